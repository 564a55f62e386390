"""Grouped GEMM 2 with LoRA, bias and router weight fused: activations in, weighted expert outputs out."""

from __future__ import annotations

import torch

from moegraft.core.routing import MoERouting
from moegraft.kernels.base_product.host import base_operand2
from moegraft.kernels.launch import cdiv
from moegraft.kernels.moe_gemm2.device import gemm2_kernel
from moegraft.kernels.moe_gemm13.host import lora_operands, lora_sizes, tile_options
from moegraft.kernels.records import Expand, MoEWeights
from moegraft.tuning.tiles import GemmTile


def moe_gemm2(
    y_ND: torch.Tensor,
    h_NF: torch.Tensor,
    weights: MoEWeights,
    routing: MoERouting,
    *,
    h_scales: torch.Tensor | None = None,
    expand: Expand | None = None,
    output_weights_TK: torch.Tensor | None = None,
    tile: GemmTile,
) -> None:
    """Writes y [N, D], in the order of rows; rows of sentinel experts are left as they are.

    Semantics, for every position p of expert e, with row n = order[p]:

        y[n] = output_weight[n] * (W2[e] h[p] + b2[e] + B2[a, e] u[p])

    in float32, rounded once. ``h_scales`` and ``expand`` as in ``moe_gemm13``.
    """
    if routing.num_rows == 0:
        return
    D, F = weights.hidden_size, weights.intermediate_size
    base = base_operand2(weights, tile)
    stride_be, stride_bd = (0, 0) if weights.b2 is None else weights.b2.stride()
    gemm2_kernel[(routing.max_blocks * cdiv(D, tile.block_n),)](
        y_ND, h_NF, h_scales, *base.tensors, weights.b2, output_weights_TK, routing.order, routing.segment,
        routing.blocks, routing.counts, *lora_operands(expand), h_NF.stride(0), *base.strides, stride_be, stride_bd,
        D=D, F=F, HAS_BIAS=weights.b2 is not None, HAS_WEIGHT=output_weights_TK is not None,
        BLOCK_M=routing.block_m, **base.options, **lora_sizes(expand, D), **tile_options(tile, y_ND),
    )  # fmt: skip

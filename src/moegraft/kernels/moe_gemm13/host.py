"""Grouped GEMM 13 with LoRA, bias and activation fused: hidden states in, activations out."""

from __future__ import annotations

import torch

from moegraft.core.config import ActivationKind
from moegraft.core.routing import MoERouting
from moegraft.kernels.base_product.host import base_operand13
from moegraft.kernels.launch import cdiv, dot_precision, pdl_options
from moegraft.kernels.moe_gemm13.device import gemm13_kernel
from moegraft.kernels.records import Expand, MoEWeights, QuantisedRows
from moegraft.tuning.tiles import GemmTile

KIND_CODES = {kind: code for code, kind in enumerate(ActivationKind)}
"""As device_lib.py numbers them."""


def moe_gemm13(
    h_NF: torch.Tensor,
    x_TD: torch.Tensor,
    weights: MoEWeights,
    routing: MoERouting,
    *,
    x_scales: torch.Tensor | None = None,
    quantised_h: QuantisedRows | None = None,
    expand: Expand | None = None,
    input_weights_TK: torch.Tensor | None = None,
    tile: GemmTile,
) -> None:
    """Writes h [N, F], in the order of positions.

    Semantics, for every position p of expert e, with row n = order[p] and token t = n // K:

        (gate, up) = (W13[e] x[t] + B13[a, e] u[p]) * input_weight[n] + b13[e]
        h[p] = act(gate, up)

    in float32, rounded once. ``x_scales``: of formats whose GEMM reads quantised rows. ``quantised_h``: h goes there in
    fp8, a scale for each ``tile.block_n`` columns, and to ``h_NF`` only with an ``expand``. ``expand`` has u, of
    ``lora_shrink13``; without it the kernel has no LoRA in it. ``input_weights_TK`` is for models that apply the router
    weight to the input.
    """
    if routing.num_rows == 0:
        return
    D, F = weights.hidden_size, weights.intermediate_size
    base = base_operand13(weights, tile)
    stored_NF, scale_NQ = (None, None) if quantised_h is None else (quantised_h.stored_MI, quantised_h.scale_MQ)
    stride_bf, bias_up_offset = weights.half_strides(1 if weights.b13 is None else weights.b13.stride(1))
    gemm13_kernel[(routing.max_blocks * cdiv(F, tile.block_n),)](
        h_NF, stored_NF, scale_NQ, x_TD, x_scales, *base.tensors, weights.b13, input_weights_TK, routing.order,
        routing.segment, routing.blocks, routing.counts, *lora_operands(expand), x_TD.stride(0), *base.strides,
        base.up_offset, 0 if weights.b13 is None else weights.b13.stride(0), stride_bf, bias_up_offset,
        0 if expand is None else expand.lanes.segment.shape[0], weights.activation.alpha, weights.activation.limit,
        D=D, F=F, K=routing.top_k, GATED=weights.activation.gated, KIND=KIND_CODES[weights.activation.kind],
        HAS_BIAS=weights.b13 is not None, WEIGHT_ON_INPUT=input_weights_TK is not None,
        WAIT_FIRST=expand is None or not expand.is_behind_routing, BLOCK_M=routing.block_m, **base.options,
        **lora_sizes(expand, F), **tile_options(tile, h_NF),
    )  # fmt: skip


def lora_operands(expand: Expand | None) -> tuple[torch.Tensor | None, ...]:
    """Pointers of the expand, in the order in which the kernels take them."""
    if expand is None:
        return (None,) * 5
    lanes = expand.lanes
    return expand.u_NW, expand.lora.tables.pool, lanes.segment, lanes.granule, lanes.element


def lora_sizes(expand: Expand | None, columns: int) -> dict[str, int]:
    """Constants of the expand."""
    if expand is None:
        return {"HAS_LORA": False, "U_WIDTH": 0, "ALIGN": 1}
    return {"HAS_LORA": True, "U_WIDTH": expand.u_NW.shape[1], "ALIGN": expand.lora.row_alignment(columns)}


def tile_options(tile: GemmTile, out: torch.Tensor) -> dict[str, object]:
    """Constants and launch options of a GEMM; ``out`` is in the compute dtype, whatever its rows were quantised to."""
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_L": tile.block_l,
        "GROUP": tile.group,
        "SWAPPED": tile.swapped,
        "PRECISION": dot_precision(out.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **pdl_options(out.device),
    }

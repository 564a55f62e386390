"""The grouped GEMMs with LoRA fused: hidden states to activations (13), activations to expert outputs (2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moegraft.core.config import ActivationKind, DeviceTarget
from moegraft.core.routing import MoERouting
from moegraft.kernels.device import groups
from moegraft.kernels.moe_gemm.device import gemm2_kernel, gemm13_kernel
from moegraft.kernels.records import (
    Expand,
    MoEWeights,
    QuantisedRows,
    WeightFormat,
    cdiv,
    dot_precision,
    lora_operands,
    pdl_options,
)
from moegraft.tuning.tiles import GemmTile
from moegraft.tuning.weight_formats import RULES

KIND_CODES = {kind: code for code, kind in enumerate(ActivationKind)}
"""As device/common.py numbers them."""
FORMAT_CODES = {format: code for code, format in enumerate(WeightFormat)}
"""As device/blocks.py numbers them."""
_ALIGNMENT_BYTES = 16


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
    stored, scale = (None, None) if quantised_h is None else (quantised_h.stored_MI, quantised_h.scale_MQ)
    activation, F = weights.activation, weights.sizes.intermediate_size
    w, (lora, LOW_RANK) = operand13(weights, tile), lora_operands(expand, F)
    gemm13_kernel[(routing.blocks.shape[0] * cdiv(F, tile.block_n),)](
        (h_NF, stored, scale), groups.Rows(x_TD, x_scales, x_TD.stride(0)), w.numbers, w.weights, w.bias,
        input_weights_TK, groups.Routing(routing.order, routing.segment, routing.blocks, routing.counts), lora,
        activation.alpha, activation.limit, SHAPE=w.SHAPE, K=routing.top_k, KIND=KIND_CODES[activation.kind],
        LOW_RANK=LOW_RANK, BLOCK_M=routing.block_m, TILE=_tile(tile, w, h_NF.dtype),
        WAIT_FIRST=expand is None or not expand.is_behind_routing, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **pdl_options(h_NF.device),
    )  # fmt: skip


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
    D = weights.sizes.hidden_size
    w, (lora, LOW_RANK) = operand2(weights, tile), lora_operands(expand, D)
    gemm2_kernel[(routing.blocks.shape[0] * cdiv(D, tile.block_n),)](
        y_ND, groups.Rows(h_NF, h_scales, h_NF.stride(0)), w.numbers, w.weights, w.bias, output_weights_TK,
        groups.Routing(routing.order, routing.segment, routing.blocks, routing.counts), lora, SHAPE=w.SHAPE,
        LOW_RANK=LOW_RANK, BLOCK_M=routing.block_m, TILE=_tile(tile, w, y_ND.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl_options(y_ND.device),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Operand:
    """w13 or w2 as a GEMM takes it. ``numbers``: the weights, or a descriptor of them."""

    numbers: torch.Tensor | TensorDescriptor
    weights: groups.Weights
    bias: groups.Bias
    SHAPE: groups.Shape


def operand13(weights: MoEWeights, tile: GemmTile) -> Operand:
    """w13 for a GEMM of this tile, whose ``tma`` decides between a descriptor and the tensor."""
    sizes, quantisation, b13 = weights.sizes, weights.quantisation, weights.b13
    scales, zeros = (None, None) if quantisation is None else (quantisation.scales13, quantisation.zeros13)
    bias = groups.Bias(None, 0, 0, 0)
    if b13 is not None:
        bias = groups.Bias(b13, b13.stride(0), *weights.half_strides(b13.stride(1)))
    if RULES[weights.format].is_granular:
        numbers, strides = _four_bit_numbers(weights.w13, tile), (0, 0, 0, 0)
    else:
        w = weights.w13_EGFD
        stride, up_offset = weights.half_strides(w.stride(1))
        numbers = _numbers(w, tile, is_plain=not weights.is_interleaved)
        strides = (w.stride(0), stride, w.stride(2), up_offset)
    return Operand(
        numbers=numbers,
        weights=groups.Weights(scales, zeros, *strides),
        bias=bias,
        SHAPE=groups.Shape(
            FORMAT=FORMAT_CODES[weights.format],
            LENGTH=sizes.hidden_size,
            COLUMNS=sizes.intermediate_size,
            GATED=sizes.gated,
            PAIRED=quantisation is None and sizes.gated and weights.is_interleaved,
            SCALE_GROUP=0 if quantisation is None else quantisation.scale_group,
        ),
    )


def operand2(weights: MoEWeights, tile: GemmTile) -> Operand:
    """w2, as ``operand13`` gives w13."""
    sizes, quantisation, b2 = weights.sizes, weights.quantisation, weights.b2
    scales, zeros = (None, None) if quantisation is None else (quantisation.scales2, quantisation.zeros2)
    if RULES[weights.format].is_granular:
        numbers, strides = _four_bit_numbers(weights.w2, tile), (0, 0, 0, 0)
    else:
        w = weights.w2_EDF
        numbers, strides = _numbers(w, tile), (w.stride(0), w.stride(1), w.stride(2), 0)
    return Operand(
        numbers=numbers,
        weights=groups.Weights(scales, zeros, *strides),
        bias=groups.Bias(None, 0, 0, 0) if b2 is None else groups.Bias(b2, b2.stride(0), b2.stride(1), 0),
        SHAPE=groups.Shape(
            FORMAT=FORMAT_CODES[weights.format],
            LENGTH=sizes.intermediate_size,
            COLUMNS=sizes.hidden_size,
            GATED=False,
            PAIRED=False,
            SCALE_GROUP=0 if quantisation is None else quantisation.scale_group,
        ),
    )


def _numbers(w_EOI: torch.Tensor, tile: GemmTile, *, is_plain: bool = True) -> torch.Tensor | TensorDescriptor:
    """Weights [E, out, in] read in tiles [block_n, block_k]: a TMA descriptor where device and layout allow it.

    A descriptor sees the matrix [E*out, in]; it needs rows that are contiguous, 16-byte aligned and evenly spaced
    through all experts, and ``is_plain``: columns of one half that are neighbours.
    """
    E, rows, length = w_EOI.shape
    fits = (
        tile.tma
        and is_plain
        and DeviceTarget.of(w_EOI.device).has_hopper_features
        and w_EOI.stride(2) == 1
        and w_EOI.stride(0) == rows * w_EOI.stride(1)
        and w_EOI.stride(1) * w_EOI.element_size() % _ALIGNMENT_BYTES == 0
        and w_EOI.data_ptr() % _ALIGNMENT_BYTES == 0
    )
    if not fits:
        return w_EOI
    return TensorDescriptor(w_EOI, [E * rows, length], [w_EOI.stride(1), 1], [tile.block_n, tile.block_k])


def _four_bit_numbers(packed_EPRW: torch.Tensor, tile: GemmTile) -> torch.Tensor | TensorDescriptor:
    if not (tile.tma and DeviceTarget.of(packed_EPRW.device).has_hopper_features):
        return packed_EPRW
    words = packed_EPRW.shape[-1]
    return TensorDescriptor(packed_EPRW, [packed_EPRW.numel() // words, words], [words, 1], [tile.block_n, words])


def _tile(tile: GemmTile, w: Operand, dtype: torch.dtype) -> groups.Tile:
    """``dtype``: the compute dtype, whatever the rows were quantised to."""
    return groups.Tile(
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_L=tile.block_l,
        GROUP=tile.group,
        USE_TMA=isinstance(w.numbers, TensorDescriptor),
        SWAPPED=tile.swapped,
        PRECISION=dot_precision(dtype),
    )

"""What a GEMM is given for w13 or w2, by weight format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moegraft.kernels.launch import has_hopper_features
from moegraft.kernels.records import MoEWeights, WeightFormat
from moegraft.kernels.tma import weight_operand
from moegraft.tuning.four_bit import FOUR_BIT
from moegraft.tuning.tiles import GemmTile

FORMAT_CODES = {format: code for code, format in enumerate(WeightFormat)}
"""As device.py numbers them."""


@dataclass(frozen=True, kw_only=True)
class BaseOperand:
    """Weights, scales and zero points; elements from an expert, a column and an input to the next, and from a gate's
    column to its up; ``options``: the constants of ``base_product``, of w13 also whether gate and up alternate."""

    tensors: tuple[torch.Tensor | TensorDescriptor | None, ...]
    strides: tuple[int, int, int]
    up_offset: int
    options: dict[str, int]


def base_operand13(weights: MoEWeights, tile: GemmTile) -> BaseOperand:
    """w13, as GEMM 13 takes it."""
    quantisation = weights.quantisation
    scales, zeros = (None, None) if quantisation is None else (quantisation.scales13, quantisation.zeros13)
    if weights.format in FOUR_BIT:
        operand13 = _four_bit_operand(weights, weights.w13, scales, zeros, tile)
        return replace(operand13, options={**operand13.options, "PAIRED": False})
    w = weights.w13_EGFD
    stride, up_offset = weights.half_strides(w.stride(1))
    operand, use_tma = weight_operand(w, tile, is_plain=not weights.is_interleaved)
    return BaseOperand(
        tensors=(operand, scales, zeros),
        strides=(w.stride(0), stride, w.stride(2)),
        up_offset=up_offset,
        options={**_options(weights, use_tma), "PAIRED": weights.is_paired},
    )


def base_operand2(weights: MoEWeights, tile: GemmTile) -> BaseOperand:
    """w2, as GEMM 2 takes it."""
    quantisation = weights.quantisation
    scales, zeros = (None, None) if quantisation is None else (quantisation.scales2, quantisation.zeros2)
    if weights.format in FOUR_BIT:
        return _four_bit_operand(weights, weights.w2, scales, zeros, tile)
    w = weights.w2_EDF
    operand, use_tma = weight_operand(w, tile)
    strides = (w.stride(0), w.stride(1), w.stride(2))
    return BaseOperand(
        tensors=(operand, scales, zeros), strides=strides, up_offset=0, options=_options(weights, use_tma)
    )


def _four_bit_operand(
    weights: MoEWeights,
    packed_EPRW: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    tile: GemmTile,
) -> BaseOperand:
    """Scales and zero points as ``four_bit_weights`` made them."""
    use_tma = tile.tma and has_hopper_features(packed_EPRW.device)
    operand: torch.Tensor | TensorDescriptor = packed_EPRW
    if use_tma:
        words = packed_EPRW.shape[-1]
        rows = packed_EPRW.numel() // words
        operand = TensorDescriptor(packed_EPRW, [rows, words], [words, 1], [tile.block_n, words])
    return BaseOperand(
        tensors=(operand, scales, zeros),
        strides=(0, 0, 0),
        up_offset=0,
        options=_options(weights, use_tma),
    )


def _options(weights: MoEWeights, use_tma: bool) -> dict[str, int]:
    scale_group = 0 if weights.quantisation is None else weights.quantisation.scale_group
    return {"FORMAT": FORMAT_CODES[weights.format], "SCALE_GROUP": scale_group, "USE_TMA": use_tma}

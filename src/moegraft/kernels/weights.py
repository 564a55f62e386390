"""Experts of every format as the kernels take them."""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.core.config import Activation
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.formats.four_bit import FourBitExperts, FourBitMatrix
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.scaled import BLOCK, ScaledExperts
from moegraft.kernels.records import MoEWeights, Quantisation, WeightFormat

_WORDS = {4: torch.int32, 8: torch.int64}


def kernel_weights(weights: ExpertsWeights, activation: Activation, dtype: torch.dtype) -> MoEWeights:
    """The weights for rows of ``dtype``; nothing is copied but some scales of int4, see ``four_bit_weights``.

    Raises TypeError for a format that the kernels do not read.
    """
    if isinstance(weights, FourBitExperts):
        return four_bit_weights(weights, activation, dtype)
    if isinstance(weights, DenseExperts):
        return MoEWeights(
            w13=weights.w13,
            w2=weights.w2,
            b13=weights.b13,
            b2=weights.b2,
            activation=activation,
            is_transposed=weights.is_transposed,
            is_interleaved=weights.is_interleaved,
        )
    if not isinstance(weights, ScaledExperts):
        raise TypeError(f"found {weights.format_name} weights, expected {', '.join(WeightFormat)}")
    quantisation = Quantisation(
        format=WeightFormat(weights.format_name),
        scales13=weights.w13_scale,
        scales2=weights.w2_scale,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        scale_group=BLOCK if weights.is_block_scaled else 0,
    )
    if isinstance(weights, Fp8Experts):
        quantisation = replace(quantisation, input_scale13=weights.x_scale, input_scale2=weights.h_scale)
    return MoEWeights(
        w13=weights.w13,
        w2=weights.w2,
        b13=weights.b13,
        b2=weights.b2,
        activation=activation,
        quantisation=quantisation,
    )


def four_bit_weights(experts: FourBitExperts, activation: Activation, dtype: torch.dtype) -> MoEWeights:
    """The packed tensors themselves, for rows of ``dtype``; copied are int4 scales of another dtype at most.

    The scales of a granule are one integer, its zero points too. Scales of groups of 32 and 64 are rounded to
    ``dtype``: where they are stored in another, each call makes a copy of them. Of a granule or of all inputs they
    stay float32. In float32 all scales are floats.
    """
    w13, w2 = experts.w13, experts.w2
    return MoEWeights(
        w13=w13.packed,
        w2=w2.packed,
        b13=experts.b13,
        b2=experts.b2,
        activation=activation,
        quantisation=Quantisation(
            format=WeightFormat(experts.format_name),
            scales13=_scale_words(w13, dtype),
            scales2=_scale_words(w2, dtype),
            zeros13=None if w13.zeros is None else _as_words(w13.zeros),
            zeros2=None if w2.zeros is None else _as_words(w2.zeros),
            scale_group=w13.group,
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
        ),
    )


def _scale_words(matrix: FourBitMatrix, dtype: torch.dtype) -> torch.Tensor:
    scales = matrix.scales
    if not matrix.group or (dtype == torch.float32 and scales.is_floating_point()):
        return scales.float()
    if not scales.is_floating_point() or scales.shape[-1] == 1:
        return _as_words(scales)
    return _as_words(scales.to(dtype))


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_WORDS[tensor.shape[-1] * tensor.element_size()])

"""4-bit experts as the kernels take them."""

from __future__ import annotations

import torch

from moegraft.core.config import Activation
from moegraft.formats.four_bit import FourBitExperts
from moegraft.kernels.records import MoEWeights, Quantisation, WeightFormat


def four_bit_weights(experts: FourBitExperts, activation: Activation, dtype: torch.dtype) -> MoEWeights:
    """The packed tensors themselves; floating scales rounded to ``dtype``, in which the kernels multiply."""
    w13, w2 = experts.w13, experts.w2
    return MoEWeights(
        w13=w13.packed,
        w2=w2.packed,
        b13=experts.b13,
        b2=experts.b2,
        activation=activation,
        quantisation=Quantisation(
            format=WeightFormat(experts.format_name),
            scales13=w13.scales.to(dtype) if w13.scales.is_floating_point() else w13.scales,
            scales2=w2.scales.to(dtype) if w2.scales.is_floating_point() else w2.scales,
            zeros13=w13.zeros,
            zeros2=w2.zeros,
            scale_group=w13.group,
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
        ),
    )

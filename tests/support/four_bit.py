"""Cases over 4-bit weights: the weights as the kernels take them, and the same dequantised for the oracle."""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.formats.four_bit import FourBitExperts
from moegraft.formats.int4 import Int4Experts
from moegraft.formats.mxfp4 import MXFP4Experts
from moegraft.kernels.records import MoEWeights
from moegraft.kernels.weights import four_bit_weights
from moegraft.testing.cases import MoECase, MoEInputs, make_inputs

FORMATS = ("int4 g128", "int4 g64", "int4 g32 zeros", "int4 channel", "int4 channel zeros", "mxfp4")


def quantise(
    format: str, w13_EGFD: torch.Tensor, w2_EDF: torch.Tensor, b13: torch.Tensor | None, b2: torch.Tensor | None
) -> FourBitExperts:
    """Canonical weights in one of ``FORMATS``; zero points of 0 and 15 among the others where there are zero points."""
    num_halves = w13_EGFD.shape[1] // max(w2_EDF.shape[2], 1)
    if format == "mxfp4":
        return MXFP4Experts.pack(w13_EGFD, w2_EDF, b13=b13, b2=b2, num_halves=num_halves)
    group = 0 if "channel" in format else int(format.split()[1][1:])
    experts = Int4Experts.pack(
        w13_EGFD, w2_EDF, group=group, is_symmetric="zeros" not in format, b13=b13, b2=b2, num_halves=num_halves
    )
    if experts.w13.zeros is None:
        return experts
    zeros = experts.w13.zeros.clone()
    zeros[..., 0, :], zeros[..., 1, :] = 0, 15
    return replace(experts, w13=replace(experts.w13, zeros=zeros))


def quantised_case(case: MoECase, format: str, *, device: str, seed: int = 0) -> tuple[MoECase, MoEInputs, MoEWeights]:
    """The case, its inputs with the dequantised weights, and the packed weights."""
    inputs = make_inputs(case, device=device, seed=seed)
    w = inputs.weights
    experts = quantise(format, w.w13, w.w2, w.b13, w.b2)
    w13, w2 = experts.dequantise(torch.float32)
    packed = four_bit_weights(experts, case.config.activation, case.config.dtype)
    return case, replace(inputs, weights=replace(w, w13=w13, w2=w2)), packed

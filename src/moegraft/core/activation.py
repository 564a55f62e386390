"""The activation between w13 and w2, in plain torch: the reference of every fused form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moegraft.core.config import Activation, ActivationKind
from moegraft.core.halves import split_halves

_POINTWISE: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationKind.SILU: F.silu,
    ActivationKind.GELU: F.gelu,
    ActivationKind.GELU_TANH: lambda gate: F.gelu(gate, approximate="tanh"),
    ActivationKind.RELU2: lambda gate: F.relu(gate).square(),
}


def apply_activation(u_NGF: torch.Tensor, activation: Activation, *, is_interleaved: bool = False) -> torch.Tensor:
    """h [N, F] from u [N, G*F], computed in float32 and rounded once to u's dtype.

    Semantics: h = kind(gate) * up; ungated h = kind(u); SWIGLU_OAI (gpt-oss): gate' = min(gate, limit),
    up' = clamp(up, -limit, limit), h = (up' + 1) * gate' * sigmoid(alpha * gate').
    """
    gate_NF, up_NF = split_halves(u_NGF.float(), num_halves=activation.num_halves, is_interleaved=is_interleaved)
    if activation.kind is ActivationKind.SWIGLU_OAI:
        gate_NF = gate_NF.clamp(max=activation.limit)
        up_NF = up_NF.clamp(-activation.limit, activation.limit)
        h_NF = (up_NF + 1) * gate_NF * torch.sigmoid(activation.alpha * gate_NF)
    else:
        h_NF = _POINTWISE[activation.kind](gate_NF)
        if activation.gated:
            h_NF = h_NF.mul_(up_NF)
    return h_NF.to(u_NGF.dtype)

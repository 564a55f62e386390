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
    up' = clamp(up, -limit, limit), h = (up' + 1) * gate' * sigmoid(alpha * gate'). SILU_CLAMPED: the same clamps,
    h = silu(gate') * up'. SILU_SOFTCAPPED: cap(x, c) = c * tanh(x / c),
    h = cap(gate, alpha) * sigmoid(gate) * cap(up, limit).
    """
    gate_NF, up_NF = split_halves(u_NGF.float(), num_halves=2 if activation.gated else 1, is_interleaved=is_interleaved)
    alpha, limit = activation.alpha, activation.limit
    if activation.kind in (ActivationKind.SWIGLU_OAI, ActivationKind.SILU_CLAMPED):
        gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
    if activation.kind is ActivationKind.SWIGLU_OAI:
        h_NF = (up_NF + 1) * gate_NF * torch.sigmoid(alpha * gate_NF)
    elif activation.kind is ActivationKind.SILU_CLAMPED:
        h_NF = F.silu(gate_NF) * up_NF
    elif activation.kind is ActivationKind.SILU_SOFTCAPPED:
        h_NF = alpha * torch.tanh(gate_NF / alpha) * torch.sigmoid(gate_NF) * (limit * torch.tanh(up_NF / limit))
    else:
        h_NF = _POINTWISE[activation.kind](gate_NF)
        if activation.gated:
            h_NF = h_NF.mul_(up_NF)
    return h_NF.to(u_NGF.dtype)

"""How gate and up lie along the G*F axis of w13, of its bias and of its output. Nothing else in Python knows.

``apply_activation`` is what an expert makes of them, in plain torch: the reference of every fused form.

Apart: g0 g1 ... u0 u1 ...; interleaved (gpt-oss): g0 u0 g1 u1 ...; G = 1: the one half is the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from moegraft.core.config import Activation, ActivationKind


def half_slices(size: int, *, num_halves: int, is_interleaved: bool) -> tuple[slice, ...]:
    """Where each half of F = ``size`` lies along the axis."""
    if num_halves == 1:
        return (slice(0, size),)
    if is_interleaved:
        return slice(0, 2 * size, 2), slice(1, 2 * size, 2)
    return slice(0, size), slice(size, 2 * size)


def half_strides(stride: int, size: int, *, num_halves: int, is_interleaved: bool) -> tuple[int, int]:
    """(stride from f to f + 1, offset from gate to up) in elements, from the stride of the axis."""
    if num_halves == 1:
        return stride, 0
    return (2 * stride, stride) if is_interleaved else (stride, size * stride)


def half_intervals(
    start: int, stop: int, size: int, *, num_halves: int, is_interleaved: bool
) -> tuple[tuple[int, int], ...]:
    """Columns [start, stop) of F in both halves, as intervals of the axis in stored order."""
    if num_halves == 1:
        return ((start, stop),)
    return ((2 * start, 2 * stop),) if is_interleaved else ((start, stop), (size + start, size + stop))


def split_halves(
    tensor: torch.Tensor, axis: int = -1, *, num_halves: int, is_interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (gate, up) of a G*F axis; without a gate both names mean the only half."""
    axis %= tensor.dim()
    size = tensor.shape[axis] // num_halves
    slices = half_slices(size, num_halves=num_halves, is_interleaved=is_interleaved)
    lead = (slice(None),) * axis
    return tensor[(*lead, slices[0])], tensor[(*lead, slices[-1])]


def join_halves(halves: Sequence[torch.Tensor], axis: int, *, is_interleaved: bool) -> torch.Tensor:
    """The G*F axis of halves [..., F, ...], in a copy; the inverse of ``split_halves``."""
    if is_interleaved:
        return torch.stack(list(halves), axis + 1).flatten(axis, axis + 1)
    return torch.cat(list(halves), axis)


def cut_halves(
    tensor: torch.Tensor,
    axis: int,
    columns: tuple[int, int],
    extra: int = 0,
    *,
    num_halves: int,
    is_interleaved: bool,
    fill: float = 0.0,
) -> torch.Tensor:
    """A copy with columns [start, stop) of each half, and ``extra`` columns of ``fill`` behind each."""
    start, stop = columns
    size, width = tensor.shape[axis] // num_halves, stop - start
    before = half_slices(size, num_halves=num_halves, is_interleaved=is_interleaved)
    after = half_slices(width + extra, num_halves=num_halves, is_interleaved=is_interleaved)
    shape = list(tensor.shape)
    shape[axis] = num_halves * (width + extra)
    out = tensor.new_full(shape, fill) if extra else tensor.new_empty(shape)
    lead = (slice(None),) * axis
    for source, target in zip(before, after, strict=True):
        out[(*lead, target)].narrow(axis, 0, width).copy_(tensor[(*lead, source)].narrow(axis, start, width))
    return out


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
    h = silu(gate') * up'. CLAMPED_SILU: h = min(silu(gate), limit) * up'. SILU_SOFTCAPPED: cap(x, c) = c * tanh(x / c),
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
    elif activation.kind is ActivationKind.CLAMPED_SILU:
        h_NF = F.silu(gate_NF).clamp(max=limit) * up_NF.clamp(-limit, limit)
    elif activation.kind is ActivationKind.SILU_SOFTCAPPED:
        h_NF = alpha * torch.tanh(gate_NF / alpha) * torch.sigmoid(gate_NF) * (limit * torch.tanh(up_NF / limit))
    else:
        h_NF = _POINTWISE[activation.kind](gate_NF)
        if activation.gated:
            h_NF = h_NF.mul_(up_NF)
    return h_NF.to(u_NGF.dtype)

"""How gate and up lie along the G*F axis of w13, of its bias and of its output. Nothing else in Python knows.

Apart: g0 g1 ... u0 u1 ...; interleaved (gpt-oss): g0 u0 g1 u1 ...; G = 1: the one half is the axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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

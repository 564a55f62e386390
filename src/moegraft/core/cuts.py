"""Cutting tensors: intervals of an axis that are kept, and what pads a cut to the length that all ranks have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import pad

Cuts = Mapping[int, Sequence[tuple[int, int]]]
"""Axis -> the intervals [start, stop) of it that are kept, in this order."""


def cut_tensor(tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """The tensor with only the given intervals of some axes; a copy where anything is cut off."""
    for axis, pieces in cuts.items():
        if tuple(pieces) != ((0, tensor.shape[axis]),):
            parts = [tensor.narrow(axis, start, stop - start) for start, stop in pieces]
            tensor = torch.cat(parts, axis) if parts else tensor.narrow(axis, 0, 0).clone()
    return tensor


def pad_axis(tensor: torch.Tensor, axis: int, size: int, *, fill: float = 0.0) -> torch.Tensor:
    """The tensor with ``fill`` behind an axis, up to ``size``; itself where nothing is missing."""
    missing = size - tensor.shape[axis]
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - axis) + [0, missing], value=fill) if missing else tensor


def cut_axis(
    tensor: torch.Tensor, axis: int, start: int, stop: int, extra: int = 0, *, fill: float = 0.0
) -> torch.Tensor:
    """A contiguous copy of [start, stop) of an axis, with ``extra`` elements of ``fill`` behind it."""
    kept = pad_axis(tensor.narrow(axis, start, stop - start), axis, stop - start + extra, fill=fill)
    return kept.clone(memory_format=torch.contiguous_format)

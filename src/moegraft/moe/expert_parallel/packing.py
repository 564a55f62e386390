"""Rows as they travel: header and activations side by side as bytes, so that one collective carries them.

Shape letters: S rows sent · M rows received · K experts per token · D hidden size · B bytes of a row
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts, dequantise_rows, quantise_rows

Field = tuple[torch.dtype, int]
"""dtype and width of one field of a row."""

ROW_ALIGN = 4
"""Bytes. Fields of four bytes an element come first, so each stands where its dtype wants it."""


class RowCodec(ABC):
    """How the activations of a row are sent."""

    @abstractmethod
    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]: ...

    @abstractmethod
    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The fields of each row."""

    @abstractmethod
    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """[M, D] as the GEMM reads it."""


@dataclass(frozen=True)
class PlainRows(RowCodec):
    """As they are: what LoRA, and GEMMs over unquantised activations, read."""

    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return ((dtype, hidden_size),)

    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x_SD,)

    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return fields[0]


@dataclass(frozen=True)
class Fp8Rows(RowCodec):
    """e4m3 values and their float32 scales; decoding gives the bits of ``Fp8Experts.quantise_input``."""

    group_size: int | None
    static_scale: torch.Tensor | None

    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]:
        num_groups = 1 if self.group_size is None else -(-hidden_size // self.group_size)
        return (torch.float32, num_groups), (torch.float8_e4m3fn, hidden_size)

    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stored_SD, scale_SQ = quantise_rows(x_SD, group_size=self.group_size, static_scale=self.static_scale)
        return scale_SQ, stored_SD

    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scale_MQ, stored_MD = fields
        return dequantise_rows(stored_MD, scale_MQ, dtype)


def codec_for(weights: ExpertsWeights) -> RowCodec:
    """fp8 weights meet fp8 activations, which may be sent as such; all others read activations as they are."""
    if isinstance(weights, Fp8Experts):
        return Fp8Rows(weights.group_size, weights.x_scale)
    return PlainRows()


def pack_rows(fields: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [S, B] from fields [S, width]."""
    parts = [_bytes_of(field) for field in fields]
    padding = -sum(part.shape[1] for part in parts) % ROW_ALIGN
    if padding:
        parts.append(parts[0].new_zeros(parts[0].shape[0], padding))
    return torch.cat(parts, dim=1)


def _bytes_of(field: torch.Tensor) -> torch.Tensor:
    # For no row, or one, contiguous() leaves the strides of an expanded tensor as they are, and a view refuses them.
    if field.numel() == 0:
        return field.new_empty(field.shape[0], field.shape[1] * field.itemsize, dtype=torch.uint8)
    if field.stride(-1) != 1:
        field = field.clone(memory_format=torch.contiguous_format)
    return field.contiguous().view(torch.uint8)


def unpack_rows(packed_MB: torch.Tensor, fields: Sequence[Field]) -> list[torch.Tensor]:
    """Inverse of ``pack_rows``: views [M, width]."""
    views, start = [], 0
    for dtype, width in fields:
        stop = start + width * dtype.itemsize
        views.append(packed_MB[:, start:stop].view(dtype))
        start = stop
    return views

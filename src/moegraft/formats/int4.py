"""Int4 weights with scales a group of inputs, from GPTQ, AWQ and compressed-tensors checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moegraft.formats.four_bit import RUNS, FourBitExperts, FourBitMatrix

SYMMETRIC_ZERO = 8
_EIGHT_ONES = 0x11111111
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of an AWQ word in which each of its eight columns lies."""


@dataclass(frozen=True, kw_only=True)
class Int4Matrix(FourBitMatrix):
    """(code - zero) * scale; without ``zeros``, zero is 8. Run j of a granule lies in bits 4j..4j+3 of its words."""

    @staticmethod
    def spread(numbers: torch.Tensor) -> torch.Tensor:
        return sum((numbers[..., j, :] << 4 * j for j in range(1, RUNS)), start=numbers[..., 0, :])

    @staticmethod
    def gather(words: torch.Tensor) -> torch.Tensor:
        return torch.stack([words >> 4 * j & 15 for j in range(RUNS)], -2)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        zeros = self.zero_rows()
        centred = self.codes().float() - (SYMMETRIC_ZERO if zeros is None else self.over_inputs(zeros).float())
        return (centred * self.over_inputs(self.scale_rows()).float()).to(dtype)

    def _neutral(self, zeros: torch.Tensor | None, num_before: int, num_padding: int) -> torch.Tensor:
        codes = super()._neutral(zeros, num_before, num_padding)
        if zeros is None:
            return codes + SYMMETRIC_ZERO
        groups = torch.arange(num_before, num_before + num_padding, device=zeros.device)
        return zeros.index_select(-1, groups // self.group if self.group else torch.zeros_like(groups))

    @classmethod
    def quantise(cls, w: torch.Tensor, *, group: int = 128, is_symmetric: bool = True) -> Int4Matrix:
        """Round to nearest of a floating matrix [..., R, I]; scales in its dtype, as small as the group allows."""
        num_inputs = w.shape[-1]
        size = group or max(num_inputs, 1)
        count = -(-num_inputs // size) if group else 1
        last = w[..., -1:] if num_inputs else w.new_zeros(*w.shape[:-1], 1)
        padding = last.expand(
            *w.shape[:-1], count * size - num_inputs
        )  # as a number of the last group: its range stays
        grouped = torch.cat([w, padding], -1).float().unflatten(-1, (count, size))
        if is_symmetric:
            scales = (grouped.abs().amax(-1) / (SYMMETRIC_ZERO - 1)).clamp(min=1e-8).to(w.dtype)
            zeros = None
            codes = (grouped / scales.float().unsqueeze(-1)).round() + SYMMETRIC_ZERO
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scales = ((high - low) / 15).clamp(min=1e-8).to(w.dtype)
            zeros = (-low / scales.float()).round().clamp(0, 15)
            codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
        codes = codes.clamp(0, 15).to(torch.uint8).flatten(-2)[..., :num_inputs]
        return cls.from_codes(codes, scales, group=group, zeros=None if zeros is None else zeros.to(torch.uint8))

    @classmethod
    def from_gptq(
        cls,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None = None,
        *,
        group: int,
        zero_offset: int = 1,
    ) -> Int4Matrix:
        """qweight int32 [..., I/8, R], qzeros int32 [..., groups, R/8], scales [..., groups, R], g_idx [..., I].

        ``group`` 0 (or -1 as configs write it): one for all inputs. ``zero_offset``: GPTQ stores zero points less one,
        its version 2 as they are (0). Libraries take the ones off whole words, so that a zero point of 0 borrows from
        its neighbour; here they are added to whole words. Raises ValueError for act-order: inputs whose groups are not
        one after the other.
        """
        group = max(group, 0)
        num_inputs = 8 * qweight.shape[-2]
        refuse_act_order("g_idx", g_idx, num_inputs, group)
        codes = _nibbles(qweight, -2)
        zeros = _nibbles(_int32(qzeros) + zero_offset * _EIGHT_ONES, -1)
        return cls._from_in_out(codes, zeros, scales, group)

    @classmethod
    def from_awq(cls, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, group: int) -> Int4Matrix:
        """AWQ's GEMM version: qweight int32 [..., I, R/8], qzeros int32 [..., groups, R/8], scales [..., groups, R]."""
        codes, zeros = _nibbles(qweight, -1, _AWQ_PLACES), _nibbles(qzeros, -1, _AWQ_PLACES)
        return cls._from_in_out(codes, zeros, scales, max(group, 0))

    @classmethod
    def from_compressed_tensors(
        cls,
        weight_packed: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zero_point: torch.Tensor | None = None,
        weight_g_idx: torch.Tensor | None = None,
        *,
        num_inputs: int,
        group: int,
    ) -> Int4Matrix:
        """pack-quantized: weight_packed int32 [..., R, ceil(I/8)], weight_scale [..., R, groups], weight_g_idx
        [..., I], weight_zero_point int32 [..., ceil(R/8), groups]. ``num_inputs``: the last of weight_shape. ``group``
        as in ``from_gptq``. Raises ValueError for act-order.
        """
        group = max(group, 0)
        refuse_act_order("weight_g_idx", weight_g_idx, num_inputs, group)
        codes = _nibbles(weight_packed, -1)[..., :num_inputs]
        zeros = None
        if weight_zero_point is not None:
            zeros = _nibbles(weight_zero_point, -2)[..., : codes.shape[-2], :]
        return cls._with_zeros(codes, zeros, weight_scale, group)

    @classmethod
    def _from_in_out(cls, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: int) -> Int4Matrix:
        if zeros.shape != scales.shape:
            raise ValueError(f"int4 weights: found zero points {list(zeros.shape)}, expected {list(scales.shape)}")
        return cls._with_zeros(codes.mT, zeros.mT, scales.mT, group)

    @classmethod
    def _with_zeros(
        cls, codes: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor, group: int
    ) -> Int4Matrix:
        """Zero points that are all 8 are left out: the kernels then have a constant."""
        if zeros is not None and zeros.device.type != "meta" and bool((zeros == SYMMETRIC_ZERO).all()):
            zeros = None
        return cls.from_codes(codes, scales, group=group, zeros=zeros)


def refuse_act_order(name: str, group_of: torch.Tensor | None, num_inputs: int, group: int) -> None:
    """Raises ValueError where a group is no run of inputs.

    ``group_of`` [..., I]; where all of it is negative, act-order is off. ``group``: inputs of a group; 0: all.
    """
    if group_of is None:
        return
    if group_of.shape[-1:] != (num_inputs,):
        raise ValueError(f"int4 weights: found {name} {list(group_of.shape)}, expected {num_inputs} entries")
    if group_of.device.type == "meta" or bool((group_of < 0).all()):
        return
    in_order = torch.arange(num_inputs, device=group_of.device) // (group or max(num_inputs, 1))
    if not torch.equal(group_of.long(), in_order.expand_as(group_of)):
        raise ValueError(
            f"int4 weights: found {name} out of order (act-order, desc_act), expected input i in group "
            f"i // {group or num_inputs}; act-order is not supported"
        )


def _nibbles(words: torch.Tensor, axis: int, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 words as eight numbers each along ``axis``, -1 or -2; number i of a word from its nibble ``places[i]``."""
    numbers = [_int32(words) >> 4 * place & 15 for place in places]
    return torch.stack(numbers, axis).flatten(axis - 1, axis)


def _int32(words: torch.Tensor) -> torch.Tensor:
    """The words. Raises ValueError for another dtype, in which they would not wrap around."""
    if words.dtype != torch.int32:
        raise ValueError(f"int4 weights: found packed words of {words.dtype}, expected torch.int32")
    return words


@dataclass(frozen=True, kw_only=True)
class Int4Experts(FourBitExperts):
    """w13 and w2 of int4 numbers: what GPTQ, AWQ and compressed-tensors call W4A16."""

    format_name: ClassVar[str] = "int4"
    matrix_type: ClassVar[type[FourBitMatrix]] = Int4Matrix

    w13: Int4Matrix
    w2: Int4Matrix

    @classmethod
    def pack(
        cls,
        w13_EGFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        *,
        group: int = 128,
        is_symmetric: bool = True,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
        num_halves: int = 2,
    ) -> Int4Experts:
        """Canonical weights (gate rows, then up rows), rounded to the nearest."""
        w13, w2 = (Int4Matrix.quantise(w, group=group, is_symmetric=is_symmetric) for w in (w13_EGFD, w2_EDF))
        return cls(w13=w13, w2=w2, b13=b13, b2=b2, num_halves=num_halves)

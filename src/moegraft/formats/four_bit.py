"""Matrices of 4-bit numbers in the order in which the kernels read them, and an experts layer of two of them.

A *granule* is 128 inputs of one output row: four runs of 32 inputs, and word i of its 32 words (int16) holds input i of
each run. A kernel so gets four operands of 32 inputs from one load, each with one shift and one mask, and no number has
to move to another thread. The words of all rows for one granule are neighbours, so that a tile of rows is one piece of
memory. Scales (and zero points) of a granule lie the same way, S = 128 / group of them a row, in no less than the four
bytes that an asynchronous copy takes: a scale alone is float32, zero points share 32 bits.

Shape letters: E experts · R output rows · I inputs · P granules of 128 inputs · S scales a granule
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch.nn.functional import pad

from moegraft.core.halves import cut_halves, half_intervals
from moegraft.formats.base import ExpertsWeights

GRANULE = 128
RUN = 32
RUNS = GRANULE // RUN

_ZEROS = {1: torch.int32, 2: torch.int16, 4: torch.uint8}


@dataclass(frozen=True, kw_only=True)
class FourBitMatrix(ABC):
    """[..., R, I] with any leading axes, 4 bits a number.

    ``packed`` int16 [..., P, R, 32] · ``scales`` [..., P, R, S], float32 where S is 1 · ``zeros`` of 32 / S bits, like
    scales, or absent · ``group``: inputs that share a scale, 32, 64 or 128; 0: all of a row, and scales and zeros have
    P and S of 1. Inputs that pad a row to whole granules have any number: a kernel gives them zeros.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    num_inputs: int
    group: int
    zeros: torch.Tensor | None = None

    def __post_init__(self) -> None:
        *lead, P, R, words = self.packed.shape
        expected = (*lead, P if self.group else 1, R, _scales_a_granule(self.group))
        if self.packed.dtype != torch.int16 or words != RUN or -(-self.num_inputs // GRANULE) != P:
            raise ValueError(
                f"4-bit matrix: found packed {self.packed.dtype} {list(self.packed.shape)} for {self.num_inputs} "
                f"inputs, expected torch.int16 [..., {-(-self.num_inputs // GRANULE)}, R, {RUN}]"
            )
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"4-bit matrix: found {name} {tuple(tensor.shape)}, expected {expected}")
        # In fewer bytes a scale alone could not be copied asynchronously, nor zero points be one word.
        if expected[-1] == 1 and self.scales.dtype != torch.float32:
            raise ValueError(f"4-bit matrix: found scales alone in {self.scales.dtype}, expected torch.float32")
        if self.zeros is not None and self.zeros.dtype != _ZEROS[expected[-1]]:
            raise ValueError(f"4-bit matrix: found zeros {self.zeros.dtype}, expected {_ZEROS[expected[-1]]}")

    @staticmethod
    @abstractmethod
    def spread(numbers: torch.Tensor) -> torch.Tensor:
        """Words from the numbers of the four runs [..., 4, 32], int32 in 0..15: int32 in 0..65535, [..., 32]."""

    @staticmethod
    @abstractmethod
    def gather(words: torch.Tensor) -> torch.Tensor:
        """Inverse of ``spread``."""

    @abstractmethod
    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in a floating dtype, computed in float32."""

    @property
    def num_rows(self) -> int:
        return self.packed.shape[-2]

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scales: torch.Tensor, *, group: int, zeros: torch.Tensor | None = None
    ) -> Self:
        """``codes`` [..., R, I]; ``scales``, ``zeros`` [..., R, ceil(I / group)], or [..., R, 1] for group 0.

        Codes and zero points are in 0..15. A group may be any multiple of 128 too. Raises ValueError for another group
        or scales that do not fit.
        """
        *lead, R, num_inputs = codes.shape
        if group > GRANULE and group % GRANULE == 0:
            repeats, groups = group // GRANULE, -(-num_inputs // GRANULE)
            scales = scales.repeat_interleave(repeats, -1)[..., :groups]
            zeros = None if zeros is None else zeros.repeat_interleave(repeats, -1)[..., :groups]
            group = GRANULE
        if group not in (0, 32, 64, 128):
            raise ValueError(f"4-bit matrix: found a group of {group} inputs, expected 32, 64, a multiple of 128, or 0")
        groups = -(-num_inputs // group) if group else 1
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            if tensor is not None and tuple(tensor.shape) != (*lead, R, groups):
                raise ValueError(f"4-bit matrix: found {name} {tuple(tensor.shape)}, expected {(*lead, R, groups)}")
        padded = pad(codes.to(torch.int32), [0, -num_inputs % GRANULE])
        words = cls.spread(padded.unflatten(-1, (padded.shape[-1] // GRANULE, RUNS, RUN)))
        return cls(
            packed=_to_int16(words).transpose(-3, -2).contiguous(),
            scales=_to_granules(scales.float() if _scales_a_granule(group) == 1 else scales, group),
            zeros=None if zeros is None else _to_granules(zeros.to(_ZEROS[_scales_a_granule(group)]), group),
            num_inputs=num_inputs,
            group=group,
        )

    def codes(self) -> torch.Tensor:
        """[..., R, I] uint8 in 0..15."""
        words = self.packed.transpose(-3, -2).to(torch.int32) & 0xFFFF
        return self.gather(words).to(torch.uint8).flatten(-3)[..., : self.num_inputs]

    def scale_rows(self) -> torch.Tensor:
        """[..., R, ceil(I / group)]."""
        return self._from_granules(self.scales)

    def zero_rows(self) -> torch.Tensor | None:
        """Like ``scale_rows``, or absent."""
        return None if self.zeros is None else self._from_granules(self.zeros)

    def _from_granules(self, tensor: torch.Tensor) -> torch.Tensor:
        groups = -(-self.num_inputs // self.group) if self.group else 1
        return tensor.transpose(-3, -2).flatten(-2)[..., :groups]

    def over_inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """What ``scale_rows`` or ``zero_rows`` gave, one for each input."""
        if not self.group:
            return rows.expand(*rows.shape[:-1], self.num_inputs)
        return rows.repeat_interleave(self.group, -1)[..., : self.num_inputs]

    def at(self, index: int | torch.Tensor) -> Self:
        """One, or some, of the first leading axis."""
        return self._map(lambda tensor: tensor[index])

    @classmethod
    def stack(cls, matrices: Sequence[Self]) -> Self:
        """Along a new first axis."""
        return cls._join(matrices, torch.stack)

    @classmethod
    def cat_rows(cls, matrices: Sequence[Self]) -> Self:
        """Output rows one matrix after the other; gate and up become w13."""
        return cls._join(matrices, lambda tensors: torch.cat(tensors, -2))

    def take_rows(self, index: torch.Tensor, *, num_padding: int = 0) -> Self:
        """Some output rows, then rows of zero, in memory of its own."""
        taken = self._map(lambda tensor: pad(tensor.index_select(-2, index), [0, 0, 0, num_padding]))
        return taken._map(lambda tensor: tensor.contiguous())

    def take_inputs(self, start: int, stop: int, *, num_padding: int = 0) -> Self:
        """Inputs [start, stop), then inputs that count nothing. ``start``: a multiple of the group."""
        scales, zeros = self.scale_rows(), self.zero_rows()
        if self.group:
            groups = slice(start // self.group, -(-stop // self.group))
            extra = [0, -(-(stop - start + num_padding) // self.group) - (groups.stop - groups.start)]
            scales = pad(scales[..., groups], extra)
            zeros = None if zeros is None else pad(zeros[..., groups], extra)
        neutral = self._neutral(zeros, stop - start, num_padding)
        codes = torch.cat([self.codes()[..., start:stop], neutral], -1)
        return self.from_codes(codes, scales.contiguous(), group=self.group, zeros=zeros)

    def _neutral(self, zeros: torch.Tensor | None, num_before: int, num_padding: int) -> torch.Tensor:
        """Codes [..., R, num_padding] that stand for zero."""
        lead = (*self.packed.shape[:-3], self.num_rows)
        return self.packed.new_zeros((*lead, num_padding), dtype=torch.uint8)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        zeros = None if self.zeros is None else change(self.zeros)
        return replace(self, packed=change(self.packed), scales=change(self.scales), zeros=zeros)

    @property
    def _kind(self) -> str:
        zeros = "without" if self.zeros is None else "with"
        return f"{self.num_inputs} inputs in groups of {self.group} {zeros} zero points"

    @classmethod
    def _join(cls, matrices: Sequence[Self], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Self:
        first = matrices[0]
        for other in matrices[1:]:
            if other._kind != first._kind:
                raise ValueError(f"4-bit matrices that are joined differ: found {other._kind}, expected {first._kind}")
        zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
        return replace(
            first,
            packed=join([matrix.packed for matrix in matrices]),
            scales=join([matrix.scales for matrix in matrices]),
            zeros=join(zeros) if zeros else None,
        )


def _scales_a_granule(group: int) -> int:
    """S of the shape letters."""
    return GRANULE // group if group else 1


def _to_int16(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _to_granules(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[..., R, groups] as [..., P, R, S]."""
    if not group:
        return rows.unsqueeze(-3).contiguous()
    S = _scales_a_granule(group)
    padded = pad(rows, [0, -rows.shape[-1] % S])
    return padded.unflatten(-1, (padded.shape[-1] // S, S)).transpose(-3, -2).contiguous()


@dataclass(frozen=True, kw_only=True)
class FourBitExperts(ExpertsWeights):
    """w13 [E, G*F, D] and w2 [E, D, F] as 4-bit matrices; gate rows, then up rows."""

    matrix_type: ClassVar[type[FourBitMatrix]]
    is_interleaved: ClassVar[bool] = False  # type: ignore[misc]  # whatever a checkpoint does, packing puts halves apart

    w13: FourBitMatrix
    w2: FourBitMatrix
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    num_halves: int = 2

    def __post_init__(self) -> None:
        E, F, D = self.num_experts, self.intermediate_size, self.hidden_size
        found = tuple((matrix.packed.shape[0], matrix.num_rows, matrix.num_inputs) for matrix in (self.w13, self.w2))
        expected = ((E, self.num_halves * F, D), (E, D, F))
        if found != expected or self.w13.packed.dim() != 4 or self.w2.packed.dim() != 4:
            raise ValueError(f"{self.format_name} experts: found w13 {found[0]} and w2 {found[1]}, expected {expected}")
        if self.w13.group != self.w2.group:
            raise ValueError(
                f"{self.format_name} experts: found groups of {self.w13.group} inputs in w13 and {self.w2.group} in "
                "w2, expected the same"
            )
        for name, bias, width in (("b13", self.b13, self.num_halves * F), ("b2", self.b2, D)):
            if bias is not None and tuple(bias.shape) != (E, width):
                raise ValueError(f"{self.format_name} experts: found {name} {tuple(bias.shape)}, expected {(E, width)}")

    @property
    def num_experts(self) -> int:
        return self.w13.packed.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.num_inputs

    @property
    def intermediate_size(self) -> int:
        return self.w2.num_inputs

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        w13, w2 = self.w13, self.w2
        found = (w13.packed, w13.scales, w13.zeros, w2.packed, w2.scales, w2.zeros, self.b13, self.b2)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def intermediate_granule(self) -> int:
        return self.w2.group or 1

    def w13_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.w13.at(expert).values(dtype).mT

    def w2_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.w2.at(expert).values(dtype).mT

    def take_experts(self, experts: Sequence[int]) -> Self:
        index = torch.tensor(list(experts), dtype=torch.long, device=self.device)
        return replace(
            self,
            w13=self.w13.at(index),
            w2=self.w2.at(index),
            b13=None if self.b13 is None else self.b13.index_select(0, index),
            b2=None if self.b2 is None else self.b2.index_select(0, index),
        )

    def take_intermediate(self, start: int, stop: int, *, padded_to: int | None = None) -> Self:
        F, granule = self.intermediate_size, self.intermediate_granule
        extra = 0 if padded_to is None else padded_to - (stop - start)
        # A rank behind the last column takes [F, F), wherever F ends, and computes zeros.
        if start < stop and (start % granule or (stop % granule and stop != F)):
            raise ValueError(
                f"{self.format_name} experts: found a cut at [{start}, {stop}) of F = {F}, expected multiples of "
                f"{granule}, the inputs of w2 that share a scale"
            )
        intervals = half_intervals(start, stop, F, num_halves=self.num_halves, is_interleaved=False)
        w13 = [self.w13.take_rows(torch.arange(*rows, device=self.device), num_padding=extra) for rows in intervals]
        b13 = self.b13
        if b13 is not None:
            b13 = cut_halves(b13, 1, (start, stop), extra, num_halves=self.num_halves, is_interleaved=False)
        return replace(
            self,
            w13=self.matrix_type.cat_rows(w13),
            w2=self.w2.take_inputs(start, stop, num_padding=extra),
            b13=b13,
            b2=None if self.b2 is None else self.b2.clone(),
        )

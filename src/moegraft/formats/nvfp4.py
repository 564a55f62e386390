"""NVFP4 weights: e2m1 numbers, an e4m3 scale for 16 of them, a float32 scale for each matrix.

Shape letters: E experts · D hidden size · F expert intermediate size · G = 2 (gate and up) or 1 · O, I rows and columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from moegraft.core.cuts import cut_axis
from moegraft.core.halves import cut_halves
from moegraft.formats.base import ExpertsWeights

BLOCK = 16
"""Inputs under one scale."""
LARGEST = 6.0 * 448.0
"""The largest number times the largest scale of a block."""
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True, kw_only=True)
class NVFP4Experts(ExpertsWeights):
    """weight = e2m1(code) * scale of 16 inputs * scale of the row's matrix (gate, up or down of one expert).

    w13 uint8 [E, G*F, D/2] (gate rows, then up rows), w2 uint8 [E, D, F/2]: two codes a byte, the first in its low
    half; w13_scale, w2_scale e4m3 [E, rows, inputs/16]; w13_global [E, G*F], w2_global [E, D] in float32, equal over a
    matrix. Activations are read as they are. Raises ValueError for what does not fit.
    """

    format_name: ClassVar[str] = "nvfp4"

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_global: torch.Tensor
    w2_global: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    num_halves: int = 2
    is_interleaved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ("w13", "w2"):
            codes, scale = getattr(self, name), getattr(self, f"{name}_scale")
            found = (codes.dtype, scale.dtype, getattr(self, f"{name}_global").dtype)
            if found != (torch.uint8, torch.float8_e4m3fn, torch.float32) or codes.dim() != 3:
                raise ValueError(
                    f"nvfp4 experts: found {name} {tuple(codes.shape)} with dtypes {', '.join(map(str, found))}, "
                    "expected 3 axes of torch.uint8, scales of torch.float8_e4m3fn and torch.float32"
                )
        E, D, F = self.num_experts, self.hidden_size, self.intermediate_size
        rows = self.num_halves * F
        expected = {
            "w13": (E, rows, D // 2),
            "w2": (E, D, F // 2),
            "w13_scale": (E, rows, D // BLOCK),
            "w2_scale": (E, D, F // BLOCK),
            "w13_global": (E, rows),
            "w2_global": (E, D),
            "b13": (E, rows),
            "b2": (E, D),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"nvfp4 experts: found {name} {tuple(tensor.shape)}, expected {shape}")

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        return 2 * self.w2.shape[2]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        stored = (self.w13, self.w2, self.w13_scale, self.w2_scale, self.w13_global, self.w2_global, self.b13, self.b2)
        return tuple(tensor for tensor in stored if tensor is not None)

    @property
    def intermediate_granule(self) -> int:
        return BLOCK

    def w13_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(self.w13[expert], self.w13_scale[expert], self.w13_global[expert]).to(dtype).mT

    def w2_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(self.w2[expert], self.w2_scale[expert], self.w2_global[expert]).to(dtype).mT

    def take_experts(self, experts: Sequence[int]) -> Self:
        index = torch.tensor(list(experts), dtype=torch.long, device=self.device)

        def take(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else _bytes(tensor).index_select(0, index).view(tensor.dtype)

        return self._each(take)

    def take_intermediate(self, start: int, stop: int, *, padded_to: int | None = None) -> Self:
        F, width = self.intermediate_size, stop - start
        padded = width if padded_to is None else padded_to
        if (start < stop and (start % BLOCK or (stop % BLOCK and stop != F))) or padded % BLOCK:
            raise ValueError(
                f"nvfp4 experts: columns {start} to {stop} of {F} as {padded} cut a block of scales; cut at "
                f"multiples of {BLOCK}"
            )
        extra = padded - width

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            stored, columns = _bytes(tensor), (start, stop)
            taken = cut_halves(stored, 1, columns, extra, num_halves=self.num_halves, is_interleaved=False)
            return taken.view(tensor.dtype)

        def columns(tensor: torch.Tensor, each: int) -> torch.Tensor:
            return cut_axis(_bytes(tensor), 2, start // each, stop // each, extra // each).view(tensor.dtype)

        return replace(
            self,
            w13=rows(self.w13),
            w13_scale=rows(self.w13_scale),
            w13_global=rows(self.w13_global),
            w2=columns(self.w2, 2),
            w2_scale=columns(self.w2_scale, BLOCK),
            w2_global=self.w2_global.clone(),
            b13=None if self.b13 is None else rows(self.b13),
            b2=None if self.b2 is None else self.b2.clone(),
        )

    def _each(self, change: object) -> Self:
        names = ("w13", "w2", "w13_scale", "w2_scale", "w13_global", "w2_global", "b13", "b2")
        return replace(self, **{name: change(getattr(self, name)) for name in names})  # type: ignore[operator]

    @classmethod
    def pack(
        cls,
        w13_EGFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        *,
        num_halves: int = 2,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
    ) -> NVFP4Experts:
        """Canonical weights (gate rows, then up rows), rounded to the nearest; ``dequantise`` is the inverse."""
        w13, w13_scale, w13_global = quantise(w13_EGFD.unflatten(1, (num_halves, -1)))
        w2, w2_scale, w2_global = quantise(w2_EDF)
        packed = cls.from_checkpoint(
            w13=w13.flatten(1, 2),
            w2=w2,
            w13_scale=w13_scale.flatten(1, 2),
            w2_scale=w2_scale,
            w13_global=w13_global,
            w2_global=w2_global[:, None],
            num_halves=num_halves,
        )
        return replace(packed, b13=b13, b2=b2)

    @classmethod
    def from_checkpoint(
        cls,
        *,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor,
        w2_scale: torch.Tensor,
        w13_global: torch.Tensor,
        w2_global: torch.Tensor,
        num_halves: int = 2,
    ) -> NVFP4Experts:
        """Checkpoint tensors of all experts, stacked: codes and scales of blocks as the record has them; w13_global
        [E, G] and w2_global [E, 1], what multiplies a matrix. Raises ValueError."""
        if w13.dim() != 3 or w2.dim() != 3 or tuple(w13_global.shape) != (len(w13), num_halves):
            raise ValueError(
                f"nvfp4 experts: found w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)} and scales of matrices "
                f"{tuple(w13_global.shape)}, expected 3 axes and [{len(w13)}, {num_halves}]"
            )
        return cls(
            w13=w13,
            w2=w2,
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            w13_global=w13_global.float().repeat_interleave(w13.shape[1] // num_halves, dim=1),
            w2_global=w2_global.float().expand(-1, w2.shape[1]).contiguous(),
            num_halves=num_halves,
        )


def dequantise(codes_OI: torch.Tensor, scale_OB: torch.Tensor, global_O: torch.Tensor) -> torch.Tensor:
    """W [O, I] in float32 from bytes [O, I/2], e4m3 scales [O, I/16] and the scale of each row's matrix [O] (or [])."""
    table = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)], device=codes_OI.device)
    numbers = table[torch.stack([codes_OI & 15, codes_OI >> 4], -1).flatten(-2).long()]
    scale = scale_OB.float() * (global_O[..., None] if global_O.dim() else global_O)
    return numbers * scale.repeat_interleave(BLOCK, dim=-1)


def quantise(w_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bytes, scales of blocks, scale of the matrix) of matrices [..., O, I], as ``dequantise`` reads them."""
    blocks = w_OI.float().unflatten(-1, (-1, BLOCK))
    whole = (blocks.abs().amax((-3, -2, -1)) / LARGEST).clamp(min=1e-12)
    scale = (blocks.abs().amax(-1) / 6.0 / whole[..., None, None]).to(torch.float8_e4m3fn)
    step = (scale.float() * whole[..., None, None])[..., None]
    scaled = torch.where(step > 0, blocks / step, 0.0)
    magnitudes = torch.bucketize(scaled.abs(), torch.tensor(_MIDPOINTS, device=w_OI.device))
    codes = (magnitudes + 8 * (scaled < 0)).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale, whole


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as integers: few operations know them."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor

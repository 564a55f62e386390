"""Eight-bit expert weights with float32 scales: what fp8 and int8 have in common.

Shape letters: E experts · D hidden size · F expert intermediate size · G = 2 (gate and up) or 1 (no gate) ·
O, I rows (out) and columns (in) of one matrix
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch.nn.functional import pad

from moegraft.core.cuts import cut_axis
from moegraft.core.halves import cut_halves
from moegraft.formats.base import ExpertsWeights

BLOCK = 128
"""Side of a block of weights under one scale, and the columns of a group of activations."""


class Granularity(enum.StrEnum):
    """What one scale of a weight serves."""

    BLOCK = "block"  # 128 x 128 weights of one half, cut short at its borders
    CHANNEL = "channel"  # a row
    TENSOR = "tensor"  # one half (gate, up or down) of one expert; stored as equal rows


@dataclass(frozen=True, kw_only=True)
class ScaledExperts(ExpertsWeights):
    """w13 [E, G*F, D] (gate rows, then up rows) and w2 [E, D, F] in eight bits; weight = stored * scale.

    Scales in float32, one a row: w13_scale [E, G*F], w2_scale [E, D]; or, in blocks of 128 x 128 that start anew in
    each half: [E, G*ceil(F/128), ceil(D/128)], [E, ceil(D/128), ceil(F/128)]. Biases b13 [E, G*F], b2 [E, D].
    """

    stored_dtype: ClassVar[torch.dtype]
    stored_max: ClassVar[float]

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    num_halves: int = 2
    is_interleaved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_axes(self.format_name, self.w13, self.w2)
        E, D, F, G = self.num_experts, self.hidden_size, self.intermediate_size, self.num_halves
        blocks_D, blocks_F = _num_blocks(D), _num_blocks(F)
        expected = {"w13": (E, G * F, D), "w2": (E, D, F), "b13": (E, G * F), "b2": (E, D)}
        if self.is_block_scaled:
            expected |= {"w13_scale": (E, G * blocks_F, blocks_D), "w2_scale": (E, blocks_D, blocks_F)}
        else:
            expected |= {"w13_scale": (E, G * F), "w2_scale": (E, D)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{self.format_name} experts: found {name} {tuple(tensor.shape)}, expected {shape}")
        for name, dtype in {
            "w13": self.stored_dtype,
            "w2": self.stored_dtype,
            "w13_scale": torch.float32,
            "w2_scale": torch.float32,
        }.items():
            found = getattr(self, name).dtype
            if found != dtype:
                raise ValueError(f"{self.format_name} experts: found {name} in {found}, expected {dtype}")

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[2]

    @property
    def is_block_scaled(self) -> bool:
        return self.w13_scale.dim() == 3

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        stored = (self.w13, self.w2, self.w13_scale, self.w2_scale, self.b13, self.b2)
        return tuple(tensor for tensor in stored if tensor is not None)

    @property
    def intermediate_granule(self) -> int:
        return BLOCK if self.is_block_scaled else 1

    def w13_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        scale = self.w13_scale[expert]
        if self.is_block_scaled:
            scale = spread_blocks(scale.unflatten(0, (self.num_halves, -1)), self.intermediate_size, self.hidden_size)
            scale = scale.flatten(0, 1)
        return _dequantise(self.w13[expert], scale, dtype).mT

    def w2_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        scale = self.w2_scale[expert]
        if self.is_block_scaled:
            scale = spread_blocks(scale, self.hidden_size, self.intermediate_size)
        return _dequantise(self.w2[expert], scale, dtype).mT

    def take_experts(self, experts: Sequence[int]) -> Self:
        index = torch.tensor(list(experts), dtype=torch.long, device=self.device)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return _view_bytes(tensor).index_select(0, index).view(tensor.dtype)

        return replace(
            self,
            w13=take(self.w13),
            w2=take(self.w2),
            w13_scale=take(self.w13_scale),
            w2_scale=take(self.w2_scale),
            b13=None if self.b13 is None else take(self.b13),
            b2=None if self.b2 is None else take(self.b2),
        )

    def take_intermediate(self, start: int, stop: int, *, padded_to: int | None = None) -> Self:
        F, granule = self.intermediate_size, self.intermediate_granule
        # A rank behind the last column takes [F, F), wherever F ends, and computes zeros.
        if start < stop and (start % granule or (stop % granule and stop != F)):
            raise ValueError(
                f"{self.format_name} experts: columns {start} to {stop} of {F} cut a block of scales; cut at multiples "
                f"of {granule}"
            )
        width = stop - start
        extra = 0 if padded_to is None else padded_to - width

        def cut(tensor: torch.Tensor, columns: tuple[int, int], behind: int, fill: float = 0.0) -> torch.Tensor:
            stored, G = _view_bytes(tensor), self.num_halves
            taken = cut_halves(stored, 1, columns, behind, num_halves=G, is_interleaved=False, fill=fill)
            return taken.view(tensor.dtype)

        w13_scale, w2_scale = self.w13_scale, self.w2_scale
        if self.is_block_scaled:
            first, last = start // BLOCK, _num_blocks(stop)
            behind = _num_blocks(width + extra) - (last - first)
            w13_scale = cut(w13_scale, (first, last), behind, fill=1.0)
            w2_scale = cut_axis(w2_scale, 2, first, last, behind, fill=1.0)
        else:
            w13_scale, w2_scale = cut(w13_scale, (start, stop), extra, fill=1.0), w2_scale.clone()
        return replace(
            self,
            w13=cut(self.w13, (start, stop), extra),
            w2=cut_axis(_view_bytes(self.w2), 2, start, stop, extra).view(self.w2.dtype),
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            b13=None if self.b13 is None else cut(self.b13, (start, stop), extra),
            b2=None if self.b2 is None else self.b2.clone(),
        )

    @classmethod
    def quantise_weight(cls, w_ENOI: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
        """(stored [E, n*O, I], scales as the record has them) of n halves [E, n, O, I], each scaled by itself."""
        E, n, O, I = w_ENOI.shape  # noqa: E741
        w, sizes = w_ENOI.float(), (E, n, O, I)
        match granularity:
            case Granularity.BLOCK:
                rows, columns = _num_blocks(O), _num_blocks(I)
                tiles = pad(w, (0, columns * BLOCK - I, 0, rows * BLOCK - O))
                largest = tiles.view(E, n, rows, BLOCK, columns, BLOCK).abs().amax((3, 5))
            case Granularity.CHANNEL:
                largest = _largest(w, (3,))[..., None]
            case Granularity.TENSOR:
                largest = _largest(w, (2, 3))[..., None, None].expand(E, n, O, 1)
        scale = torch.where(largest > 0, largest / cls.stored_max, 1.0)
        spread = spread_blocks(scale, O, I) if granularity is Granularity.BLOCK else scale
        stored = cls._round((w / spread).clamp(-cls.stored_max, cls.stored_max)).view(sizes).flatten(1, 2)
        return stored, scale.flatten(1, 2) if granularity is Granularity.BLOCK else scale.flatten(1, 3)

    @classmethod
    def _read_scales(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor],
        num_halves: int,
        *,
        is_block: bool,
    ) -> dict[str, torch.Tensor]:
        """w13_scale and w2_scale from those of a checkpoint. Raises ValueError for what does not fit."""
        _check_axes(cls.format_name, w13, w2)
        E, D, rows = w13.shape[0], w2.shape[1], w13.shape[1] // num_halves
        return {
            "w13_scale": read_scales(scales[0], num_experts=E, num_halves=num_halves, rows=rows, is_block=is_block),
            "w2_scale": read_scales(scales[1], num_experts=E, num_halves=1, rows=D, is_block=is_block),
        }

    @classmethod
    def _round(cls, w: torch.Tensor) -> torch.Tensor:
        return w.to(cls.stored_dtype)


def read_scales(scale: torch.Tensor, *, num_experts: int, num_halves: int, rows: int, is_block: bool) -> torch.Tensor:
    """Scales of stacked checkpoint tensors [E, num_halves*rows, in] as ``ScaledExperts`` keeps them.

    In blocks: [E, blocks, blocks]. Else one a row, [E, n*rows] or [E, n*rows, 1]; one a half, [E, n] or [E, n, 1];
    one an expert, [E], [E, 1] or [E, 1, 1]. Raises ValueError for any other shape.
    """
    if is_block:
        if scale.dim() != 3:
            raise ValueError(f"found block scales of shape {tuple(scale.shape)}, expected [experts, blocks, blocks]")
        return scale.float()
    per_row = scale.float().flatten(1) if scale.dim() > 1 else scale.float()[..., None]
    all_rows = num_halves * rows
    if per_row.dim() != 2 or len(per_row) != num_experts or per_row.shape[1] not in (1, num_halves, all_rows):
        raise ValueError(
            f"found scales of shape {tuple(scale.shape)} for {num_experts} experts of {all_rows} rows, expected one a "
            f"row, one a half ({num_halves}) or one an expert"
        )
    if per_row.shape[1] == all_rows:
        return per_row.contiguous()
    return per_row.repeat_interleave(all_rows // per_row.shape[1], dim=1)


def _dequantise(stored_OI: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (stored_OI.float() * (scale[:, None] if scale.dim() == 1 else scale)).to(dtype)


def spread_blocks(
    scale: torch.Tensor, rows: int, columns: int, *, block_size: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """Scales of blocks, cut short at the borders, over the elements that they serve: [..., rows, columns].

    ``scale`` [..., ceil(rows / block_size[0]), ceil(columns / block_size[1])].
    """
    over_rows = scale.repeat_interleave(block_size[0], dim=-2)[..., :rows, :]
    return over_rows.repeat_interleave(block_size[1], dim=-1)[..., :columns]


def _check_axes(format_name: str, w13: torch.Tensor, w2: torch.Tensor) -> None:
    for name, tensor in (("w13", w13), ("w2", w2)):
        if tensor.dim() != 3:
            raise ValueError(f"{format_name} experts: found {name} {tuple(tensor.shape)}, expected 3 axes")


def _largest(w: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Largest magnitude; 0 over nothing."""
    if 0 in w.shape:
        return w.new_zeros([size for axis, size in enumerate(w.shape) if axis not in dims])
    return w.abs().amax(dims)


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as integers: few operations know them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor

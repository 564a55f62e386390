"""int8 expert weights with a scale a row; activations are read as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moegraft.formats.scaled import Granularity, ScaledExperts


@dataclass(frozen=True, kw_only=True)
class Int8Experts(ScaledExperts):
    """Symmetric int8 weights, one scale a row (or a tensor, stored as equal rows)."""

    format_name: ClassVar[str] = "int8"
    stored_dtype: ClassVar[torch.dtype] = torch.int8
    stored_max: ClassVar[float] = 127.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_block_scaled:
            raise ValueError("int8 experts: found scales in blocks, expected one a row")

    @classmethod
    def pack(
        cls,
        w13_EGFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        *,
        num_halves: int = 2,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
    ) -> Int8Experts:
        """Canonical weights (gate rows, then up rows), rounded to nearest; ``dequantise`` is the inverse."""
        w13, w13_scale = cls.quantise_weight(w13_EGFD.unflatten(1, (num_halves, -1)), Granularity.CHANNEL)
        w2, w2_scale = cls.quantise_weight(w2_EDF[:, None], Granularity.CHANNEL)
        return cls(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale, b13=b13, b2=b2, num_halves=num_halves)

    @classmethod
    def from_checkpoint(
        cls,
        *,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor,
        w2_scale: torch.Tensor,
        num_halves: int = 2,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
    ) -> Int8Experts:
        """Checkpoint tensors of all experts, stacked: w13 [E, G*F, D], w2 [E, D, F], and ``weight_scale`` of
        compressed-tensors in any shape that ``read_scales`` takes. Weights are kept. Raises ValueError."""
        scales = cls._read_scales(w13, w2, (w13_scale, w2_scale), num_halves, is_block=False)
        return cls(w13=w13, w2=w2, **scales, b13=b13, b2=b2, num_halves=num_halves)

    @classmethod
    def _round(cls, w: torch.Tensor) -> torch.Tensor:
        return w.round().to(torch.int8)

"""Unquantised expert weights in every stored orientation, as views: nothing is copied to serve them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DenseExperts:
    """w13 and w2 of one experts layer as the checkpoint stores them.

    w13 [E, G*F, D] and w2 [E, D, F], or transposed [E, D, G*F] and [E, F, D]. ``is_interleaved``: gate and up
    alternate along the G*F axis. Biases b13 [E, G*F] (in the order of w13's axis) and b2 [E, D].
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    num_halves: int = 2
    is_transposed: bool = False
    is_interleaved: bool = False

    def __post_init__(self) -> None:
        E, F, D = self.num_experts, self.intermediate_size, self.hidden_size
        rows = self.num_halves * F
        expected = ((E, D, rows), (E, F, D)) if self.is_transposed else ((E, rows, D), (E, D, F))
        found = (tuple(self.w13.shape), tuple(self.w2.shape))
        if found != expected:
            raise ValueError(f"expert weights: found w13 {found[0]} and w2 {found[1]}, expected {expected}")
        for name, bias, width in (("b13", self.b13, rows), ("b2", self.b2, D)):
            if bias is not None and tuple(bias.shape) != (E, width):
                raise ValueError(f"expert weights: found {name} {tuple(bias.shape)}, expected {(E, width)}")

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[1 if self.is_transposed else 2]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[1 if self.is_transposed else 2]

    @property
    def w13_in_out(self) -> torch.Tensor:
        """[E, D, G*F], a view."""
        return self.w13 if self.is_transposed else self.w13.transpose(1, 2)

    @property
    def w2_in_out(self) -> torch.Tensor:
        """[E, F, D], a view."""
        return self.w2 if self.is_transposed else self.w2.transpose(1, 2)

    def dequantise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Canonical w13 [E, G*F, D] (gate rows, then up rows) and w2 [E, D, F]."""
        w13, w2 = self.w13_in_out.transpose(1, 2), self.w2_in_out.transpose(1, 2)
        if self.is_interleaved and self.num_halves == 2:
            w13 = torch.cat([w13[:, ::2], w13[:, 1::2]], dim=1)
        return w13, w2

    @classmethod
    def pack(
        cls, w13_EGFD: torch.Tensor, w2_EDF: torch.Tensor, *, num_halves: int, is_transposed: bool, is_interleaved: bool
    ) -> DenseExperts:
        """Inverse of ``dequantise`` for the given layout (without biases)."""
        w13 = w13_EGFD
        if is_interleaved and num_halves == 2:
            F = w2_EDF.shape[2]
            w13 = torch.stack([w13[:, :F], w13[:, F:]], dim=2).flatten(1, 2)
        if is_transposed:
            w13, w2_EDF = w13.transpose(1, 2).contiguous(), w2_EDF.transpose(1, 2).contiguous()
        return cls(
            w13=w13, w2=w2_EDF, num_halves=num_halves, is_transposed=is_transposed, is_interleaved=is_interleaved
        )

"""What every weight format of an experts layer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch

from moegraft.core.halves import join_halves, split_halves


class ExpertsWeights(ABC):
    """w13 and w2 of one experts layer in one storage format; immutable.

    ``b13`` [E, G*F] (in the stored order of the G*F axis) and ``b2`` [E, D] are in the compute dtype, or absent.
    ``num_halves`` is G. ``is_interleaved``: gate and up alternate along the stored G*F axis.
    """

    format_name: ClassVar[str]
    num_halves: int
    is_interleaved: bool
    b13: torch.Tensor | None
    b2: torch.Tensor | None

    @property
    @abstractmethod
    def num_experts(self) -> int: ...

    @property
    @abstractmethod
    def hidden_size(self) -> int: ...

    @property
    @abstractmethod
    def intermediate_size(self) -> int: ...

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that is stored, biases and scales included."""

    @abstractmethod
    def w13_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[D, G*F] of one expert in the stored order of the G*F axis; a view where nothing has to be computed."""

    @abstractmethod
    def w2_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[F, D] of one expert."""

    @abstractmethod
    def take_experts(self, experts: Sequence[int]) -> Self:
        """The layer of these experts only, in this order; no expert of it shares memory with the whole layer."""

    @abstractmethod
    def take_intermediate(self, start: int, stop: int, *, padded_to: int | None = None) -> Self:
        """Columns [start, stop) of F of both halves of w13, of b13 and of w2; b2 whole. In memory of its own.

        ``padded_to``: zero columns behind them, up to this many. Raises ValueError where the format's scale groups
        do not allow the cut; ``intermediate_granule`` says which cuts they allow. An empty one is always allowed.
        """

    @property
    def intermediate_granule(self) -> int:
        """F may be cut at multiples of this."""
        return 1

    def quantise_input(self, x_MI: torch.Tensor, *, of_w2: bool = False) -> torch.Tensor:
        """The activations as GEMM 13 (or ``of_w2``) reads them, in the dtype of x: x itself unless quantised."""
        return x_MI

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes of everything stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def dequantise(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Canonical w13 [E, G*F, D] (gate rows, then up rows) and w2 [E, D, F]."""
        E, D, F = self.num_experts, self.hidden_size, self.intermediate_size
        w13 = torch.empty(E, self.num_halves * F, D, dtype=dtype, device=self.device)
        w2 = torch.empty(E, D, F, dtype=dtype, device=self.device)
        for expert in range(E):
            rows = self.w13_in_out_of(expert, dtype).mT
            if self.is_interleaved and self.num_halves == 2:
                rows = join_halves(split_halves(rows, 0, num_halves=2, is_interleaved=True), 0, is_interleaved=False)
            w13[expert] = rows
            w2[expert] = self.w2_in_out_of(expert, dtype).mT
        return w13, w2

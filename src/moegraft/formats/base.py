"""What every weight format of an experts layer offers, and the one that keeps weights unquantised, as they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from moegraft.core.cuts import cut_axis
from moegraft.core.halves import cut_halves, join_halves, split_halves


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


@dataclass(frozen=True, kw_only=True)
class DenseExperts(ExpertsWeights):
    """w13 and w2 of one experts layer as the checkpoint stores them.

    w13 [E, G*F, D] and w2 [E, D, F], or transposed [E, D, G*F] and [E, F, D]. ``is_interleaved``: gate and up
    alternate along the G*F axis. Biases b13 [E, G*F] (in the order of w13's axis) and b2 [E, D].
    """

    format_name: ClassVar[str] = "dense"

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

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.w13, self.w2, self.b13, self.b2) if tensor is not None)

    def w13_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.w13_in_out[expert].to(dtype)

    def w2_in_out_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.w2_in_out[expert].to(dtype)

    def take_experts(self, experts: Sequence[int]) -> DenseExperts:
        index = torch.tensor(list(experts), dtype=torch.long, device=self.device)
        return replace(
            self,
            w13=self.w13.index_select(0, index),
            w2=self.w2.index_select(0, index),
            b13=None if self.b13 is None else self.b13.index_select(0, index),
            b2=None if self.b2 is None else self.b2.index_select(0, index),
        )

    def take_intermediate(self, start: int, stop: int, *, padded_to: int | None = None) -> DenseExperts:
        extra = 0 if padded_to is None else padded_to - (stop - start)
        half_axis, f_axis = (2, 1) if self.is_transposed else (1, 2)

        def cut(tensor: torch.Tensor, axis: int) -> torch.Tensor:
            G, columns = self.num_halves, (start, stop)
            return cut_halves(tensor, axis, columns, extra, num_halves=G, is_interleaved=self.is_interleaved)

        return replace(
            self,
            w13=cut(self.w13, half_axis),
            w2=cut_axis(self.w2, f_axis, start, stop, extra),
            b13=None if self.b13 is None else cut(self.b13, 1),
            b2=None if self.b2 is None else self.b2.clone(),
        )

    @classmethod
    def pack(
        cls, w13_EGFD: torch.Tensor, w2_EDF: torch.Tensor, *, num_halves: int, is_transposed: bool, is_interleaved: bool
    ) -> DenseExperts:
        """Inverse of ``dequantise`` for the given layout (without biases)."""
        w13 = w13_EGFD
        if is_interleaved and num_halves == 2:
            w13 = join_halves(split_halves(w13, 1, num_halves=2, is_interleaved=False), 1, is_interleaved=True)
        if is_transposed:
            w13, w2_EDF = w13.transpose(1, 2).contiguous(), w2_EDF.transpose(1, 2).contiguous()
        return cls(
            w13=w13, w2=w2_EDF, num_halves=num_halves, is_transposed=is_transposed, is_interleaved=is_interleaved
        )

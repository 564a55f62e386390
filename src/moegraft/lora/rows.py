"""Which adapter serves which row of a call, and how large the adapters of the call are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from moegraft.core.errors import BatchError
from moegraft.core.tables import ExpertsFactor

if TYPE_CHECKING:
    from moegraft.lora.punica.cpu import BatchFactors

BASE_SLOT = -1


@dataclass(frozen=True, kw_only=True)
class RankBounds:
    """No adapter of a call has more rank rows in A13 (gate and up together) or A2 of an experts layer.

    They size workspaces; a zero runs no LoRA on w13 or on w2. ``has_gains``: whether one may have DoRA on experts.
    """

    a13: int
    a2: int
    has_gains: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, max_ranks: Sequence[int]) -> RankBounds:
        """From ``AdapterBatch.max_ranks`` of an experts module; zeros where no adapter touches it."""
        if not max_ranks:
            return _NO_RANKS
        has_gains = any(max_ranks[ExpertsFactor.GAIN_GATE :])
        return cls(a13=max_ranks[ExpertsFactor.A13], a2=max_ranks[ExpertsFactor.A2], has_gains=has_gains)

    @property
    def are_zero(self) -> bool:
        return self.a13 == 0 and self.a2 == 0


_NO_RANKS = RankBounds(a13=0, a2=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterRows:
    """The adapter of each of M rows, stated one by one; frozen, shared by all layers that see these rows.

    slots_M: int32 on the device, -1 = base; may be a buffer of the caller's, whose contents change between calls ·
    host: the same numbers where the host knows them; None: ``slots_M`` alone says it, and what follows from it is
    derived when a layer runs · run_length: how many neighbouring rows have the same adapter, at a guess: it chooses
    tiles, not results · factors: what the CPU's wrapper has derived from the adapters
    of the batch, kept as long as it holds them.
    """

    slots_M: torch.Tensor
    host: tuple[int, ...] | None
    run_length: int
    factors: BatchFactors | None = None

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        *,
        device: torch.device | str,
        lengths: int | Sequence[int] = 1,
        factors: BatchFactors | None = None,
    ) -> AdapterRows:
        """Entry i of ``slots`` serves the next ``lengths[i]`` rows (a number: as many each). BatchError where they
        do not go together."""
        if isinstance(lengths, int):
            lengths = (lengths,) * len(slots)
        if len(lengths) != len(slots):
            raise BatchError(f"lengths= has {len(lengths)} entries, adapters= has {len(slots)}")
        if any(length < 0 for length in lengths):
            raise BatchError(f"lengths={list(lengths)}, expected numbers of tokens, none below 0")
        host = tuple(slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length))
        return cls(
            slots_M=torch.tensor(host, dtype=torch.int32).to(device),
            host=host,
            run_length=typical_run(slots, lengths),
            factors=factors or _new_factors(),
        )

    @classmethod
    def on_device(cls, slots_M: torch.Tensor, *, run_length: int = 1) -> AdapterRows:
        """Rows that only the device knows: int32 [M], read anew whenever a layer, or a graph that captured it, runs."""
        if slots_M.dim() != 1 or slots_M.dtype != torch.int32 or not slots_M.is_contiguous():
            raise BatchError(f"slots {list(slots_M.shape)} {slots_M.dtype}, expected [M] torch.int32, contiguous")
        return cls(slots_M=slots_M, host=None, run_length=run_length)

    def at(self, places: Sequence[int]) -> AdapterRows:
        """Some of the rows, by their places."""
        if self.host is None:
            index = torch.tensor(places, device=self.slots_M.device)
            return AdapterRows.on_device(self.slots_M[index], run_length=min(self.run_length, len(places)))
        host = [self.host[place] for place in places]
        return AdapterRows.of(host, device=self.slots_M.device, factors=self.factors)

    @property
    def num_rows(self) -> int:
        return self.slots_M.shape[0]

    @cached_property
    def has_adapters(self) -> bool:
        """Whether some row has an adapter, or may have one when a layer runs."""
        return self.host is None or any(slot != BASE_SLOT for slot in self.host)


def _new_factors() -> BatchFactors:
    from moegraft.lora.punica.cpu import BatchFactors

    return BatchFactors()


def typical_run(slots: Sequence[int], lengths: Sequence[int]) -> int:
    """The mean over rows of how many neighbours have the same slot, themselves included; at least 1."""
    total = squares = 0
    for _, run in groupby(zip(slots, lengths, strict=True), key=lambda entry: entry[0]):
        rows = sum(length for _, length in run)
        total, squares = total + rows, squares + rows * rows
    return squares // total if total else 1


def distinct_slots(slots: Sequence[int]) -> tuple[int, ...]:
    """Without the base, in the order of their first row."""
    return tuple(dict.fromkeys(slot for slot in slots if slot != BASE_SLOT))


def number_slots(slots: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[max slot + 2]: number of a slot among ``slots``, -1 for others; the last entry serves slot -1."""
    return _inverse(slots, range(len(slots)), torch.long, device)


def _inverse(keys: Sequence[int], values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    table = torch.full((max(keys, default=BASE_SLOT) + 2,), BASE_SLOT, dtype=dtype)
    table[list(keys)] = torch.tensor(list(values), dtype=dtype)
    return table.to(device)


@lru_cache(maxsize=64)
def _base_slot(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((1,), BASE_SLOT, dtype=torch.int32, device=device)


def base_slots(num_rows: int, device: torch.device) -> torch.Tensor:
    """[M] int32 of -1, as a view of one number: the slots of a call without adapters cost no launch."""
    return _base_slot(device).expand(num_rows)


@dataclass(frozen=True, eq=False)
class GroupAdapters:
    """The adapters that the ranks of an expert-parallel group use in one batch, held on each of them.

    ids: the same on every rank, agreed when an adapter is loaded, ascending · slots: this rank's slot of each.
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...]
    device: torch.device

    @cached_property
    def id_of_slot(self) -> torch.Tensor:
        """[max slot + 2] int32 on the device; the last entry serves slot -1."""
        return _inverse(self.slots, self.ids, torch.int32, self.device)

    @cached_property
    def slot_of_id(self) -> torch.Tensor:
        """[max id + 2] int32 on the device; the last entry serves id -1."""
        return _inverse(self.ids, self.slots, torch.int32, self.device)

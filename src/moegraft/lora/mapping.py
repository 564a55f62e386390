"""Which adapter serves which row of one forward call, as the layers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from moegraft.core.errors import BatchError

BASE_SLOT = -1


@dataclass(frozen=True)
class LoRASegments:
    """Rows that take part in LoRA, sorted by adapter (and expert): one segment per distinct pair.

    Segment g holds the caller's rows ``rows_L[offsets[g]:offsets[g+1]]``; its adapter is number ``adapter_G[g]`` of
    the mapping's ``active_slots`` and its expert stands at ``position_G[g]`` among the experts that the adapter holds
    (None where the module has no experts).

    Example: active_slots (3, 7); rows 0..4 with (slot, position) = (7,0) base (3,2) (7,0) (3,1) give
    rows_L = [4, 2, 0, 3], offsets = (0, 1, 2, 4), adapter_G = [0, 0, 1], position_G = [1, 2, 0].
    """

    rows_L: torch.Tensor
    offsets: tuple[int, ...]
    adapter_G: torch.Tensor
    position_G: torch.Tensor | None

    @classmethod
    def one_row_each(
        cls, rows_L: torch.Tensor, adapter_L: torch.Tensor, position_L: torch.Tensor | None
    ) -> LoRASegments:
        """Every row by itself, in the given order: for few rows cheaper than to look for rows that go together."""
        return cls(rows_L, tuple(range(rows_L.shape[0] + 1)), adapter_L, position_L)

    @property
    def is_empty(self) -> bool:
        return self.offsets[-1] == 0

    def per_row(self, values_G: torch.Tensor) -> torch.Tensor:
        """Each segment's value (first dimension G) for each of its rows (first dimension L)."""
        if self.offsets[-1] == values_G.shape[0]:  # one row each: the shape of a decode step
            return values_G
        counts = torch.tensor([b - a for a, b in pairwise(self.offsets)], device=values_G.device)
        return values_G.repeat_interleave(counts, dim=0)


@dataclass(frozen=True, eq=False)
class AdapterMapping:
    """Slots of the T rows of one call: ``row_slots`` of the batch's B sequences, each repeated T / B times.

    Frozen and shared by all layers of a call; what is derived from it is computed once. ``shared`` is a scratch
    dictionary of the batch, in which a punica wrapper keeps what it derives from the batch's adapters.
    """

    row_slots: tuple[int, ...]
    repeats: int
    device: torch.device
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def for_rows(
        cls, row_slots: Sequence[int], num_rows: int, device: torch.device, shared: dict[str, Any] | None = None
    ) -> AdapterMapping:
        """Mapping of ``num_rows`` rows (a multiple of B, sequence-major: all tokens of row 0, then of row 1 ...)."""
        return cls(tuple(row_slots), _repeats(row_slots, num_rows), device, {} if shared is None else shared)

    @property
    def num_rows(self) -> int:
        return len(self.row_slots) * self.repeats

    @cached_property
    def active_slots(self) -> tuple[int, ...]:
        """The distinct slots of the batch, in the order of their first row."""
        return tuple(dict.fromkeys(slot for slot in self.row_slots if slot != BASE_SLOT))

    @property
    def has_adapters(self) -> bool:
        return bool(self.active_slots) and self.repeats > 0

    @cached_property
    def token_slots(self) -> torch.Tensor:
        """[T] int32 on the device: slot of each row, -1 = base."""
        rows = torch.tensor(self.row_slots, dtype=torch.int32)
        return rows.repeat_interleave(self.repeats).to(self.device)

    @cached_property
    def adapter_of_slot(self) -> torch.Tensor:
        """[max slot + 2]: number of a slot among ``active_slots``, -1 for others; the last entry serves slot -1."""
        numbers = torch.full((max(self.active_slots, default=BASE_SLOT) + 2,), -1)
        numbers[list(self.active_slots)] = torch.arange(len(self.active_slots))
        return numbers.to(self.device)

    def rows_of(self, slot: int) -> torch.Tensor:
        """Rows that one slot serves, ascending."""
        sequences = torch.tensor([i for i, s in enumerate(self.row_slots) if s == slot])
        return (sequences[:, None] * self.repeats + torch.arange(self.repeats)).flatten().to(self.device)

    @cached_property
    def segments(self) -> LoRASegments:
        """The rows with an adapter, one segment an adapter: what a linear map reads."""
        rows = [self.rows_of(slot) for slot in self.active_slots]
        return LoRASegments(
            rows_L=torch.cat(rows) if rows else torch.empty(0, dtype=torch.long, device=self.device),
            offsets=tuple(accumulate((len(mine) for mine in rows), initial=0)),
            adapter_G=torch.arange(len(rows), device=self.device),
            position_G=None,
        )

    @cached_property
    def is_in_order(self) -> bool:
        """Whether ``segments`` takes all rows, in their order: nothing has to be gathered (one adapter a row, say)."""
        slots = self.row_slots
        grouped = [slot for active in self.active_slots for slot in slots if slot == active]
        return list(slots) == grouped


def _repeats(row_slots: Sequence[int], num_rows: int) -> int:
    B = len(row_slots)
    if B == 0 or num_rows % B:
        raise BatchError(f"{num_rows} rows cannot be shared out to the {B} entries of adapters=")
    return num_rows // B


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
        return _inverse(self.slots, self.ids, self.device)

    @cached_property
    def slot_of_id(self) -> torch.Tensor:
        """[max id + 2] int32 on the device; the last entry serves id -1."""
        return _inverse(self.ids, self.slots, self.device)


def _inverse(keys: Sequence[int], values: Sequence[int], device: torch.device) -> torch.Tensor:
    table = torch.full((max(keys, default=BASE_SLOT) + 2,), BASE_SLOT, dtype=torch.int32)
    table[list(keys)] = torch.tensor(values, dtype=torch.int32)
    return table.to(device)


@dataclass(frozen=True, eq=False)
class GroupMapping(AdapterMapping):
    """The mapping that experts read where rows travel between ranks: its adapters are those of every rank's rows.

    ``row_slots`` are this rank's own rows, of which there may be none. Linear maps, whose rows stay, take an
    ``AdapterMapping`` with a ``shared`` of its own.
    """

    group: GroupAdapters = field(kw_only=True)

    @classmethod
    def for_group(
        cls, row_slots: Sequence[int], num_rows: int, group: GroupAdapters, shared: dict[str, Any] | None = None
    ) -> GroupMapping:
        """As ``for_rows``; a rank whose batch is empty has no entries and no rows."""
        repeats = 0 if not row_slots and num_rows == 0 else _repeats(row_slots, num_rows)
        return cls(tuple(row_slots), repeats, group.device, {} if shared is None else shared, group=group)

    @cached_property
    def active_slots(self) -> tuple[int, ...]:
        """The slots of all adapters of the group's batch."""
        return self.group.slots

    @property
    def has_adapters(self) -> bool:
        return bool(self.group.slots)

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """[T] int32 on the device: id of each row's adapter, the same on every rank; -1 = base."""
        return self.group.id_of_slot[self.token_slots.long()]

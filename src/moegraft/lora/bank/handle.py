"""One loaded adapter, as the bank keeps it, and as users see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moegraft.lora.bank.address_space import AddressSpace
from moegraft.lora.bank.layout import BankLayout


@dataclass(frozen=True, eq=False, kw_only=True)
class Residency:
    """Where a resident adapter lies. A new record each time, so that a reader without the lock sees one state.

    ``views``: entry -> view into the pool, valid as long as this residency is.
    """

    slot: int
    pages: tuple[int, ...]
    views: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class AdapterHandle:
    """A loaded adapter. Owned and changed by its bank only; read it freely.

    ``ranks``: module -> rank of each factor (ExpertsFactor or LinearFactor order, 0 = untouched); modules that the
    adapter does not touch are absent. ``saved``: (module, parameter) pairs that it replaces. ``image``: host copy of
    its pages [num_pages, page_elems]; on the CPU only while evicted.
    """

    name: str
    source: str | None
    space: AddressSpace
    ranks: Mapping[str, tuple[int, ...]]
    saved: frozenset[tuple[str, str]]
    image: torch.Tensor | None
    residency: Residency | None = None
    pinned: bool = False
    users: int = 0
    last_use: int = 0

    @property
    def expert_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Experts that it holds, ascending, by experts module."""
        return self.space.expert_ids

    @property
    def slot(self) -> int:
        """Row of the bank's tables, -1 while evicted."""
        residency = self.residency
        return -1 if residency is None else residency.slot

    @property
    def resident(self) -> bool:
        return self.residency is not None

    @property
    def in_use(self) -> bool:
        """Whether a batch in flight needs it."""
        return self.users > 0

    @property
    def evictable(self) -> bool:
        return self.resident and not self.pinned and not self.in_use


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """A snapshot of one loaded adapter, for users.

    ``ranks``: module -> largest rank of its LoRA · ``modules``: all modules that it
    touches, ``modules_to_save`` included · ``num_bytes`` of its factors · ``num_pages`` that they take in the bank.
    """

    name: str
    source: str | None
    ranks: Mapping[str, int]
    modules: tuple[str, ...]
    num_bytes: int
    num_pages: int
    resident: bool
    pinned: bool
    in_use: bool


def module_ranks(layout: BankLayout, space: AddressSpace) -> dict[str, tuple[int, ...]]:
    """``AdapterHandle.ranks`` of an address space."""
    ranks: dict[str, tuple[int, ...]] = {}
    for module in (*layout.experts, *layout.linears, *layout.embeddings):
        entries = layout.module_entries(module)
        placed = [space.placements.get(entry) for entry in range(entries.start, entries.stop)]
        if any(placed):
            ranks[module] = tuple(placement.rank if placement else 0 for placement in placed)
    return ranks

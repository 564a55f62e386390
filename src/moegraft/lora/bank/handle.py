"""What the bank keeps of an adapter, what it hands out of it, and which adapters leave the pool so that others fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from weakref import ReferenceType

import torch

from moegraft.core.errors import AdapterMemoryError
from moegraft.core.tables import ExpertsFactor
from moegraft.lora.bank.layout import AddressSpace, BankLayout
from moegraft.lora.bank.pool import PagePool


@dataclass(frozen=True, eq=False, kw_only=True)
class Residency:
    """Where a resident adapter lies. A new record each time, so that a reader without the lock sees one state.

    ``views``: entry -> view into the pool, valid as long as this residency is · ``ready``: what a stream waits for
    before it reads, where another one writes the pages.
    """

    slot: int
    pages: tuple[int, ...]
    ready: torch.cuda.Event | None = None
    views: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class AdapterHandle:
    """A loaded adapter. Owned and changed by its bank only; read it freely.

    ``ranks``: module -> rank of each factor (ExpertsFactor or LinearFactor order, 0 = untouched); modules that the
    adapter does not touch are absent. ``saved``: (module, parameter) pairs that it replaces. ``tokens``: modules whose
    rows it replaces. ``is_combined``: made of other adapters, for rows that name several. ``image``: host copy of
    its pages [num_pages, page_elems]; on the CPU only while evicted. ``uid``: of this load, counted from 1 and never
    given again, so that what was computed with another adapter of the name is told apart; ``number``: the smallest that
    was free when it came, for tables. ``leases``: the batches that hold it; one that is lost on the way ends by itself.
    """

    name: str
    source: str | None
    space: AddressSpace
    ranks: Mapping[str, tuple[int, ...]]
    saved: frozenset[tuple[str, str]]
    image: torch.Tensor | None
    tokens: frozenset[str] = frozenset()
    is_combined: bool = False
    residency: Residency | None = None
    pinned: bool = False
    last_use: int = 0
    uid: int = 0
    number: int = -1
    leases: tuple[ReferenceType[AdapterBatch], ...] = ()

    def rank_on(self, module: str) -> int:
        """The lanes that its LoRA has there; A of experts stacks gate and up, and behind A and B of other modules
        stands a gain of one row."""
        ranks = self.ranks[module]
        return max(ranks[1:] if len(ranks) == len(ExpertsFactor) else ranks[:2])

    @cached_property
    def largest_rank(self) -> int:
        """Over all its modules; 0 without LoRA. Engines ask in every step."""
        return max(map(self.rank_on, self.ranks), default=0)

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

    def batches(self) -> list[AdapterBatch]:
        """Those in flight that hold it."""
        held = (lease() for lease in self.leases)
        return [batch for batch in held if batch is not None and not batch.released]

    @property
    def users(self) -> int:
        """Batches in flight that need it."""
        return len(self.batches())

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

    ``uid``: of this load, never given again · ``ranks``: module -> largest rank of its LoRA · ``modules``: all modules
    that it touches, ``modules_to_save`` included · ``num_bytes`` of its factors · ``num_pages`` that they take there.
    """

    name: str
    uid: int
    source: str | None
    ranks: Mapping[str, int]
    modules: tuple[str, ...]
    num_bytes: int
    num_pages: int
    resident: bool
    pinned: bool
    in_use: bool


class AdapterBatch:
    """Made by ``AdapterBank.acquire``; a context manager. Several may be alive at once.

    ``names`` and ``row_slots``: adapter name (None = base) and slot (-1 = base) of each row of the batch ·
    ``handles``: the distinct adapters in order of their first row. None of them is evicted or unloaded, and no slot
    changes, before ``release``.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        handles: Sequence[AdapterHandle],
        release: Callable[[AdapterBatch], None],
    ) -> None:
        slots = {handle.name: handle.slot for handle in handles}
        self.names = tuple(names)
        self.row_slots = tuple(-1 if name is None else slots[name] for name in names)
        self.handles = tuple(handles)
        self.released = False
        self._release = release
        self._max_ranks: dict[str, tuple[int, ...]] = {}

    @property
    def has_adapters(self) -> bool:
        return bool(self.handles)

    def max_ranks(self, module: str) -> tuple[int, ...]:
        """Largest rank of each factor of a module (ExpertsFactor or LinearFactor order) over the adapters here.

        Empty where none of them touches the module.
        """
        ranks = self._max_ranks.get(module)
        if ranks is None:
            held = [handle.ranks[module] for handle in self.handles if module in handle.ranks]
            ranks = tuple(max(column) for column in zip(*held, strict=True))
            self._max_ranks[module] = ranks
        return ranks

    def release(self) -> None:
        """Lets the bank evict and unload these adapters again. Releasing twice does nothing."""
        self._release(self)

    def __enter__(self) -> AdapterBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class NewAdapter:
    """An adapter that lies in the pool and cannot be named yet; ``AdapterBank.install`` or ``discard`` follows.

    Where it is lost on the way, the bank takes its pages back.
    """

    def __init__(self, handle: AdapterHandle) -> None:
        self.handle = handle


def module_ranks(layout: BankLayout, space: AddressSpace) -> dict[str, tuple[int, ...]]:
    """``AdapterHandle.ranks`` of an address space."""
    ranks: dict[str, tuple[int, ...]] = {}
    for module in (*layout.experts, *layout.linears, *layout.embeddings):
        entries = layout.module_entries(module)
        placed = [space.placements.get(entry) for entry in range(entries.start, entries.stop)]
        if any(placed):
            ranks[module] = tuple(placement.rank if placement else 0 for placement in placed)
    return ranks


def check_fits_at_all(name: str, num_pages: int, pool: PagePool) -> None:
    """Raises AdapterMemoryError for an adapter that is larger than the whole pool."""
    if num_pages > pool.num_pages:
        raise AdapterMemoryError(
            f"adapter {name!r} needs {num_pages * pool.page_bytes} bytes ({num_pages} pages), "
            f"the adapter memory has {pool.capacity_bytes} bytes ({pool.num_pages} pages)"
        )


def choose_victims(
    resident: Sequence[AdapterHandle], wanted: Sequence[AdapterHandle], *, pool: PagePool, max_slots: int
) -> list[AdapterHandle]:
    """Least recently used adapters to evict, so that all ``wanted`` ones are resident afterwards.

    Only adapters that are neither wanted, pinned nor in use, and none whose leaving does not help. Raises
    AdapterMemoryError where even all of them are not enough.
    """
    missing = [handle for handle in wanted if not handle.resident]
    pages_short = sum(handle.space.num_pages for handle in missing) - pool.num_free
    slots_short = len(missing) - (max_slots - len(resident))
    if pages_short <= 0 and slots_short <= 0:
        return []
    kept = set(wanted)
    candidates = sorted((h for h in resident if h.evictable and h not in kept), key=lambda h: h.last_use)
    victims: list[AdapterHandle] = []
    for handle in candidates:
        if pages_short <= 0 and slots_short <= 0:
            break
        victims.append(handle)
        pages_short -= handle.space.num_pages
        slots_short -= 1
    if pages_short > 0 or slots_short > 0:
        raise AdapterMemoryError(_shortage(resident, missing, kept, pool, max_slots))
    for handle in reversed(victims.copy()):
        if pages_short + handle.space.num_pages <= 0 and slots_short + 1 <= 0:
            victims.remove(handle)
            pages_short += handle.space.num_pages
            slots_short += 1
    return victims


def _shortage(
    resident: Sequence[AdapterHandle],
    missing: Sequence[AdapterHandle],
    kept: set[AdapterHandle],
    pool: PagePool,
    max_slots: int,
) -> str:
    held = []
    for handle in resident:
        why = [w for w, is_so in (("pinned", handle.pinned), ("in use", handle.in_use)) if is_so]
        why += ["wanted by this batch"] if handle in kept else []
        if why:
            held.append(f"{handle.name!r} {handle.space.num_pages * pool.page_bytes} bytes ({', '.join(why)})")
    names = ", ".join(repr(handle.name) for handle in missing)
    needed = sum(handle.space.num_pages for handle in missing)
    return (
        f"adapters {names} need {needed * pool.page_bytes} bytes ({needed} pages) and {len(missing)} slots; "
        f"free: {pool.num_free * pool.page_bytes} of {pool.capacity_bytes} bytes "
        f"({pool.num_free} of {pool.num_pages} pages) and {max_slots - len(resident)} of {max_slots} slots; "
        f"cannot leave: {'; '.join(held) or 'none'}"
    )

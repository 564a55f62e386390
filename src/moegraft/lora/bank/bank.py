"""AdapterBank: many adapters' factors in one pool of pages, behind tables that kernels read.

Streams. Device work is enqueued on the caller's current stream, pages before the table rows that point to them.
Batches, loads and unloads therefore need no synchronisation where they run on one stream (the default stream, from
any number of threads); a caller who loads on another stream orders the two streams itself. ``prefetch`` has a stream of
its own, ordered by events.

Interrupts. What is loaded is ``_handles``, where an adapter lies is ``AdapterHandle.residency``, who holds it are the
batches alive: each changes by one store. Free pages, slots and table rows follow from them, and are made anew where a
change was interrupted (``_settle``). What callers hold (batches, adapters not yet installed) the bank knows weakly.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import cast
from weakref import WeakSet, ref

import torch

from moegraft.core.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterNameError,
    UnknownAdapterError,
)
from moegraft.core.tables import ExpertsFactor, ExpertsTables, LinearFactor, LinearTables
from moegraft.lora.bank.factors import collect_factors
from moegraft.lora.bank.handle import (
    AdapterBatch,
    AdapterHandle,
    AdapterInfo,
    NewAdapter,
    Residency,
    check_fits_at_all,
    choose_victims,
    module_ranks,
)
from moegraft.lora.bank.integrity import check_bank
from moegraft.lora.bank.layout import BankLayout, build_image, new_image, plan_address_space
from moegraft.lora.bank.pool import DeviceTables, PagePool, factor_tensor, saved_tensor
from moegraft.lora.targets import AdapterWeights

MAX_SLOTS = 65536


@dataclass(frozen=True, kw_only=True)
class BankMemory:
    """How full a bank is, for schedulers. In pages of ``page_bytes`` and in slots.

    ``evictable_*``: of resident adapters that are neither pinned nor in use, and so make room where it is needed.
    """

    page_bytes: int
    num_pages: int
    free_pages: int
    evictable_pages: int
    num_slots: int
    free_slots: int
    evictable_slots: int


class AdapterBank:
    """Holds loaded adapters; ``capacity_bytes`` on ``device`` for the resident ones, host memory for the others.

    A resident adapter has a *slot*, its row in all tables. Up to ``max_slots`` adapters are resident; more may be
    loaded. Where room is short, the least recently used adapters that are neither pinned nor in use are evicted to host
    memory, and come back when a batch names them. Every method is atomic: it holds one lock, and where it raises, an
    interrupt included, nothing has changed or everything has, save that adapters may have been evicted. ``poison``
    fills memory that holds nothing with NaN. Raises AdapterMemoryError for a capacity below one page or beyond the
    device.
    """

    def __init__(
        self,
        layout: BankLayout,
        *,
        capacity_bytes: int,
        device: torch.device | str,
        max_slots: int = 64,
        poison: bool = False,
    ) -> None:
        if isinstance(max_slots, bool) or not isinstance(max_slots, int) or not 1 <= max_slots <= MAX_SLOTS:
            raise ValueError(f"max_slots is {max_slots!r}, expected a whole number from 1 to {MAX_SLOTS}")
        self.layout = layout
        self.max_slots = max_slots
        self.pool = PagePool(
            capacity_bytes=capacity_bytes,
            page_elems=layout.page_elems,
            dtype=layout.dtype,
            device=device,
            poison=poison,
        )
        self.tables = DeviceTables(layout, self.pool, max_slots=max_slots)
        self._poison = poison
        self._is_cuda = self.pool.data.device.type == "cuda"
        self._lock = threading.RLock()
        self._change = _Change(self)
        self._handles: dict[str, AdapterHandle] = {}
        self._slots: list[AdapterHandle | None] = [None] * max_slots
        self._coming: WeakSet[NewAdapter] = WeakSet()
        self._num_coming = 0
        self._unsettled = False
        self._uids = itertools.count(1)
        self._clock = 0
        self.evictions = 0  # since the start, of adapters that stayed loaded
        self._side_stream: torch.cuda.Stream | None = None
        self._other_streams: dict[int, torch.cuda.Event] = {}

    def experts_tables(self, module: str) -> ExpertsTables:
        """The tables of an experts module. Raises AdapterMismatchError for an unknown one."""
        tables = self.tables.experts.get(module)
        if tables is None:
            raise AdapterMismatchError(f"the base model has no experts module {module!r}")
        return tables

    def linear_tables(self, module: str) -> LinearTables:
        """The tables of a linear map. Raises AdapterMismatchError for an unknown one."""
        tables = self.tables.linears.get(module)
        if tables is None:
            raise AdapterMismatchError(f"the base model has no linear map {module!r}")
        return tables

    def load(
        self, name: str, weights: AdapterWeights, *, source: str | None = None, resident: bool = True
    ) -> AdapterHandle:
        """Checks an adapter, copies it into the bank and makes it resident; ``source`` says where it came from.

        ``resident=False`` leaves it in host memory until a batch names it: nothing is evicted for it now.

        Raises AdapterNameError for a name that is taken or no name, AdapterTensorError or AdapterMismatchError for
        weights that do not fit the model, AdapterMemoryError where there is no room.
        """
        return self.install(self.build(name, weights, source=source, resident=resident))

    def build(
        self, name: str, weights: AdapterWeights, *, source: str | None = None, resident: bool = True
    ) -> NewAdapter:
        """All of ``load`` that may fail: the adapter lies in the pool, under no name yet. Raises as ``load``."""
        self.check_new_name(name)
        factors = collect_factors(self.layout, weights)
        space = plan_address_space(self.layout, weights, factors)
        check_fits_at_all(name, space.num_pages, self.pool)
        handle = AdapterHandle(
            name=name,
            source=source,
            space=space,
            ranks=module_ranks(self.layout, space),
            saved=frozenset((module, param) for module, params in weights.saved.items() for param in params),
            tokens=weights.tokens,
            is_combined=weights.is_combined,
            image=build_image(self.layout, space, factors, pin=self._is_cuda, poison=self._poison),
        )
        new = NewAdapter(handle)
        with self._lock, self._change:
            self.check_new_name(name)
            self._coming.add(new)
            self._num_coming += 1
            if resident:
                self._make_resident([handle])
        return new

    def install(self, new: NewAdapter) -> AdapterHandle:
        """Gives a built adapter its name; nothing to do where it has it.

        Raises AdapterNameError, having discarded the adapter, where the name is taken by now.
        """
        with self._lock, self._change:
            handle = new.handle
            if self._handles.get(handle.name) is not handle:
                if handle.name in self._handles:
                    self._coming.discard(new)
                self.check_new_name(handle.name)
                taken = {other.number for other in self._handles.values()}
                handle.number = next(number for number in itertools.count() if number not in taken)
                handle.uid = next(self._uids)
                self._handles[handle.name] = handle
            # Only now: what is neither coming nor named loses its pages where an interrupt comes.
            self._coming.discard(new)
            self._num_coming = len(self._coming)
        return handle

    def discard(self, new: NewAdapter) -> None:
        """Takes a built adapter's pages back; nothing to do where it has been installed or discarded."""
        with self._lock, self._change:
            self._coming.discard(new)
            self._settle()

    def check_new_name(self, name: str) -> None:
        """Raises AdapterNameError for what is no name, and for one that is taken."""
        if not isinstance(name, str) or not name:
            raise AdapterNameError(f"an adapter's name is a non-empty string, found {name!r}")
        if name in self._handles:
            raise AdapterNameError(f"an adapter {name!r} is already loaded; unload it first")

    def check_unused(self, name: str) -> None:
        """Raises UnknownAdapterError, or AdapterInUseError while a batch holds the adapter: ``unload`` would do so."""
        with self._lock:
            self._check_unused(self.get(name), "unloaded")

    def unload(self, name: str) -> None:
        """Forgets an adapter, pinned or not.

        Raises UnknownAdapterError, or AdapterInUseError while a batch holds it.
        """
        with self._lock, self._change:
            handle = self.get(name)
            self._check_unused(handle, "unloaded")
            del self._handles[name]
            self._leave_pool(handle)
            handle.image = None

    def evict(self, name: str) -> None:
        """Moves an adapter to host memory; nothing to do where it is there.

        Raises UnknownAdapterError, or AdapterInUseError while a batch holds it or it is pinned.
        """
        with self._lock, self._change:
            handle = self.get(name)
            self._check_unused(handle, "evicted")
            if handle.pinned:
                raise AdapterInUseError(f"adapter {name!r} is pinned and cannot be evicted; unpin it first")
            self._evict([handle])

    def ensure_resident(self, names: Iterable[str]) -> None:
        """Brings all these adapters into the pool at once. Raises UnknownAdapterError or AdapterMemoryError."""
        with self._lock, self._change:
            self._make_resident(self._distinct(names))

    def prefetch(self, names: Iterable[str]) -> bool:
        """Begins to bring adapters into the pool, from any thread; False, having changed nothing, where no room is.

        On CUDA the copies run on a stream of the bank's own, and a batch that names the adapters waits for them there.
        On the CPU they are done on return. Raises UnknownAdapterError.
        """
        with self._lock, self._change:
            handles = self._distinct(names)
            if not self._has_room(handles):
                return False
            if self._is_cuda:
                with torch.cuda.stream(self._own_stream()):
                    self._make_resident(handles, is_aside=True)
            else:
                self._make_resident(handles)
            return True

    def can_hold(self, names: Iterable[str | None]) -> bool:
        """Whether ``acquire(names)`` would find room now; changes nothing. Raises UnknownAdapterError."""
        with self._lock:
            return self._has_room(self._distinct(names))

    def memory(self) -> BankMemory:
        """How full the bank is now."""
        with self._lock, self._change:
            leaving = [handle for handle in self._slots if handle is not None and handle.evictable]
            return BankMemory(
                page_bytes=self.pool.page_bytes,
                num_pages=self.pool.num_pages,
                free_pages=self.pool.num_free,
                evictable_pages=sum(handle.space.num_pages for handle in leaving),
                num_slots=self.max_slots,
                free_slots=self._slots.count(None),
                evictable_slots=len(leaving),
            )

    def pin(self, name: str) -> None:
        """Makes an adapter resident and keeps it so. Raises UnknownAdapterError or AdapterMemoryError."""
        with self._lock, self._change:
            handle = self.get(name)
            self._make_resident([handle])
            handle.pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again. Raises UnknownAdapterError."""
        with self._lock:
            self.get(name).pinned = False

    def get(self, name: str) -> AdapterHandle:
        """The handle of a loaded adapter. Raises UnknownAdapterError, which lists what is loaded."""
        with self._lock:
            handle = self._handles.get(name) if isinstance(name, str) else None
            if handle is None:
                loaded = ", ".join(map(repr, self.names())) or "none"
                raise UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {loaded}")
            return handle

    def names(self) -> tuple[str, ...]:
        """Names of all loaded adapters, oldest first; not of combinations."""
        with self._lock:
            return tuple(name for name, handle in self._handles.items() if not handle.is_combined)

    def handles(self, *, coming: bool = False) -> tuple[AdapterHandle, ...]:
        """All loaded adapters at one moment, oldest first; ``coming``: and those that are built and not yet named."""
        with self._lock:
            new = [adapter.handle for adapter in self._coming] if coming else []
            return (*self._handles.values(), *new)

    def infos(self) -> dict[str, AdapterInfo]:
        """Snapshots of all loaded adapters at one moment, by name, oldest first."""
        with self._lock:
            return {name: self._info_of(self._handles[name]) for name in self.names()}

    def info(self, name: str) -> AdapterInfo:
        """A snapshot of one adapter, for users. Raises UnknownAdapterError."""
        with self._lock:
            return self._info_of(self.get(name))

    def image(self, name: str) -> torch.Tensor:
        """An adapter's pages [num_pages, page_elems] on the host, to be read. Raises UnknownAdapterError."""
        with self._lock:
            handle = self.get(name)
            image = handle.image
            if image is None:
                assert handle.residency is not None, "an adapter outside the pool has its image"
                image = new_image(self.layout, handle.space, pin=False)
                self.pool.read(handle.residency.pages, image)
            return image

    def _info_of(self, handle: AdapterHandle) -> AdapterInfo:
        entries = self.layout.entries
        touched = [entries[entry].module for entry in sorted(handle.space.placements)]
        return AdapterInfo(
            name=handle.name,
            uid=handle.uid,
            source=handle.source,
            ranks={module: max(ranks) for module, ranks in handle.ranks.items()},
            modules=tuple(dict.fromkeys(touched)),
            num_bytes=handle.space.num_bytes,
            num_pages=handle.space.num_pages,
            resident=handle.resident,
            pinned=handle.pinned,
            in_use=handle.in_use,
        )

    def acquire(self, names: Sequence[str | None]) -> AdapterBatch:
        """Holds the adapters of a batch, one name a row (None = base), until the batch is released.

        Raises UnknownAdapterError, or AdapterMemoryError where they do not all fit beside what must stay; nothing has
        been evicted then.
        """
        with self._lock, self._change:
            handles = self._distinct(names)
            self._make_resident(handles)
            batch = AdapterBatch(names, handles, self._release)
            try:
                for handle in handles:
                    handle.leases = (*(ref(other) for other in handle.batches()), ref(batch))
                return batch
            except BaseException:
                batch.released = True
                raise

    def _release(self, batch: AdapterBatch) -> None:
        batch.released = True
        self._note_stream()

    def factor(
        self, adapter: int | AdapterHandle, module: str, factor: ExpertsFactor | LinearFactor
    ) -> torch.Tensor | None:
        """A factor of a resident adapter (a slot or a handle), None where the adapter does not touch it.

        Experts: [h, r, row_len] for its h experts (``handle.expert_ids[module]``), or [1, r, row_len] where one
        serves all of them; linear maps and embeddings: [r, row_len]. A view into the pool where its pages follow each
        other, else a copy; valid while a batch holds the adapter. Raises AdapterError where it is not resident.
        """
        handle, residency = self._resident(adapter)
        entry = self.layout.factor_entry(module, factor)
        placement = handle.space.placements.get(entry)
        if placement is None:
            return None
        tensor = residency.views.get(entry)
        if tensor is None:
            row_len = self.layout.entries[entry].row_len
            tensor, is_view = factor_tensor(
                self.pool, residency.pages, placement, row_len, per_expert=module in self.layout.experts
            )
            if is_view:
                residency.views[entry] = tensor
        return tensor

    def saved(self, adapter: int | AdapterHandle, module: str, param: str) -> torch.Tensor | None:
        """A parameter that a resident adapter replaces, in its own shape and dtype; None where it does not.

        A view into the pool where possible; valid while a batch holds the adapter. Raises AdapterError where it is not
        resident.
        """
        handle, residency = self._resident(adapter)
        saved = self.layout.saved_entry(module, param)
        if (module, param) not in handle.saved:
            return None
        placement = handle.space.placements.get(saved.index)
        if placement is None:  # a parameter without elements
            return torch.empty(saved.shape, dtype=saved.dtype, device=self.pool.data.device)
        tensor = residency.views.get(saved.index)
        if tensor is None:
            row_len = self.layout.entries[saved.index].row_len
            tensor, is_view = saved_tensor(self.pool, residency.pages, placement, row_len, saved)
            if is_view:
                residency.views[saved.index] = tensor
        return tensor

    def close(self, *, force: bool = False) -> None:
        """Forgets all adapters and gives the pool's memory back; the bank is of no use afterwards.

        Raises AdapterInUseError, having changed nothing, while a batch holds an adapter. ``force``: takes adapters from
        batches that hold them, which are released; the memory goes when the last tensor of what still runs goes.
        """
        with self._lock, self._change:
            busy = [handle for handle in self._handles.values() if handle.in_use]
            if busy and not force:
                raise AdapterInUseError(
                    f"adapters {', '.join(handle.name for handle in busy)} serve a batch now; "
                    "close the bank after it has ended"
                )
            for handle in busy:
                for batch in handle.batches():
                    batch.release()
            self._handles.clear()
            self._coming.clear()
            self._settle()
            if not busy:
                self.pool.close()

    def check_integrity(self) -> None:
        """Raises MoegraftError where pages, tables, slots and handles do not agree. Synchronises the device."""
        with self._lock, self._change:
            check_bank(self, self._slots)

    def _resident(self, adapter: int | AdapterHandle) -> tuple[AdapterHandle, Residency]:
        if isinstance(adapter, AdapterHandle):
            handle: AdapterHandle | None = adapter
        else:
            handle = self._slots[adapter] if 0 <= adapter < self.max_slots else None
        residency = None if handle is None else handle.residency
        if handle is None or residency is None:
            what = f"slot {adapter}" if handle is None else f"adapter {handle.name!r}"
            raise AdapterError(f"{what} is not resident; acquire a batch that names the adapter first")
        return handle, residency

    def _check_unused(self, handle: AdapterHandle, verb: str) -> None:
        users = handle.users
        if users:
            what = "a batch" if users == 1 else f"{users} batches"
            raise AdapterInUseError(f"adapter {handle.name!r} serves {what} and cannot be {verb} now")

    def _distinct(self, names: Iterable[str | None]) -> list[AdapterHandle]:
        return [self.get(name) for name in dict.fromkeys(names) if name is not None]

    def _victims(self, wanted: Sequence[AdapterHandle]) -> list[AdapterHandle]:
        resident = [handle for handle in self._slots if handle is not None]
        return choose_victims(resident, wanted, pool=self.pool, max_slots=self.max_slots)

    def _has_room(self, wanted: Sequence[AdapterHandle]) -> bool:
        try:
            self._victims(wanted)
        except AdapterMemoryError:
            return False
        return True

    def _make_resident(self, wanted: Sequence[AdapterHandle], *, is_aside: bool = False) -> None:
        if any(handle.residency is None for handle in wanted):
            self._evict(self._victims(wanted))
        for handle in wanted:
            if handle.residency is None:
                self._enter_pool(handle, is_aside=is_aside)
            elif not is_aside:
                self._wait_for(handle.residency)
            self._clock += 1
            handle.last_use = self._clock
        self._note_stream()

    def _evict(self, handles: Sequence[AdapterHandle]) -> None:
        """On CUDA the host image was kept; elsewhere all images are read back before anything changes."""
        for handle in handles:
            if handle.residency is not None and handle.image is None:
                image = new_image(self.layout, handle.space, pin=self._is_cuda)
                self.pool.read(handle.residency.pages, image)
                handle.image = image
        for handle in handles:
            self._leave_pool(handle)
            self.evictions += 1

    def _enter_pool(self, handle: AdapterHandle, *, is_aside: bool) -> None:
        assert handle.image is not None, "an adapter outside the pool has its image"
        slot = self._slots.index(None)
        pages = self.pool.allocate(handle.space.num_pages)
        self.pool.write(pages, handle.image)
        self.tables.fill(slot, handle.space, pages)
        ready = cast("torch.cuda.Event", torch.cuda.current_stream().record_event()) if is_aside else None
        self._slots[slot] = handle
        handle.residency = Residency(slot=slot, pages=pages, ready=ready)
        if not self._is_cuda:
            handle.image = None

    def _leave_pool(self, handle: AdapterHandle) -> None:
        residency, handle.residency = handle.residency, None
        if residency is not None:
            self._wait_for(residency)
            self.tables.clear(residency.slot)
            self.pool.free(residency.pages)
            self._slots[residency.slot] = None

    def _settle(self) -> None:
        """Makes pages, slots and table rows anew from the adapters that there are."""
        there = [*self._handles.values(), *(new.handle for new in self._coming)]
        held = {handle.residency.slot: handle for handle in there if handle.residency is not None}
        self._num_coming = len(self._coming)
        self.pool.reclaim([page for handle in held.values() for page in cast("Residency", handle.residency).pages])
        self._slots = [held.get(slot) for slot in range(self.max_slots)]
        self.tables.clear_all([slot for slot in range(self.max_slots) if slot not in held])

    def _own_stream(self) -> torch.cuda.Stream:
        """Behind all that was enqueued so far: pages that are written anew may have been read until now."""
        device = self.pool.data.device
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(device)
        self._side_stream.wait_stream(torch.cuda.default_stream(device))
        for event in self._other_streams.values():
            self._side_stream.wait_event(event)
        return self._side_stream

    def _note_stream(self) -> None:
        """Remembers where other streams than the default one stand, for ``_own_stream``."""
        if self._is_cuda and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.pool.data.device)
            if stream != torch.cuda.default_stream(self.pool.data.device):
                self._other_streams[stream.stream_id] = stream.record_event()

    def _wait_for(self, residency: Residency) -> None:
        if residency.ready is not None:
            torch.cuda.current_stream(self.pool.data.device).wait_event(residency.ready)


class _Change:
    """Around a change of a bank, inside its lock: settles what this or an earlier change left half done."""

    def __init__(self, bank: AdapterBank) -> None:
        self.bank = bank

    def __enter__(self) -> None:
        bank = self.bank
        if bank._unsettled or len(bank._coming) != bank._num_coming:
            bank._settle()
        bank._unsettled = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, UnknownAdapterError | AdapterInUseError):
            self.bank._settle()
        self.bank._unsettled = False

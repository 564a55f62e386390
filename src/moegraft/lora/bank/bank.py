"""AdapterBank: many adapters' factors in one pool of pages, behind tables that kernels read.

Streams. All device work is enqueued on the caller's current stream, pages before the table rows that point to them.
Batches, loads and unloads therefore need no synchronisation where they run on one stream (the default stream, from
any number of threads); a caller who loads on another stream orders the two streams itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from moegraft.core.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterMismatchError,
    AdapterNameError,
    UnknownAdapterError,
)
from moegraft.core.tables import ExpertsFactor, ExpertsTables, LinearFactor, LinearTables
from moegraft.lora.bank.address_space import build_image, new_image, plan_address_space
from moegraft.lora.bank.batch import AdapterBatch
from moegraft.lora.bank.device_tables import DeviceTables
from moegraft.lora.bank.factors import collect_factors
from moegraft.lora.bank.handle import AdapterHandle, AdapterInfo, Residency, module_ranks
from moegraft.lora.bank.integrity import check_bank
from moegraft.lora.bank.layout import BankLayout
from moegraft.lora.bank.pool import PagePool
from moegraft.lora.bank.residency import check_fits_at_all, choose_victims
from moegraft.lora.bank.views import factor_tensor, saved_tensor
from moegraft.lora.targets import AdapterWeights


class AdapterBank:
    """Holds loaded adapters; ``capacity_bytes`` on ``device`` for the resident ones, host memory for the others.

    A resident adapter has a *slot*, its row in all tables. Up to ``max_slots`` adapters are resident; more may be
    loaded. Where room is short, the least recently used adapters that are neither pinned nor in use are evicted to host
    memory, and come back when a batch names them. Every method is atomic: it holds one re-entrant lock, and where it
    raises nothing has changed, save that adapters may have been evicted where a copy to the device failed. ``poison``
    fills memory that holds nothing with NaN.
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
        if max_slots < 1:
            raise ValueError(f"max_slots is {max_slots}, expected at least 1")
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
        self._handles: dict[str, AdapterHandle] = {}
        self._slots: list[AdapterHandle | None] = [None] * max_slots
        self._clock = 0

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
        self._check_new_name(name)
        factors = collect_factors(self.layout, weights)
        space = plan_address_space(self.layout, weights, factors)
        check_fits_at_all(name, space.num_pages, self.pool)
        handle = AdapterHandle(
            name=name,
            source=source,
            space=space,
            ranks=module_ranks(self.layout, space),
            saved=frozenset((module, param) for module, params in weights.saved.items() for param in params),
            image=build_image(self.layout, space, factors, pin=self._is_cuda, poison=self._poison),
        )
        with self._lock:
            self._check_new_name(name)
            if resident:
                self._make_resident([handle])
            self._handles[name] = handle
        return handle

    def unload(self, name: str) -> None:
        """Forgets an adapter, pinned or not.

        Raises UnknownAdapterError, or AdapterInUseError while a batch holds it.
        """
        with self._lock:
            handle = self.get(name)
            self._check_unused(handle, "unloaded")
            if handle.residency is not None:
                self._leave_pool(handle, handle.residency)
            handle.image = None
            del self._handles[name]

    def evict(self, name: str) -> None:
        """Moves an adapter to host memory; nothing to do where it is there.

        Raises UnknownAdapterError, or AdapterInUseError while a batch holds it or it is pinned.
        """
        with self._lock:
            handle = self.get(name)
            self._check_unused(handle, "evicted")
            if handle.pinned:
                raise AdapterInUseError(f"adapter {name!r} is pinned and cannot be evicted; unpin it first")
            if handle.residency is not None:
                self._evict([handle])

    def ensure_resident(self, names: Iterable[str]) -> None:
        """Brings all these adapters into the pool at once. Raises UnknownAdapterError or AdapterMemoryError."""
        with self._lock:
            self._make_resident([self.get(name) for name in dict.fromkeys(names)])

    def pin(self, name: str) -> None:
        """Makes an adapter resident and keeps it so. Raises UnknownAdapterError or AdapterMemoryError."""
        with self._lock:
            self.ensure_resident([name])
            self.get(name).pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again. Raises UnknownAdapterError."""
        with self._lock:
            self.get(name).pinned = False

    def get(self, name: str) -> AdapterHandle:
        """The handle of a loaded adapter. Raises UnknownAdapterError, which lists what is loaded."""
        with self._lock:
            handle = self._handles.get(name)
            if handle is None:
                loaded = ", ".join(repr(known) for known in self._handles) or "none"
                raise UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {loaded}")
            return handle

    def names(self) -> tuple[str, ...]:
        """Names of all loaded adapters, oldest first."""
        with self._lock:
            return tuple(self._handles)

    def info(self, name: str) -> AdapterInfo:
        """A snapshot of one adapter, for users. Raises UnknownAdapterError."""
        with self._lock:
            handle = self.get(name)
            entries = self.layout.entries
            touched = [entries[entry].module for entry in sorted(handle.space.placements)]
            return AdapterInfo(
                name=name,
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

        Raises UnknownAdapterError, or AdapterMemoryError where they do not all fit beside what must stay.
        """
        with self._lock:
            handles = [self.get(name) for name in dict.fromkeys(names) if name is not None]
            self._make_resident(handles)
            for handle in handles:
                handle.users += 1
            return AdapterBatch(names, handles, self._release)

    def _release(self, batch: AdapterBatch) -> None:
        with self._lock:
            if not batch.released:
                batch.released = True
                for handle in batch.handles:
                    handle.users -= 1

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

    def close(self) -> None:
        """Forgets all adapters and gives the pool's memory back; the bank is of no use afterwards.

        Raises AdapterInUseError, having changed nothing, while a batch holds an adapter.
        """
        with self._lock:
            busy = [handle.name for handle in self._handles.values() if handle.in_use]
            if busy:
                raise AdapterInUseError(
                    f"adapters {', '.join(busy)} serve a batch now; close the bank after it has ended"
                )
            for name in self.names():
                self.unload(name)
            self.pool.close()

    def check_integrity(self) -> None:
        """Raises MoegraftError where pages, tables, slots and handles do not agree. Synchronises the device."""
        with self._lock:
            check_bank(self, self._handles, self._slots)

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

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterNameError(f"an adapter's name is a non-empty string, found {name!r}")
        if name in self._handles:
            raise AdapterNameError(f"an adapter {name!r} is already loaded; unload it first")

    def _check_unused(self, handle: AdapterHandle, verb: str) -> None:
        if handle.in_use:
            raise AdapterInUseError(f"adapter {handle.name!r} serves {handle.users} batches and cannot be {verb} now")

    def _make_resident(self, wanted: Sequence[AdapterHandle]) -> None:
        resident = [handle for handle in self._slots if handle is not None]
        self._evict(choose_victims(resident, wanted, pool=self.pool, max_slots=self.max_slots))
        for handle in wanted:
            if not handle.resident:
                self._enter_pool(handle)
            self._clock += 1
            handle.last_use = self._clock

    def _evict(self, handles: Sequence[AdapterHandle]) -> None:
        """On CUDA the host image was kept; elsewhere all images are read back before anything changes."""
        images = {}
        for handle in handles:
            if handle.residency is not None and handle.image is None:
                images[handle] = new_image(self.layout, handle.space, pin=self._is_cuda)
                self.pool.read(handle.residency.pages, images[handle])
        for handle in handles:
            handle.image = images.get(handle, handle.image)
            if handle.residency is not None:
                self._leave_pool(handle, handle.residency)

    def _enter_pool(self, handle: AdapterHandle) -> None:
        assert handle.image is not None, "an adapter outside the pool has its image"
        slot = self._slots.index(None)
        pages = self.pool.allocate(handle.space.num_pages)
        try:
            self.pool.write(pages, handle.image)
            self.tables.fill(slot, handle.space, pages)
        except BaseException:
            self.tables.clear(slot)
            self.pool.free(pages)
            raise
        self._slots[slot] = handle
        handle.residency = Residency(slot=slot, pages=pages)
        if not self._is_cuda:
            handle.image = None

    def _leave_pool(self, handle: AdapterHandle, residency: Residency) -> None:
        self.tables.clear(residency.slot)
        self.pool.free(residency.pages)
        self._slots[residency.slot] = None
        handle.residency = None

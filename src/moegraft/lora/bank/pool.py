"""The memory of the adapter bank on the device: pages, tables that say where factors lie, views of what lies there."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from moegraft.core.errors import AdapterMemoryError, MoegraftError
from moegraft.core.memory import format_bytes
from moegraft.core.tables import NUM_FIELDS, ExpertsTables, LinearTables
from moegraft.lora.bank.factors import from_bank_rows
from moegraft.lora.bank.layout import AddressSpace, BankLayout, Placement, SavedEntry


def page_runs(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts a list of page numbers into ascending runs without holes: (position in the list, first page, length).

    ``[4, 5, 9, 2, 3]`` gives (0, 4, 2), (2, 9, 1), (3, 2, 2).
    """
    begin = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield begin, pages[begin], end - begin
            begin = end


class PagePool:
    """``capacity_bytes // page_bytes`` pages of ``page_elems`` elements each.

    ``data`` [num_pages * page_elems] and ``pages`` [num_pages, page_elems] are the same memory, whose address never
    changes. ``poison`` fills pages with NaN before their first use and when they are freed. Not thread-safe: its owner
    holds the lock. Raises AdapterMemoryError where the capacity does not hold one page.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        page_elems: int,
        dtype: torch.dtype,
        device: torch.device | str,
        poison: bool = False,
    ) -> None:
        self.page_elems = page_elems
        self.page_bytes = page_elems * dtype.itemsize
        self.num_pages = capacity_bytes // self.page_bytes
        if self.num_pages < 1:
            raise AdapterMemoryError(
                f"adapter memory of {capacity_bytes} bytes is smaller than one page of {self.page_bytes} bytes"
            )
        _check_room(capacity_bytes, torch.device(device))
        self._poison = poison
        try:
            # A tensor made in inference mode could not be updated in place outside of it.
            with torch.inference_mode(False):
                self.data = torch.empty(self.num_pages * page_elems, dtype=dtype, device=device)
        except RuntimeError as error:
            raise AdapterMemoryError(
                f"adapter memory of {capacity_bytes} bytes could not be had on {device}: {str(error).splitlines()[0]}"
            ) from error
        self.pages = self.data.view(self.num_pages, page_elems)
        if poison:
            self.data.fill_(float("nan"))
        self._free_runs: list[tuple[int, int]] = [(0, self.num_pages)]  # (first page, length): sorted, never adjacent
        self._num_free = self.num_pages

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages; what was asked for, rounded down to pages."""
        return self.num_pages * self.page_bytes

    @property
    def num_free(self) -> int:
        return self._num_free

    def free_pages(self) -> list[int]:
        """Numbers of all free pages, ascending."""
        return [page for first, length in self._free_runs for page in range(first, first + length)]

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Takes pages from the shortest free run that holds them all, else from the longest runs first.

        One run lets a factor be viewed without a copy and an adapter be moved with one copy. Raises
        AdapterMemoryError, taking nothing, where too few pages are free.
        """
        if num_pages > self._num_free:
            raise AdapterMemoryError(f"{num_pages} pages are needed, {self._num_free} of {self.num_pages} are free")
        if num_pages == 0:
            return ()
        fitting = [run for run in self._free_runs if run[1] >= num_pages]
        if fitting:
            chosen = [min(fitting, key=lambda run: run[1])]
        else:
            chosen = sorted(self._free_runs, key=lambda run: -run[1])
        taken: list[int] = []
        for first, length in chosen:
            count = min(length, num_pages - len(taken))
            if count == 0:
                break
            taken.extend(range(first, first + count))
            self._free_runs.remove((first, length))
            if count < length:
                bisect.insort(self._free_runs, (first + count, length - count))
        self._num_free -= num_pages
        return tuple(taken)

    def close(self) -> None:
        """Gives the memory itself back, whoever still holds the tensor; the pool is of no use afterwards."""
        self.data.untyped_storage().resize_(0)

    def free(self, pages: Sequence[int]) -> None:
        """Gives pages back. Raises MoegraftError, freeing nothing, where one is not allocated or named twice."""
        released = list(page_runs(sorted(pages)))
        merged: list[tuple[int, int]] = []
        for first, length in sorted(self._free_runs + [(first, length) for _, first, length in released]):
            end = merged[-1][0] + merged[-1][1] if merged else 0
            if first < end or first + length > self.num_pages:
                raise MoegraftError(f"page {first} is freed twice or lies outside the pool of {self.num_pages} pages")
            if merged and first == end:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((first, length))
        if self._poison:
            for _, first, length in released:
                self.pages[first : first + length].fill_(float("nan"))
        self._free_runs = merged
        self._num_free += len(pages)

    def reclaim(self, owned: Sequence[int]) -> None:
        """Sets the free list anew: every page that is not ``owned``, whatever was half done before."""
        taken = sorted({-1, *owned, self.num_pages})
        runs = [(left + 1, right - left - 1) for left, right in pairwise(taken) if right - left > 1]
        if self._poison:
            for first, length in runs:
                self.pages[first : first + length].fill_(float("nan"))
        self._free_runs = runs
        self._num_free = sum(length for _, length in runs)

    def write(self, pages: Sequence[int], image: torch.Tensor) -> None:
        """Copies ``image`` [len(pages), page_elems] into the pages: one copy a run, enqueued on the current stream."""
        for begin, first, length in page_runs(pages):
            self.pages[first : first + length].copy_(image[begin : begin + length], non_blocking=True)

    def read(self, pages: Sequence[int], image: torch.Tensor) -> None:
        """Copies the pages into ``image`` [len(pages), page_elems]."""
        for begin, first, length in page_runs(pages):
            image[begin : begin + length].copy_(self.pages[first : first + length])

    def check_integrity(self) -> None:
        """Raises MoegraftError where the free runs overlap, touch, leave the pool, or do not add up."""
        end = -1
        for first, length in self._free_runs:
            if first <= end or length < 1 or first + length > self.num_pages:
                raise MoegraftError(f"free run ({first}, {length}) in {self._free_runs} of {self.num_pages} pages")
            end = first + length
        total = sum(length for _, length in self._free_runs)
        if total != self._num_free:
            raise MoegraftError(f"free runs hold {total} pages, the counter says {self._num_free}")


def _check_room(num_bytes: int, device: torch.device) -> None:
    """Raises AdapterMemoryError for more bytes than the device has in all, whoever uses them now."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if num_bytes > total:
        raise AdapterMemoryError(
            f"adapter memory of {num_bytes} bytes ({format_bytes(num_bytes)}) is asked for on {device}, "
            f"which has {total} bytes ({format_bytes(total)})"
        )


class DeviceTables:
    """All int32, an adapter's row of each updated by one copy.

    ``page_table`` [slots, num_pages] · ``factors`` [slots, num_entries, NUM_FIELDS] · ``expert_index`` [slots, E summed
    over the experts modules] · ``experts`` and ``linears``: the views of each module.
    """

    def __init__(self, layout: BankLayout, pool: PagePool, *, max_slots: int) -> None:
        device = pool.data.device
        # A tensor made in inference mode could not be updated in place outside of it.
        with torch.inference_mode(False):
            self.page_table = torch.zeros(max_slots, pool.num_pages, dtype=torch.int32, device=device)
            self.factors = torch.zeros(max_slots, layout.num_entries, NUM_FIELDS, dtype=torch.int32, device=device)
            self.expert_index = torch.full((max_slots, layout.num_expert_columns), -1, dtype=torch.int32, device=device)
        self._pin = device.type == "cuda"
        self.experts = {
            name: ExpertsTables(
                pool=pool.data,
                page_table=self.page_table,
                factors=self.factors[:, layout.module_entries(name)],
                expert_index=self.expert_index[:, layout.expert_columns(name)],
                page_elems=pool.page_elems,
            )
            for name in layout.experts
        }
        self.linears = {
            name: LinearTables(
                pool=pool.data,
                page_table=self.page_table,
                factors=self.factors[:, layout.module_entries(name)],
                page_elems=pool.page_elems,
            )
            for name in layout.linears
        }

    def fill(self, slot: int, space: AddressSpace, pages: Sequence[int]) -> None:
        """Shows an adapter in ``slot``: three copies, enqueued on the current stream."""
        rows = (
            (self.page_table[slot, : len(pages)], torch.tensor(pages, dtype=torch.int32)),
            (self.factors[slot], space.descriptors),
            (self.expert_index[slot], space.expert_index),
        )
        for target, row in rows:
            # A fresh page-locked row: torch keeps it until its copy is done, whatever the host does next.
            target.copy_(row.pin_memory() if self._pin and row.numel() else row, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Makes ``slot`` a base slot: rank 0 everywhere, no expert held."""
        self.factors[slot].zero_()
        self.expert_index[slot].fill_(-1)

    def clear_all(self, slots: Sequence[int]) -> None:
        """Makes all of these base slots."""
        rows = torch.tensor(slots, dtype=torch.long, device=self.factors.device)
        self.factors.index_fill_(0, rows, 0)
        self.expert_index.index_fill_(0, rows, -1)


def first_element(pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int) -> int | None:
    """Element of the pool where row 0 begins, if row j begins ``j * row_len`` behind it for every j; else None."""
    span = math.ceil(placement.rows / (pool.page_elems // row_len))
    used = tuple(pages[placement.first_page : placement.first_page + span])
    first = used[0]
    if span > 1 and (pool.page_elems % row_len or used != tuple(range(first, first + span))):
        return None
    return first * pool.page_elems + placement.offset


def gather_rows(pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int) -> torch.Tensor:
    """A copy of all rows of a factor that spans several pages: [rows, row_len]."""
    rows_per_page = pool.page_elems // row_len
    span = math.ceil(placement.rows / rows_per_page)
    used = pages[placement.first_page : placement.first_page + span]
    rows = torch.cat([pool.pages[page, : rows_per_page * row_len] for page in used])
    return rows.view(-1, row_len)[: placement.rows]


def factor_tensor(
    pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int, *, per_expert: bool
) -> tuple[torch.Tensor, bool]:
    """A factor as [copies, rank, row_len] or, not ``per_expert``, [rank, row_len]; and whether it is a view."""
    shape = (placement.copies, placement.rank, row_len) if per_expert else (placement.rank, row_len)
    start = first_element(pool, pages, placement, row_len)
    if start is None:
        return gather_rows(pool, pages, placement, row_len).view(shape), False
    strides = (placement.rank * row_len, row_len, 1) if per_expert else (row_len, 1)
    return pool.data.as_strided(shape, strides, start), True


def saved_tensor(
    pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int, saved: SavedEntry
) -> tuple[torch.Tensor, bool]:
    """A saved parameter in its own shape and dtype, bit by bit; and whether it is a view."""
    start = first_element(pool, pages, placement, row_len)
    if start is None:
        return from_bank_rows(gather_rows(pool, pages, placement, row_len), saved.shape, saved.dtype), False
    bank_bytes, own_bytes = pool.data.dtype.itemsize, saved.dtype.itemsize
    data = pool.data.view(saved.dtype)
    pitch = row_len * bank_bytes // own_bytes
    strides = [1] * len(saved.shape)
    for dim in range(len(strides) - 2, -1, -1):
        strides[dim] = pitch if dim == len(strides) - 2 else strides[dim + 1] * saved.shape[dim + 1]
    return data.as_strided(saved.shape, strides, start * bank_bytes // own_bytes), True

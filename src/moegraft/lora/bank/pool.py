"""The memory of the adapter bank: one tensor, cut into pages of equal size. Knows nothing about adapters."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import torch

from moegraft.core.errors import AdapterMemoryError, MoegraftError


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
        self._poison = poison
        # A tensor made in inference mode could not be updated in place outside of it.
        with torch.inference_mode(False):
            self.data = torch.empty(self.num_pages * page_elems, dtype=dtype, device=device)
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

"""What must hold in an adapter bank at any time between two calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moegraft.core.errors import MoegraftError
from moegraft.lora.bank.handle import AdapterHandle, Residency

if TYPE_CHECKING:
    from moegraft.lora.bank.bank import AdapterBank


def check_bank(bank: AdapterBank, slots: Sequence[AdapterHandle | None]) -> None:
    """Raises MoegraftError with the details of the first thing that does not agree."""
    handles = bank.handles(coming=True)
    bank.pool.check_integrity()
    _check_pages(bank, slots)
    _check_slots(bank, handles, slots)
    for handle in handles:
        _check_address_space(bank, handle)


def _check_pages(bank: AdapterBank, slots: Sequence[AdapterHandle | None]) -> None:
    owner: dict[int, str] = dict.fromkeys(bank.pool.free_pages(), "the free list")
    for handle in slots:
        if handle is None or handle.residency is None:
            continue
        for page in handle.residency.pages:
            if page in owner:
                raise MoegraftError(f"page {page} belongs to {owner[page]} and to adapter {handle.name!r}")
            owner[page] = f"adapter {handle.name!r}"
    lost = set(range(bank.pool.num_pages)) ^ set(owner)
    if lost:
        raise MoegraftError(f"pages {sorted(lost)} are neither free nor owned, or outside the pool")


def _check_slots(bank: AdapterBank, handles: Sequence[AdapterHandle], slots: Sequence[AdapterHandle | None]) -> None:
    factors, expert_index = bank.tables.factors.cpu(), bank.tables.expert_index.cpu()
    page_table = bank.tables.page_table.cpu()
    for slot, handle in enumerate(slots):
        if handle is None:
            if factors[slot].any() or (expert_index[slot] != -1).any():
                raise MoegraftError(f"slot {slot} is free, its table rows are not")
            continue
        residency = handle.residency
        if handle not in handles or residency is None or residency.slot != slot:
            raise MoegraftError(f"slot {slot} holds adapter {handle.name!r}, whose handle says {residency}")
        pages = page_table[slot, : len(residency.pages)].tolist()
        if tuple(pages) != residency.pages or len(pages) != handle.space.num_pages:
            raise MoegraftError(f"slot {slot}: page table {pages}, the handle has {residency.pages}")
        if not torch.equal(factors[slot], handle.space.descriptors):
            raise MoegraftError(f"slot {slot}: descriptors differ from those of adapter {handle.name!r}")
        if not torch.equal(expert_index[slot], handle.space.expert_index):
            raise MoegraftError(f"slot {slot}: expert positions differ from those of adapter {handle.name!r}")


def _check_address_space(bank: AdapterBank, handle: AdapterHandle) -> None:
    name, residency = handle.name, handle.residency
    if residency is None and (handle.image is None or handle.in_use or handle.pinned):
        raise MoegraftError(f"adapter {name!r} is evicted, but in use, pinned, or without a host image")
    if residency is not None:
        _check_views(bank, handle, residency)
    spans: list[tuple[int, int, str]] = []
    for entry, placement in handle.space.placements.items():
        row_len = bank.layout.entries[entry].row_len
        rows_per_page = bank.layout.rows_per_page(entry)
        label = f"{bank.layout.entries[entry].module} {bank.layout.entries[entry].label}"
        for index in range(math.ceil(placement.rows / rows_per_page)):
            rows = min(rows_per_page, placement.rows - index * rows_per_page)
            first = (placement.first_page + index) * bank.layout.page_elems
            if placement.offset + rows * row_len > bank.layout.page_elems:
                raise MoegraftError(f"adapter {name!r}: {label} leaves its page")
            spans.append((first + placement.offset, first + placement.offset + rows * row_len, label))
    spans.sort()
    for (_, end, left), (start, _, right) in itertools.pairwise(spans):
        if start < end:
            raise MoegraftError(f"adapter {name!r}: {left} and {right} overlap")
    if spans and spans[-1][1] > handle.space.num_pages * bank.layout.page_elems:
        raise MoegraftError(f"adapter {name!r}: {spans[-1][2]} lies outside its {handle.space.num_pages} pages")


def _check_views(bank: AdapterBank, handle: AdapterHandle, residency: Residency) -> None:
    storage = bank.pool.data.untyped_storage().data_ptr()
    for entry, view in residency.views.items():
        if view.untyped_storage().data_ptr() != storage:
            raise MoegraftError(f"adapter {handle.name!r}: the view of entry {entry} lies outside the pool")

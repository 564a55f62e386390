"""One adapter's address space of pages: where its factors go, and its image in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moegraft.core.tables import NUM_FIELDS, Field
from moegraft.lora.bank.factors import FactorRows
from moegraft.lora.bank.layout import BankLayout
from moegraft.lora.targets import AdapterWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a factor of ``rows`` rows begins, relative to its adapter; see the formula in ``core/tables.py``."""

    rank: int
    copies: int
    lane: int
    first_page: int
    offset: int

    @property
    def rows(self) -> int:
        return self.rank * self.copies

    @property
    def expert_stride(self) -> int:
        return self.rank if self.copies > 1 else 0


@dataclass(frozen=True, kw_only=True)
class AddressSpace:
    """One adapter as the bank sees it. Never changes while the adapter is loaded, wherever its pages are.

    ``placements`` by entry · ``descriptors`` [num_entries, NUM_FIELDS] int32 · ``expert_index`` [num_expert_columns]
    int32 · ``num_bytes`` without the rounding to pages · ``expert_ids`` by experts module.
    """

    placements: Mapping[int, Placement]
    num_pages: int
    num_bytes: int
    descriptors: torch.Tensor
    expert_index: torch.Tensor
    expert_ids: Mapping[str, tuple[int, ...]]


def plan_address_space(layout: BankLayout, weights: AdapterWeights, factors: Sequence[FactorRows]) -> AddressSpace:
    """Decides where each factor goes. Changes nothing."""
    placements, num_pages = place_factors(layout, factors)
    descriptors = torch.zeros(layout.num_entries, NUM_FIELDS, dtype=torch.int32)
    if placements:
        descriptors[list(placements)] = torch.tensor(
            [_descriptor(placement) for placement in placements.values()], dtype=torch.int32
        )
    expert_index = torch.full((layout.num_expert_columns,), -1, dtype=torch.int32)
    touched = {layout.entries[entry].module for entry in placements}
    expert_ids = {module: lora.expert_ids for module, lora in weights.experts.items() if module in touched}
    for module, ids in expert_ids.items():
        expert_index[layout.expert_columns(module)][list(ids)] = torch.arange(len(ids), dtype=torch.int32)
    return AddressSpace(
        placements=placements,
        num_pages=num_pages,
        num_bytes=sum(factor.rows.numel() for factor in factors) * layout.dtype.itemsize,
        descriptors=descriptors,
        expert_index=expert_index,
        expert_ids=expert_ids,
    )


def _descriptor(placement: Placement) -> list[int]:
    fields = [0] * NUM_FIELDS
    fields[Field.FIRST_PAGE] = placement.first_page
    fields[Field.OFFSET] = placement.offset
    fields[Field.RANK] = placement.rank
    fields[Field.EXPERT_STRIDE] = placement.expert_stride
    fields[Field.LANE] = placement.lane
    return fields


def place_factors(layout: BankLayout, factors: Iterable[FactorRows]) -> tuple[dict[int, Placement], int]:
    """Largest first: what needs several pages opens new ones; the rest fills the first page with room behind its end.

    Gives the placements by entry and the number of pages. Offsets are multiples of the row length where it divides the
    page, so that rows can be gathered from ``pool.view(-1, row_len)``, and of 16 bytes elsewhere.
    """
    ordered = sorted((f for f in factors if f.rows.numel()), key=lambda f: (-f.rows.numel(), f.entry))
    smallest = ordered[-1].rows.numel() if ordered else 0
    placements: dict[int, Placement] = {}
    open_pages: dict[int, int] = {}  # page -> elements taken, for pages with room for the smallest factor
    num_pages = 0
    for factor in ordered:
        num_rows, row_len = factor.rows.shape
        rows_per_page = layout.rows_per_page(factor.entry)
        align = layout.align_elems if layout.page_elems % row_len else row_len
        # What is too large for one page finds no room either.
        spot = _find_room(open_pages, num_rows * row_len, align, layout.page_elems)
        if spot is not None:
            first_page, offset = spot
            last_page, end = first_page, offset + num_rows * row_len
        else:
            first_page, offset = num_pages, 0
            num_pages += math.ceil(num_rows / rows_per_page)
            last_page = num_pages - 1
            end = (num_rows - (last_page - first_page) * rows_per_page) * row_len
        placements[factor.entry] = Placement(
            rank=factor.rank, copies=factor.copies, lane=factor.lane, first_page=first_page, offset=offset
        )
        open_pages[last_page] = end
        if end + smallest > layout.page_elems:
            del open_pages[last_page]
    return placements, num_pages


def _find_room(open_pages: Mapping[int, int], size: int, align: int, page_elems: int) -> tuple[int, int] | None:
    for page, end in open_pages.items():
        start = math.ceil(end / align) * align
        if start + size <= page_elems:
            return page, start
    return None


def build_image(
    layout: BankLayout, space: AddressSpace, factors: Iterable[FactorRows], *, pin: bool, poison: bool = False
) -> torch.Tensor:
    """The adapter's pages as they will lie in the pool, in host memory: [num_pages, page_elems]."""
    image = new_image(layout, space, pin=pin)
    if poison:
        image.fill_(float("nan"))
    for factor in factors:
        placement = space.placements.get(factor.entry)
        if placement is not None:
            _write_rows(image, placement, factor.rows, layout.rows_per_page(factor.entry))
    return image


def new_image(layout: BankLayout, space: AddressSpace, *, pin: bool) -> torch.Tensor:
    """Host memory for an adapter's pages; page-locked where ``pin``, so that copies from it overlap with work."""
    return torch.empty(space.num_pages, layout.page_elems, dtype=layout.dtype, pin_memory=pin)


def read_rows(image: torch.Tensor, placement: Placement, row_len: int, rows_per_page: int) -> torch.Tensor:
    """A copy of the rows [copies * rank, row_len] that ``build_image`` has written."""
    num_rows = placement.rank * placement.copies
    rows = image.new_empty(num_rows, row_len)
    first, offset = placement.first_page, placement.offset
    full_pages = 0 if offset else num_rows // rows_per_page
    done = full_pages * rows_per_page
    full = image[first : first + full_pages, : rows_per_page * row_len]
    rows[:done].view(full_pages, rows_per_page, row_len).copy_(full.view(full_pages, rows_per_page, row_len))
    if done < num_rows:
        size = (num_rows - done) * row_len
        rows[done:].copy_(image[first + full_pages, offset : offset + size].view(-1, row_len))
    return rows


def _write_rows(image: torch.Tensor, placement: Placement, rows: torch.Tensor, rows_per_page: int) -> None:
    num_rows, row_len = rows.shape
    first, offset = placement.first_page, placement.offset
    full_pages = 0 if offset else num_rows // rows_per_page
    done = full_pages * rows_per_page
    full = image[first : first + full_pages, : rows_per_page * row_len]
    full.view(full_pages, rows_per_page, row_len).copy_(rows[:done].view(full_pages, rows_per_page, row_len))
    if done < num_rows:
        size = (num_rows - done) * row_len
        image[first + full_pages, offset : offset + size].view(-1, row_len).copy_(rows[done:])

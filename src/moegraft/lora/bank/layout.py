"""The address space of pages: every factor that an adapter of this base model may have, and where one's factors lie.

``BankLayout`` numbers the factors of the model and chooses the page size, ``AddressSpace`` is one adapter's: where each
of its factors goes, and their image in host memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moegraft.core.errors import AdapterMismatchError
from moegraft.core.tables import NUM_FIELDS, ExpertsFactor, Field, LinearFactor
from moegraft.lora.targets import AdapterWeights, EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets

DEFAULT_PAGE_BYTES = 256 * 1024
ALIGN_BYTES = 16  # the widest load of a GPU thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One factor of one module: a row of ``AdapterBank.factors``. ``row_len`` in elements of the bank's dtype."""

    module: str
    label: str
    row_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedEntry:
    """A whole parameter (``modules_to_save``): ``rows`` rows of its last dimension, stored bit by bit.

    Where its dtype is not the bank's, a row is counted in elements of the bank, rounded up.
    """

    index: int
    shape: torch.Size
    dtype: torch.dtype
    rows: int


def choose_page_elems(row_lens: Iterable[int], *, target_elems: int, align_elems: int) -> int:
    """Elements of a page: about ``target_elems``, never less than the longest row, a multiple of ``align_elems``.

    ``row_lens`` by importance: each in turn is made to divide the page as long as the least common multiple stays
    within one page. A row length that divides the page wastes nothing at a page's end, and its rows can be gathered
    from ``pool.view(-1, row_len)``.
    """
    lens = list(dict.fromkeys(row_lens))
    longest = max(lens, default=1)
    unit = align_elems
    for row_len in lens:
        multiple = math.lcm(unit, row_len)
        if multiple <= max(target_elems, longest):
            unit = multiple
    return max(math.ceil(longest / unit), round(target_elems / unit), 1) * unit


def _by_frequency(row_lens: Iterable[int]) -> list[int]:
    return [row_len for row_len, _ in sorted(Counter(row_lens).items(), key=lambda item: (-item[1], item[0]))]


class BankLayout:
    """The entries of an adapter bank for one base model.

    An experts module has 8 consecutive entries (ExpertsFactor), a linear map 3 (LinearFactor), an embedding 2
    (LinearFactor.A with rows of length V, LinearFactor.B), a saveable parameter 1. ``expert_columns`` are the columns
    that an experts module owns in the bank's table of expert positions. ``page_bytes`` is a wish: see
    ``choose_page_elems``. Raises ValueError where one name is two kinds of module.
    """

    def __init__(self, targets: ModelTargets, *, dtype: torch.dtype, page_bytes: int | None = None) -> None:
        self.dtype = dtype
        self.experts: Mapping[str, ExpertsTarget] = dict(targets.experts)
        self.linears: Mapping[str, LinearTarget] = dict(targets.linears)
        self.embeddings: Mapping[str, EmbeddingTarget] = dict(targets.embeddings)
        self.saved: dict[str, dict[str, SavedEntry]] = {}
        self.entries: list[Entry] = []
        self.num_expert_columns = 0
        self._module_entries: dict[str, slice] = {}
        self._expert_columns: dict[str, slice] = {}
        self._number_modules()
        num_lora = len(self.entries)
        self._number_saved(targets.saveable)
        self.page_elems = self._choose_page(num_lora, page_bytes or DEFAULT_PAGE_BYTES)

    def _number_modules(self) -> None:
        for name, experts in self.experts.items():
            hidden, inter, out = experts.hidden_size, experts.intermediate_size, experts.output_size
            out = out or experts.hidden_size
            self._add(name, ExpertsFactor, (hidden, inter, inter, inter, out, inter, inter, out))
            first = self.num_expert_columns
            self.num_expert_columns += experts.num_experts
            self._expert_columns[name] = slice(first, self.num_expert_columns)
        for name, linear in self.linears.items():
            self._add(name, LinearFactor, (linear.in_features, linear.out_features, linear.out_features))
        for name, embedding in self.embeddings.items():
            self._add(name, (LinearFactor.A, LinearFactor.B), (embedding.num_embeddings, embedding.embedding_dim))

    def _add(self, module: str, factors: Iterable[ExpertsFactor | LinearFactor], row_lens: tuple[int, ...]) -> None:
        if module in self._module_entries:
            raise ValueError(f"module {module!r} is listed as two kinds of target")
        first = len(self.entries)
        for factor, row_len in zip(factors, row_lens, strict=True):
            self.entries.append(Entry(module=module, label=factor.name.lower(), row_len=row_len))
        self._module_entries[module] = slice(first, len(self.entries))

    def _number_saved(self, saveable: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for module, params in saveable.items():
            self.saved[module] = {}
            for param, tensor in params.items():
                last = tensor.shape[-1] if tensor.dim() else 1
                row_len = max(1, math.ceil(last * tensor.dtype.itemsize / self.dtype.itemsize))
                self.saved[module][param] = SavedEntry(
                    index=len(self.entries),
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    rows=tensor.numel() // last if last else 0,
                )
                self.entries.append(Entry(module=module, label=param, row_len=row_len))

    def _choose_page(self, num_lora: int, page_bytes: int) -> int:
        num_experts_entries = len(ExpertsFactor) * len(self.experts)
        lens = [entry.row_len for entry in self.entries]
        groups = (lens[:num_experts_entries], lens[num_experts_entries:num_lora], lens[num_lora:])
        return choose_page_elems(
            [row_len for group in groups for row_len in _by_frequency(group)],
            target_elems=page_bytes // self.dtype.itemsize,
            align_elems=self.align_elems,
        )

    @property
    def align_elems(self) -> int:
        return max(1, ALIGN_BYTES // self.dtype.itemsize)

    @property
    def page_bytes(self) -> int:
        return self.page_elems * self.dtype.itemsize

    @property
    def num_entries(self) -> int:
        return len(self.entries)

    def rows_per_page(self, entry: int) -> int:
        """k of the address formula."""
        return self.page_elems // self.entries[entry].row_len

    def module_entries(self, module: str) -> slice:
        """Entries of an experts module, linear map or embedding. Raises AdapterMismatchError for any other name."""
        entries = self._module_entries.get(module)
        if entries is None:
            raise AdapterMismatchError(f"the base model has no module {module!r} that takes LoRA")
        return entries

    def factor_entry(self, module: str, factor: ExpertsFactor | LinearFactor) -> int:
        """The entry of one factor. Raises AdapterMismatchError where the base model has no such module or factor."""
        entries = self.module_entries(module)
        if not 0 <= factor < entries.stop - entries.start:
            raise AdapterMismatchError(f"{module!r} has no factor {factor!r}")
        return int(entries.start) + factor

    def expert_columns(self, module: str) -> slice:
        """Columns of an experts module in the table of expert positions."""
        columns = self._expert_columns.get(module)
        if columns is None:
            raise AdapterMismatchError(f"the base model has no experts module {module!r}")
        return columns

    def saved_entry(self, module: str, param: str) -> SavedEntry:
        """The entry of a saveable parameter. Raises AdapterMismatchError where the base model has none."""
        entry = self.saved.get(module, {}).get(param)
        if entry is None:
            raise AdapterMismatchError(f"the base model has no parameter {module}.{param} that an adapter may replace")
        return entry


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorRows:
    """One factor, ready to be placed: ``rows`` [copies * rank, row_len] in the bank's dtype.

    ``copies``: number of experts, or 1 where one factor serves all experts or there are none.
    """

    entry: int
    rank: int
    copies: int
    lane: int
    rows: torch.Tensor


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

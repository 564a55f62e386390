"""Adapters of one model in numbered slots over a pool of pages: each factor by its own rank, addresses that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moegraft.core.errors import AdapterMemoryError
from moegraft.core.memory import format_bytes
from moegraft.core.tables import ExpertsFactor, LinearFactor
from moegraft.lora.bank.layout import BankLayout, FactorRows, Placement, place_factors, plan_address_space
from moegraft.lora.bank.pool import DeviceTables, PagePool
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ModelTargets


@dataclass(frozen=True, kw_only=True)
class Part:
    """One factor of one module of an adapter: ``copies`` times ``rank`` rank rows, which ``rows`` gives when they are
    written, in any shape that flattens to them, on any device. ``lane``: where B of up begins among A's rows.
    """

    factor: ExpertsFactor | LinearFactor
    rank: int
    rows: Callable[[], torch.Tensor]
    copies: int = 1
    lane: int = 0


def no_rows() -> torch.Tensor:
    """Stands for the rows of a part that only tells its size."""
    raise AssertionError("this part is only a size")


class SlotPages:
    """``num_slots`` slots, each empty or with one adapter.

    ``largest``: parts of an adapter that has every module at the largest rank. ``capacity_bytes``: None for as many
    pages as ``num_slots`` of those need. Raises AdapterMemoryError where the memory holds not one of them.
    """

    def __init__(
        self,
        targets: ModelTargets,
        largest: Mapping[str, Sequence[Part]],
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity_bytes: int | None = None,
        page_bytes: int | None = None,
    ) -> None:
        self.layout = BankLayout(targets, dtype=dtype, page_bytes=page_bytes)
        self._num_experts = {name: target.num_experts for name, target in targets.experts.items()}
        # First fit may take a page more for a smaller adapter than for a larger one.
        self.pages_of_largest = place_factors(self.layout, self._sizes(largest))[1] + 1
        needed = self.pages_of_largest * self.layout.page_bytes
        capacity = num_slots * needed if capacity_bytes is None else capacity_bytes
        if capacity < needed:
            raise AdapterMemoryError(
                f"adapter memory of {format_bytes(capacity)} holds no adapter of the largest rank, which takes "
                f"{format_bytes(needed)}"
            )
        self.pool = PagePool(capacity_bytes=capacity, page_elems=self.layout.page_elems, dtype=dtype, device=device)
        self.tables = DeviceTables(self.layout, self.pool, max_slots=num_slots)
        self._held: list[tuple[int, ...]] = [()] * num_slots

    def pages_of(self, parts: Mapping[str, Sequence[Part]]) -> int:
        """Pages that an adapter of these parts takes."""
        return place_factors(self.layout, self._sizes(parts))[1]

    def held(self, slot: int) -> int:
        """Pages that a slot has."""
        return len(self._held[slot])

    def drop(self, slot: int) -> None:
        """Empties a slot: its rows become base rows, on the current stream, and its pages are free."""
        if self._held[slot]:
            self.tables.clear(slot)
            self.pool.free(self._held[slot])
            self._held[slot] = ()

    def put(self, slot: int, parts: Mapping[str, Sequence[Part]]) -> None:
        """An adapter in place of what the slot holds, on the current stream.

        Raises AdapterMemoryError where too few pages are free; the slot is then empty.
        """
        self.drop(slot)
        sizes = list(self._sizes(parts))
        experts = {
            name: ExpertsLoRA(expert_ids=tuple(range(count)))
            for name, count in self._num_experts.items()
            if name in parts
        }
        space = plan_address_space(self.layout, AdapterWeights(experts=experts), sizes)
        pages = self.pool.allocate(space.num_pages)
        self._held[slot] = pages
        for name, of_module in parts.items():
            first = self.layout.module_entries(name).start
            for part in of_module:
                placement = space.placements.get(first + part.factor)
                if placement is not None:
                    self._write(part.rows(), placement, pages, self.layout.entries[first + part.factor].row_len)
        self.tables.fill(slot, space, pages)

    def _sizes(self, parts: Mapping[str, Sequence[Part]]) -> Iterable[FactorRows]:
        """Without their numbers."""
        for name, of_module in parts.items():
            first = self.layout.module_entries(name).start
            for part in of_module:
                entry = first + part.factor
                size = (part.copies * part.rank, self.layout.entries[entry].row_len)
                rows = torch.empty(size, dtype=self.layout.dtype, device="meta")
                yield FactorRows(entry=entry, rank=part.rank, copies=part.copies, lane=part.lane, rows=rows)

    def _write(self, rows: torch.Tensor, placement: Placement, pages: Sequence[int], row_len: int) -> None:
        """One copy for each run of neighbouring pages that are full, one for the rest."""
        rows = rows.to(self.pool.data.device, self.layout.dtype).reshape(-1, row_len)
        if rows.shape[0] != placement.rows:
            raise ValueError(f"{rows.shape[0]} rank rows, expected {placement.rows}")
        per_page = self.pool.page_elems // row_len
        done = 0
        page = placement.first_page
        while done < placement.rows:
            run = 1
            while done + (run + 1) * per_page <= placement.rows and pages[page + run] == pages[page] + run:
                run += 1
            count = min(placement.rows - done, run * per_page)
            offset = placement.offset if page == placement.first_page else 0
            if count == run * per_page:
                target = self.pool.pages[pages[page] : pages[page] + run, : per_page * row_len]
                target.view(run, per_page, row_len).copy_(rows[done : done + count].view(run, per_page, row_len))
            else:
                target = self.pool.pages[pages[page], offset : offset + count * row_len]
                target.view(count, row_len).copy_(rows[done : done + count])
            done, page = done + count, page + run

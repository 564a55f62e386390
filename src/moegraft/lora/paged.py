"""Reading paged factors with torch operations, for wrappers without kernels. The address formula: core/tables.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.core.tables import ExpertsTables, Field, LinearTables


@dataclass(frozen=True)
class FactorIndex:
    """One factor of S adapters, ready to be gathered.

    unit_SHR: first unit in the pool of lane r of the expert at position h (H = 1 without experts); lanes past an
    adapter's rank repeat its last row. rank_S and lane_S: Field.RANK and Field.LANE. ``is_uniform``: every adapter
    has rank ``max_rank`` and starts at lane 0.
    """

    unit_SHR: torch.Tensor
    unit: int
    rank_S: torch.Tensor
    lane_S: torch.Tensor
    max_rank: int
    is_uniform: bool

    @classmethod
    def of(
        cls, tables: ExpertsTables | LinearTables, factor: int, row_len: int, slots: Sequence[int]
    ) -> FactorIndex | None:
        """None where no adapter has the factor."""
        device = tables.factors.device
        desc_S = tables.factors[list(slots), factor].long()
        rank_S = desc_S[:, Field.RANK]
        max_rank = int(rank_S.max()) if len(slots) else 0
        if max_rank == 0:
            return None
        positions = tables.expert_index.shape[1] if isinstance(tables, ExpertsTables) else 1
        lane_SR = torch.minimum(torch.arange(max_rank, device=device), (rank_S - 1).clamp(min=0)[:, None])
        row_SHR = torch.arange(positions, device=device)[:, None] * desc_S[:, Field.EXPERT_STRIDE, None, None]
        row_SHR = row_SHR + lane_SR[:, None]
        rows_per_page = tables.page_elems // row_len
        # Positions past those that an adapter holds are never asked for; they only must not leave the table.
        page_SHR = desc_S[:, Field.FIRST_PAGE, None, None] + row_SHR // rows_per_page
        page_SHR = page_SHR.clamp(max=tables.page_table.shape[1] - 1)
        slot_S11 = torch.tensor(slots, device=device)[:, None, None]
        elem_SHR = tables.page_table[slot_S11, page_SHR].long() * tables.page_elems
        elem_SHR += desc_S[:, Field.OFFSET, None, None] + (row_SHR % rows_per_page) * row_len
        # Rows are gathered in units that divide a row, a page and every offset into one: one view of the pool serves
        # any row length. Where the row length does not divide the page, offsets are no multiples of it.
        unit = math.gcd(row_len, tables.page_elems, *desc_S[:, Field.OFFSET].tolist())
        lane_S = desc_S[:, Field.LANE]
        is_uniform = int(rank_S.min()) == max_rank and int(lane_S.max()) == 0
        return cls(elem_SHR // unit, unit, rank_S, lane_S, max_rank, is_uniform)

    def read(
        self,
        tables: ExpertsTables | LinearTables,
        unit_GR: torch.Tensor,
        row_len: int,
        adapter_G: torch.Tensor | slice,
    ) -> torch.Tensor:
        """Rows from ``unit_GR``, copied: [G, max_rank, row_len]; zeros where an adapter lacks the factor."""
        units = unit_GR
        if self.unit != row_len:
            units = unit_GR.unsqueeze(-1) + torch.arange(row_len // self.unit, device=unit_GR.device)
        flat = tables.pool.view(-1, self.unit).index_select(0, units.flatten())
        rows_GRI = flat.view(*unit_GR.shape, row_len)
        if self.is_uniform:
            return rows_GRI
        # Where an adapter lacks the factor its descriptor points at something else's memory, and 0 * NaN is NaN.
        return rows_GRI.masked_fill_((self.rank_S[adapter_G] == 0)[:, None, None], 0)


class PagedFactors:
    """Factor indices of the adapters of one batch, made once and read by every layer call while the batch lives.

    The bank moves no page of an adapter in use, so the indices stay true as long as the batch is held.
    """

    def __init__(self) -> None:
        self._indices: dict[tuple[int, int, tuple[int, ...]], FactorIndex | None] = {}
        self._copies: dict[tuple[int, int, tuple[int, ...]], torch.Tensor] = {}

    def index(
        self, tables: ExpertsTables | LinearTables, factor: int, row_len: int, slots: tuple[int, ...]
    ) -> FactorIndex | None:
        """The index of a factor of the adapters in ``slots``; None where none of them has it."""
        key = (id(tables), factor, slots)
        if key not in self._indices:
            self._indices[key] = FactorIndex.of(tables, factor, row_len, slots)
        return self._indices[key]

    def whole(
        self, tables: LinearTables, factor: int, row_len: int, slots: tuple[int, ...]
    ) -> tuple[FactorIndex, torch.Tensor] | None:
        """The factor of every adapter in ``slots`` in float32: [S, max_rank, row_len], copied once a batch.

        float32, since small products in lower precision are several times slower on a CPU.
        """
        index = self.index(tables, factor, row_len, slots)
        if index is None:
            return None
        key = (id(tables), factor, slots)
        if key not in self._copies:
            self._copies[key] = index.read(tables, index.unit_SHR[:, 0], row_len, slice(None)).float()
        return index, self._copies[key]

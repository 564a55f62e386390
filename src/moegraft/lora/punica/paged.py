"""Reading paged factors with torch operations, for wrappers without kernels. The address formula: core/tables.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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


class PagedFactors:
    """Factor indices of the adapters of one batch, made once and read by every layer call while the batch lives.

    The bank moves no page of an adapter in use, so the indices stay true as long as the batch is held.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self._indices: dict[tuple[int, int], FactorIndex | None] = {}
        self._copies: dict[tuple[int, int], torch.Tensor] = {}

    def index(self, tables: ExpertsTables | LinearTables, factor: int, row_len: int) -> FactorIndex | None:
        """The index of a factor; None where no adapter of the batch has it."""
        key = (id(tables), factor)
        if key not in self._indices:
            self._indices[key] = FactorIndex.of(tables, factor, row_len, self.slots)
        return self._indices[key]

    def gather(
        self, tables: ExpertsTables, index: FactorIndex, adapter_G: torch.Tensor, position_G: torch.Tensor, row_len: int
    ) -> torch.Tensor:
        """The factor of G (adapter, expert position) pairs, copied: [G, max_rank, row_len]."""
        return _read(tables, index, index.unit_SHR[adapter_G, position_G], row_len, adapter_G)

    def whole(self, tables: LinearTables, factor: int, row_len: int) -> torch.Tensor | None:
        """The factor of every adapter of the batch in float32: [S, max_rank, row_len], copied once a batch.

        float32, since small products in lower precision are several times slower on a CPU.
        """
        key = (id(tables), factor)
        if key not in self._copies:
            index = self.index(tables, factor, row_len)
            if index is None:
                return None
            self._copies[key] = _read(tables, index, index.unit_SHR[:, 0], row_len, slice(None)).float()
        return self._copies[key]


def _read(
    tables: ExpertsTables | LinearTables,
    index: FactorIndex,
    unit_GR: torch.Tensor,
    row_len: int,
    adapter_G: torch.Tensor | slice,
) -> torch.Tensor:
    units = unit_GR
    if index.unit != row_len:
        units = unit_GR.unsqueeze(-1) + torch.arange(row_len // index.unit, device=unit_GR.device)
    flat = tables.pool.view(-1, index.unit).index_select(0, units.flatten())
    rows_GRI = flat.view(*unit_GR.shape, row_len)
    if index.is_uniform:
        return rows_GRI
    # Where an adapter lacks the factor its descriptor points at something else's memory, and 0 * NaN is NaN.
    return rows_GRI.masked_fill_((index.rank_S[adapter_G] == 0)[:, None, None], 0)


def grouped_mm(x_LI: torch.Tensor, w_GIO: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """y[l] = x[l] @ w[g] for offsets[g] <= l < offsets[g+1]: [L, O]."""
    if offsets[-1] == w_GIO.shape[0]:  # one row each
        return torch.bmm(x_LI.unsqueeze(1), w_GIO).squeeze(1)
    if fits_torch_grouped_mm(x_LI, w_GIO):
        ends = torch.tensor(offsets[1:], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x_LI, w_GIO, offs=ends)
    y_LO = x_LI.new_empty(x_LI.shape[0], w_GIO.shape[2])
    for g, (start, end) in enumerate(pairwise(offsets)):
        torch.mm(x_LI[start:end], w_GIO[g], out=y_LO[start:end])
    return y_LO


def fits_torch_grouped_mm(x_LI: torch.Tensor, w_GIO: torch.Tensor) -> bool:
    """torch's grouped GEMM spares a Python loop on the CPU, but wants every stride to be a multiple of 16 bytes."""
    if x_LI.device.type != "cpu" or x_LI.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(size * x_LI.itemsize % 16 == 0 for size in (x_LI.stride(0), *w_GIO.shape[1:]))

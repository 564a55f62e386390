"""Reading a paged factor row by row, for the references."""

from __future__ import annotations

import torch

from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field


def read_factor(tables: ExpertsTables, slot: int, expert: int, factor: ExpertsFactor, row_len: int) -> torch.Tensor:
    """Rank rows [r, row_len] by the formula of core/tables.py; r = 0 where the adapter does not touch the expert."""
    position = -1 if slot < 0 else int(tables.expert_index[slot, expert])
    fields = tables.factors[slot, factor].tolist()
    rows_per_page = tables.page_elems // row_len
    rows = []
    for j in range(fields[Field.RANK] if position >= 0 else 0):
        row = position * fields[Field.EXPERT_STRIDE] + j
        page = int(tables.page_table[slot, fields[Field.FIRST_PAGE] + row // rows_per_page])
        element = page * tables.page_elems + fields[Field.OFFSET] + row % rows_per_page * row_len
        rows.append(tables.pool[element : element + row_len])
    return torch.stack(rows) if rows else tables.pool.new_empty(0, row_len)

"""LoRA on an embedding for rows that only the device knows: no host sync, so that a graph may capture it.

Shape letters: M rows · R rank lanes · V tokens · D columns
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegraft.core.tables import Field, LinearFactor, LinearTables

_STEP_ELEMS = 1 << 24
"""Elements of B that are gathered at once: rows are walked in steps, so that memory does not follow their number."""


def shrink_embedding(
    ids_M: torch.Tensor,
    slots_M: torch.Tensor,
    tables: LinearTables,
    *,
    num_embeddings: int,
    rank_bound: int,
    pieces: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Semantics: v[m] = A[slots[m]][:, ids[m]], zero past the rank and in base rows: [M, rank_bound], adapters' dtype.

    ``num_embeddings``: V that the tables hold; ``pieces``: the one range of tokens that they are, others give zero.
    """
    first_elem_MR, is_lane_MR = _rank_rows(slots_M, tables, LinearFactor.A, num_embeddings, rank_bound)
    if pieces is not None:
        ((start, stop),) = pieces
        is_lane_MR = is_lane_MR & ((ids_M >= start) & (ids_M < stop))[:, None]
        ids_M = (ids_M - start).clamp(0, stop - start - 1)
    v_MR = tables.pool.view(-1)[first_elem_MR + ids_M[:, None]]
    return v_MR.masked_fill(~is_lane_MR, 0)


def expand_embedding(y_MD: torch.Tensor, v_MR: torch.Tensor, slots_M: torch.Tensor, tables: LinearTables) -> None:
    """Semantics: y[m] += B[slots[m]]^T v[m], in float32, rounded once; base rows keep their bits."""
    M, D = y_MD.shape
    R, column_D = v_MR.shape[1], torch.arange(D, device=y_MD.device)
    step = max(1, _STEP_ELEMS // (R * D))
    for start in range(0, M, step):
        rows = slice(start, start + step)
        first_elem_MR, is_lane_MR = _rank_rows(slots_M[rows], tables, LinearFactor.B, D, R)
        b_MRD = tables.pool.view(-1)[first_elem_MR[..., None] + column_D]
        b_MRD = b_MRD.masked_fill(~is_lane_MR[..., None], 0).float()
        delta_MD = torch.bmm(v_MR[rows].float().unsqueeze(1), b_MRD).squeeze(1)
        has_lora_M1 = is_lane_MR.any(1, keepdim=True)
        y_MD[rows] = torch.where(has_lora_M1, (y_MD[rows] + delta_MD).to(y_MD.dtype), y_MD[rows])


def _rank_rows(
    slots_M: torch.Tensor, tables: LinearTables, factor: LinearFactor, row_len: int, num_lanes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(first element of every rank row [M, R], whether row m has that lane); the formula: core/tables.py."""
    slot_M = slots_M.clamp(min=0).long()
    desc_M1F = tables.factors[slot_M, int(factor)].long().unsqueeze(1)
    rank_M1 = desc_M1F[..., Field.RANK].masked_fill(slots_M[:, None] < 0, 0)
    lane_R = torch.arange(num_lanes, device=slots_M.device)
    # Lanes that a row has not read its last one, or what stands at the table's beginning, and are masked.
    row_MR = torch.minimum(lane_R, (rank_M1 - 1).clamp(min=0))
    rows_per_page = tables.page_elems // row_len
    page_MR = tables.page_table[slot_M[:, None], desc_M1F[..., Field.FIRST_PAGE] + row_MR // rows_per_page].long()
    elem_MR = page_MR * tables.page_elems + desc_M1F[..., Field.OFFSET] + row_MR % rows_per_page * row_len
    return elem_MR, lane_R < rank_M1

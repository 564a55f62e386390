"""Device side of the routing of a single token, which computes the token's low-rank rows on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import (
    B2,
    B_GATE,
    B_UP,
    FIELD_EXPERT_STRIDE,
    FIELD_LANE,
    FIELD_RANK,
    GRANULE,
    NUM_FIELDS,
    factor_row_elements,
    pad_to_granule,
)


@triton.jit
def _write_lanes(lists, first_lane, granules, row, index, pages_ptr, factors_ptr, B_FIRST: tl.constexpr,
                 NUM_B: tl.constexpr, COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                 LANES: tl.constexpr):  # fmt: skip
    """The lanes that the row's adapter brings to NUM_B factors; as ``moe_routing`` writes them for a segment."""
    j = tl.arange(0, LANES)
    in_list = j < granules * GRANULE
    lanes = first_lane + j
    tl.store(lists.segment + lanes, tl.zeros_like(lanes) + row, mask=in_list)
    for b in tl.static_range(NUM_B):
        factor_ptr = factors_ptr + (B_FIRST + b) * NUM_FIELDS
        rank = tl.load(factor_ptr + FIELD_RANK)
        live = in_list & (j < rank)
        rows = index * tl.load(factor_ptr + FIELD_EXPERT_STRIDE) + j
        element = factor_row_elements(pages_ptr, factor_ptr, rows, live, COLUMNS, PAGE_ELEMS, 1)
        granule = pad_to_granule(tl.load(factor_ptr + FIELD_LANE)) // GRANULE
        granule = tl.where(j // GRANULE * GRANULE < rank, granule + j // GRANULE, 0)
        tl.store(lists.granule + b * lists.capacity + lanes, granule, mask=in_list)
        tl.store(lists.element + b * lists.capacity + lanes, tl.where(live, element, -1), mask=in_list)


@triton.jit
def route_token_kernel(lists, lanes13, lanes2, u_ptr, x_ptr, ids_ptr, slot_ptr, tables, LAYER: tl.constexpr,
                       LANES: tl.constexpr, LOW_RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """Program (n, part): BLOCK_R columns of u of row n; the first of a row writes its block, its tile and its lanes.

    Every row is a block of its own, at the position of its number.
    """
    E: tl.constexpr = LAYER.E
    GATED: tl.constexpr = LAYER.GATED
    GRANULES13: tl.constexpr = LAYER.GRANULES13
    GRANULES2: tl.constexpr = LAYER.GRANULES2
    F: tl.constexpr = LAYER.F
    PAGE_ELEMS: tl.constexpr = LAYER.PAGE_ELEMS
    D: tl.constexpr = LAYER.D
    ALIGN: tl.constexpr = LOW_RANK.ALIGN
    U_WIDTH: tl.constexpr = LOW_RANK.U_WIDTH
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    n = tl.program_id(0)
    part = tl.program_id(1)
    expert = tl.load(ids_ptr + n).to(tl.int32)
    slot = tl.load(slot_ptr)
    is_local = (expert >= 0) & (expert < E)
    has_adapter = is_local & (slot >= 0)
    slot = tl.maximum(slot, 0)
    index = tl.load(tables.expert_index + slot * tables.stride_experts + expert, mask=has_adapter, other=-1)
    factors_ptr = tables.factors + slot * tables.stride_factors
    pages_ptr = tables.pages + slot * tables.stride_pages
    rank13 = tl.load(factors_ptr + FIELD_RANK)
    up_lane = tl.load(factors_ptr + B_UP * NUM_FIELDS + FIELD_LANE)
    rank_up = tl.load(factors_ptr + B_UP * NUM_FIELDS + FIELD_RANK)
    rank_gate = tl.load(factors_ptr + B_GATE * NUM_FIELDS + FIELD_RANK) * GATED
    rank_down = tl.load(factors_ptr + B2 * NUM_FIELDS + FIELD_RANK)
    stride13 = tl.load(factors_ptr + FIELD_EXPERT_STRIDE)
    has_work = index >= 0
    if part == 0:
        granules13 = tl.where(has_work, (tl.maximum(rank_gate, rank_up) + GRANULE - 1) // GRANULE, 0)
        granules2 = tl.where(has_work, (rank_down + GRANULE - 1) // GRANULE, 0)
        lane13 = n * (GRANULES13 * GRANULE)
        lane2 = n * (GRANULES2 * GRANULE)
        if n == 0:
            tl.store(lists.counts, tl.num_programs(0))
            tl.store(lists.counts + 1, tl.num_programs(0))
        tl.store(lists.order + n, n)
        tl.store(lists.segment + n, n)
        record = lists.blocks + n * 8
        tl.store(record + 0, expert)
        tl.store(record + 1, n)
        tl.store(record + 2, n + is_local.to(tl.int32))
        tl.store(record + 3, lane13)
        tl.store(record + 4, lane13 + granules13 * GRANULE)
        tl.store(record + 5, lane2)
        tl.store(record + 6, lane2 + granules2 * GRANULE)
        record = lists.tiles + n * 8
        tl.store(record + 0, expert)
        tl.store(record + 1, slot)
        tl.store(record + 2, n)
        tl.store(record + 3, n + (granules13 + granules2 > 0).to(tl.int32))
        tl.store(record + 4, 0)
        tl.store(record + 5, 0)
        _write_lanes(
            lanes13, lane13, granules13, n, index, pages_ptr, factors_ptr, B_UP - GATED, 1 + GATED,
            F, PAGE_ELEMS, LANES,
        )  # fmt: skip
        _write_lanes(lanes2, lane2, granules2, n, index, pages_ptr, factors_ptr, B2, 1, D, PAGE_ELEMS, LANES)
    up_column = pad_to_granule(up_lane)
    num_columns = up_column + pad_to_granule(rank13 - up_lane)
    if (index < 0) | (part * BLOCK_R >= num_columns):
        return
    column = part * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.where(column < up_column, column, column - up_column + up_lane)
    j_live = tl.where(column < up_column, column < up_lane, j < rank13)
    a_elements = factor_row_elements(pages_ptr, factors_ptr, index * stride13 + j, j_live, D, PAGE_ELEMS, ALIGN)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in tl.static_range(0, D, BLOCK_K):
        k_live = start + k < D
        x = tl.load(x_ptr + start + k, mask=k_live, other=0.0).to(tl.float32)
        a_live = j_live[:, None] & k_live[None, :]
        a = tl.load(tables.pool + a_elements[:, None] + (start + k)[None, :], mask=a_live, other=0.0)
        acc += a.to(tl.float32) * x[None, :]
    u = tl.sum(acc, 1).to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + n * U_WIDTH + column, u, mask=column < num_columns)

"""Device side of the shrink: the low-rank rows u = A x of every (expert, adapter) segment."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import (
    B_GATE,
    B_UP,
    FIELD_EXPERT_STRIDE,
    FIELD_LANE,
    FIELD_RANK,
    NUM_FIELDS,
    factor_row_elements,
    pad_to_granule,
)


@triton.jit
def shrink_kernel(u_ptr, partial_ptr, rows, routing, tile_ptr, tables, num_rows, LENGTH: tl.constexpr,
                  FACTOR: tl.constexpr, LOW_RANK: tl.constexpr, PAGE_ELEMS: tl.constexpr, TILE: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """u[position, column(j)] = A[j] . x[row of position] for the rows of one tile and BLOCK_R columns.

    Lanes of the gate stand in the columns from 0, those of an up factor with an A of its own behind them from the next
    granule on; what pads a granule becomes zero. With ``SPLITS`` > 1, programs share LENGTH and leave partial sums in
    float32; the last one to arrive at the tile adds them up in the order of splits.
    """
    TILE_M: tl.constexpr = TILE.TILE_M
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    SPLITS: tl.constexpr = TILE.SPLITS
    RANK_BLOCKS: tl.constexpr = TILE.RANK_BLOCKS
    A: tl.constexpr = FACTOR.A
    B_LAST: tl.constexpr = FACTOR.B_LAST
    ALIGN: tl.constexpr = LOW_RANK.ALIGN
    K: tl.constexpr = FACTOR.K
    PRECISION: tl.constexpr = TILE.PRECISION
    U_WIDTH: tl.constexpr = LOW_RANK.U_WIDTH
    TICKET: tl.constexpr = FACTOR.TICKET
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    pid = tl.program_id(0)
    split = pid % SPLITS
    rank_block = pid // SPLITS % RANK_BLOCKS
    tile = pid // (SPLITS * RANK_BLOCKS)
    if tile >= tl.load(routing.counts + 1):
        return
    first = tl.load(tile_ptr + tile * 8 + 2)
    end = tl.load(tile_ptr + tile * 8 + 3)
    if first >= end:
        return
    expert = tl.load(tile_ptr + tile * 8 + 0)
    slot = tl.load(tile_ptr + tile * 8 + 1)
    slot_factors_ptr = tables.factors + slot * tables.stride_factors
    factor_ptr = slot_factors_ptr + A * NUM_FIELDS
    rank = tl.load(factor_ptr + FIELD_RANK)
    up_lane = tl.load(slot_factors_ptr + B_LAST * NUM_FIELDS + FIELD_LANE)
    up_column = pad_to_granule(up_lane)
    num_columns = up_column + pad_to_granule(rank - up_lane)
    if rank_block * BLOCK_R >= num_columns:
        return
    index = tl.load(tables.expert_index + slot * tables.stride_experts + expert)
    column = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.where(column < up_column, column, column - up_column + up_lane)
    j_live = tl.where(column < up_column, column < up_lane, j < rank)
    row = index * tl.load(factor_ptr + FIELD_EXPERT_STRIDE) + j
    pages_ptr = tables.pages + slot * tables.stride_pages
    a_elements = factor_row_elements(pages_ptr, factor_ptr, row, j_live, LENGTH, PAGE_ELEMS, ALIGN)
    positions = first + tl.arange(0, TILE_M)
    live = positions < end
    x_rows = positions
    if K > 0:
        x_rows = tl.load(routing.order + positions, mask=live, other=0) // K
    x_ptrs = rows.ptr + x_rows.to(tl.int64)[:, None] * rows.stride
    steps: tl.constexpr = (LENGTH + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    acc = tl.zeros([TILE_M, BLOCK_R], tl.float32)
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_live = k < LENGTH
        x = tl.load(x_ptrs + k[None, :], mask=live[:, None] & k_live[None, :], other=0.0)
        a_live = j_live[:, None] & k_live[None, :]
        a = tl.load(tables.pool + a_elements[:, None] + k[None, :], mask=a_live, other=0.0)
        acc = tl.dot(x, a.T, acc, input_precision=PRECISION)

    u_offsets = positions.to(tl.int64)[:, None] * U_WIDTH + column[None, :]
    u_live = live[:, None] & (column < num_columns)[None, :]
    if SPLITS == 1:
        tl.store(u_ptr + u_offsets, acc.to(u_ptr.dtype.element_ty), mask=u_live)
    else:
        # One row is a constant, which has no methods.
        split_elements = tl.cast(num_rows, tl.int64) * U_WIDTH
        tl.store(partial_ptr + split * split_elements + u_offsets, acc, mask=u_live)
        tl.debug_barrier()  # every thread's part is written before the ticket is drawn
        arrived = tl.atomic_add(tile_ptr + tile * 8 + TICKET, 1)
        if arrived == SPLITS * tl.cdiv(num_columns, BLOCK_R) - 1:
            for block in range(tl.cdiv(num_columns, BLOCK_R)):
                column = block * BLOCK_R + tl.arange(0, BLOCK_R)
                u_offsets = positions.to(tl.int64)[:, None] * U_WIDTH + column[None, :]
                u_live = live[:, None] & (column < num_columns)[None, :]
                total = tl.zeros([TILE_M, BLOCK_R], tl.float32)
                for s in tl.static_range(SPLITS):
                    part_ptrs = partial_ptr + s * split_elements + u_offsets
                    total += tl.load(part_ptrs, mask=u_live, other=0.0, cache_modifier=".cg")
                tl.store(u_ptr + u_offsets, total.to(u_ptr.dtype.element_ty), mask=u_live)
            tl.store(tile_ptr + tile * 8 + TICKET, 0)  # for the next shrink over this routing


@triton.jit
def place_kernel(u_ptr, gathered_ptr, tile_ptr, count_ptr, tables, num_rows, NUM_RANKS: tl.constexpr,
                 SHARE_WIDTH: tl.constexpr, U_WIDTH: tl.constexpr, TILE_M: tl.constexpr, BLOCK_C: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """Program (tile, block of columns): u as ``shrink_kernel`` writes it, of rows that ranks have a share of each.

    The adapter's A is this rank's share, of as many lanes as every other rank's; its B reads all lanes.
    """
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    blocks: tl.constexpr = (U_WIDTH + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // blocks
    if tile >= tl.load(count_ptr + 1):
        return
    first = tl.load(tile_ptr + tile * 8 + 2)
    end = tl.load(tile_ptr + tile * 8 + 3)
    if first >= end:
        return
    factors_ptr = tables.factors + tl.load(tile_ptr + tile * 8 + 1) * tables.stride_factors
    share = tl.load(factors_ptr + FIELD_RANK)
    up_lane = tl.load(factors_ptr + B_UP * NUM_FIELDS + FIELD_LANE)
    up_rank = tl.load(factors_ptr + B_UP * NUM_FIELDS + FIELD_RANK)
    rank = tl.maximum(up_lane + up_rank, tl.load(factors_ptr + B_GATE * NUM_FIELDS + FIELD_RANK))
    up_column = pad_to_granule(up_lane)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.where(column < up_column, column, column - up_column + up_lane)
    j_live = tl.where(column < up_column, column < up_lane, j < rank) & (j < share * NUM_RANKS)
    share = tl.maximum(share, 1)
    positions = first + tl.arange(0, TILE_M)
    live = positions < end
    rows = (j // share)[None, :] * num_rows + positions[:, None]
    lanes_ptr = gathered_ptr + rows.to(tl.int64) * SHARE_WIDTH + (j % share)[None, :]
    lanes = tl.load(lanes_ptr, mask=live[:, None] & j_live[None, :], other=0.0)
    u_ptrs = u_ptr + positions.to(tl.int64)[:, None] * U_WIDTH + column[None, :]
    u_live = column < up_column + pad_to_granule(rank - up_lane)
    tl.store(u_ptrs, lanes.to(u_ptr.dtype.element_ty), mask=live[:, None] & (u_live & (column < U_WIDTH))[None, :])

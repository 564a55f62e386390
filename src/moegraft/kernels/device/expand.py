"""The expand: low-rank rows times the rows of B that a block's lanes name, added to float32 sums."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.pages import GRANULE


@triton.jit
def load_lanes(segment_ptr, granule_ptr, element_ptr, lanes, lane_end):
    """(segment, granule of u, element of the pool where the row of B starts or -1) of some lanes."""
    live = lanes < lane_end
    segment = tl.load(segment_ptr + lanes, mask=live, other=-1)
    granule = tl.load(granule_ptr + lanes, mask=live, other=0)
    element = tl.load(element_ptr + lanes, mask=live, other=-1)
    return segment, granule, element


@triton.jit
def load_low_rank(lora, segment, granule, element, positions, row_segments, columns, columns_live,
                  BLOCK_L: tl.constexpr, LOW_RANK: tl.constexpr):  # fmt: skip
    """(u [m, l], B [l, f]) of lanes that ``load_lanes`` found; u is zero in rows of other segments than the lane's.

    The compiler cannot see that the lanes of a granule are neighbours in u and share a segment, nor that a row of B is
    aligned: it is told, on values computed here, so that both are read in whole vectors.
    """
    U_WIDTH: tl.constexpr = LOW_RANK.U_WIDTH
    ALIGN: tl.constexpr = LOW_RANK.ALIGN
    column = granule * GRANULE + tl.arange(0, BLOCK_L) % GRANULE
    column = tl.max_contiguous(tl.multiple_of(column, 16), 16)
    hit = tl.max_constancy(row_segments[:, None] == segment[None, :], [1, 16])
    u = tl.load(lora.u + positions[:, None] * U_WIDTH + column[None, :], mask=hit, other=0.0)
    b_ptrs = lora.pool + (element // ALIGN * ALIGN)[:, None] + columns[None, :]
    b = tl.load(b_ptrs, mask=(element >= 0)[:, None] & columns_live[None, :], other=0.0)
    return u, b


@triton.jit
def first_lanes(lora, routing, block, positions, live, GATED: tl.constexpr, LANE_FIELD: tl.constexpr,
                BLOCK_L: tl.constexpr):  # fmt: skip
    """What ``expand`` needs of the routing; loaded before the base product, whose loop then hides the latency."""
    row_segments = tl.load(routing.segment + positions, mask=live, other=-2)
    lane_first = tl.load(routing.blocks + block * 8 + LANE_FIELD)
    lane_end = tl.load(routing.blocks + block * 8 + LANE_FIELD + 1)
    lanes = lane_first + tl.arange(0, BLOCK_L)
    where = load_lanes(lora.segment, lora.granule, lora.element, lanes, lane_end)
    up_where = where
    if GATED:
        up_where = load_lanes(lora.segment, lora.granule + lora.capacity, lora.element + lora.capacity, lanes, lane_end)
    return row_segments, lane_first, lane_end, where, up_where


@triton.jit
def expand(acc_gate, acc_up, prefetched, lora, positions, columns, columns_live, GATED: tl.constexpr,
           LOW_RANK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Adds B u of the block's lanes to the accumulators of the base product, as further K steps.

    Pipelined by hand: u and B a step ahead, where they lie two steps ahead.
    """
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    row_segments, lane_first, lane_end, where, up_where = prefetched
    segment, granule, element = where
    _, up_granule, up_element = up_where
    granule_up_ptr = lora.granule + GATED * lora.capacity
    element_up_ptr = lora.element + GATED * lora.capacity
    lanes = lane_first + tl.arange(0, BLOCK_L)
    u, b = load_low_rank(
        lora, segment, granule, element, positions, row_segments, columns, columns_live, BLOCK_L, LOW_RANK
    )
    if GATED:
        up_u, up_b = load_low_rank(
            lora, segment, up_granule, up_element, positions, row_segments, columns, columns_live, BLOCK_L, LOW_RANK
        )
    lanes += BLOCK_L
    segment, granule, element = load_lanes(lora.segment, lora.granule, lora.element, lanes, lane_end)
    if GATED:
        _, up_granule, up_element = load_lanes(lora.segment, granule_up_ptr, element_up_ptr, lanes, lane_end)
    for _ in tl.range(lane_first, lane_end, BLOCK_L, num_stages=1):
        next_u, next_b = load_low_rank(
            lora, segment, granule, element, positions, row_segments, columns, columns_live, BLOCK_L, LOW_RANK
        )
        if GATED:
            next_up_u, next_up_b = load_low_rank(
                lora, segment, up_granule, up_element, positions, row_segments, columns, columns_live, BLOCK_L,
                LOW_RANK,
            )  # fmt: skip
        lanes += BLOCK_L
        segment, granule, element = load_lanes(lora.segment, lora.granule, lora.element, lanes, lane_end)
        if GATED:
            _, up_granule, up_element = load_lanes(lora.segment, granule_up_ptr, element_up_ptr, lanes, lane_end)
            acc_gate = _add_lanes(acc_gate, u, b, TILE)
            acc_up = _add_lanes(acc_up, up_u, up_b, TILE)
            up_u, up_b = next_up_u, next_up_b
        else:
            acc_up = _add_lanes(acc_up, u, b, TILE)
        u, b = next_u, next_b
    return acc_gate, acc_up


@triton.jit
def _add_lanes(acc, u, b, TILE: tl.constexpr):
    SWAPPED: tl.constexpr = TILE.SWAPPED
    PRECISION: tl.constexpr = TILE.PRECISION
    if SWAPPED:
        acc = tl.dot(b.T, u.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(u, b, acc, input_precision=PRECISION)
    return acc

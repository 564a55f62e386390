"""Device functions that GEMM 13 and GEMM 2 share: which block a program has, and the expand over its lanes."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.base_product.device import DENSE
from moegraft.kernels.device_lib import grouped_order, load_lanes, load_low_rank


@triton.jit
def find_block(block_ptr, count_ptr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(block, column tile, expert, first, end) of this program; first == end where it has nothing to do."""
    num_blocks = tl.load(count_ptr)
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    has_block = pid < num_blocks * num_n
    block, n = grouped_order(tl.where(has_block, pid, 0), num_blocks, num_n, GROUP)
    record_ptr = block_ptr + block * 8
    expert = tl.load(record_ptr + 0, mask=has_block, other=0)
    first = tl.load(record_ptr + 1, mask=has_block, other=0)
    end = tl.load(record_ptr + 2, mask=has_block, other=0)
    return block, n, expert, first, end


@triton.jit
def has_short_block(num_rows, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether half a block's rows are room enough: so it mostly is for the last block of an expert.

    Only where half a block is one matrix instruction of four warps, as the halves of a whole block are: a row's sums
    have the same bits in either.
    """
    if FORMAT == DENSE and BLOCK_M == 128:
        is_short = num_rows <= BLOCK_M // 2
    else:
        is_short: tl.constexpr = False  # type: ignore[no-redef]
    return is_short


@triton.jit
def first_lanes(block_ptr, block, positions, live, segment_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr,
                lane_capacity, GATED: tl.constexpr, LANE_FIELD: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """What ``expand`` needs of the routing; loaded before the base product, whose loop then hides the latency."""
    row_segments = tl.load(segment_ptr + positions, mask=live, other=-2)
    lane_first = tl.load(block_ptr + block * 8 + LANE_FIELD)
    lane_end = tl.load(block_ptr + block * 8 + LANE_FIELD + 1)
    lanes = lane_first + tl.arange(0, BLOCK_L)
    where = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
    up_where = where
    if GATED:
        up_where = load_lanes(
            lane_segment_ptr, lane_granule_ptr + lane_capacity, element_ptr + lane_capacity, lanes, lane_end
        )
    return row_segments, lane_first, lane_end, where, up_where


@triton.jit
def expand(acc_gate, acc_up, prefetched, positions, columns, columns_live, u_ptr, pool_ptr, lane_segment_ptr,
           lane_granule_ptr, element_ptr, lane_capacity, GATED: tl.constexpr, U_WIDTH: tl.constexpr,
           ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds B u of the block's lanes to the accumulators of the base product, as further K steps.

    Pipelined by hand: u and B a step ahead, where they lie two steps ahead.
    """
    row_segments, lane_first, lane_end, where, up_where = prefetched
    segment, granule, element = where
    _, up_granule, up_element = up_where
    granule_up_ptr = lane_granule_ptr + GATED * lane_capacity
    element_up_ptr = element_ptr + GATED * lane_capacity
    lanes = lane_first + tl.arange(0, BLOCK_L)
    u, b = load_low_rank(
        u_ptr, pool_ptr, segment, granule, element, positions, row_segments, columns, columns_live, BLOCK_L, U_WIDTH,
        ALIGN,
    )  # fmt: skip
    if GATED:
        up_u, up_b = load_low_rank(
            u_ptr, pool_ptr, segment, up_granule, up_element, positions, row_segments, columns, columns_live, BLOCK_L,
            U_WIDTH, ALIGN,
        )  # fmt: skip
    lanes += BLOCK_L
    segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
    if GATED:
        _, up_granule, up_element = load_lanes(lane_segment_ptr, granule_up_ptr, element_up_ptr, lanes, lane_end)
    for _ in tl.range(lane_first, lane_end, BLOCK_L, num_stages=1):
        next_u, next_b = load_low_rank(
            u_ptr, pool_ptr, segment, granule, element, positions, row_segments, columns, columns_live, BLOCK_L,
            U_WIDTH, ALIGN,
        )  # fmt: skip
        if GATED:
            next_up_u, next_up_b = load_low_rank(
                u_ptr, pool_ptr, segment, up_granule, up_element, positions, row_segments, columns, columns_live,
                BLOCK_L, U_WIDTH, ALIGN,
            )  # fmt: skip
        lanes += BLOCK_L
        segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
        if GATED:
            _, up_granule, up_element = load_lanes(lane_segment_ptr, granule_up_ptr, element_up_ptr, lanes, lane_end)
            acc_gate = _add_lanes(acc_gate, u, b, SWAPPED, PRECISION)
            acc_up = _add_lanes(acc_up, up_u, up_b, SWAPPED, PRECISION)
            up_u, up_b = next_up_u, next_up_b
        else:
            acc_up = _add_lanes(acc_up, u, b, SWAPPED, PRECISION)
        u, b = next_u, next_b
    return acc_gate, acc_up


@triton.jit
def _add_lanes(acc, u, b, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(b.T, u.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(u, b, acc, input_precision=PRECISION)
    return acc

"""Device side of the expand that stands alone: adds the low-rank rows' delta to someone else's GEMM output."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.blocks import grouped_order
from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.expand import load_lanes, load_low_rank


@triton.jit
def expand_kernel(y_ptr, strides, routing, lora, COLUMNS: tl.constexpr, HALVES: tl.constexpr, LANE_FIELD: tl.constexpr,
                  LOW_RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
                  PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[row of position] += B u[position]: one read and one write of y, of the rows that have an adapter.

    ``HALVES`` B factors one after the other (gate and up), each to its own COLUMNS of y. ``strides``: elements of y
    from a row, a column and a half to the next.
    """
    stride_n, stride_c, half_offset = strides
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    num_blocks = tl.load(routing.counts)
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    half = tl.program_id(0) % HALVES
    pid = tl.program_id(0) // HALVES
    if pid >= num_blocks * num_n:
        return
    y_ptr += half * half_offset
    granule_ptr = lora.granule + half * lora.capacity
    element_ptr = lora.element + half * lora.capacity
    block, n = grouped_order(pid, num_blocks, num_n, 1)
    lane_first = tl.load(routing.blocks + block * 8 + LANE_FIELD)
    lane_end = tl.load(routing.blocks + block * 8 + LANE_FIELD + 1)
    first = tl.load(routing.blocks + block * 8 + 1)
    end = tl.load(routing.blocks + block * 8 + 2)
    if (first >= end) | (lane_first >= lane_end):
        return
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(routing.order + positions, mask=live, other=0)
    row_segments = tl.load(routing.segment + positions, mask=live, other=-2)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    has_adapter = tl.zeros([BLOCK_M], tl.int32)
    for start in range(lane_first, lane_end, BLOCK_L):
        lanes = start + tl.arange(0, BLOCK_L)
        segment, granule, element = load_lanes(lora.segment, granule_ptr, element_ptr, lanes, lane_end)
        u, b = load_low_rank(
            lora, segment, granule, element, positions, row_segments, columns, columns_live, BLOCK_L, LOW_RANK
        )
        hit = (row_segments[:, None] == segment[None, :]) & (element >= 0)[None, :]
        has_adapter = tl.maximum(has_adapter, tl.max(hit.to(tl.int32), axis=1))
        acc = tl.dot(u, b, acc, input_precision=PRECISION)
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_c
    y_live = (has_adapter > 0)[:, None] & columns_live[None, :]
    y = tl.load(y_ptrs, mask=y_live, other=0.0).to(tl.float32) + acc
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_live)

"""Device side of the grouped GEMM 2: LoRA as extra K steps, bias, router weight."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device_lib import (
    await_prior_kernel,
    grouped_order,
    load_lanes,
    load_low_rank,
    release_next_kernel,
)


@triton.jit
def gemm2_kernel(y_ptr, h_ptr, w_ptr, bias_ptr, router_weight_ptr, order_ptr, segment_ptr, block_ptr, count_ptr,
                 u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, stride_we, stride_wd, stride_wf,
                 stride_be, stride_bd, D: tl.constexpr, F: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_WEIGHT: tl.constexpr, HAS_LORA: tl.constexpr, U_WIDTH: tl.constexpr, ALIGN: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
                 GROUP: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[row of position] = router weight * (W2[e] h[position] + b2[e] + B2 u). Waits as GEMM 13 does."""
    if not HAS_LORA:
        await_prior_kernel(PDL)
    num_blocks = tl.load(count_ptr)
    num_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if pid >= num_blocks * num_n:
        return
    block, n = grouped_order(pid, num_blocks, num_n, GROUP)
    expert = tl.load(block_ptr + block * 8 + 0)
    first = tl.load(block_ptr + block * 8 + 1)
    end = tl.load(block_ptr + block * 8 + 2)
    if first >= end:
        return
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(order_ptr + positions, mask=live, other=0)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_live = d < D
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + positions.to(tl.int64)[:, None] * F + k[None, :]
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += expert.to(tl.int64) * stride_we + d[None, :] * stride_wd + k[:, None] * stride_wf
    if HAS_LORA:
        row_segments = tl.load(segment_ptr + positions, mask=live, other=-2)
        lane_first = tl.load(block_ptr + block * 8 + 5)
        lane_end = tl.load(block_ptr + block * 8 + 6)
        lanes = lane_first + tl.arange(0, BLOCK_L)
        segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(F, BLOCK_K)):
        k_live = k < F - step * BLOCK_K
        h = tl.load(h_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if USE_TMA:
            w = w_ptr.load([expert * D + n * BLOCK_N, step * BLOCK_K]).T
        else:
            w_live = k_live[:, None] & d_live[None, :]
            w = tl.load(w_ptrs + step * BLOCK_K * stride_wf, mask=w_live, other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)

    if HAS_LORA:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    if HAS_LORA:
        u, b = load_low_rank(
            u_ptr, pool_ptr, segment, granule, element, positions, row_segments, d, d_live, BLOCK_L, U_WIDTH, ALIGN
        )
        lanes += BLOCK_L
        segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
        for _ in tl.range(lane_first, lane_end, BLOCK_L, num_stages=1):
            next_u, next_b = load_low_rank(
                u_ptr, pool_ptr, segment, granule, element, positions, row_segments, d, d_live, BLOCK_L, U_WIDTH, ALIGN
            )
            lanes += BLOCK_L
            segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
            acc = tl.dot(u, b, acc, input_precision=PRECISION)
            u, b = next_u, next_b

    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * stride_be + d * stride_bd, mask=d_live, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT:
        acc *= tl.load(router_weight_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + row[:, None].to(tl.int64) * D + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & d_live[None, :])

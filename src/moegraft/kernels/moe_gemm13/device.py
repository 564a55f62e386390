"""Device side of the grouped GEMM 13: gate and up in one program, LoRA as extra K steps, bias, activation."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device_lib import (
    activate,
    await_prior_kernel,
    grouped_order,
    load_lanes,
    load_low_rank,
    release_next_kernel,
)


@triton.jit
def gemm13_kernel(h_ptr, x_ptr, w_ptr, bias_ptr, router_weight_ptr, order_ptr, segment_ptr, block_ptr, count_ptr,
                  u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, stride_x, stride_we, stride_wf,
                  stride_wd, up_offset, stride_be, stride_bf, bias_up_offset, lane_capacity, alpha, limit,
                  D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
                  HAS_BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, HAS_LORA: tl.constexpr,
                  U_WIDTH: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
                  PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[position] = act(W13[e] x + b13[e] + B13 u) for BLOCK_M positions of one expert and BLOCK_N columns of F.

    The base part reads nothing that the shrink writes, so that with programmatic launch the two run side by side; the
    program waits for the shrink only before the first lane. The expand is pipelined by hand:
    u and B a step ahead, where they lie two steps ahead.
    """
    if not HAS_LORA:
        await_prior_kernel(PDL)
    num_blocks = tl.load(count_ptr)
    num_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
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
    f = n * BLOCK_N + tl.arange(0, BLOCK_N)
    f_live = f < F
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (row // K).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += expert.to(tl.int64) * stride_we + f[None, :] * stride_wf + k[:, None] * stride_wd
    if HAS_LORA:
        granule_up_ptr = lane_granule_ptr + GATED * lane_capacity
        element_up_ptr = element_ptr + GATED * lane_capacity
        row_segments = tl.load(segment_ptr + positions, mask=live, other=-2)
        lane_first = tl.load(block_ptr + block * 8 + 3)
        lane_end = tl.load(block_ptr + block * 8 + 4)
        lanes = lane_first + tl.arange(0, BLOCK_L)
        segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
        if GATED:
            _, up_granule, up_element = load_lanes(lane_segment_ptr, granule_up_ptr, element_up_ptr, lanes, lane_end)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_gate = acc_up
    for step in range(tl.cdiv(D, BLOCK_K)):
        k_live = k < D - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if USE_TMA:
            w_row = expert * (F * (1 + GATED)) + n * BLOCK_N
            if GATED:
                acc_gate = tl.dot(x, w_ptr.load([w_row, step * BLOCK_K]).T, acc_gate, input_precision=PRECISION)
                w_row += F
            acc_up = tl.dot(x, w_ptr.load([w_row, step * BLOCK_K]).T, acc_up, input_precision=PRECISION)
        else:
            w_live = k_live[:, None] & f_live[None, :]
            if GATED:
                w = tl.load(w_ptrs + step * BLOCK_K * stride_wd, mask=w_live, other=0.0)
                acc_gate = tl.dot(x, w, acc_gate, input_precision=PRECISION)
            w = tl.load(w_ptrs + up_offset + step * BLOCK_K * stride_wd, mask=w_live, other=0.0)
            acc_up = tl.dot(x, w, acc_up, input_precision=PRECISION)

    if HAS_LORA:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    if HAS_LORA:
        u, b = load_low_rank(
            u_ptr, pool_ptr, segment, granule, element, positions, row_segments, f, f_live, BLOCK_L, U_WIDTH, ALIGN
        )
        if GATED:
            up_u, up_b = load_low_rank(
                u_ptr, pool_ptr, segment, up_granule, up_element, positions, row_segments, f, f_live, BLOCK_L, U_WIDTH,
                ALIGN,
            )  # fmt: skip
        lanes += BLOCK_L
        segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
        if GATED:
            _, up_granule, up_element = load_lanes(lane_segment_ptr, granule_up_ptr, element_up_ptr, lanes, lane_end)
        for _ in tl.range(lane_first, lane_end, BLOCK_L, num_stages=1):
            next_u, next_b = load_low_rank(
                u_ptr, pool_ptr, segment, granule, element, positions, row_segments, f, f_live, BLOCK_L, U_WIDTH, ALIGN
            )
            if GATED:
                next_up_u, next_up_b = load_low_rank(
                    u_ptr, pool_ptr, segment, up_granule, up_element, positions, row_segments, f, f_live, BLOCK_L,
                    U_WIDTH, ALIGN,
                )  # fmt: skip
            lanes += BLOCK_L
            segment, granule, element = load_lanes(lane_segment_ptr, lane_granule_ptr, element_ptr, lanes, lane_end)
            if GATED:
                _, up_granule, up_element = load_lanes(
                    lane_segment_ptr, granule_up_ptr, element_up_ptr, lanes, lane_end
                )
                acc_gate = tl.dot(u, b, acc_gate, input_precision=PRECISION)
                acc_up = tl.dot(up_u, up_b, acc_up, input_precision=PRECISION)
                up_u, up_b = next_up_u, next_up_b
            else:
                acc_up = tl.dot(u, b, acc_up, input_precision=PRECISION)
            u, b = next_u, next_b

    if WEIGHT_ON_INPUT:
        router_weight = tl.load(router_weight_ptr + row, mask=live, other=0.0).to(tl.float32)
        acc_gate *= router_weight[:, None]
        acc_up *= router_weight[:, None]
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + f * stride_bf
        if GATED:
            acc_gate += tl.load(bias_ptrs, mask=f_live, other=0.0).to(tl.float32)[None, :]
        acc_up += tl.load(bias_ptrs + bias_up_offset, mask=f_live, other=0.0).to(tl.float32)[None, :]
    if GATED:
        h = activate(acc_gate, acc_up, KIND, True, alpha, limit)
    else:
        h = activate(acc_up, acc_up, KIND, False, alpha, limit)
    h_ptrs = h_ptr + positions[:, None].to(tl.int64) * F + f[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=live[:, None] & f_live[None, :])

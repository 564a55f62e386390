"""Device side of the grouped GEMM 13: gate and up in one program, LoRA as extra K steps, bias, activation."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.base_product.device import base_product
from moegraft.kernels.device_lib import activate, await_prior_kernel, release_next_kernel
from moegraft.kernels.gemm_lib import expand, find_block, first_lanes, has_short_block
from moegraft.kernels.moe_quantise.device import store_quantised


@triton.jit
def gemm13_kernel(h_ptr, h_stored_ptr, h_scale_ptr, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr,
                  router_weight_ptr, order_ptr, segment_ptr, block_ptr, count_ptr, u_ptr, pool_ptr, lane_segment_ptr,
                  lane_granule_ptr, element_ptr, stride_x, stride_we, stride_wf, stride_wd, up_offset, stride_be,
                  stride_bf, bias_up_offset, lane_capacity, alpha, limit, FORMAT: tl.constexpr, D: tl.constexpr,
                  F: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr, KIND: tl.constexpr,
                  HAS_BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, WAIT_FIRST: tl.constexpr,
                  SCALE_GROUP: tl.constexpr, HAS_LORA: tl.constexpr, U_WIDTH: tl.constexpr, ALIGN: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
                  GROUP: tl.constexpr, USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """h[position] = act(W13[e] x + b13[e] + B13 u) for BLOCK_M positions of one expert and BLOCK_N columns of F.

    The base part reads nothing that the shrink writes, so that with programmatic launch the two run side by side; the
    program waits for the shrink only before the first lane. With ``h_stored_ptr`` (BLOCK_N is then the group that
    shares a scale) h is written as GEMM 2 reads it, and as it is only where a shrink reads it.
    """
    if WAIT_FIRST:
        await_prior_kernel(PDL)
    block, n, expert, first, end = find_block(block_ptr, count_ptr, F, BLOCK_N, GROUP)
    if first >= end:
        return
    if has_short_block(end - first, FORMAT, BLOCK_M):
        _gemm13_block(
            h_ptr, h_stored_ptr, h_scale_ptr, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr,
            router_weight_ptr, order_ptr, segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr,
            element_ptr, block, n, expert, first, end, stride_x, stride_we, stride_wf, stride_wd, up_offset, stride_be,
            stride_bf, bias_up_offset, lane_capacity, alpha, limit, FORMAT, D, F, K, GATED, PAIRED, KIND,
            HAS_BIAS, WEIGHT_ON_INPUT, SCALE_GROUP, HAS_LORA, U_WIDTH, ALIGN, BLOCK_M // 2, BLOCK_N, BLOCK_K, BLOCK_L,
            USE_TMA, SWAPPED, PRECISION, PDL,
        )  # fmt: skip
    else:
        _gemm13_block(
            h_ptr, h_stored_ptr, h_scale_ptr, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr,
            router_weight_ptr, order_ptr, segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr,
            element_ptr, block, n, expert, first, end, stride_x, stride_we, stride_wf, stride_wd, up_offset, stride_be,
            stride_bf, bias_up_offset, lane_capacity, alpha, limit, FORMAT, D, F, K, GATED, PAIRED, KIND,
            HAS_BIAS, WEIGHT_ON_INPUT, SCALE_GROUP, HAS_LORA, U_WIDTH, ALIGN, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_L,
            USE_TMA, SWAPPED, PRECISION, PDL,
        )  # fmt: skip


@triton.jit
def _gemm13_block(h_ptr, h_stored_ptr, h_scale_ptr, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr,
                  router_weight_ptr, order_ptr, segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr,
                  lane_granule_ptr, element_ptr, block, n, expert, first, end, stride_x, stride_we, stride_wf,
                  stride_wd, up_offset, stride_be, stride_bf, bias_up_offset, lane_capacity, alpha, limit,
                  FORMAT: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
                  PAIRED: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
                  SCALE_GROUP: tl.constexpr, HAS_LORA: tl.constexpr, U_WIDTH: tl.constexpr, ALIGN: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
                  USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """The block's positions, of which there are at most BLOCK_M."""
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(order_ptr + positions, mask=live, other=0)
    if HAS_LORA:
        prefetched = first_lanes(
            block_ptr, block, positions, live, segment_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr,
            lane_capacity, GATED, 3, BLOCK_L,
        )  # fmt: skip
    acc_gate, acc_up = base_product(
        x_ptr, row // K, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we, stride_wf,
        stride_wd, up_offset, FORMAT, D, F, GATED, PAIRED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED,
        PRECISION,
    )  # fmt: skip

    if HAS_LORA:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    f = n * BLOCK_N + tl.arange(0, BLOCK_N)
    f_live = f < F
    if HAS_LORA:
        acc_gate, acc_up = expand(
            acc_gate, acc_up, prefetched, positions, f, f_live, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr,
            element_ptr, lane_capacity, GATED, U_WIDTH, ALIGN, BLOCK_L, SWAPPED, PRECISION,
        )  # fmt: skip

    if SWAPPED:
        acc_gate, acc_up = acc_gate.T, acc_up.T
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
    h = h.to(h_ptr.dtype.element_ty)
    if h_stored_ptr is not None:
        num_groups: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
        store_quantised(h_stored_ptr, h_scale_ptr, h, positions, n, f, live, f_live, F, num_groups)
    if h_stored_ptr is None or HAS_LORA:
        h_ptrs = h_ptr + positions[:, None].to(tl.int64) * F + f[None, :]
        tl.store(h_ptrs, h, mask=live[:, None] & f_live[None, :])

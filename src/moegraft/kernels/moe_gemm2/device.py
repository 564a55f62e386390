"""Device side of the grouped GEMM 2: LoRA as extra K steps, bias, router weight."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.base_product.device import base_product
from moegraft.kernels.device_lib import await_prior_kernel, release_next_kernel
from moegraft.kernels.gemm_lib import expand, find_block, first_lanes, has_short_block


@triton.jit
def gemm2_kernel(y_ptr, h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, router_weight_ptr, order_ptr,
                 segment_ptr, block_ptr, count_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr,
                 stride_h, stride_we, stride_wd, stride_wf, stride_be, stride_bd, FORMAT: tl.constexpr,
                 D: tl.constexpr, F: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                 SCALE_GROUP: tl.constexpr, HAS_LORA: tl.constexpr, U_WIDTH: tl.constexpr, ALIGN: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
                 GROUP: tl.constexpr, USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """y[row of position] = router weight * (W2[e] h[position] + b2[e] + B2 u). Waits as GEMM 13 does."""
    if not HAS_LORA:
        await_prior_kernel(PDL)
    block, n, expert, first, end = find_block(block_ptr, count_ptr, D, BLOCK_N, GROUP)
    if first >= end:
        return
    if has_short_block(end - first, FORMAT, BLOCK_M):
        _gemm2_block(
            y_ptr, h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, router_weight_ptr, order_ptr,
            segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, block, n, expert,
            first, end, stride_h, stride_we, stride_wd, stride_wf, stride_be, stride_bd, FORMAT, D, F, HAS_BIAS,
            HAS_WEIGHT, SCALE_GROUP, HAS_LORA, U_WIDTH, ALIGN, BLOCK_M // 2, BLOCK_N, BLOCK_K, BLOCK_L, USE_TMA,
            SWAPPED, PRECISION, PDL,
        )  # fmt: skip
    else:
        _gemm2_block(
            y_ptr, h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, router_weight_ptr, order_ptr,
            segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, block, n, expert,
            first, end, stride_h, stride_we, stride_wd, stride_wf, stride_be, stride_bd, FORMAT, D, F, HAS_BIAS,
            HAS_WEIGHT, SCALE_GROUP, HAS_LORA, U_WIDTH, ALIGN, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_L, USE_TMA,
            SWAPPED, PRECISION, PDL,
        )  # fmt: skip


@triton.jit
def _gemm2_block(y_ptr, h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, router_weight_ptr, order_ptr,
                 segment_ptr, block_ptr, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, block, n,
                 expert, first, end, stride_h, stride_we, stride_wd, stride_wf, stride_be, stride_bd,
                 FORMAT: tl.constexpr, D: tl.constexpr, F: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_WEIGHT: tl.constexpr, SCALE_GROUP: tl.constexpr, HAS_LORA: tl.constexpr, U_WIDTH: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_L: tl.constexpr, USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """The block's positions, of which there are at most BLOCK_M."""
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(order_ptr + positions, mask=live, other=0)
    if HAS_LORA:
        prefetched = first_lanes(
            block_ptr, block, positions, live, segment_ptr, lane_segment_ptr, lane_granule_ptr, element_ptr, 0, False,
            5, BLOCK_L,
        )  # fmt: skip
    _, acc = base_product(
        h_ptr, positions, live, h_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_h, stride_we, stride_wd,
        stride_wf, 0, FORMAT, F, D, False, False, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED, PRECISION,
    )  # fmt: skip

    if HAS_LORA:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_live = d < D
    if HAS_LORA:
        _, acc = expand(
            acc, acc, prefetched, positions, d, d_live, u_ptr, pool_ptr, lane_segment_ptr, lane_granule_ptr,
            element_ptr, 0, False, U_WIDTH, ALIGN, BLOCK_L, SWAPPED, PRECISION,
        )  # fmt: skip

    if SWAPPED:
        acc = acc.T
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * stride_be + d * stride_bd, mask=d_live, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT:
        acc *= tl.load(router_weight_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + row[:, None].to(tl.int64) * D + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & d_live[None, :])

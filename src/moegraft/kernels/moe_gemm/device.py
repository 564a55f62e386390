"""Device side of the grouped GEMMs, with LoRA as extra K steps."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.base_product import base_product
from moegraft.kernels.device.blocks import find_block, has_short_block
from moegraft.kernels.device.common import activate, await_prior_kernel, release_next_kernel
from moegraft.kernels.device.expand import expand, first_lanes
from moegraft.kernels.device.quantise import store_quantised


@triton.jit
def gemm13_kernel(out, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, alpha, limit, SHAPE: tl.constexpr,
                  K: tl.constexpr, KIND: tl.constexpr, LOW_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
                  TILE: tl.constexpr, WAIT_FIRST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[position] = act(W13[e] x + b13[e] + B13 u) for BLOCK_M positions of one expert and BLOCK_N columns of F.

    The base part reads nothing that the shrink writes, so that with programmatic launch the two run side by side; the
    program waits for the shrink only before the first lane. ``out``: (h, h in fp8, its scales). With the second
    (BLOCK_N is then the group that shares a scale) h is written as GEMM 2 reads it, and as it is only where a shrink
    reads it.
    """
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    GROUP: tl.constexpr = TILE.GROUP
    FORMAT: tl.constexpr = SHAPE.FORMAT
    if WAIT_FIRST:
        await_prior_kernel(PDL)
    block, n, expert, first, end = find_block(routing.blocks, routing.counts, COLUMNS, BLOCK_N, GROUP)
    if first >= end:
        return
    if has_short_block(end - first, FORMAT, BLOCK_M):
        _gemm13_block(
            out, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, alpha, limit, (block, n, expert, first,
            end), SHAPE, K, KIND, LOW_RANK, BLOCK_M // 2, TILE, PDL,
        )  # fmt: skip
    else:
        _gemm13_block(
            out, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, alpha, limit, (block, n, expert, first,
            end), SHAPE, K, KIND, LOW_RANK, BLOCK_M, TILE, PDL,
        )  # fmt: skip


@triton.jit
def _gemm13_block(out, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, alpha, limit, work,
                  SHAPE: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, LOW_RANK: tl.constexpr,
                  BLOCK_M: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The positions of a block as ``find_block`` found it, of which there are at most BLOCK_M."""
    GATED: tl.constexpr = SHAPE.GATED
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    SWAPPED: tl.constexpr = TILE.SWAPPED
    h_ptr, stored_ptr, stored_scale_ptr = out
    block, n, expert, first, end = work
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(routing.order + positions, mask=live, other=0)
    if lora.u is not None:
        prefetched = first_lanes(lora, routing, block, positions, live, GATED, 3, BLOCK_L)
    acc_gate, acc_up = base_product(rows, row // K, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)

    if lora.u is not None:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    f = n * BLOCK_N + tl.arange(0, BLOCK_N)
    f_live = f < COLUMNS
    if lora.u is not None:
        acc_gate, acc_up = expand(acc_gate, acc_up, prefetched, lora, positions, f, f_live, GATED, LOW_RANK, TILE)

    if SWAPPED:
        acc_gate, acc_up = acc_gate.T, acc_up.T
    if router_weight_ptr is not None:
        router_weight = tl.load(router_weight_ptr + row, mask=live, other=0.0).to(tl.float32)
        acc_gate *= router_weight[:, None]
        acc_up *= router_weight[:, None]
    if bias.ptr is not None:
        bias_ptrs = bias.ptr + expert * bias.stride_e + f * bias.stride_n
        if GATED:
            acc_gate += tl.load(bias_ptrs, mask=f_live, other=0.0).to(tl.float32)[None, :]
        acc_up += tl.load(bias_ptrs + bias.up_offset, mask=f_live, other=0.0).to(tl.float32)[None, :]
    if GATED:
        h = activate(acc_gate, acc_up, KIND, True, alpha, limit)
    else:
        h = activate(acc_up, acc_up, KIND, False, alpha, limit)
    h = h.to(h_ptr.dtype.element_ty)
    if stored_ptr is not None:
        num_groups: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
        store_quantised(stored_ptr, stored_scale_ptr, h, positions, n, f, live, f_live, COLUMNS, num_groups)
    if stored_ptr is None or lora.u is not None:
        h_ptrs = h_ptr + positions[:, None].to(tl.int64) * COLUMNS + f[None, :]
        tl.store(h_ptrs, h, mask=live[:, None] & f_live[None, :])


@triton.jit
def gemm2_kernel(y_ptr, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, SHAPE: tl.constexpr,
                 LOW_RANK: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[row of position] = router weight * (W2[e] h[position] + b2[e] + B2 u). Waits as GEMM 13 does."""
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    GROUP: tl.constexpr = TILE.GROUP
    FORMAT: tl.constexpr = SHAPE.FORMAT
    if lora.u is None:
        await_prior_kernel(PDL)
    block, n, expert, first, end = find_block(routing.blocks, routing.counts, COLUMNS, BLOCK_N, GROUP)
    if first >= end:
        return
    if has_short_block(end - first, FORMAT, BLOCK_M):
        _gemm2_block(
            y_ptr, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, (block, n, expert, first, end), SHAPE,
            LOW_RANK, BLOCK_M // 2, TILE, PDL,
        )  # fmt: skip
    else:
        _gemm2_block(
            y_ptr, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, (block, n, expert, first, end), SHAPE,
            LOW_RANK, BLOCK_M, TILE, PDL,
        )  # fmt: skip


@triton.jit
def _gemm2_block(y_ptr, rows, w_ptr, weights, bias, router_weight_ptr, routing, lora, work, SHAPE: tl.constexpr,
                 LOW_RANK: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The positions of a block as ``find_block`` found it, of which there are at most BLOCK_M."""
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    SWAPPED: tl.constexpr = TILE.SWAPPED
    block, n, expert, first, end = work
    positions = first + tl.arange(0, BLOCK_M)
    live = positions < end
    row = tl.load(routing.order + positions, mask=live, other=0)
    if lora.u is not None:
        prefetched = first_lanes(lora, routing, block, positions, live, False, 5, BLOCK_L)
    _, acc = base_product(rows, positions, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)

    if lora.u is not None:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_live = d < COLUMNS
    if lora.u is not None:
        _, acc = expand(acc, acc, prefetched, lora, positions, d, d_live, False, LOW_RANK, TILE)

    if SWAPPED:
        acc = acc.T
    if bias.ptr is not None:
        bias_ptrs = bias.ptr + expert * bias.stride_e + d * bias.stride_n
        acc += tl.load(bias_ptrs, mask=d_live, other=0.0).to(tl.float32)[None, :]
    if router_weight_ptr is not None:
        acc *= tl.load(router_weight_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + row[:, None].to(tl.int64) * COLUMNS + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & d_live[None, :])

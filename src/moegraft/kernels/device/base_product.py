"""The base part of a grouped GEMM: a block's rows times one column tile of its expert's weights, for every format.

A weight format is one function with the signature of ``dense_product`` and a line in ``base_product``. Dense weights
have two: where gate and up alternate, ``paired_product`` reads them as they lie, as one matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.blocks import DENSE, FP8, INT4, INT8, MXFP4
from moegraft.kernels.device.eight_bit import fp8_product, int8_product
from moegraft.kernels.device.four_bit import int4_product, mxfp4_product


@triton.jit
def base_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """(gate, up): float32 [BLOCK_M, BLOCK_N], columns n*BLOCK_N.. of COLUMNS; ungated, both are the only half.

    Rows ``x_index`` of ``rows`` [., LENGTH] where ``live``; ``w_ptr``: the weights, or a TMA descriptor of them.
    ``TILE.SWAPPED``: the weights are the left operand, and the results [BLOCK_N, BLOCK_M]. Reads nothing that a LoRA
    kernel writes.
    """
    PAIRED: tl.constexpr = SHAPE.PAIRED
    FORMAT: tl.constexpr = SHAPE.FORMAT
    if PAIRED:
        acc_gate, acc_up = paired_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    elif FORMAT == DENSE:
        acc_gate, acc_up = dense_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    elif FORMAT == INT8:
        acc_gate, acc_up = int8_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    elif FORMAT == FP8:
        acc_gate, acc_up = fp8_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    elif FORMAT == INT4:
        acc_gate, acc_up = int4_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    elif FORMAT == MXFP4:
        acc_gate, acc_up = mxfp4_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    return acc_gate, acc_up


@triton.jit
def dense_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    """Weights in the dtype of x, of any strides, or behind a TMA descriptor of [E * rows, LENGTH]."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    USE_TMA: tl.constexpr = TILE.USE_TMA
    GATED: tl.constexpr = SHAPE.GATED
    LENGTH: tl.constexpr = SHAPE.LENGTH
    PRECISION: tl.constexpr = TILE.PRECISION
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = rows.ptr + x_index.to(tl.int64)[:, None] * rows.stride + k[None, :]
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += (
            expert.to(tl.int64) * weights.stride_e + columns[None, :] * weights.stride_n + k[:, None] * weights.stride_k
        )
    up_ptrs = w_ptrs
    if GATED and not USE_TMA:
        up_ptrs += weights.up_offset
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if USE_TMA:
            w_row = expert * (COLUMNS * (1 + GATED)) + n * BLOCK_N
            if GATED:
                w = w_ptr.load([w_row, step * BLOCK_K])
                acc_gate = tl.dot(x, w.T, acc_gate, input_precision=PRECISION)
                w_row += COLUMNS
            acc_up = tl.dot(x, w_ptr.load([w_row, step * BLOCK_K]).T, acc_up, input_precision=PRECISION)
        else:
            w_live = k_live[:, None] & columns_live[None, :]
            if GATED:
                w = tl.load(w_ptrs + step * BLOCK_K * weights.stride_k, mask=w_live, other=0.0)
                acc_gate = tl.dot(x, w, acc_gate, input_precision=PRECISION)
            w = tl.load(up_ptrs + step * BLOCK_K * weights.stride_k, mask=w_live, other=0.0)
            acc_up = tl.dot(x, w, acc_up, input_precision=PRECISION)
    return acc_gate, acc_up


@triton.jit
def paired_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Gate and up of BLOCK_N columns are 2*BLOCK_N neighbours: one product, taken apart when all of it is summed.

    Read apart, they would be every second number of a row: no vector loads, and no asynchronous copies.
    ``weights.up_offset``: from a column to its neighbour.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    LENGTH: tl.constexpr = SHAPE.LENGTH
    PRECISION: tl.constexpr = TILE.PRECISION
    columns = n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
    columns_live = columns < 2 * COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = rows.ptr + x_index.to(tl.int64)[:, None] * rows.stride + k[None, :]
    w_ptrs = (
        w_ptr
        + expert.to(tl.int64) * weights.stride_e
        + columns[None, :] * weights.up_offset
        + k[:, None] * weights.stride_k
    )
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        w_live = k_live[:, None] & columns_live[None, :]
        w = tl.load(w_ptrs + step * BLOCK_K * weights.stride_k, mask=w_live, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))

"""The base part of a grouped GEMM: a block's rows times one column tile of its expert's weights, for every format.

A weight format is one function with the signature of ``dense_product`` and a line in ``base_product``. Dense weights
have two: where gate and up alternate, ``paired_product`` reads them as they lie, as one matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.eight_bit_product.device import fp8_product, int8_product
from moegraft.kernels.four_bit_product.device import int4_product, mxfp4_product

# Codes of WeightFormat.
DENSE = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
MXFP4 = tl.constexpr(4)


@triton.jit
def base_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                 stride_wn, stride_wk, up_offset, FORMAT: tl.constexpr, LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
                 GATED: tl.constexpr, PAIRED: tl.constexpr, SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, SWAPPED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """(gate, up): float32 [BLOCK_M, BLOCK_N], columns n*BLOCK_N.. of COLUMNS; ungated, both are the only half.

    Rows ``x_index`` of x [., LENGTH] where ``live``. ``PAIRED``: dense columns of gate and up alternate. ``SWAPPED``:
    the weights are the left operand, and the results [BLOCK_N, BLOCK_M]. Reads nothing that a LoRA kernel writes.
    """
    if PAIRED:
        acc_gate, acc_up = paired_product(
            x_ptr, x_index, live, w_ptr, expert, n, stride_x, stride_we, up_offset, stride_wk, LENGTH, COLUMNS,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif FORMAT == DENSE:
        acc_gate, acc_up = dense_product(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
            stride_wn, stride_wk, up_offset, LENGTH, COLUMNS, GATED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
            SWAPPED, PRECISION,
        )  # fmt: skip
    elif FORMAT == INT8:
        acc_gate, acc_up = int8_product(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
            stride_wn, stride_wk, up_offset, LENGTH, COLUMNS, GATED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
            SWAPPED, PRECISION,
        )  # fmt: skip
    elif FORMAT == FP8:
        acc_gate, acc_up = fp8_product(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
            stride_wn, stride_wk, up_offset, LENGTH, COLUMNS, GATED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
            SWAPPED, PRECISION,
        )  # fmt: skip
    elif FORMAT == INT4:
        acc_gate, acc_up = int4_product(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
            stride_wn, stride_wk, up_offset, LENGTH, COLUMNS, GATED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
            SWAPPED, PRECISION,
        )  # fmt: skip
    elif FORMAT == MXFP4:
        acc_gate, acc_up = mxfp4_product(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
            stride_wn, stride_wk, up_offset, LENGTH, COLUMNS, GATED, SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
            SWAPPED, PRECISION,
        )  # fmt: skip
    return acc_gate, acc_up


@triton.jit
def dense_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                  stride_wn, stride_wk, up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
                  SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Weights in the dtype of x, of any strides, or behind a TMA descriptor of [E * rows, LENGTH]."""
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += expert.to(tl.int64) * stride_we + columns[None, :] * stride_wn + k[:, None] * stride_wk
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if USE_TMA:
            w_row = expert * (COLUMNS * (1 + GATED)) + n * BLOCK_N
            if GATED:
                acc_gate = tl.dot(x, w_ptr.load([w_row, step * BLOCK_K]).T, acc_gate, input_precision=PRECISION)
                w_row += COLUMNS
            acc_up = tl.dot(x, w_ptr.load([w_row, step * BLOCK_K]).T, acc_up, input_precision=PRECISION)
        else:
            w_live = k_live[:, None] & columns_live[None, :]
            if GATED:
                w = tl.load(w_ptrs + step * BLOCK_K * stride_wk, mask=w_live, other=0.0)
                acc_gate = tl.dot(x, w, acc_gate, input_precision=PRECISION)
            w = tl.load(w_ptrs + up_offset + step * BLOCK_K * stride_wk, mask=w_live, other=0.0)
            acc_up = tl.dot(x, w, acc_up, input_precision=PRECISION)
    return acc_gate, acc_up


@triton.jit
def paired_product(x_ptr, x_index, live, w_ptr, expert, n, stride_x, stride_we, stride_wn, stride_wk,
                   LENGTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gate and up of BLOCK_N columns are 2*BLOCK_N neighbours: one product, taken apart when all of it is summed.

    Read apart, they would be every second number of a row: no vector loads, and no asynchronous copies.
    """
    columns = n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
    columns_live = columns < 2 * COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + columns[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        w_live = k_live[:, None] & columns_live[None, :]
        w = tl.load(w_ptrs + step * BLOCK_K * stride_wk, mask=w_live, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))

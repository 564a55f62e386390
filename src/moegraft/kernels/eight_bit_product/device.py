"""Base products of int8 and fp8 weights [E, G*COLUMNS, LENGTH], inputs neighbours. The contract: ``base_product``."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device_lib import scaled
from moegraft.kernels.moe_quantise.device import quantise_group

BLOCK = tl.constexpr(128)
"""Side of a block of fp8 weights under one scale."""
EXACT_TERMS = tl.constexpr(128)
"""Products that the fp8 matrix unit may add up in its short accumulator before float32 takes them over."""


@triton.jit
def int8_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                 stride_wn, stride_wk, up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
                 SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Weights become numbers of the dtype of x in registers; the scale of a column multiplies its sum."""
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + k[None, :]
    acc_up = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if GATED:
            w = _load_weights(w_ptr, expert, 0, columns, columns_live, n, step, k_live, stride_we, stride_wn, 0,
                              COLUMNS, 2, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
            acc_gate = _dot(x, w.to(x.dtype), acc_gate, SWAPPED, PRECISION)
        w = _load_weights(w_ptr, expert, GATED, columns, columns_live, n, step, k_live, stride_we, stride_wn,
                          up_offset, COLUMNS, 1 + GATED, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
        acc_up = _dot(x, w.to(x.dtype), acc_up, SWAPPED, PRECISION)
    return _scale_columns(acc_gate, acc_up, w_scale_ptr, expert, columns, columns_live, COLUMNS, GATED, SWAPPED)


@triton.jit
def fp8_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                stride_wn, stride_wk, up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
                SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows in fp8 with float32 scales [rows, groups]; without scales (blocks only), rows to quantise here."""
    if SCALE_GROUP > 0:
        acc_gate, acc_up = _fp8_blocks(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, expert, n, stride_x, stride_we, stride_wn,
            up_offset, LENGTH, COLUMNS, GATED, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED,
        )  # fmt: skip
    else:
        acc_gate, acc_up = _fp8_columns(
            x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, expert, n, stride_x, stride_we, stride_wn,
            up_offset, LENGTH, COLUMNS, GATED, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED,
        )  # fmt: skip
    return acc_gate, acc_up


@triton.jit
def _fp8_columns(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, expert, n, stride_x, stride_we, stride_wn,
                 up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
                 SWAPPED: tl.constexpr):  # fmt: skip
    """A scale a row and a scale a column: both multiply the sum."""
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + k[None, :]
    x_scale = tl.load(x_scale_ptr + x_index, mask=live, other=0.0)
    acc_up = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if GATED:
            w = _load_weights(w_ptr, expert, 0, columns, columns_live, n, step, k_live, stride_we, stride_wn, 0,
                              COLUMNS, 2, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
            acc_gate = _fp8_dot(x, w, acc_gate, SWAPPED)
        w = _load_weights(w_ptr, expert, GATED, columns, columns_live, n, step, k_live, stride_we, stride_wn,
                          up_offset, COLUMNS, 1 + GATED, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
        acc_up = _fp8_dot(x, w, acc_up, SWAPPED)
    acc_gate, acc_up = _scale_columns(
        acc_gate, acc_up, w_scale_ptr, expert, columns, columns_live, COLUMNS, GATED, SWAPPED
    )
    if SWAPPED:
        x_scale = x_scale[None, :]
    else:
        x_scale = x_scale[:, None]
    return scaled(acc_gate, x_scale), scaled(acc_up, x_scale)


@triton.jit
def _fp8_blocks(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, expert, n, stride_x, stride_we, stride_wn,
                up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
                SWAPPED: tl.constexpr):  # fmt: skip
    """A step is one block of inputs: its sum times the scale of the row's group and that of the block of weights.

    BLOCK_K is the block's side and BLOCK_N divides it, so that a tile has one scale of weights a step.
    """
    tl.static_assert(BLOCK_K == BLOCK)
    tl.static_assert(BLOCK % BLOCK_N == 0)
    num_groups: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    half_blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + k[None, :]
    x_scale_ptrs = x_scale_ptr
    if x_scale_ptr is not None:
        x_scale_ptrs += x_index.to(tl.int64) * num_groups
    up_scale_ptr = w_scale_ptr + (expert * (1 + GATED) * half_blocks + n * BLOCK_N // BLOCK).to(tl.int64) * num_groups
    gate_scale_ptr = up_scale_ptr
    if GATED:
        up_scale_ptr += half_blocks * num_groups
    acc_up = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(num_groups):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if x_scale_ptr is None:
            x, x_scale = quantise_group(x)
        else:
            x_scale = tl.load(x_scale_ptrs + step, mask=live, other=0.0)
        if SWAPPED:
            x_scale = x_scale[None, :]
        else:
            x_scale = x_scale[:, None]
        zeros = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
        if GATED:
            w = _load_weights(w_ptr, expert, 0, columns, columns_live, n, step, k_live, stride_we, stride_wn, 0,
                              COLUMNS, 2, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
            acc_gate += _fp8_dot(x, w, zeros, SWAPPED) * (x_scale * tl.load(gate_scale_ptr + step))
        w = _load_weights(w_ptr, expert, GATED, columns, columns_live, n, step, k_live, stride_we, stride_wn,
                          up_offset, COLUMNS, 1 + GATED, BLOCK_N, BLOCK_K, USE_TMA)  # fmt: skip
        acc_up += _fp8_dot(x, w, zeros, SWAPPED) * (x_scale * tl.load(up_scale_ptr + step))
    return acc_gate, acc_up


@triton.jit
def _load_weights(w_ptr, expert, half, columns, columns_live, n, step, k_live, stride_we, stride_wn, offset,
                  COLUMNS: tl.constexpr, NUM_HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  USE_TMA: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of one half; through a descriptor of [E * rows, LENGTH] or by strides."""
    if USE_TMA:
        w = w_ptr.load([(expert * NUM_HALVES + half) * COLUMNS + n * BLOCK_N, step * BLOCK_K])
    else:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + offset + columns[:, None] * stride_wn + k[None, :]
        w = tl.load(w_ptrs, mask=columns_live[:, None] & k_live[None, :], other=0.0)
    return w


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr):
    if SWAPPED:
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return zeros


@triton.jit
def _dot(x, w, acc, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _fp8_dot(x, w, acc, SWAPPED: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(w, x.T, acc, max_num_imprecise_acc=EXACT_TERMS)
    else:
        acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=EXACT_TERMS)
    return acc


@triton.jit
def _scale_columns(acc_gate, acc_up, w_scale_ptr, expert, columns, columns_live, COLUMNS: tl.constexpr,
                   GATED: tl.constexpr, SWAPPED: tl.constexpr):  # fmt: skip
    """Multiplies the sums of a column with its scale, of [E, G * COLUMNS]."""
    scale_ptrs = w_scale_ptr + expert.to(tl.int64) * COLUMNS * (1 + GATED) + columns
    up_scale = tl.load(scale_ptrs + GATED * COLUMNS, mask=columns_live, other=0.0)
    gate_scale = tl.load(scale_ptrs, mask=columns_live, other=0.0)
    if SWAPPED:
        up_scale, gate_scale = up_scale[:, None], gate_scale[:, None]
    else:
        up_scale, gate_scale = up_scale[None, :], gate_scale[None, :]
    return scaled(acc_gate, gate_scale), scaled(acc_up, up_scale)

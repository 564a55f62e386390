"""Base products of int8 and fp8 weights [E, G*COLUMNS, LENGTH], inputs neighbours. The contract: ``base_product``."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import add_product, scaled, zero_sums
from moegraft.kernels.device.quantise import quantise_group

BLOCK = tl.constexpr(128)
"""Side of a block of fp8 weights under one scale."""
EXACT_TERMS = tl.constexpr(128)
"""Products that the fp8 matrix unit may add up in its short accumulator before float32 takes them over."""


@triton.jit
def int8_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """Weights become numbers of the dtype of x in registers; the scale of a column multiplies its sum."""
    GATED: tl.constexpr = SHAPE.GATED
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    SWAPPED: tl.constexpr = TILE.SWAPPED
    LENGTH: tl.constexpr = SHAPE.LENGTH
    PRECISION: tl.constexpr = TILE.PRECISION
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = rows.ptr + x_index.to(tl.int64)[:, None] * rows.stride + k[None, :]
    acc_up = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if GATED:
            w = _load_weights(w_ptr, weights, expert, 0, columns, columns_live, n, step, k_live, SHAPE, TILE)
            acc_gate = add_product(x, w.to(x.dtype), acc_gate, SWAPPED, PRECISION)
        w = _load_weights(w_ptr, weights, expert, GATED, columns, columns_live, n, step, k_live, SHAPE, TILE)
        acc_up = add_product(x, w.to(x.dtype), acc_up, SWAPPED, PRECISION)
    return _scale_columns(acc_gate, acc_up, weights, expert, columns, columns_live, SHAPE, TILE)


@triton.jit
def fp8_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    """Rows in fp8 with float32 scales [rows, groups]; without scales (blocks only), rows to quantise here."""
    SCALE_GROUP: tl.constexpr = SHAPE.SCALE_GROUP
    if SCALE_GROUP > 0:
        acc_gate, acc_up = _fp8_blocks(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    else:
        acc_gate, acc_up = _fp8_columns(rows, x_index, live, w_ptr, weights, expert, n, SHAPE, BLOCK_M, TILE)
    return acc_gate, acc_up


@triton.jit
def _fp8_columns(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """A scale a row and a scale a column: both multiply the sum."""
    GATED: tl.constexpr = SHAPE.GATED
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    SWAPPED: tl.constexpr = TILE.SWAPPED
    LENGTH: tl.constexpr = SHAPE.LENGTH
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = rows.ptr + x_index.to(tl.int64)[:, None] * rows.stride + k[None, :]
    x_scale = tl.load(rows.scale + x_index, mask=live, other=0.0)
    acc_up = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(tl.cdiv(LENGTH, BLOCK_K)):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if GATED:
            w = _load_weights(w_ptr, weights, expert, 0, columns, columns_live, n, step, k_live, SHAPE, TILE)
            acc_gate = _fp8_dot(x, w, acc_gate, SWAPPED)
        w = _load_weights(w_ptr, weights, expert, GATED, columns, columns_live, n, step, k_live, SHAPE, TILE)
        acc_up = _fp8_dot(x, w, acc_up, SWAPPED)
    acc_gate, acc_up = _scale_columns(acc_gate, acc_up, weights, expert, columns, columns_live, SHAPE, TILE)
    if SWAPPED:
        x_scale = x_scale[None, :]
    else:
        x_scale = x_scale[:, None]
    return scaled(acc_gate, x_scale), scaled(acc_up, x_scale)


@triton.jit
def _fp8_blocks(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    """A step is one block of inputs: its sum times the scale of the row's group and that of the block of weights.

    BLOCK_K is the block's side and BLOCK_N divides it, so that a tile has one scale of weights a step.
    """
    GATED: tl.constexpr = SHAPE.GATED
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    LENGTH: tl.constexpr = SHAPE.LENGTH
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    SWAPPED: tl.constexpr = TILE.SWAPPED
    tl.static_assert(BLOCK_K == BLOCK)
    tl.static_assert(BLOCK % BLOCK_N == 0)
    num_groups: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    half_blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_live = columns < COLUMNS
    k = tl.arange(0, BLOCK_K)
    x_ptrs = rows.ptr + x_index.to(tl.int64)[:, None] * rows.stride + k[None, :]
    x_scale_ptrs = rows.scale
    if rows.scale is not None:
        x_scale_ptrs += x_index.to(tl.int64) * num_groups
    up_scale_ptr = weights.scale + (expert * (1 + GATED) * half_blocks + n * BLOCK_N // BLOCK).to(tl.int64) * num_groups
    gate_scale_ptr = up_scale_ptr
    if GATED:
        up_scale_ptr += half_blocks * num_groups
    acc_up = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    for step in range(num_groups):
        k_live = k < LENGTH - step * BLOCK_K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=live[:, None] & k_live[None, :], other=0.0)
        if rows.scale is None:
            x, x_scale = quantise_group(x)
        else:
            x_scale = tl.load(x_scale_ptrs + step, mask=live, other=0.0)
        if SWAPPED:
            x_scale = x_scale[None, :]
        else:
            x_scale = x_scale[:, None]
        zeros = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
        if GATED:
            w = _load_weights(w_ptr, weights, expert, 0, columns, columns_live, n, step, k_live, SHAPE, TILE)
            acc_gate += _fp8_dot(x, w, zeros, SWAPPED) * (x_scale * tl.load(gate_scale_ptr + step))
        w = _load_weights(w_ptr, weights, expert, GATED, columns, columns_live, n, step, k_live, SHAPE, TILE)
        acc_up += _fp8_dot(x, w, zeros, SWAPPED) * (x_scale * tl.load(up_scale_ptr + step))
    return acc_gate, acc_up


@triton.jit
def _load_weights(w_ptr, weights, expert, half, columns, columns_live, n, step, k_live, SHAPE: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of one half (up: 1, or 0 without a gate); through a descriptor or by strides."""
    USE_TMA: tl.constexpr = TILE.USE_TMA
    GATED: tl.constexpr = SHAPE.GATED
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    if USE_TMA:
        w_row = (expert * (1 + GATED) + half) * COLUMNS + n * BLOCK_N
        w = w_ptr.load([w_row, step * BLOCK_K])
    else:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        offset = expert.to(tl.int64) * weights.stride_e + half * weights.up_offset
        w_ptrs = w_ptr + offset + columns[:, None] * weights.stride_n + k[None, :]
        w = tl.load(w_ptrs, mask=columns_live[:, None] & k_live[None, :], other=0.0)
    return w


@triton.jit
def _fp8_dot(x, w, acc, SWAPPED: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(w, x.T, acc, max_num_imprecise_acc=EXACT_TERMS)
    else:
        acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=EXACT_TERMS)
    return acc


@triton.jit
def _scale_columns(acc_gate, acc_up, weights, expert, columns, columns_live, SHAPE: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Multiplies the sums of a column with its scale, of [E, G * COLUMNS]."""
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    GATED: tl.constexpr = SHAPE.GATED
    SWAPPED: tl.constexpr = TILE.SWAPPED
    scale_ptrs = weights.scale + expert.to(tl.int64) * COLUMNS * (1 + GATED) + columns
    up_scale = tl.load(scale_ptrs + GATED * COLUMNS, mask=columns_live, other=0.0)
    gate_scale = tl.load(scale_ptrs, mask=columns_live, other=0.0)
    if SWAPPED:
        up_scale, gate_scale = up_scale[:, None], gate_scale[:, None]
    else:
        up_scale, gate_scale = up_scale[None, :], gate_scale[None, :]
    return scaled(acc_gate, gate_scale), scaled(acc_up, up_scale)

"""Base products of single rows: no matrix unit, every number of a weight goes through the registers of one thread.

One row is too little for a tile of the matrix unit. Instead as many bytes as possible are on their way at once: the
weights of a step are loaded before those of the step ahead of it are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.blocks import INT8, MXFP4
from moegraft.kernels.device.common import await_prior_kernel
from moegraft.kernels.device.four_bit import GRANULE, RUN, _load_words, _number, _runs, _scale_of


@triton.jit
def row_sums(rows, w_ptr, weights, ids_ptr, factor_ptr, choice, n, SHAPE: tl.constexpr, E: tl.constexpr,
             K: tl.constexpr, TILE: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """(gate, up): float32 [BLOCK_N], the sum over TILE.CHOICES choices from ``choice`` on of factor * W[expert] x.

    Columns n*BLOCK_N.. of COLUMNS; ungated, both are the only half. Choices of experts outside [0, E) give nothing.
    Each choice has a row of its own where CHOICES > 1, else all share row 0. ``factor_ptr`` None: ones. ``WAIT``: rows
    are those of the kernel before this one, weights are not.
    """
    FORMAT: tl.constexpr = SHAPE.FORMAT
    if FORMAT == 0 or FORMAT == INT8:
        gate, up = _dense_sums(rows, w_ptr, weights, ids_ptr, factor_ptr, choice, n, SHAPE, E, K, TILE, WAIT, PDL)
    else:
        gate, up = _four_bit_sums(rows, w_ptr, weights, ids_ptr, factor_ptr, choice, n, SHAPE, E, K, TILE, WAIT, PDL)
    return gate, up


@triton.jit
def load_choices(ids_ptr, choices, E: tl.constexpr, K: tl.constexpr):
    """(expert or 0, whether it is one of the E) of some choices."""
    expert = tl.load(ids_ptr + choices, mask=choices < K, other=-1).to(tl.int32)
    is_local = (expert >= 0) & (expert < E)
    return tl.where(is_local, expert, 0), is_local


@triton.jit
def load_factors(factor_ptr, choices, is_local):
    """The factor of each choice, zero where it gives nothing."""
    if factor_ptr is None:
        factor = is_local.to(tl.float32)
    else:
        factor = tl.load(factor_ptr + choices, mask=is_local, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _dense_sums(rows, w_ptr, weights, ids_ptr, factor_ptr, choice, n, SHAPE: tl.constexpr, E: tl.constexpr,
                K: tl.constexpr, TILE: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Weights in the dtype of x, or int8 with a scale a column; inputs are neighbours."""
    CHOICES: tl.constexpr = TILE.CHOICES
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    LENGTH: tl.constexpr = SHAPE.LENGTH
    GATED: tl.constexpr = SHAPE.GATED
    FORMAT: tl.constexpr = SHAPE.FORMAT
    STEPS: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    choices = choice + tl.arange(0, CHOICES)
    expert, is_local = load_choices(ids_ptr, choices, E, K)
    factor = load_factors(factor_ptr, choices, is_local)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live = (is_local[:, None] & (columns < COLUMNS)[None, :])[:, :, None]
    first = expert.to(tl.int64)[:, None] * weights.stride_e + columns[None, :] * weights.stride_n
    w_ptrs = w_ptr + first[:, :, None] + k[None, None, :]
    x_rows = choices * 0
    if CHOICES > 1:
        x_rows = choices
    x_ptrs = rows.ptr + x_rows.to(tl.int64)[:, None] * rows.stride + k[None, :]
    acc_up = tl.zeros([CHOICES, BLOCK_N, BLOCK_K], tl.float32)
    acc_gate = acc_up
    k_live = (k < LENGTH)[None, None, :]
    w_up = tl.load(w_ptrs + weights.up_offset * GATED, mask=live & k_live, other=0.0)
    w_gate = w_up
    if GATED:
        w_gate = tl.load(w_ptrs, mask=live & k_live, other=0.0)
    if WAIT:
        await_prior_kernel(PDL)
    for step in range(STEPS):
        x_live = is_local[:, None] & (k < LENGTH - step * BLOCK_K)[None, :]
        x = tl.load(x_ptrs + step * BLOCK_K, mask=x_live, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            x = x * factor[:, None]
        now_up, now_gate = w_up, w_gate
        if STEPS > 1:
            ahead = (step + 1) * BLOCK_K
            ahead_live = live & (k < LENGTH - ahead)[None, None, :]
            w_up = tl.load(w_ptrs + ahead + weights.up_offset * GATED, mask=ahead_live, other=0.0)
            if GATED:
                w_gate = tl.load(w_ptrs + ahead, mask=ahead_live, other=0.0)
        acc_up += now_up.to(tl.float32) * x[:, None, :]
        if GATED:
            acc_gate += now_gate.to(tl.float32) * x[:, None, :]
    up, gate = tl.sum(acc_up, 2), tl.sum(acc_gate, 2)
    if FORMAT == INT8:
        scale_ptrs = weights.scale + expert.to(tl.int64)[:, None] * (COLUMNS * (1 + GATED)) + columns[None, :]
        column_live = is_local[:, None] & (columns < COLUMNS)[None, :]
        up *= tl.load(scale_ptrs + GATED * COLUMNS, mask=column_live, other=0.0)
        gate *= tl.load(scale_ptrs, mask=column_live, other=0.0)
    return tl.sum(gate, 0), tl.sum(up, 0)


@triton.jit
def _four_bit_sums(rows, w_ptr, weights, ids_ptr, factor_ptr, choice, n, SHAPE: tl.constexpr, E: tl.constexpr,
                   K: tl.constexpr, TILE: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Words in the order of ``formats/four_bit.py``: a step is BLOCK_K // 128 granules, and a line of the tile is one
    (choice, granule, column)."""
    CHOICES: tl.constexpr = TILE.CHOICES
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    GRANULES: tl.constexpr = TILE.BLOCK_K // 128
    LINES: tl.constexpr = CHOICES * GRANULES * BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    LENGTH: tl.constexpr = SHAPE.LENGTH
    GATED: tl.constexpr = SHAPE.GATED
    SCALE_GROUP: tl.constexpr = SHAPE.SCALE_GROUP
    E2M1: tl.constexpr = SHAPE.FORMAT == MXFP4
    NUM: tl.constexpr = (LENGTH + GRANULE - 1) // GRANULE
    STEPS: tl.constexpr = (NUM + GRANULES - 1) // GRANULES
    ROWS: tl.constexpr = COLUMNS * (1 + GATED)
    SCALED: tl.constexpr = NUM if SCALE_GROUP > 0 else 1
    line = tl.arange(0, LINES)
    choices = choice + line // (GRANULES * BLOCK_N)
    expert, is_local = load_choices(ids_ptr, choices, E, K)
    factor = load_factors(factor_ptr, choices, is_local)
    within = line // BLOCK_N % GRANULES
    row = tl.minimum(n * BLOCK_N + line % BLOCK_N, COLUMNS - 1)
    first = expert.to(tl.int64) * SCALED * ROWS + row
    x_rows = choices * 0
    if CHOICES > 1:
        x_rows = choices
    x_ptrs = rows.ptr + x_rows.to(tl.int64) * rows.stride
    acc_up = tl.zeros([LINES, RUN], tl.float32)
    acc_gate = acc_up
    granule = tl.minimum(within, NUM - 1)
    w_up = _load_line(w_ptr, expert, is_local, granule, row + GATED * COLUMNS, NUM, ROWS)
    w_gate = w_up
    if GATED:
        w_gate = _load_line(w_ptr, expert, is_local, granule, row, NUM, ROWS)
    if WAIT:
        await_prior_kernel(PDL)
    for step in range(STEPS):
        k = (step * GRANULES + within) * GRANULE
        here = first
        if SCALE_GROUP > 0:
            here += tl.minimum(step * GRANULES + within, NUM - 1) * ROWS
        now_up, now_gate = w_up, w_gate
        if STEPS > 1:
            granule = tl.minimum((step + 1) * GRANULES + within, NUM - 1)
            w_up = _load_line(w_ptr, expert, is_local, granule, row + GATED * COLUMNS, NUM, ROWS)
            if GATED:
                w_gate = _load_line(w_ptr, expert, is_local, granule, row, NUM, ROWS)
        acc_up = _add_lines(acc_up, x_ptrs, is_local, k, now_up, weights, here + GATED * COLUMNS, E2M1, LENGTH,
                            SCALE_GROUP)  # fmt: skip
        if GATED:
            acc_gate = _add_lines(acc_gate, x_ptrs, is_local, k, now_gate, weights, here, E2M1, LENGTH, SCALE_GROUP)
    up = tl.sum(acc_up, 1) * factor
    gate = tl.sum(acc_gate, 1) * factor
    if SCALE_GROUP == 0:
        up *= tl.load(weights.scale + first + GATED * COLUMNS)
        gate *= tl.load(weights.scale + first)
    shape: tl.constexpr = (CHOICES * GRANULES, BLOCK_N)
    return tl.sum(tl.reshape(gate, shape), 0), tl.sum(tl.reshape(up, shape), 0)


@triton.jit
def _load_line(w_ptr, expert, live, granule, row, NUM: tl.constexpr, ROWS: tl.constexpr):
    """Words int16 [lines, 32]."""
    first = ((expert.to(tl.int64) * NUM + granule) * ROWS + row) * RUN
    return tl.load(w_ptr + first[:, None] + tl.arange(0, RUN)[None, :], mask=live[:, None], other=0)


@triton.jit
def _add_lines(acc, x_ptrs, live, k, words, weights, index, E2M1: tl.constexpr, LENGTH: tl.constexpr,
               SCALE_GROUP: tl.constexpr):  # fmt: skip
    """acc [lines, 32] + the products of each line's 128 inputs from ``k`` on, four for each word."""
    DTYPE: tl.constexpr = x_ptrs.dtype.element_ty
    RUNS: tl.constexpr = SCALE_GROUP // 32 if SCALE_GROUP > 0 else 4  # of one scale
    LATE: tl.constexpr = not E2M1
    runs = _runs(words, E2M1, DTYPE)
    scales = _load_words(weights.scale, index)
    zeros = _load_words(weights.zero, index)
    i = tl.arange(0, RUN)
    total = acc
    for j in tl.static_range(4):
        inputs = k[:, None] + j * RUN + i[None, :]
        x = tl.load(x_ptrs[:, None] + inputs, mask=live[:, None] & (inputs < LENGTH), other=0.0).to(tl.float32)
        w = _number(runs[j], weights, scales, zeros, j, E2M1, SCALE_GROUP, LATE).to(tl.float32)
        if LATE and SCALE_GROUP > 0:
            if j % RUNS == 0:
                total = tl.zeros_like(acc)
            total += w * x
            if j % RUNS == RUNS - 1:
                s = _scale_of(weights.scale, scales, j, E2M1, SCALE_GROUP, DTYPE)
                acc = tl.fma(total, tl.broadcast_to(s.to(tl.float32)[:, None], acc.shape), acc)
        else:
            acc += w * x
    return acc

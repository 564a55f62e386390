"""Device side of linear maps of few rows: one tile has all rows, and LoRA is added to its sums before they are rounded.

The base product needs nothing of the shrink before it, so the two run at once. The expand gathers: each row's own rows
of B for the tile's columns, whichever adapters the rows have, in one go.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import FIELD_FIRST_PAGE, FIELD_OFFSET, FIELD_RANK, NUM_FIELDS, rank_row_elements
from moegraft.kernels.lora_linear.device import GAIN, B

LINE = tl.constexpr(128)
"""Bytes of a line of the L2 cache."""


@triton.jit
def fetch_ahead(w_ptr, stride, n, COLUMNS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_N: tl.constexpr,
                LINES: tl.constexpr):  # fmt: skip
    """Asks the L2 cache for the tile's weights, while the kernel before this one still runs."""
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    element_bytes: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    at = tl.arange(0, LINES) * (LINE // element_bytes)
    at = tl.minimum(at, LENGTH - 1)
    ptrs = w_ptr + tl.minimum(columns, COLUMNS - 1).to(tl.int64)[:, None] * stride + at[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def expanded(acc, v_ptr, rows, slots, columns, tables, factors_ptr, num_rows, COLUMNS: tl.constexpr,
             PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr, V_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
             BLOCK_R: tl.constexpr):  # fmt: skip
    """gain[a] * acc + B[a] v for each row with adapter a; the partial sums of v are added in a fixed order."""
    has_slot = slots >= 0
    slot = tl.where(has_slot, slots, 0)
    column_live = columns < COLUMNS
    pages_ptrs = tables.pages + slot.to(tl.int64) * tables.stride_pages
    factor_ptrs = factors_ptr + slot.to(tl.int64) * tables.stride_factors
    b_ptrs = factor_ptrs + B * NUM_FIELDS
    gain_ptrs = factor_ptrs + GAIN * NUM_FIELDS
    rank = tl.minimum(tl.load(b_ptrs + FIELD_RANK, mask=has_slot, other=0), V_WIDTH)
    first_page = tl.load(b_ptrs + FIELD_FIRST_PAGE, mask=has_slot, other=0)
    offset = tl.load(b_ptrs + FIELD_OFFSET, mask=has_slot, other=0)
    gain_rank = tl.load(gain_ptrs + FIELD_RANK, mask=has_slot, other=0)
    if tl.max(gain_rank) > 0:
        gain_live = (gain_rank > 0)[:, None]
        gain_page = tl.load(gain_ptrs + FIELD_FIRST_PAGE, mask=has_slot, other=0)
        gain_offset = tl.load(gain_ptrs + FIELD_OFFSET, mask=has_slot, other=0)
        no_lane = tl.zeros([1], tl.int32)[None, :]
        elements = rank_row_elements(
            (pages_ptrs + gain_page)[:, None], 0, gain_offset[:, None], no_lane, gain_live, COLUMNS, PAGE_ELEMS, 1
        )
        elements = tl.multiple_of(elements, [ALIGN, ALIGN])
        gain_mask = gain_live & column_live[None, :]
        gain = tl.load(tables.pool + elements + columns[None, :], mask=gain_mask, other=1.0).to(tl.float32)
        acc = acc * gain
    split_step = (tl.zeros([], tl.int64) + num_rows) * V_WIDTH  # one row is a plain number
    for first_lane in range(0, tl.max(rank), BLOCK_R):
        lane = first_lane + tl.arange(0, BLOCK_R)
        live = lane[None, :] < rank[:, None]
        elements = rank_row_elements(
            (pages_ptrs + first_page)[:, None], 0, offset[:, None], lane[None, :], live, COLUMNS, PAGE_ELEMS, 1
        )
        elements = tl.multiple_of(elements, [ALIGN, ALIGN])
        b_mask = live[:, :, None] & column_live[None, None, :]
        b = tl.load(tables.pool + elements[:, :, None] + columns[None, None, :], mask=b_mask, other=0.0)
        v_ptrs = v_ptr + rows.to(tl.int64)[:, None] * V_WIDTH + lane[None, :]
        v = tl.load(v_ptrs, mask=live, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            v += tl.load(v_ptrs + split * split_step, mask=live, other=0.0).to(tl.float32)
        v = v.to(b.dtype).to(tl.float32)
        acc += tl.sum(v[:, :, None] * b.to(tl.float32), axis=1)
    return acc


@triton.jit
def few_rows_tile(y, x, w_ptr, bias_ptr, v_ptr, slots_ptr, tables, factors_ptr, stride_w, num_rows, n,
                  COLUMNS: tl.constexpr, LENGTH: tl.constexpr, PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr,
                  V_WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """y[m] = W x[m] + bias, with LoRA where V_WIDTH > 0, for all rows and BLOCK_N columns."""
    row = tl.arange(0, BLOCK_M)
    live = row < num_rows
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_live = columns < COLUMNS
    if AHEAD > 0:
        fetch_ahead(w_ptr, stride_w, n, COLUMNS, LENGTH, BLOCK_N, AHEAD)
    if V_WIDTH == 0:  # else the shrink, which waited for x itself, is the kernel before this one
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x.ptr + row.to(tl.int64)[:, None] * x.stride + k[None, :]
    w_ptrs = w_ptr + columns.to(tl.int64)[:, None] * stride_w + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, LENGTH, BLOCK_K):
        if LENGTH % BLOCK_K == 0:
            x_block = tl.load(x_ptrs + first, mask=live[:, None], other=0.0)
            w = tl.load(w_ptrs + first, mask=column_live[:, None], other=0.0)
        else:
            k_live = k < LENGTH - first
            x_block = tl.load(x_ptrs + first, mask=live[:, None] & k_live[None, :], other=0.0)
            w = tl.load(w_ptrs + first, mask=column_live[:, None] & k_live[None, :], other=0.0)
        acc = tl.dot(x_block, w.T, acc, input_precision=PRECISION)
    if V_WIDTH > 0:
        slots = tl.load(slots_ptr + row, mask=live, other=-1)
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
        acc = expanded(acc, v_ptr, row, slots, columns, tables, factors_ptr, num_rows, COLUMNS, PAGE_ELEMS,
                       ALIGN, V_WIDTH, SPLITS, BLOCK_R)  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y.ptr + row.to(tl.int64)[:, None] * y.stride + columns[None, :]
    tl.store(y_ptrs, acc.to(y.ptr.dtype.element_ty), mask=live[:, None] & column_live[None, :])


@triton.jit
def few_rows_kernel(y0, y1, y2, y3, x, w0, w1, w2, w3, bias0, bias1, bias2, bias3, v_ptr, slots_ptr, tables, shift1,
                    shift2, shift3, stride_w, num_rows, COLUMNS: tl.constexpr, ALIGNS: tl.constexpr,
                    LENGTH: tl.constexpr, PAGE_ELEMS: tl.constexpr, V_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
                    AHEAD: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to four maps of the same x (columns 0: none), whose programs stand behind each other.

    shift: elements from the descriptors of the first map to theirs. 34 parameters: output, weights and bias are said
    for each map.
    """
    columns0: tl.constexpr = COLUMNS[0]
    columns1: tl.constexpr = COLUMNS[1]
    columns2: tl.constexpr = COLUMNS[2]
    columns3: tl.constexpr = COLUMNS[3]
    align0: tl.constexpr = ALIGNS[0]
    align1: tl.constexpr = ALIGNS[1]
    align2: tl.constexpr = ALIGNS[2]
    align3: tl.constexpr = ALIGNS[3]
    first1: tl.constexpr = (columns0 + BLOCK_N - 1) // BLOCK_N
    first2: tl.constexpr = first1 + (columns1 + BLOCK_N - 1) // BLOCK_N
    first3: tl.constexpr = first2 + (columns2 + BLOCK_N - 1) // BLOCK_N
    factors0, factors1, factors2, factors3 = tables.factors, tables.factors, tables.factors, tables.factors
    v1, v2, v3 = v_ptr, v_ptr, v_ptr
    if V_WIDTH > 0:
        v_step = (tl.zeros([], tl.int64) + SPLITS * num_rows) * V_WIDTH  # one row is a plain number
        factors1, factors2, factors3 = factors0 + shift1, factors0 + shift2, factors0 + shift3
        v1, v2, v3 = v_ptr + v_step, v_ptr + 2 * v_step, v_ptr + 3 * v_step
    pid = tl.program_id(0)
    if pid < first1:
        few_rows_tile(
            y0, x, w0, bias0, v_ptr, slots_ptr, tables, factors0, stride_w, num_rows, pid, columns0, LENGTH,
            PAGE_ELEMS, align0, V_WIDTH, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, AHEAD, PRECISION, PDL,
        )  # fmt: skip
    elif columns1 > 0:
        if pid < first2:
            few_rows_tile(
                y1, x, w1, bias1, v1, slots_ptr, tables, factors1, stride_w, num_rows,
                pid - first1, columns1, LENGTH, PAGE_ELEMS, align1, V_WIDTH, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                AHEAD, PRECISION, PDL,
            )  # fmt: skip
        elif columns2 > 0:
            if pid < first3:
                few_rows_tile(
                    y2, x, w2, bias2, v2, slots_ptr, tables, factors2, stride_w,
                    num_rows, pid - first2, columns2, LENGTH, PAGE_ELEMS, align2, V_WIDTH, SPLITS, BLOCK_M, BLOCK_N,
                    BLOCK_K, BLOCK_R, AHEAD, PRECISION, PDL,
                )  # fmt: skip
            elif columns3 > 0:
                few_rows_tile(
                    y3, x, w3, bias3, v3, slots_ptr, tables, factors3, stride_w,
                    num_rows, pid - first3, columns3, LENGTH, PAGE_ELEMS, align3, V_WIDTH, SPLITS, BLOCK_M, BLOCK_N,
                    BLOCK_K, BLOCK_R, AHEAD, PRECISION, PDL,
                )  # fmt: skip

"""Device side of linear maps of few rows: one tile has all rows, and LoRA is added to its sums before they are rounded.

The base product needs nothing of the shrink before it, so the two run at once. The expand is one product too, of the
lanes of all adapters at once: a row has zeros at the lanes of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import FIELD_FIRST_PAGE, FIELD_OFFSET, FIELD_RANK, NUM_FIELDS, rank_row_elements
from moegraft.kernels.lora_linear.device import GAIN, B


@triton.jit
def distinct_slots(slots, first, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    """(the slots of the rows, each once, from the ``first`` on: SLOTS of them, -1 behind the last; how many there are).

    They stand in the order of their first rows."""
    row = tl.arange(0, BLOCK_M)
    is_repeated = (slots[:, None] == slots[None, :]) & (row[None, :] < row[:, None])
    leads = (tl.sum(is_repeated.to(tl.int32), axis=1) == 0) & (slots >= 0)
    place = tl.cumsum(leads.to(tl.int32), axis=0) - 1
    wanted = first + tl.arange(0, SLOTS)
    is_it = leads[None, :] & (place[None, :] == wanted[:, None])
    return tl.max(tl.where(is_it, slots[None, :], -1), axis=1), tl.sum(leads.to(tl.int32), axis=0)


@triton.jit
def b_rows(slots, first_lane, columns, tables, factors_ptr, COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr,
           ALIGN: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """[SLOTS * BLOCK_R, BLOCK_N]: lanes first_lane.. of B of each slot, zero where it has none."""
    has_slot = slots >= 0
    slot = tl.where(has_slot, slots, 0).to(tl.int64)
    factor_ptrs = factors_ptr + slot * tables.stride_factors + B * NUM_FIELDS
    rank = tl.load(factor_ptrs + FIELD_RANK, mask=has_slot, other=0)
    first_page = tl.load(factor_ptrs + FIELD_FIRST_PAGE, mask=has_slot, other=0)
    offset = tl.load(factor_ptrs + FIELD_OFFSET, mask=has_slot, other=0)
    lane = first_lane + tl.arange(0, BLOCK_R)
    live = lane[None, :] < rank[:, None]
    pages_ptrs = tables.pages + slot * tables.stride_pages + first_page
    elements = rank_row_elements(
        pages_ptrs[:, None], 0, offset[:, None], lane[None, :], live, COLUMNS, PAGE_ELEMS, 1
    )  # fmt: skip
    elements = tl.multiple_of(tl.reshape(elements, [SLOTS * BLOCK_R]), ALIGN)
    live = tl.reshape(live, [SLOTS * BLOCK_R])
    mask = live[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(tables.pool + elements[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def add_lanes(acc, b, v_ptr, row, slots, rank, some, first_lane, num_rows, V_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
              BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + B[a] v, lanes first_lane.. of the rows whose slots are among ``some``: one product, in which a row meets
    zeros but for its own slot. The partial sums of v are added in a fixed order and rounded once."""
    lane = first_lane + tl.arange(0, BLOCK_R)
    live = lane[None, :] < rank[:, None]
    v_ptrs = v_ptr + row.to(tl.int64)[:, None] * V_WIDTH + lane[None, :]
    split_step = (tl.zeros([], tl.int64) + num_rows) * V_WIDTH  # one row is a plain number
    v = tl.load(v_ptrs, mask=live, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        v += tl.load(v_ptrs + split * split_step, mask=live, other=0.0).to(tl.float32)
    is_own = slots[:, None] == some[None, :]
    spread = tl.where(is_own[:, :, None], v.to(b.dtype)[:, None, :], 0.0)
    spread = tl.reshape(spread, [BLOCK_M, SLOTS * BLOCK_R])
    return tl.dot(spread.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def gained(acc, slots, gain_rank, columns, tables, factors_ptr, COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr):
    """acc times the gain of each row's adapter, where it has one."""
    live = (gain_rank > 0)[:, None]
    slot = tl.where(gain_rank > 0, slots, 0).to(tl.int64)
    factor_ptrs = factors_ptr + slot * tables.stride_factors + GAIN * NUM_FIELDS
    first_page = tl.load(factor_ptrs + FIELD_FIRST_PAGE, mask=gain_rank > 0, other=0)
    offset = tl.load(factor_ptrs + FIELD_OFFSET, mask=gain_rank > 0, other=0)
    pages_ptrs = tables.pages + slot * tables.stride_pages + first_page
    first = tl.zeros([1], tl.int32)[None, :]
    elements = rank_row_elements(pages_ptrs[:, None], 0, offset[:, None], first, live, COLUMNS, PAGE_ELEMS, 1)
    mask = live & (columns < COLUMNS)[None, :]
    return acc * tl.load(tables.pool + elements + columns[None, :], mask=mask, other=1.0).to(tl.float32)


@triton.jit
def few_rows_tile(y, x, w_ptr, bias_ptr, v_ptr, slots_ptr, tables, factors_ptr, stride_w, num_rows, n,
                  COLUMNS: tl.constexpr, ALIGN: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
                  PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[m] = W x[m] + bias, with LoRA where V_WIDTH > 0, for all rows and BLOCK_N columns."""
    LENGTH: tl.constexpr = SHAPE.LENGTH
    PAGE_ELEMS: tl.constexpr = SHAPE.PAGE_ELEMS
    V_WIDTH: tl.constexpr = SHAPE.V_WIDTH
    SPLITS: tl.constexpr = SHAPE.SPLITS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    SLOTS: tl.constexpr = TILE.SLOTS
    row = tl.arange(0, BLOCK_M)
    live = row < num_rows
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_live = columns < COLUMNS
    if V_WIDTH > 0:
        # What does not wait for the shrink is on its way during the base product. Slots, tables and x, for which the
        # shrink itself has waited, were complete before.
        slots = tl.load(slots_ptr + row, mask=live, other=-1)
        some, num_slots = distinct_slots(slots, 0, BLOCK_M, SLOTS)
        b = b_rows(some, 0, columns, tables, factors_ptr, COLUMNS, PAGE_ELEMS, ALIGN, SLOTS, BLOCK_R, BLOCK_N)
        mine_ptrs = factors_ptr + tl.where(slots >= 0, slots, 0).to(tl.int64) * tables.stride_factors
        rank = tl.minimum(tl.load(mine_ptrs + B * NUM_FIELDS + FIELD_RANK, mask=slots >= 0, other=0), V_WIDTH)
        gain_rank = tl.load(mine_ptrs + GAIN * NUM_FIELDS + FIELD_RANK, mask=slots >= 0, other=0)
    else:
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
        if tl.max(gain_rank) > 0:
            acc = gained(acc, slots, gain_rank, columns, tables, factors_ptr, COLUMNS, PAGE_ELEMS)
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
        acc = add_lanes(acc, b, v_ptr, row, slots, rank, some, 0, num_rows, V_WIDTH, SPLITS, BLOCK_M, SLOTS, BLOCK_R,
                        PRECISION)  # fmt: skip
        max_rank = tl.max(rank)
        if (num_slots > SLOTS) | (max_rank > BLOCK_R):
            for first_slot in range(0, num_slots, SLOTS):
                some, _ = distinct_slots(slots, first_slot, BLOCK_M, SLOTS)
                first_lane = 0
                if first_slot == 0:
                    first_lane += BLOCK_R
                for lane in range(first_lane, max_rank, BLOCK_R):
                    b = b_rows(some, lane, columns, tables, factors_ptr, COLUMNS, PAGE_ELEMS, ALIGN, SLOTS, BLOCK_R,
                               BLOCK_N)  # fmt: skip
                    acc = add_lanes(acc, b, v_ptr, row, slots, rank, some, lane, num_rows, V_WIDTH, SPLITS, BLOCK_M,
                                    SLOTS, BLOCK_R, PRECISION)  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y.ptr + row.to(tl.int64)[:, None] * y.stride + columns[None, :]
    tl.store(y_ptrs, acc.to(y.ptr.dtype.element_ty), mask=live[:, None] & column_live[None, :])


@triton.jit
def few_rows_kernel(y0, y1, y2, y3, x, w0, w1, w2, w3, bias0, bias1, bias2, bias3, v_ptr, slots_ptr, tables, shift1,
                    shift2, shift3, stride_w, num_rows, COLUMNS: tl.constexpr, ALIGNS: tl.constexpr,
                    SHAPE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """Up to four maps of the same x (columns 0: none), whose programs stand behind each other.

    shift: elements from the descriptors of the first map to theirs. 27 parameters: output, weights and bias are said
    for each map.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
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
    if SHAPE.V_WIDTH > 0:
        v_step = (tl.zeros([], tl.int64) + SHAPE.SPLITS * num_rows) * SHAPE.V_WIDTH  # one row is a plain number
        factors1, factors2, factors3 = factors0 + shift1, factors0 + shift2, factors0 + shift3
        v1, v2, v3 = v_ptr + v_step, v_ptr + 2 * v_step, v_ptr + 3 * v_step
    pid = tl.program_id(0)
    if pid < first1:
        few_rows_tile(
            y0, x, w0, bias0, v_ptr, slots_ptr, tables, factors0, stride_w, num_rows, pid, columns0, align0, SHAPE,
            TILE, PRECISION, PDL,
        )  # fmt: skip
    elif columns1 > 0:
        if pid < first2:
            few_rows_tile(
                y1, x, w1, bias1, v1, slots_ptr, tables, factors1, stride_w, num_rows, pid - first1, columns1, align1,
                SHAPE, TILE, PRECISION, PDL,
            )  # fmt: skip
        elif columns2 > 0:
            if pid < first3:
                few_rows_tile(
                    y2, x, w2, bias2, v2, slots_ptr, tables, factors2, stride_w, num_rows, pid - first2, columns2,
                    align2, SHAPE, TILE, PRECISION, PDL,
                )  # fmt: skip
            elif columns3 > 0:
                few_rows_tile(
                    y3, x, w3, bias3, v3, slots_ptr, tables, factors3, stride_w, num_rows, pid - first3, columns3,
                    align3, SHAPE, TILE, PRECISION, PDL,
                )  # fmt: skip

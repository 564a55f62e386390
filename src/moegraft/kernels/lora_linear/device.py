"""Device side of LoRA on linear maps: a shrink and an expand over tiles of rows in the order of the batch.

Rows are not sorted. The first row of each adapter slot in a tile *leads* it; a program works on the slots that a few
rows of its tile lead, one after the other, with the tile's other rows masked. Every (row, column) of y thus belongs to
exactly one program, whatever the mix of slots: nothing is added twice, and no atomics are needed.

    tile of 8 rows, slots    5  5 -1  2  5  2  2 -1
    leading rows             ^        ^                  rows 0 (slot 5: rows 0, 1, 4) and 3 (slot 2: rows 3, 5, 6)

In a decode step each program looks at one row, and most rows lead; in prefill one program walks a whole tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import Constant, await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import FIELD_RANK, NUM_FIELDS, factor_row_elements

# Rows of ``LinearTables.factors``, as core/tables.py has them.
A = Constant(0)
B = Constant(1)
GAIN = Constant(2)

NO_SLOT = Constant(2**31 - 1)


@triton.jit
def led_slots(slots, first_leader, TILE_M: tl.constexpr, LEADERS: tl.constexpr):
    """The slots that rows [first_leader, first_leader + LEADERS) of a tile lead; NO_SLOT at every other row."""
    row = tl.arange(0, TILE_M)
    is_repeated = (slots[:, None] == slots[None, :]) & (row[None, :] < row[:, None])
    leads = (tl.sum(is_repeated.to(tl.int32), axis=1) == 0) & (slots >= 0)
    leads &= (row >= first_leader) & (row < first_leader + LEADERS)
    return tl.where(leads, slots, NO_SLOT)


@triton.jit
def lanes_of(slot, rank_block, tables, factors_ptr, LENGTH: tl.constexpr, PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr,
             BLOCK_R: tl.constexpr):  # fmt: skip
    """(rank, elements of BLOCK_R rank rows) of A of a slot; NO_SLOT has none."""
    has_slot = slot != NO_SLOT
    mine = tl.where(has_slot, slot, 0)
    factor_ptr = factors_ptr + mine * tables.stride_factors + A * NUM_FIELDS
    rank = tl.load(factor_ptr + FIELD_RANK, mask=has_slot, other=0)
    j = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    pages_ptr = tables.pages + mine * tables.stride_pages
    return rank, factor_row_elements(pages_ptr, factor_ptr, j, j < rank, LENGTH, PAGE_ELEMS, ALIGN)


@triton.jit
def shrink_tile(v_ptr, x, slots_ptr, tables, factors_ptr, num_rows, pid, LENGTH: tl.constexpr,
                PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, V_WIDTH: tl.constexpr,
                RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                PRECISION: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """v[split, m, j] = sum over the split's part of LENGTH of A[a][j] * x[m], for the lanes j that adapter a has.

    ``EARLY``: the kernel before this one wrote neither slots nor tables.
    """
    if not EARLY:
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
    TILE_M: tl.constexpr = ROWS.TILE_M
    GROUPS: tl.constexpr = ROWS.GROUPS
    LEADERS: tl.constexpr = ROWS.LEADERS
    split = pid % SPLITS
    rank_block = pid // SPLITS % RANK_BLOCKS
    group = pid // (SPLITS * RANK_BLOCKS) % GROUPS
    rows = pid // (SPLITS * RANK_BLOCKS * GROUPS) * TILE_M + tl.arange(0, TILE_M)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    x_ptrs = x.ptr + rows.to(tl.int64)[:, None] * x.stride
    j = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    steps: tl.constexpr = (LENGTH + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)

    led = led_slots(slots, group * LEADERS, TILE_M, LEADERS)
    slot = tl.min(led)
    rank, a_elements = lanes_of(slot, rank_block, tables, factors_ptr, LENGTH, PAGE_ELEMS, ALIGN, BLOCK_R)
    if EARLY:
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
    while slot != NO_SLOT:
        if rank_block * BLOCK_R < rank:
            mine = slots == slot
            lane_live = j < rank
            acc = tl.zeros([TILE_M, BLOCK_R], tl.float32)
            for step in range(steps):
                k = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
                k_live = k < LENGTH
                x_block = tl.load(x_ptrs + k[None, :], mask=mine[:, None] & k_live[None, :], other=0.0)
                a_mask = lane_live[:, None] & k_live[None, :]
                a_rows = tl.multiple_of(a_elements, ALIGN)  # forgotten where the loop carries it
                a = tl.load(tables.pool + a_rows[:, None] + k[None, :], mask=a_mask, other=0.0)
                acc = tl.dot(x_block, a.T, acc, input_precision=PRECISION)
            v_rows = (split * num_rows + rows).to(tl.int64)
            v_ptrs = v_ptr + v_rows[:, None] * V_WIDTH + j[None, :]
            tl.store(v_ptrs, acc.to(v_ptr.dtype.element_ty), mask=mine[:, None] & lane_live[None, :])
        led = tl.where(led == slot, NO_SLOT, led)
        slot = tl.min(led)
        rank, a_elements = lanes_of(slot, rank_block, tables, factors_ptr, LENGTH, PAGE_ELEMS, ALIGN, BLOCK_R)


@triton.jit
def shrink_kernel(v_ptr, x, slots_ptr, tables, num_rows, LENGTH: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                  ALIGN: tl.constexpr, ROWS: tl.constexpr, V_WIDTH: tl.constexpr, RANK_BLOCKS: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """``shrink_tile`` of one map."""
    shrink_tile(
        v_ptr, x, slots_ptr, tables, tables.factors, num_rows, tl.program_id(0), LENGTH, PAGE_ELEMS, ALIGN, ROWS,
        V_WIDTH, RANK_BLOCKS, BLOCK_R, BLOCK_K, SPLITS, PRECISION, False, PDL,
    )  # fmt: skip


@triton.jit
def shrink_group_kernel(v_ptr, x, slots_ptr, tables, shift1, shift2, shift3, num_rows, LENGTH: tl.constexpr,
                        PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, V_WIDTH: tl.constexpr,
                        RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                        PRECISION: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to four maps that read the same x, one along the second axis of the grid; v [map, split, m, j]. shift: from
    the descriptors of the first map to theirs."""
    number = tl.program_id(1)
    shift = tl.where(number == 1, shift1, tl.where(number == 2, shift2, shift3))
    factors_ptr = tables.factors + tl.where(number == 0, 0, shift)
    mine_ptr = v_ptr + (number * SPLITS * num_rows).to(tl.int64) * V_WIDTH
    shrink_tile(
        mine_ptr, x, slots_ptr, tables, factors_ptr, num_rows, tl.program_id(0), LENGTH, PAGE_ELEMS, ALIGN, ROWS,
        V_WIDTH, RANK_BLOCKS, BLOCK_R, BLOCK_K, SPLITS, PRECISION, EARLY, PDL,
    )  # fmt: skip


@triton.jit
def expand_tile(y, v_ptr, bias_ptr, slots_ptr, tables, factors_ptr, num_rows, pid, COLUMNS: tl.constexpr,
                PAGE_ELEMS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
                V_WIDTH: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STEPS_N: tl.constexpr, SPLITS: tl.constexpr,
                PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[m] += B[a] v[m] + (gain[a] - 1) * (y[m] - bias), for TILE_M rows and STEPS_N blocks of BLOCK_N columns.

    The partial sums of v are added in a fixed order and rounded once. Slices begin at multiples of BLOCK_N; the columns
    of slice s read lanes [s * rank, (s + 1) * rank) of v.
    """
    TILE_M: tl.constexpr = ROWS.TILE_M
    GROUPS: tl.constexpr = ROWS.GROUPS
    LEADERS: tl.constexpr = ROWS.LEADERS
    SECOND: tl.constexpr = SLICES.SECOND
    THIRD: tl.constexpr = SLICES.THIRD
    FOURTH: tl.constexpr = SLICES.FOURTH
    width: tl.constexpr = BLOCK_N * STEPS_N
    num_n: tl.constexpr = (COLUMNS + width - 1) // width
    first_column = pid % num_n * width
    group = pid // num_n % GROUPS
    rows = pid // (num_n * GROUPS) * TILE_M + tl.arange(0, TILE_M)
    splits = tl.arange(0, SPLITS)
    # Slots and tables were complete before the shrink ran, so this need not wait for it.
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    led = led_slots(slots, group * LEADERS, TILE_M, LEADERS)
    slot = tl.min(led)
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    y_ptrs = y.ptr + rows.to(tl.int64)[:, None] * y.stride
    v_ptrs = v_ptr + (splits[:, None] * num_rows + rows[None, :]).to(tl.int64)[:, :, None] * V_WIDTH
    while slot != NO_SLOT:
        pages_ptr = tables.pages + slot * tables.stride_pages
        factor_ptr = factors_ptr + slot * tables.stride_factors + B * NUM_FIELDS
        gain_ptr = factors_ptr + slot * tables.stride_factors + GAIN * NUM_FIELDS
        rank = tl.minimum(tl.load(factor_ptr + FIELD_RANK), V_WIDTH)
        gain_rank = tl.load(gain_ptr + FIELD_RANK)
        mine = slots == slot
        if rank + gain_rank > 0:
            for step in range(STEPS_N):
                first = first_column + step * BLOCK_N
                columns = first + tl.arange(0, BLOCK_N)
                slice_lane = ((first >= SECOND).to(tl.int32) + (first >= THIRD).to(tl.int32)
                              + (first >= FOURTH).to(tl.int32)) * rank  # fmt: skip
                column_live = columns < COLUMNS
                y_mask = mine[:, None] & column_live[None, :]
                base = tl.load(y_ptrs + columns[None, :], mask=y_mask, other=0.0).to(tl.float32)
                acc = tl.zeros([TILE_M, BLOCK_N], tl.float32)
                for first_lane in range(0, rank, BLOCK_R):
                    lane = first_lane + tl.arange(0, BLOCK_R)
                    lane_live = lane < rank
                    b_elements = factor_row_elements(pages_ptr, factor_ptr, lane, lane_live, COLUMNS, PAGE_ELEMS, ALIGN)
                    b_mask = lane_live[:, None] & column_live[None, :]
                    b = tl.load(tables.pool + b_elements[:, None] + columns[None, :], mask=b_mask, other=0.0)
                    v_mask = mine[None, :, None] & lane_live[None, None, :]
                    v = tl.sum(tl.load(v_ptrs + (slice_lane + lane)[None, None, :], mask=v_mask, other=0.0), axis=0)
                    acc = tl.dot(v.to(b.dtype), b, acc, input_precision=PRECISION)
                if gain_rank > 0:
                    row = tl.zeros([1], tl.int32)
                    element = factor_row_elements(pages_ptr, gain_ptr, row, row == 0, COLUMNS, PAGE_ELEMS, ALIGN)
                    gain = tl.load(tables.pool + element + columns, mask=column_live, other=1.0).to(tl.float32)
                    gained = base
                    if bias_ptr is not None:
                        gained -= tl.load(bias_ptr + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
                    acc += (gain[None, :] - 1.0) * gained
                tl.store(y_ptrs + columns[None, :], (base + acc).to(y.ptr.dtype.element_ty), mask=y_mask)
        led = tl.where(led == slot, NO_SLOT, led)
        slot = tl.min(led)


@triton.jit
def expand_kernel(y, v_ptr, bias_ptr, slots_ptr, tables, num_rows, COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                  ALIGN: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr, V_WIDTH: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STEPS_N: tl.constexpr, SPLITS: tl.constexpr,
                  PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``expand_tile`` of one map."""
    expand_tile(
        y, v_ptr, bias_ptr, slots_ptr, tables, tables.factors, num_rows, tl.program_id(0), COLUMNS, PAGE_ELEMS, ALIGN,
        ROWS, SLICES, V_WIDTH, BLOCK_R, BLOCK_N, STEPS_N, SPLITS, PRECISION, PDL,
    )  # fmt: skip


@triton.jit
def expand_group_kernel(y0, y1, y2, y3, v_ptr, bias0, bias1, bias2, bias3, slots_ptr, tables, shift1, shift2, shift3,
                        num_rows, COLUMNS0: tl.constexpr, COLUMNS1: tl.constexpr, COLUMNS2: tl.constexpr,
                        COLUMNS3: tl.constexpr, PAGE_ELEMS: tl.constexpr, ALIGN0: tl.constexpr, ALIGN1: tl.constexpr,
                        ALIGN2: tl.constexpr, ALIGN3: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
                        V_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STEPS_N: tl.constexpr,
                        SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Up to four maps (COLUMNS 0: none), whose programs stand behind each other; see ``shrink_group_kernel``.

    33 parameters: output, bias, columns and alignment are said for each map.
    """
    width: tl.constexpr = BLOCK_N * STEPS_N
    row_programs = (num_rows + ROWS.TILE_M - 1) // ROWS.TILE_M * ROWS.GROUPS
    v_step = (tl.zeros([], tl.int64) + SPLITS * num_rows) * V_WIDTH  # one row is a plain number
    first1 = row_programs * ((COLUMNS0 + width - 1) // width)
    first2 = first1 + row_programs * ((COLUMNS1 + width - 1) // width)
    first3 = first2 + row_programs * ((COLUMNS2 + width - 1) // width)
    pid = tl.program_id(0)
    if pid < first1:
        expand_tile(
            y0, v_ptr, bias0, slots_ptr, tables, tables.factors, num_rows, pid, COLUMNS0, PAGE_ELEMS, ALIGN0, ROWS,
            SLICES, V_WIDTH, BLOCK_R, BLOCK_N, STEPS_N, SPLITS, PRECISION, PDL,
        )  # fmt: skip
    elif pid < first2:
        expand_tile(
            y1, v_ptr + v_step, bias1, slots_ptr, tables, tables.factors + shift1, num_rows, pid - first1, COLUMNS1,
            PAGE_ELEMS, ALIGN1, ROWS, SLICES, V_WIDTH, BLOCK_R, BLOCK_N, STEPS_N, SPLITS, PRECISION, PDL,
        )  # fmt: skip
    elif COLUMNS2 > 0:
        if pid < first3:
            expand_tile(
                y2, v_ptr + 2 * v_step, bias2, slots_ptr, tables, tables.factors + shift2, num_rows, pid - first2,
                COLUMNS2, PAGE_ELEMS, ALIGN2, ROWS, SLICES, V_WIDTH, BLOCK_R, BLOCK_N, STEPS_N, SPLITS, PRECISION, PDL,
            )  # fmt: skip
        elif COLUMNS3 > 0:
            expand_tile(
                y3, v_ptr + 3 * v_step, bias3, slots_ptr, tables, tables.factors + shift3, num_rows, pid - first3,
                COLUMNS3, PAGE_ELEMS, ALIGN3, ROWS, SLICES, V_WIDTH, BLOCK_R, BLOCK_N, STEPS_N, SPLITS, PRECISION, PDL,
            )  # fmt: skip

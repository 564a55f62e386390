"""Products of 4-bit weights in the tile order of ``formats/four_bit.py``. The contract: ``base_product/device.py``.

One load brings the words of a granule, 128 inputs of each column; shifts and masks make four runs of 32 inputs of them,
in registers and where the matrix unit wants them: each run meets its 32 columns of x in a product of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

GRANULE = tl.constexpr(128)
RUN = tl.constexpr(32)
LATE_BLOCK_M = tl.constexpr(32)
"""Up to here a group's sum takes fewer multiplications by the scale than its weights do."""


@triton.jit
def int4_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                 stride_wn, stride_wk, up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
                 SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(code - zero) * scale; SCALE_GROUP 0: one scale for all inputs of a column, which multiplies its sum."""
    return _four_bit_product(
        x_ptr, x_index, live, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, False, LENGTH, COLUMNS, GATED,
        SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED, PRECISION, BLOCK_M <= LATE_BLOCK_M,
    )  # fmt: skip


@triton.jit
def mxfp4_product(x_ptr, x_index, live, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, stride_we,
                  stride_wn, stride_wk, up_offset, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
                  SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  USE_TMA: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """e2m1 * 2**scale. Number times scale is exact, and the product brings the number's exponent into place too."""
    return _four_bit_product(
        x_ptr, x_index, live, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, True, LENGTH, COLUMNS, GATED,
        SCALE_GROUP, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, SWAPPED, PRECISION, False,
    )  # fmt: skip


@triton.jit
def _four_bit_product(x_ptr, x_index, live, w_ptr, w_scale_ptr, w_zero_ptr, expert, n, stride_x, E2M1: tl.constexpr,
                      LENGTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, SCALE_GROUP: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
                      SWAPPED: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr):  # fmt: skip
    """``LATE``: scales multiply the sums of groups instead of the weights.

    Scales and zero points of a step are loaded a step ahead. Columns and granules past the end are read at the last
    one: nothing of them is kept, and x has zeros there.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NUM: tl.constexpr = (LENGTH + GRANULE - 1) // GRANULE
    UNROLL: tl.constexpr = BLOCK_K // 128 if BLOCK_K > 128 else 1
    STEPS: tl.constexpr = (NUM + UNROLL - 1) // UNROLL
    IS_WHOLE: tl.constexpr = STEPS * UNROLL * GRANULE == LENGTH
    ROWS: tl.constexpr = COLUMNS * (1 + GATED)
    SCALES: tl.constexpr = NUM if SCALE_GROUP > 0 else 1
    AHEAD: tl.constexpr = LATE or SCALE_GROUP == 0
    row = tl.minimum(n * BLOCK_N + tl.arange(0, BLOCK_N), COLUMNS - 1)
    i = tl.arange(0, RUN)
    x_ptrs = x_ptr + x_index.to(tl.int64)[:, None] * stride_x + i[None, :]
    first = expert.to(tl.int64) * NUM * ROWS
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += (first + row)[:, None] * RUN + i[None, :]
    first = expert.to(tl.int64) * SCALES * ROWS
    acc_up = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    up_row = row + GATED * COLUMNS
    if AHEAD:
        up_scale = _load_words(w_scale_ptr, first + up_row)
        up_zero = _load_words(w_zero_ptr, first + up_row)
        scale, zero = up_scale, up_zero
        if GATED:
            scale = _load_words(w_scale_ptr, first + row)
            zero = _load_words(w_zero_ptr, first + row)
    for step in range(STEPS):
        for part in tl.static_range(UNROLL):
            granule = step * UNROLL + part
            if STEPS * UNROLL != NUM:
                granule = tl.minimum(granule, NUM - 1)
            k = (step * UNROLL + part) * GRANULE
            here = first + granule * ROWS
            if not AHEAD:
                up_scale = _load_words(w_scale_ptr, here + up_row)
                up_zero = _load_words(w_zero_ptr, here + up_row)
            if GATED:
                if not AHEAD:
                    scale = _load_words(w_scale_ptr, here + row)
                    zero = _load_words(w_zero_ptr, here + row)
                w = _load_tile(w_ptrs, expert, granule, 0, n, NUM, ROWS, COLUMNS, BLOCK_N, USE_TMA)
                acc_gate = _add_granule(
                    acc_gate, x_ptrs, live, k, w, w_scale_ptr, scale, zero, E2M1, LENGTH, IS_WHOLE, SCALE_GROUP,
                    BLOCK_M, BLOCK_N, SWAPPED, PRECISION, LATE, DTYPE,
                )  # fmt: skip
            w = _load_tile(w_ptrs, expert, granule, GATED, n, NUM, ROWS, COLUMNS, BLOCK_N, USE_TMA)
            acc_up = _add_granule(
                acc_up, x_ptrs, live, k, w, w_scale_ptr, up_scale, up_zero, E2M1, LENGTH, IS_WHOLE, SCALE_GROUP,
                BLOCK_M, BLOCK_N, SWAPPED, PRECISION, LATE, DTYPE,
            )  # fmt: skip
            if AHEAD and SCALE_GROUP > 0:
                ahead = first + tl.minimum(granule + 1, NUM - 1) * ROWS
                up_scale = _load_words(w_scale_ptr, ahead + up_row)
                up_zero = _load_words(w_zero_ptr, ahead + up_row)
                if GATED:
                    scale = _load_words(w_scale_ptr, ahead + row)
                    zero = _load_words(w_zero_ptr, ahead + row)
    if SCALE_GROUP == 0:
        acc_up = _scale_columns(acc_up, _scale_of(w_scale_ptr, up_scale, 0, 1, False, DTYPE), SWAPPED)
        if GATED:
            acc_gate = _scale_columns(acc_gate, _scale_of(w_scale_ptr, scale, 0, 1, False, DTYPE), SWAPPED)
    return acc_gate, acc_up


@triton.jit
def _add_granule(acc, x_ptrs, live, k, words, scale_ptr, scale_words, zero_words, E2M1: tl.constexpr,
                 LENGTH: tl.constexpr, IS_WHOLE: tl.constexpr, SCALE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """acc + x W of 128 inputs from ``k`` on."""
    RUNS: tl.constexpr = SCALE_GROUP // 32 if SCALE_GROUP > 0 else 4  # of one scale
    SCALES: tl.constexpr = 4 // RUNS
    runs = _runs(words, E2M1, DTYPE)
    total = acc
    for j in tl.static_range(4):
        if IS_WHOLE:
            x = tl.load(x_ptrs + k + j * RUN, mask=live[:, None], other=0.0)
        else:
            k_live = tl.arange(0, RUN) < LENGTH - k - j * RUN
            x = tl.load(x_ptrs + k + j * RUN, mask=live[:, None] & k_live[None, :], other=0.0)
        w = runs[j]
        if not E2M1:
            w = w - _zero_of(zero_words, j // RUNS, DTYPE)
        if SCALE_GROUP > 0:
            s = _scale_of(scale_ptr, scale_words, j // RUNS, SCALES, E2M1, DTYPE)
            if not LATE:
                w = w * s[:, None]
        if LATE and SCALE_GROUP > 0:
            if j % RUNS == 0:
                total = _zeros(BLOCK_M, BLOCK_N, SWAPPED)
            total = _dot(x, w, total, SWAPPED, PRECISION)
            if j % RUNS == RUNS - 1:
                acc += _scale_columns(total, s, SWAPPED)
        else:
            acc = _dot(x, w, acc, SWAPPED, PRECISION)
    return acc


@triton.jit
def _load_tile(w_ptrs, expert, granule, half: tl.constexpr, n, NUM: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """Words int16 [BLOCK_N, 32] of one granule."""
    if USE_TMA:
        words = w_ptrs.load([(expert * NUM + granule) * ROWS + half * COLUMNS + n * BLOCK_N, 0])
    else:
        words = tl.load(w_ptrs + (granule * ROWS + half * COLUMNS).to(tl.int64) * RUN)
    return words


@triton.jit
def _load_words(ptr, index):
    """One element a column, with all scales (or zero points) of a granule in it; in float32, where they are."""
    words = index
    if ptr is not None:  # noqa: SIM102  # the compiler would look at both sides of an ``and``
        if ptr.dtype.element_ty.is_int():
            words = tl.load(ptr + index)
    return words


@triton.jit
def _scale_of(ptr, words, which: tl.constexpr, SCALES: tl.constexpr, E2M1: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK_N] in the dtype of x."""
    if E2M1:
        byte = ((words >> 8 * which) & 0xFF).to(tl.int32)
        if DTYPE.is_fp32():
            scale = ((byte + 126) << 23).to(tl.float32, bitcast=True)
        else:
            scale = ((byte + 126) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif DTYPE.is_fp32():
        scale = tl.load(ptr + words * SCALES + which)
    elif SCALES == 1 and words.dtype == tl.int32:
        scale = words.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        scale = (words >> 16 * which).to(tl.int16).to(DTYPE, bitcast=True)
    return scale


@triton.jit
def _zero_of(words, which: tl.constexpr, DTYPE: tl.constexpr):
    """What ``_runs`` makes of the zero point."""
    OFFSET: tl.constexpr = 0.0 if DTYPE.is_fp32() else (128.0 if DTYPE.is_bf16() else 1024.0)
    if words.dtype == tl.int64:  # positions, for want of zero points
        zero = tl.full([1, 1], OFFSET + 8.0, DTYPE)
    else:
        zero = (((words >> 8 * which) & 0xFF).to(tl.float32) + OFFSET).to(DTYPE)[:, None]
    return zero


@triton.jit
def _scale_columns(acc, scale, SWAPPED: tl.constexpr):
    if SWAPPED:
        acc *= scale.to(tl.float32)[:, None]
    else:
        acc *= scale.to(tl.float32)[None, :]
    return acc


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
def _runs(words, E2M1: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of the four runs [BLOCK_N, 32].

    int4: the code, in half precision plus 128 (bfloat16) or 1024 (float16), where it is the lowest bits of a mantissa.
    e2m1: 2**-126 of the number.
    """
    if DTYPE.is_fp32():
        runs = _plain_runs(words, E2M1)
    elif E2M1:
        runs = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, up;
            and.b32 $0, $4, 0x81c081c0;
            shl.b32 up, $4, 3;
            and.b32 $1, up, 0x81c081c0;
            shl.b32 low, $4, 6;
            shl.b32 high, $4, 2;
            and.b32 low, low, 0x01c001c0;
            lop3.b32 $2, high, 0x80008000, low, 0xea;
            shr.u32 low, $4, 3;
            shl.b32 high, $4, 1;
            and.b32 low, low, 0x01c001c0;
            lop3.b32 $3, high, 0x80008000, low, 0xea;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif DTYPE.is_bf16():
        runs = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two, three;
            shr.u32 one, $4, 4;
            shr.u32 two, $4, 8;
            shr.u32 three, $4, 12;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $1, one, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $2, two, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $3, three, 0x000f000f, 0x43004300, 0xea;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        runs = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two, three;
            shr.u32 one, $4, 4;
            shr.u32 two, $4, 8;
            shr.u32 three, $4, 12;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, one, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $2, two, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, three, 0x000f000f, 0x64006400, 0xea;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return runs


@triton.jit
def _plain_runs(words, E2M1: tl.constexpr):
    """The same in float32 and without assembly, for Triton's interpreter."""
    bits = words.to(tl.int32) & 0xFFFF
    if E2M1:
        one = bits & 0x81C0
        two = (bits << 3) & 0x81C0
        three = ((bits << 6) & 0x01C0) | ((bits << 2) & 0x8000)
        four = ((bits >> 3) & 0x01C0) | ((bits << 1) & 0x8000)
        return (
            (one << 16).to(tl.float32, bitcast=True),
            (two << 16).to(tl.float32, bitcast=True),
            (three << 16).to(tl.float32, bitcast=True),
            (four << 16).to(tl.float32, bitcast=True),
        )
    else:
        return (
            (bits & 15).to(tl.float32),
            (bits >> 4 & 15).to(tl.float32),
            (bits >> 8 & 15).to(tl.float32),
            (bits >> 12 & 15).to(tl.float32),
        )

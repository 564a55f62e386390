"""Products of 4-bit weights in the tile order of ``formats/four_bit.py``. The contract: ``base_product``.

One load brings the words of a granule, 128 inputs of each column; shifts and masks make four runs of 32 inputs of them,
in registers and where the matrix unit wants them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from moegraft.kernels.device.common import add_product, scaled, zero_sums

GRANULE = tl.constexpr(128)
RUN = tl.constexpr(32)
SMALL_BLOCK_M = tl.constexpr(32)
"""Up to here each run is a product of its own: less is in flight, and a group's sum takes fewer multiplications by the
scale than its weights do. Beyond, a granule is one product, which the compiler cuts so that the next inputs become
numbers while the matrix unit works."""


@triton.jit
def int4_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """(code - zero) * scale; SCALE_GROUP 0: one scale for all inputs of a column, which multiplies its sum."""
    return _four_bit_product(rows, x_index, live, w_ptr, weights, expert, n, False, SHAPE, BLOCK_M, TILE)


@triton.jit
def mxfp4_product(rows, x_index, live, w_ptr, weights, expert, n, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    """e2m1 * 2**scale. Number times scale is exact, and the product brings the number's exponent into place too."""
    return _four_bit_product(rows, x_index, live, w_ptr, weights, expert, n, True, SHAPE, BLOCK_M, TILE)


@triton.jit
def _four_bit_product(rows, x_index, live, w_ptr, weights, expert, n, E2M1: tl.constexpr, SHAPE: tl.constexpr,
                      BLOCK_M: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Columns and granules past the end are read at the last one: nothing of them is kept, and x has zeros there."""
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    GATED: tl.constexpr = SHAPE.GATED
    SCALE_GROUP: tl.constexpr = SHAPE.SCALE_GROUP
    LENGTH: tl.constexpr = SHAPE.LENGTH
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    USE_TMA: tl.constexpr = TILE.USE_TMA
    SWAPPED: tl.constexpr = TILE.SWAPPED
    NUM: tl.constexpr = (LENGTH + GRANULE - 1) // GRANULE
    UNROLL: tl.constexpr = BLOCK_K // 128 if BLOCK_K > 128 else 1
    STEPS: tl.constexpr = (NUM + UNROLL - 1) // UNROLL
    IS_WHOLE: tl.constexpr = STEPS * UNROLL * GRANULE == LENGTH
    ROWS: tl.constexpr = COLUMNS * (1 + GATED)
    SCALED: tl.constexpr = NUM if SCALE_GROUP > 0 else 1  # granules that have scales
    row = tl.minimum(n * BLOCK_N + tl.arange(0, BLOCK_N), COLUMNS - 1)
    up_row = row + GATED * COLUMNS
    x_ptrs = rows.ptr + x_index.to(tl.int64) * rows.stride
    w_ptrs = w_ptr
    if not USE_TMA:
        w_ptrs += (expert.to(tl.int64) * NUM * ROWS + row)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    first = expert.to(tl.int64) * SCALED * ROWS
    # Scales of sums are no operand of a product, so that the compiler would load them where they are used.
    AHEAD: tl.constexpr = SCALE_GROUP > 0 and BLOCK_M <= SMALL_BLOCK_M and not E2M1
    acc_up = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
    acc_gate = acc_up
    if AHEAD:
        up_scales = _load_words(weights.scale, first + up_row)
        scales = up_scales
        if GATED:
            scales = _load_words(weights.scale, first + row)
    for step in range(STEPS):
        for part in tl.static_range(UNROLL):
            k = (step * UNROLL + part) * GRANULE
            granule = tl.minimum(step * UNROLL + part, NUM - 1)
            here = first
            if SCALE_GROUP > 0:
                here += granule * ROWS
            if GATED:
                if not AHEAD:
                    scales = _load_words(weights.scale, here + row)
                w = _load_tile(w_ptrs, expert, granule, 0, n, NUM, ROWS, COLUMNS, TILE)
                if part == 0:
                    w = _after_products(w, x_ptrs.dtype.element_ty, SWAPPED)
                acc_gate = _add_granule(
                    acc_gate, x_ptrs, live, k, w, weights, scales, here + row, E2M1, IS_WHOLE, SHAPE, BLOCK_M, TILE
                )
            if not AHEAD:
                up_scales = _load_words(weights.scale, here + up_row)
            w = _load_tile(w_ptrs, expert, granule, GATED, n, NUM, ROWS, COLUMNS, TILE)
            if part == 0 and not GATED:
                w = _after_products(w, x_ptrs.dtype.element_ty, SWAPPED)
            acc_up = _add_granule(
                acc_up, x_ptrs, live, k, w, weights, up_scales, here + up_row, E2M1, IS_WHOLE, SHAPE, BLOCK_M, TILE
            )
            if AHEAD:
                here = first + tl.minimum(granule + 1, NUM - 1) * ROWS
                up_scales = _load_words(weights.scale, here + up_row)
                if GATED:
                    scales = _load_words(weights.scale, here + row)
    if SCALE_GROUP == 0:
        acc_up = scaled(acc_up, _along_columns(tl.load(weights.scale + first + up_row), SWAPPED))
        if GATED:
            acc_gate = scaled(acc_gate, _along_columns(tl.load(weights.scale + first + row), SWAPPED))
    return acc_gate, acc_up


@triton.jit
def _add_granule(acc, x_ptrs, live, k, words, weights, scales, index, E2M1: tl.constexpr, IS_WHOLE: tl.constexpr,
                 SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """acc + x W of 128 inputs from ``k`` on; ``index``: where the columns' zero points of this granule lie."""
    SCALE_GROUP: tl.constexpr = SHAPE.SCALE_GROUP
    LENGTH: tl.constexpr = SHAPE.LENGTH
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    SWAPPED: tl.constexpr = TILE.SWAPPED
    PRECISION: tl.constexpr = TILE.PRECISION
    DTYPE: tl.constexpr = x_ptrs.dtype.element_ty
    RUNS: tl.constexpr = SCALE_GROUP // 32 if SCALE_GROUP > 0 else 4  # of one scale
    IS_SMALL: tl.constexpr = BLOCK_M <= SMALL_BLOCK_M
    LATE: tl.constexpr = IS_SMALL and not E2M1
    runs = _runs(words, E2M1, DTYPE)
    zeros = _load_words(weights.zero, index)
    total = acc
    if IS_SMALL:
        for j in tl.static_range(4):
            x = _load_x(x_ptrs, live, k + j * RUN, RUN, LENGTH, IS_WHOLE)
            w = _number(runs[j], weights, scales, zeros, j, E2M1, SCALE_GROUP, LATE)
            if LATE and SCALE_GROUP > 0:
                if j % RUNS == 0:
                    total = zero_sums(BLOCK_M, BLOCK_N, SWAPPED)
                total = add_product(x, w, total, SWAPPED, PRECISION)
                if j % RUNS == RUNS - 1:
                    s = _scale_of(weights.scale, scales, j, E2M1, SCALE_GROUP, DTYPE)
                    acc = tl.fma(total, _along_columns(s, SWAPPED), acc)
            else:
                acc = add_product(x, w, acc, SWAPPED, PRECISION)
    else:
        x = _load_x(x_ptrs, live, k, GRANULE, LENGTH, IS_WHOLE)
        first = _side_by_side(
            _number(runs[0], weights, scales, zeros, 0, E2M1, SCALE_GROUP, LATE),
            _number(runs[1], weights, scales, zeros, 1, E2M1, SCALE_GROUP, LATE),
        )
        second = _side_by_side(
            _number(runs[2], weights, scales, zeros, 2, E2M1, SCALE_GROUP, LATE),
            _number(runs[3], weights, scales, zeros, 3, E2M1, SCALE_GROUP, LATE),
        )
        acc = add_product(x, _side_by_side(first, second), acc, SWAPPED, PRECISION)
    return acc


@triton.jit
def _number(run, weights, scales, zeros, j: tl.constexpr, E2M1: tl.constexpr, SCALE_GROUP: tl.constexpr,
            LATE: tl.constexpr):  # fmt: skip
    """The weights of run j, with their scale unless it is ``LATE``."""
    if not E2M1:
        run -= _zero_of(weights.zero, zeros, j, SCALE_GROUP, run.dtype)
    if SCALE_GROUP > 0 and not LATE:
        run *= _scale_of(weights.scale, scales, j, E2M1, SCALE_GROUP, run.dtype).to(run.dtype)[:, None]
    return run


@triton.jit
def _side_by_side(a, b):
    """[n, k] and [n, k] as [n, 2k]; in the layout of an operand, other names for the same registers."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load_x(x_ptrs, live, k, WIDTH: tl.constexpr, LENGTH: tl.constexpr, IS_WHOLE: tl.constexpr):
    """x [m, WIDTH] from column k on."""
    i = tl.arange(0, WIDTH)
    if IS_WHOLE:
        x = tl.load(x_ptrs[:, None] + k + i[None, :], mask=live[:, None], other=0.0)
    else:
        x = tl.load(x_ptrs[:, None] + k + i[None, :], mask=live[:, None] & (i < LENGTH - k)[None, :], other=0.0)
    return x


@triton.jit
def _load_tile(w_ptrs, expert, granule, half: tl.constexpr, n, NUM: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Words int16 [BLOCK_N, 32] of one granule."""
    USE_TMA: tl.constexpr = TILE.USE_TMA
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    if USE_TMA:
        words = w_ptrs.load([(expert * NUM + granule) * ROWS + half * COLUMNS + n * BLOCK_N, 0])
    else:
        words = tl.load(w_ptrs + (granule * ROWS + half * COLUMNS).to(tl.int64) * RUN)
    return words


@triton.jit
def _after_products(words, DTYPE: tl.constexpr, SWAPPED: tl.constexpr):
    """The words, once no product of the step before reads its left operand from registers any more.

    Triton up to 3.6 lets the numbers of a step overwrite those that wgmma instructions of the last step still read
    (https://github.com/triton-lang/triton/issues/9433).
    """
    if SWAPPED and not DTYPE.is_fp32():  # noqa: SIM102  # Triton's interpreter has no target to ask for
        if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
            words = tl.inline_asm_elementwise(
                "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
                "=r,=r,=r,=r,r,r,r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=8,
            )
    return words


@triton.jit
def _load_words(ptr, index):
    """One integer a column, with all scales (or zero points) that lie together in it; of floats, where they are."""
    words = index
    if ptr is not None:  # noqa: SIM102  # the compiler would look at both sides of an ``and``
        if ptr.dtype.element_ty.is_int():
            words = tl.load(ptr + index)
    return words


@triton.jit
def _scale_of(ptr, words, j: tl.constexpr, E2M1: tl.constexpr, SCALE_GROUP: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """[BLOCK_N] of run j: of e2m1 with the factor that its exponents lack."""
    if E2M1:
        byte = ((words >> 8 * j) & 0xFF) + 126
        if DTYPE.is_fp32():
            scale = (byte << 23).to(tl.float32, bitcast=True)
        else:
            scale = (byte << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif DTYPE.is_fp32():
        scale = tl.load(ptr + words * (128 // SCALE_GROUP) + j * 32 // SCALE_GROUP)
    elif SCALE_GROUP == 128:
        scale = words.to(tl.float32, bitcast=True)
    else:
        scale = (words >> 16 * (j * 32 // SCALE_GROUP)).to(tl.int16).to(DTYPE, bitcast=True)
    return scale


@triton.jit
def _zero_of(ptr, words, j: tl.constexpr, SCALE_GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """What ``_runs`` makes of the zero point of run j: [BLOCK_N, 1], or one for all columns."""
    OFFSET: tl.constexpr = 0 if DTYPE.is_fp32() else (0x4300 if DTYPE.is_bf16() else 0x6400)
    if ptr is None:
        zero = tl.full([1, 1], 8 if DTYPE.is_fp32() else (136 if DTYPE.is_bf16() else 1032), DTYPE)
    else:
        zero = words
        if SCALE_GROUP > 0:
            zero = (words >> SCALE_GROUP // 4 * (j * 32 // SCALE_GROUP)) & 0xFF
        zero = (zero + OFFSET)[:, None]
        if DTYPE.is_fp32():
            zero = zero.to(DTYPE)
        else:
            zero = zero.to(tl.int16).to(DTYPE, bitcast=True)
    return zero


@triton.jit
def _along_columns(scale, SWAPPED: tl.constexpr):
    """A column's scale beside its sums, in float32."""
    if SWAPPED:
        scale = scale.to(tl.float32)[:, None]
    else:
        scale = scale.to(tl.float32)[None, :]
    return scale


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

"""Rows to fp8, by whichever kernel has them in registers."""

from __future__ import annotations

import triton
import triton.language as tl

# As formats/fp8.py has them.
FP8_MAX = tl.constexpr(448.0)
INVERSE_FP8_MAX = tl.constexpr(1 / 448)
SMALLEST_AMAX = tl.constexpr(1e-10)


@triton.jit
def quantise_group(x):
    """(x in fp8 [m, k], float32 scale [m]): each row as one group. The reference: ``formats.fp8.quantise_rows``."""
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST_AMAX)
    # No number is larger than 448 and its rounding: nothing to clamp.
    stored = x * tl.div_rn(FP8_MAX, largest)[:, None]
    return stored.to(tl.float8e4nv), largest * INVERSE_FP8_MAX


@triton.jit
def store_quantised(stored_ptr, scale_ptr, x, rows, group, columns, rows_live, columns_live,
                    LENGTH: tl.constexpr, NUM_GROUPS: tl.constexpr):  # fmt: skip
    """Writes rows of one whole group of columns, of [., LENGTH] and [., NUM_GROUPS]."""
    stored, scale = quantise_group(tl.where(columns_live[None, :], x, 0.0))
    rows = rows.to(tl.int64)
    stored_ptrs = stored_ptr + rows[:, None] * LENGTH + columns[None, :]
    tl.store(stored_ptrs, stored, mask=rows_live[:, None] & columns_live[None, :])
    tl.store(scale_ptr + rows * NUM_GROUPS + group, scale, mask=rows_live)

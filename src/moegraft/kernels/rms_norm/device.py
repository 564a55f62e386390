"""Device side of RMS norms: a program has a few whole rows, so that a row's bits never depend on the others."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel


@triton.jit
def rms_norm_kernel(out_ptr, x_ptr, weight_ptr, num_rows, eps, SIZE: tl.constexpr, ADDS_ONE: tl.constexpr,
                    ROUNDS_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_D: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    live = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / SIZE
    y = x * tl.rsqrt(mean + eps)[:, None]
    if ROUNDS_FIRST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        if ADDS_ONE:
            weight = weight + 1.0
        y = y * weight[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=live)

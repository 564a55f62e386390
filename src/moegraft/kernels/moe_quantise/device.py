"""Device side of the quantisation of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.quantise import FP8_MAX, quantise_group


@triton.jit
def quantise_kernel(stored_ptr, scale_ptr, x_ptr, static_scale_ptr, num_rows, stride_x, LENGTH: tl.constexpr,
                    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of one group of GROUP columns; BLOCK_K: the next power of two."""
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    k = group * GROUP + tl.arange(0, BLOCK_K)
    live = rows < num_rows
    mask = live[:, None] & (tl.arange(0, BLOCK_K) < GROUP)[None, :] & (k < LENGTH)[None, :]
    rows = rows.to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * stride_x + k[None, :], mask=mask, other=0.0)
    if static_scale_ptr is None:
        stored, scale = quantise_group(x)
    else:
        static_scale = tl.load(static_scale_ptr)
        scale = tl.zeros([BLOCK_M], tl.float32) + static_scale
        stored = x.to(tl.float32) * tl.div_rn(1.0, static_scale)
        stored = tl.minimum(tl.maximum(stored, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)
    tl.store(stored_ptr + rows[:, None] * LENGTH + k[None, :], stored, mask=mask)
    tl.store(scale_ptr + rows * NUM_GROUPS + group, scale, mask=live)

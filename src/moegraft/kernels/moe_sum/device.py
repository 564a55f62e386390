"""Device side of the sum over K."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel


@triton.jit
def sum_kernel(out_ptr, y_ptr, ids_ptr, stride_out, E: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
               BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[t] = sum over k of y[t*K + k] in float32, in the order of k; rows of sentinel experts were never written."""
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids_ptr + token * K + k)
        columns = tl.where((expert >= 0) & (expert < E), D, 0)
        acc += tl.load(y_ptr + (token * K + k).to(tl.int64) * D + d, mask=d < columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * stride_out + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)

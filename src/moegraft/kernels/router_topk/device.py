"""Device side of a router's choice: a program has one token and takes its best experts one after the other."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel


@triton.jit
def router_topk_kernel(weights_ptr, ids_ptr, logits_ptr, stride_logits, E: tl.constexpr, K: tl.constexpr,
                       OF_ALL: tl.constexpr, IS_SUMMED: tl.constexpr, BLOCK_E: tl.constexpr,
                       BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    place = tl.arange(0, BLOCK_K)
    nothing = float("-inf")
    logits = tl.load(logits_ptr + token * stride_logits + expert, mask=expert < E, other=nothing).to(tl.float32)
    best = tl.max(logits, axis=0)
    total = tl.sum(tl.exp(logits - best), axis=0)
    left = logits
    chosen = tl.full([BLOCK_K], nothing, tl.float32)
    ids = tl.zeros([BLOCK_K], tl.int32)
    for k in tl.static_range(K):
        value = tl.max(left, axis=0)
        # The first of equal ones. NaN is equal to nothing: the last place stands for it.
        at = tl.min(tl.where((left == value) & (expert < E), expert, E - 1), axis=0)
        chosen = tl.where(place == k, value, chosen)
        ids = tl.where(place == k, at, ids)
        left = tl.where(expert == at, nothing, left)
    live = place < K
    weights = tl.where(live, tl.exp(chosen - best), 0.0)
    if OF_ALL:
        weights = weights / total
    if IS_SUMMED:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(weights_ptr + token * K + place, weights.to(weights_ptr.dtype.element_ty), mask=live)
    tl.store(ids_ptr + token * K + place, ids.to(tl.int64), mask=live)

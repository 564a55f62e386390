"""Device side of paged prefill attention: a program has some tokens of one chunk, for one head of keys and the query
heads that share it, and reads the keys that these tokens see, a block after the other.

    BLOCK_M 8, 4 query heads a head of keys: 2 tokens a program
    row of the block      0 1 2 3 | 4 5 6 7
    token, query head     t,0..3  | t+1,0..3
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moegraft.kernels.paged_decode.device import NOTHING


class Chunks(NamedTuple):
    """Chunk and first token of each program [B, 2]. By chunk, int32 [N]: its first row, its tokens, the tokens of its
    context; pages of the context [N, P]."""

    blocks: tl.tensor
    row: tl.tensor
    tokens: tl.tensor
    context: tl.tensor
    page_table: tl.tensor
    stride_table: tl.tensor


@triton.jit
def prefill_kernel(out_ptr, q_ptr, k_ptr, v_ptr, chunks, scale, softcap, sinks_ptr, stride_q, stride_out,
                   HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                   HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """``HEADS``: of the decode kernel; BLOCK_G is a power of two from GROUP up."""
    K: tl.constexpr = HEADS.K
    GROUP: tl.constexpr = HEADS.GROUP
    C: tl.constexpr = HEADS.C
    V: tl.constexpr = HEADS.V
    BLOCK_G: tl.constexpr = HEADS.BLOCK_G
    BLOCK_C: tl.constexpr = HEADS.BLOCK_C
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    block_t: tl.constexpr = BLOCK_M // BLOCK_G
    head = tl.program_id(1)
    chunk = tl.load(chunks.blocks + tl.program_id(0) * 2)
    if chunk < 0:
        return
    first = tl.load(chunks.blocks + tl.program_id(0) * 2 + 1)
    tokens = tl.load(chunks.tokens + chunk)
    context = tl.load(chunks.context + chunk)
    before = context - tokens  # tokens of the context that were computed in other steps
    m = tl.arange(0, BLOCK_M)
    token, g = first + m // BLOCK_G, m % BLOCK_G
    q_live = (token < tokens) & (g < GROUP)
    position = before + token
    row = (tl.load(chunks.row + chunk) + token).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    v_column = tl.arange(0, BLOCK_V)
    q_head = head * GROUP + g
    q_ptrs = q_ptr + row[:, None] * stride_q + q_head[:, None] * C + c[None, :]
    q = tl.load(q_ptrs, mask=q_live[:, None] & (c < C)[None, :], other=0.0)
    best = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    table_ptr = chunks.page_table + chunk.to(tl.int64) * chunks.stride_table
    start = 0
    if WINDOW > 0:
        start = tl.maximum(before + first - WINDOW + 1, 0) // BLOCK_L * BLOCK_L
    stop = before + tl.minimum(first + block_t, tokens)
    for at in range(start, stop, BLOCK_L):
        place = at + tl.arange(0, BLOCK_L)
        live = place < stop
        page = tl.load(table_ptr + place // PAGE_SIZE, mask=live, other=0)
        slot = (page.to(tl.int64) * PAGE_SIZE + place % PAGE_SIZE) * K + head
        k = tl.load(k_ptr + slot[:, None] * C + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
        v_mask = live[:, None] & (v_column < V)[None, :]
        v = tl.load(v_ptr + slot[:, None] * V + v_column[None, :], mask=v_mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        seen = place[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (place[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, NOTHING)
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp(scores - new_best[:, None]), 0.0)
        shrunk = tl.exp(best - new_best)
        total = total * shrunk + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
        best = new_best
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + q_head, mask=q_live, other=0.0).to(tl.float32)
        new_best = tl.maximum(best, sink)
        shrunk = tl.exp(best - new_best)
        total = total * shrunk + tl.exp(sink - new_best)
        acc = acc * shrunk[:, None]
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptrs = out_ptr + row[:, None] * stride_out + q_head[:, None] * V + v_column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=q_live[:, None] & (v_column < V)[None, :])

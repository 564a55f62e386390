"""Device side of paged decode attention: partial softmaxes over parts of a sequence, and their sum.

A program has one row, one head of keys with the query heads that share it, and one of SPLITS parts of the row's tokens.
The parts follow from the row's own length, which only the device knows: a captured launch serves any lengths.

    length 100, window none, SPLITS 3, BLOCK_L 16        blocks of 16: 7, parts of 3 blocks
    part 0: tokens 0..47     part 1: 48..95     part 2: 96..99
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moegraft.kernels.device.common import Constant, await_prior_kernel, release_next_kernel

NOTHING = Constant(-1e30)
"""The largest score of no scores: finite, so that differences of two of them are numbers."""


class Pool(NamedTuple):
    """Keys [P, S, Hk, C] and values [P, S, Hk, Cv], contiguous; the pages of each row, and its tokens."""

    k: tl.tensor
    v: tl.tensor  # "values" is what Triton's own tuples call their elements
    page_table: tl.tensor
    lengths: tl.tensor
    stride_table: tl.tensor


class Partial(NamedTuple):
    """By part: the sum of weighted values [B, Hq, SPLITS, Cv], the largest score and the sum [B, Hq, SPLITS]."""

    acc: tl.tensor
    best: tl.tensor
    total: tl.tensor


class Heads(NamedTuple):
    """Sizes, plain numbers: each kernel makes constants of them first, which Triton 3.6 does not do by itself.

    GROUP: query heads of a head of keys, BLOCK_G of them a program · BLOCK_C, BLOCK_V: powers of two."""

    Q: int
    K: int
    GROUP: int
    C: int
    V: int
    BLOCK_G: int
    BLOCK_C: int
    BLOCK_V: int


@triton.jit
def decode_kernel(q_ptr, pool, partial, scale, softcap, stride_q, HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
                  WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_L: tl.constexpr, SPLITS: tl.constexpr,
                  PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One part of one row's tokens, for the query heads of one head of keys."""
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    Q: tl.constexpr = HEADS.Q
    K: tl.constexpr = HEADS.K
    GROUP: tl.constexpr = HEADS.GROUP
    C: tl.constexpr = HEADS.C
    V: tl.constexpr = HEADS.V
    BLOCK_G: tl.constexpr = HEADS.BLOCK_G
    BLOCK_C: tl.constexpr = HEADS.BLOCK_C
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    row = tl.program_id(0)
    group_blocks: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    head = tl.program_id(1) // group_blocks
    split = tl.program_id(2)
    length = tl.load(pool.lengths + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    blocks = tl.cdiv(length - first, BLOCK_L)
    per_split = tl.cdiv(blocks, SPLITS)
    start = first + split * per_split * BLOCK_L
    stop = tl.minimum(start + per_split * BLOCK_L, length)

    g = tl.program_id(1) % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    c = tl.arange(0, BLOCK_C)
    v_column = tl.arange(0, BLOCK_V)
    q_head = head * GROUP + g
    q_live = g < GROUP
    q_ptrs = q_ptr + row.to(tl.int64) * stride_q + q_head[:, None] * C + c[None, :]
    q = tl.load(q_ptrs, mask=q_live[:, None] & (c < C)[None, :], other=0.0)
    best = tl.full([BLOCK_G], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    table_ptr = pool.page_table + row.to(tl.int64) * pool.stride_table
    for at in range(start, stop, BLOCK_L):
        token = at + tl.arange(0, BLOCK_L)
        live = token < stop
        page = tl.load(table_ptr + token // PAGE_SIZE, mask=live, other=0)
        slot = (page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * K + head
        k_mask = live[:, None] & (c < C)[None, :]
        k = tl.load(pool.k + slot[:, None] * C + c[None, :], mask=k_mask, other=0.0)
        v_mask = live[:, None] & (v_column < V)[None, :]
        v = tl.load(pool.v + slot[:, None] * V + v_column[None, :], mask=v_mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        scores = tl.where(live[None, :], scores, NOTHING)
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.where(live[None, :], tl.exp(scores - new_best[:, None]), 0.0)
        shrunk = tl.exp(best - new_best)
        total = total * shrunk + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
        best = new_best
    place = (row.to(tl.int64) * Q + q_head) * SPLITS + split
    tl.store(partial.best + place, best, mask=q_live)
    tl.store(partial.total + place, total, mask=q_live)
    acc_mask = q_live[:, None] & (v_column < V)[None, :]
    tl.store(partial.acc + place[:, None] * V + v_column[None, :], acc, mask=acc_mask)


@triton.jit
def sum_kernel(out_ptr, partial, sinks_ptr, HEADS: tl.constexpr, SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """The parts of one row and query head, in their order; a sink adds to the sum of weights alone."""
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    Q: tl.constexpr = HEADS.Q
    V: tl.constexpr = HEADS.V
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_V)
    live = column < V
    place = (row.to(tl.int64) * Q + head) * SPLITS
    best = NOTHING + 0.0
    if HAS_SINKS:
        best = tl.load(sinks_ptr + head).to(tl.float32)
    for split in range(SPLITS):
        best = tl.maximum(best, tl.load(partial.best + place + split))
    total = 0.0
    if HAS_SINKS:
        total = tl.exp(tl.load(sinks_ptr + head).to(tl.float32) - best)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(partial.best + place + split) - best)
        total += tl.load(partial.total + place + split) * weight
        acc += tl.load(partial.acc + (place + split) * V + column, mask=live, other=0.0) * weight
    acc = tl.where(total > 0.0, acc / tl.where(total > 0.0, total, 1.0), 0.0)
    out_ptrs = out_ptr + (row.to(tl.int64) * Q + head) * V + column
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def write_kernel(keys_ptr, values_ptr, k_ptr, v_ptr, slots_ptr, stride_k, stride_v, K_SIZE: tl.constexpr,
                 V_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row's keys and values, all heads, into its slot of the pages."""
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    for start in tl.static_range(0, K_SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k = tl.load(k_ptr + row * stride_k + at, mask=at < K_SIZE)
        tl.store(keys_ptr + slot * K_SIZE + at, k, mask=at < K_SIZE)
    for start in tl.static_range(0, V_SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(v_ptr + row * stride_v + at, mask=at < V_SIZE)
        tl.store(values_ptr + slot * V_SIZE + at, v, mask=at < V_SIZE)

"""Device side of rotary embeddings: a program turns some heads of one token, of queries or of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel


@triton.jit
def _product(x, angle, dtype: tl.constexpr):
    """Rounded to the dtype, as an operation of torch is: the compiler makes one instruction of a plain product and the
    sum behind it, also in bfloat16."""
    return tl.fma(x, tl.broadcast_to(angle[None, :], x.shape), 0.0).to(dtype).to(tl.float32)


@triton.jit
def _turn(out_ptr, x_ptr, stride_token, stride_head, cos, sin, cos_behind, sin_behind, token, head, HEADS: tl.constexpr,
          SIZE: tl.constexpr, TURNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Pairs (i, i + TURNED / 2) of each head; what lies behind the first TURNED elements stays as it is."""
    half: tl.constexpr = TURNED // 2
    pair = tl.arange(0, BLOCK_R)
    live = (head < HEADS)[:, None] & (pair < half)[None, :]
    x_ptrs = x_ptr + token * stride_token + head[:, None] * stride_head + pair[None, :]
    out_ptrs = out_ptr + (token * HEADS + head[:, None]) * SIZE + pair[None, :]
    dtype = out_ptr.dtype.element_ty
    a = tl.load(x_ptrs, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptrs + half, mask=live, other=0.0).to(tl.float32)
    left = _product(a, cos, dtype) + _product(-b, sin, dtype)
    right = _product(b, cos_behind, dtype) + _product(a, sin_behind, dtype)
    tl.store(out_ptrs, left.to(dtype), mask=live)
    tl.store(out_ptrs + half, right.to(dtype), mask=live)
    if SIZE > TURNED:
        rest = tl.arange(0, BLOCK_P)
        live = (head < HEADS)[:, None] & (rest < SIZE - TURNED)[None, :]
        x_ptrs = x_ptr + token * stride_token + head[:, None] * stride_head + TURNED + rest[None, :]
        out_ptrs = out_ptr + (token * HEADS + head[:, None]) * SIZE + TURNED + rest[None, :]
        tl.store(out_ptrs, tl.load(x_ptrs, mask=live), mask=live)


@triton.jit
def rotary_kernel(q_out_ptr, k_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, stride_q, stride_q_head, stride_k,
                  stride_k_head, Q: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, TURNED: tl.constexpr,
                  ANGLES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_P: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q + BLOCK_H - 1) // BLOCK_H
    half: tl.constexpr = TURNED // 2
    pair = tl.arange(0, BLOCK_R)
    live = pair < half
    behind: tl.constexpr = ANGLES - half  # 0 where both halves share their angles
    cos = tl.load(cos_ptr + token * ANGLES + pair, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ANGLES + pair, mask=live, other=0.0).to(tl.float32)
    cos_behind = tl.load(cos_ptr + token * ANGLES + behind + pair, mask=live, other=0.0).to(tl.float32)
    sin_behind = tl.load(sin_ptr + token * ANGLES + behind + pair, mask=live, other=0.0).to(tl.float32)
    if block < q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(q_out_ptr, q_ptr, stride_q, stride_q_head, cos, sin, cos_behind, sin_behind, token, head, Q, SIZE, TURNED,
              BLOCK_R, BLOCK_P)  # fmt: skip
    else:
        head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(k_out_ptr, k_ptr, stride_k, stride_k_head, cos, sin, cos_behind, sin_behind, token, head, K, SIZE, TURNED,
              BLOCK_R, BLOCK_P)  # fmt: skip

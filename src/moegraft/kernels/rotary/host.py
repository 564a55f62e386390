"""Rotary embeddings of queries and keys: one launch, no host sync."""

from __future__ import annotations

import torch

from moegraft.kernels.records import cdiv, next_power_of_2, pdl_options
from moegraft.kernels.rotary.device import rotary_kernel


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, has_half: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, 1, C] and k [B, Hk, 1, C], one token a row, turned by cos and sin [B, 1, R]; contiguous.

        out[i]         = x[i] · cos[i]             - x[i + R/2] · sin[i]            i < R/2
        out[i + R/2]   = x[i + R/2] · cos[i + R/2] + x[i] · sin[i + R/2]
        out[j]         = x[j]                                                       j >= R

    has_half: cos and sin are [B, 1, R/2], the same for both halves. Products and sums are rounded to the dtype, which
    all four share, as operations of torch would. May be captured in a CUDA graph. ``can_turn`` says what it takes.
    """
    (B, Q, _, C), K, angles = q.shape, k.shape[1], cos.shape[-1]
    turned = 2 * angles if has_half else angles
    q_out, k_out = q.new_empty(B, Q, 1, C), k.new_empty(B, K, 1, C)
    if B == 0:
        return q_out, k_out
    cos, sin = cos.contiguous(), sin.contiguous()
    block_h = min(8, next_power_of_2(Q))
    rotary_kernel[(B, cdiv(Q, block_h) + cdiv(K, block_h))](
        q_out, k_out, q, k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), Q=Q, K=K, SIZE=C,
        TURNED=turned, ANGLES=angles, BLOCK_H=block_h, BLOCK_R=next_power_of_2(turned // 2),
        BLOCK_P=next_power_of_2(max(1, C - turned)), num_warps=2, **pdl_options(q.device),
    )  # fmt: skip
    return q_out, k_out


def can_turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, has_half: bool = False) -> bool:
    """Whether ``rotary`` takes these."""
    if not (q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3 and cos.shape == sin.shape):
        return False
    B, _, S, C = q.shape
    turned = cos.shape[-1] * (2 if has_half else 1)
    has_rows = S == 1 and (k.shape[0], k.shape[2], k.shape[3]) == (B, S, C) and cos.shape[:2] == (B, 1)
    is_alike = q.dtype == k.dtype == cos.dtype == sin.dtype
    return has_rows and is_alike and turned % 2 == 0 and 0 < turned <= C and q.stride(3) == k.stride(3) == 1

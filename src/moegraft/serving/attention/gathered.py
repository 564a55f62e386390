"""Attention over gathered pages, without a kernel of our own: the form of the CPU, and of prompts elsewhere."""

from __future__ import annotations

import torch
from torch.nn import functional

from moegraft.serving.attention import AttentionOptions


def attend_gathered(
    q_THC: torch.Tensor, k_LHC: torch.Tensor, v_LHC: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """[T, Hq, Cv] of T queries, the last of which is the last of the L keys.

    A sequence's result depends on that sequence alone: nothing is padded to the longest context of a batch.
    """
    T, L = q_THC.shape[0], k_LHC.shape[0]
    first = 0 if options.window is None else max(0, L - T + 1 - options.window)
    q_GTC = _grouped(q_THC.transpose(0, 1), k_LHC.shape[1])
    k, v = k_LHC[first:].transpose(0, 1), v_LHC[first:].transpose(0, 1)
    mask_TL = None if T == 1 else _mask(T, L - first, options.window, q_THC.device)
    if mask_TL is not None and q_GTC.shape[1] != T:  # the heads of a group lie behind each other
        mask_TL = mask_TL.repeat(q_GTC.shape[1] // T, 1)
    out = _attention(q_GTC[None], k[None], v[None], mask_TL, options)[0]
    return out.reshape(q_THC.shape[1], T, -1).transpose(0, 1)


def attend_together(
    q_BHC: torch.Tensor,
    k_BLHC: torch.Tensor,
    v_BLHC: torch.Tensor,
    lengths_B: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """[B, Hq, Cv] of one query a row, over the first ``lengths_B[b]`` of the L keys gathered for it."""
    B, L = k_BLHC.shape[:2]
    places_L = torch.arange(L, device=q_BHC.device)
    mask_BL = places_L < lengths_B[:, None]
    if options.window is not None:
        mask_BL &= places_L >= lengths_B[:, None] - options.window
    q_BHGC = q_BHC.unflatten(1, (k_BLHC.shape[2], -1))
    out = _attention(q_BHGC, k_BLHC.transpose(1, 2), v_BLHC.transpose(1, 2), mask_BL[:, None, None], options)
    return out.reshape(B, q_BHC.shape[1], -1)


def _grouped(q_HTC: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[Hk, G * T, C]: the query heads that share a head of keys, as further queries of it."""
    return q_HTC.reshape(kv_heads, -1, q_HTC.shape[-1])


def _mask(T: int, L: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[T, L], True where query t, at place L - T + t, sees a key."""
    ages = torch.arange(L - T, L, device=device)[:, None] - torch.arange(L, device=device)[None, :]
    return ages >= 0 if window is None else (ages >= 0) & (ages < window)


def _attention(
    q_BHGC: torch.Tensor,
    k_BHLC: torch.Tensor,
    v_BHLC: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """[B, Hk, G, Cv]; G queries share each head of keys."""
    if options.softcap is None and options.sinks_H is None:
        return functional.scaled_dot_product_attention(q_BHGC, k_BHLC, v_BHLC, attn_mask=mask, scale=options.scale)
    # Softcap and sinks, which torch's attention does not have; float32 scores.
    scores_BHGL = (q_BHGC @ k_BHLC.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        scores_BHGL = options.softcap * torch.tanh(scores_BHGL / options.softcap)
    if mask is not None:
        scores_BHGL = scores_BHGL.masked_fill(~mask, float("-inf"))
    if options.sinks_H is None:
        return scores_BHGL.softmax(-1).to(v_BHLC.dtype) @ v_BHLC
    heads, queries = scores_BHGL.shape[1:3]
    per_head = options.sinks_H.numel() // heads
    sinks_HG1 = options.sinks_H.float().view(heads, per_head, 1).repeat_interleave(queries // per_head, 1)
    with_sinks = torch.cat([scores_BHGL, sinks_HG1.expand(scores_BHGL.shape[0], -1, -1, -1)], dim=-1)
    return with_sinks.softmax(-1)[..., :-1].to(v_BHLC.dtype) @ v_BHLC

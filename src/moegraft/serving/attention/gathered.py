"""Attention over the gathered pages of one sequence at a time: the form of the CPU, and of prompts elsewhere."""

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
    q, k, v = q_THC.transpose(0, 1), k_LHC[first:].transpose(0, 1), v_LHC[first:].transpose(0, 1)
    mask_TL = None if T == 1 else _mask(T, L - first, options.window, q.device)
    if options.softcap is None and options.sinks_H is None:
        groups = q.shape[0] != k.shape[0]
        out = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask_TL, scale=options.scale, enable_gqa=groups
        )[0]
    else:
        out = _explicit(q, k, v, mask_TL, options)
    return out.transpose(0, 1)


def _mask(T: int, L: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[T, L], True where query t, at place L - T + t, sees a key."""
    ages = torch.arange(L - T, L, device=device)[:, None] - torch.arange(L, device=device)[None, :]
    return ages >= 0 if window is None else (ages >= 0) & (ages < window)


def _explicit(
    q_HTC: torch.Tensor,
    k_HLC: torch.Tensor,
    v_HLC: torch.Tensor,
    mask_TL: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Softcap and sinks, which torch's attention does not have; float32 scores."""
    repeats = q_HTC.shape[0] // k_HLC.shape[0]
    k_HLC, v_HLC = k_HLC.repeat_interleave(repeats, 0), v_HLC.repeat_interleave(repeats, 0)
    scores_HTL = (q_HTC @ k_HLC.transpose(1, 2)).float() * options.scale
    if options.softcap is not None:
        scores_HTL = options.softcap * torch.tanh(scores_HTL / options.softcap)
    if mask_TL is not None:
        scores_HTL = scores_HTL.masked_fill(~mask_TL, float("-inf"))
    if options.sinks_H is not None:
        sinks_HT1 = options.sinks_H.float()[:, None, None].expand(-1, scores_HTL.shape[1], 1)
        weights_HTL = torch.cat([scores_HTL, sinks_HT1], dim=-1).softmax(-1)[..., :-1]
    else:
        weights_HTL = scores_HTL.softmax(-1)
    return weights_HTL.to(v_HLC.dtype) @ v_HLC

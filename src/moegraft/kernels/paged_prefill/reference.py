"""Paged prefill attention in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch

from moegraft.kernels.paged_decode.reference import paged_decode_reference
from moegraft.kernels.paged_prefill import PrefillChunks


def paged_prefill_reference(
    q_THC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    chunks: PrefillChunks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, Hq, Cv]: each token as the last of a context of its own; zeros in rows of no chunk."""
    out_THV = q_THC.new_zeros(*q_THC.shape[:2], values_PSHC.shape[-1])
    lists = (chunks.rows_N.tolist(), chunks.tokens_N.tolist(), chunks.contexts_N.tolist())
    for n, (row, tokens, context) in enumerate(zip(*lists, strict=True)):
        lengths = torch.arange(context - tokens + 1, context + 1, dtype=torch.int32)
        out_THV[row : row + tokens] = paged_decode_reference(
            q_THC[row : row + tokens], keys_PSHC, values_PSHC, chunks.page_table_NP[n].expand(tokens, -1), lengths,
            scale=scale, window=window, softcap=softcap, sinks_H=sinks_H,
        )  # fmt: skip
    return out_THV

"""A router's choice from its logits: one launch, no host sync."""

from __future__ import annotations

import torch

from moegraft.kernels.records import next_power_of_2, pdl_options
from moegraft.kernels.router_topk.device import router_topk_kernel


def router_topk(
    logits_TE: torch.Tensor, top_k: int, *, of_all: bool, is_summed: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] of ``dtype``, ids [T, K] int64): the K largest logits of each token, the largest first, of equal
    ones the first.

        p[k] = exp(logit[k] - max)          of_all: divided by the sum over all E experts
        weight[k] = p[k]                    is_summed: divided by the sum over the K that are chosen

    float32 inside, rounded once. A token's bits depend on the token alone. May be captured in a CUDA graph. Logits that
    are not finite give weights that are not. Raises ValueError for logits that are not [T, E] with 1 <= K <= E.
    """
    if logits_TE.dim() != 2 or not 1 <= top_k <= logits_TE.shape[1] or logits_TE.stride(1) != 1:
        raise ValueError(f"router_topk: logits {list(logits_TE.shape)}, top_k {top_k}; expected [T, E], 1 <= K <= E")
    T, E = logits_TE.shape
    weights_TK = logits_TE.new_empty(T, top_k, dtype=dtype)
    ids_TK = logits_TE.new_empty(T, top_k, dtype=torch.long)
    if T:
        router_topk_kernel[(T,)](
            weights_TK, ids_TK, logits_TE, logits_TE.stride(0), E=E, K=top_k, OF_ALL=of_all, IS_SUMMED=is_summed,
            BLOCK_E=next_power_of_2(E), BLOCK_K=next_power_of_2(top_k), num_warps=1 if E <= 256 else 4,
            **pdl_options(logits_TE.device),
        )  # fmt: skip
    return weights_TK, ids_TK

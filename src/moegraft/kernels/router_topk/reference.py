"""A router's choice in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch


def router_topk_reference(
    logits_TE: torch.Tensor, top_k: int, *, of_all: bool, is_summed: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Semantics: see ``host.router_topk``."""
    values_TE, ids_TE = logits_TE.float().sort(dim=-1, descending=True, stable=True)
    weights_TK = (values_TE[:, :top_k] - values_TE[:, :1]).exp()
    if of_all:
        weights_TK = weights_TK / (values_TE - values_TE[:, :1]).exp().sum(-1, keepdim=True)
    if is_summed:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(dtype), ids_TE[:, :top_k]

"""The sum over the experts of a token in plain torch."""

from __future__ import annotations

import torch


def moe_sum_reference(y_ND: torch.Tensor, topk_ids_TK: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """Semantics: see ``host.moe_sum``. out [T, D]."""
    T, K = topk_ids_TK.shape
    is_local_TK = (topk_ids_TK >= 0) & (topk_ids_TK < num_experts)
    y_TKD = y_ND.float().view(T, K, y_ND.shape[1]).masked_fill(~is_local_TK[:, :, None], 0.0)
    out_TD = torch.zeros_like(y_TKD[:, 0])
    for k in range(K):
        out_TD += y_TKD[:, k]
    return out_TD.to(y_ND.dtype)

"""Sum over the K experts of a token."""

from __future__ import annotations

import torch

from moegraft.kernels.moe_sum.device import sum_kernel
from moegraft.kernels.records import cdiv, next_power_of_2, pdl_options


def moe_sum(out_TD: torch.Tensor, y_ND: torch.Tensor, topk_ids_TK: torch.Tensor, *, num_experts: int) -> None:
    """Semantics: out[t] = sum over k with 0 <= topk_ids[t, k] < E of y[t*K + k], in float32, in the order of k."""
    T, K = topk_ids_TK.shape
    D = out_TD.shape[1]
    if T == 0:
        return
    block = min(1024, next_power_of_2(D)) if T >= 64 else min(256, next_power_of_2(D))
    sum_kernel[(T, cdiv(D, block))](
        out_TD, y_ND, topk_ids_TK, out_TD.stride(0), E=num_experts, D=D, K=K, BLOCK=block,
        num_warps=max(1, block // 256), **pdl_options(out_TD.device),
    )  # fmt: skip

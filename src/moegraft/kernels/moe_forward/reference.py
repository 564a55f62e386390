"""The layer in plain torch: the same roundings as the kernels, row by row."""

from __future__ import annotations

import torch

from moegraft.core.activation import apply_activation
from moegraft.kernels.lora_expand.reference import add_lora_w2_reference, add_lora_w13_reference
from moegraft.kernels.records import LoRABatch, MoEWeights


def fused_moe_lora_reference(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    lora: LoRABatch | None = None,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """Semantics: see ``host.fused_moe_lora``. One row at a time; synchronises the device."""
    K = topk_ids_TK.shape[1]
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for n, expert in enumerate(topk_ids_TK.flatten().tolist()):
        if not 0 <= expert < weights.sizes.num_experts:
            continue
        t, weight = n // K, topk_weights_TK.flatten()[n].float()
        slot = -1 if lora is None else int(lora.token_slots_T[t])
        x_1D = x_TD[t : t + 1]
        u_1F = x_1D.float() @ weights.w13_EGFD[expert].float().T
        if lora is not None:
            add_lora_w13_reference(
                u_1F,
                x_1D,
                [expert],
                [slot],
                lora.tables,
                num_halves=weights.activation.num_halves,
                is_interleaved=weights.is_interleaved,
            )
        if apply_router_weight_on_input:
            u_1F *= weight
        if weights.b13 is not None:
            u_1F += weights.b13[expert].float()
        h_1F = apply_activation(u_1F, weights.activation, is_interleaved=weights.is_interleaved).to(x_TD.dtype)
        y_1D = h_1F.float() @ weights.w2_EDF[expert].float().T
        if lora is not None:
            add_lora_w2_reference(y_1D, h_1F, [expert], [slot], lora.tables)
        if weights.b2 is not None:
            y_1D += weights.b2[expert].float()
        if not apply_router_weight_on_input:
            y_1D *= weight
        out_TD[t] += y_1D[0].to(x_TD.dtype).float()
    return out_TD.to(x_TD.dtype)

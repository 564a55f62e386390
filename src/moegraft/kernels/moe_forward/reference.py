"""The layer in plain torch: the same roundings as the kernels, row by row."""

from __future__ import annotations

import torch

from moegraft.kernels.moe_gemm.reference import moe_gemm2_reference, moe_gemm13_reference
from moegraft.kernels.moe_sum.reference import moe_sum_reference
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
    K, sizes = topk_ids_TK.shape[1], weights.sizes
    y_ND = x_TD.new_zeros(topk_ids_TK.numel(), x_TD.shape[1])
    for n, expert in enumerate(topk_ids_TK.flatten().tolist()):
        if not 0 <= expert < sizes.num_experts:
            continue
        t, weight = n // K, float(topk_weights_TK.flatten()[n])
        slot = -1 if lora is None else int(lora.token_slots_T[t])
        on_input, on_output = (weight, 1.0) if apply_router_weight_on_input else (1.0, weight)
        h_1F = moe_gemm13_reference(x_TD[t : t + 1], weights, expert, lora=lora, slot=slot, input_weight=on_input)
        y_ND[n] = moe_gemm2_reference(h_1F, weights, expert, lora=lora, slot=slot, output_weight=on_output)[0]
    return moe_sum_reference(y_ND, topk_ids_TK, num_experts=sizes.num_experts)

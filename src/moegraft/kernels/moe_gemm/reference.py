"""The GEMMs in plain torch, one row at a time: the same roundings as the kernels."""

from __future__ import annotations

import torch

from moegraft.core.halves import apply_activation
from moegraft.kernels.lora_expand.reference import add_lora_w2_reference, add_lora_w13_reference
from moegraft.kernels.records import LoRABatch, MoEWeights


def moe_gemm13_reference(
    x_1D: torch.Tensor, weights: MoEWeights, expert: int, *, lora: LoRABatch | None, slot: int, input_weight: float
) -> torch.Tensor:
    """Semantics: see ``host.moe_gemm13``. h [1, F] of one row of expert and slot (-1: no adapter)."""
    num_halves, is_interleaved = weights.activation.num_halves, weights.is_interleaved
    u_1F = x_1D.float() @ weights.w13_EGFD[expert].float().T
    if lora is not None:
        add_lora_w13_reference(
            u_1F, x_1D, [expert], [slot], lora.tables, num_halves=num_halves, is_interleaved=is_interleaved
        )
    u_1F *= input_weight
    if weights.b13 is not None:
        u_1F += weights.b13[expert].float()
    return apply_activation(u_1F, weights.activation, is_interleaved=is_interleaved).to(x_1D.dtype)


def moe_gemm2_reference(
    h_1F: torch.Tensor, weights: MoEWeights, expert: int, *, lora: LoRABatch | None, slot: int, output_weight: float
) -> torch.Tensor:
    """Semantics: see ``host.moe_gemm2``. y [1, D] of one row."""
    y_1D = h_1F.float() @ weights.w2_EDF[expert].float().T
    if lora is not None:
        add_lora_w2_reference(y_1D, h_1F, [expert], [slot], lora.tables)
    if weights.b2 is not None:
        y_1D += weights.b2[expert].float()
    return (output_weight * y_1D).to(h_1F.dtype)

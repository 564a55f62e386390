"""The truth for fp8 experts: float32 loops over plain weights; the base part alone reads quantised activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ModelTargets
from support.adapters import expert_delta
from support.oracle import merge


@dataclass(frozen=True)
class Rows:
    """``group``: columns of activations under a scale, 0 for a row. ``static_scale``: of all rows, instead."""

    group: int = 0
    static_scale: float | None = None

    def rounded(self, row: torch.Tensor) -> torch.Tensor:
        groups = row.view(-1, self.group or row.shape[0])
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448
        if self.static_scale is not None:
            scale = torch.full_like(scale, self.static_scale)
        return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten()


def fp8_logits(
    dense: PreTrainedModel,
    targets: ModelTargets,
    adapter: AdapterWeights | None,
    rows: Rows,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Logits [B, S, V] of ``dense`` with ``adapter``; ``rows``: how those of the experts' base are quantised."""
    model = merge(dense, targets, None if adapter is None else replace(adapter, experts={}))
    for name in targets.experts:
        lora = None if adapter is None else adapter.experts.get(name)
        model.get_submodule(name)._fp8_truth = (rows, lora)
    model.set_experts_implementation(_NAME)
    with torch.no_grad():
        return model(**inputs).logits


def _forward(module: nn.Module, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    rows, lora = module._fp8_truth
    out_TD = torch.zeros_like(x_TD)
    for t, k in torch.cartesian_prod(*(torch.arange(size) for size in ids_TK.shape)).tolist():
        expert = int(ids_TK[t, k])
        delta = _deltas(lora, expert)
        gate, up = (module.gate_up_proj[expert] @ rows.rounded(x_TD[t])).chunk(2)
        gate = gate + delta["gate"] @ x_TD[t] if "gate" in delta else gate
        up = up + delta["up"] @ x_TD[t] if "up" in delta else up
        h_F = module.act_fn(gate) * up
        y_D = module.down_proj[expert] @ rows.rounded(h_F)
        out_TD[t] += weights_TK[t, k] * (y_D + delta["down"] @ h_F if "down" in delta else y_D)
    return out_TD


def _deltas(lora: ExpertsLoRA | None, expert: int) -> dict[str, torch.Tensor]:
    return expert_delta(lora, expert) if lora is not None and expert in lora.expert_ids else {}


_NAME = "fp8_truth"
ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)

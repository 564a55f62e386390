"""The truth for a whole model: the adapter merged into a copy of its weights, run by transformers' own code.

Nothing of moegraft's kernels, bank or integration runs here; only the record that the loader gives is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.lora.targets import AdapterWeights, EmbeddingLoRA, ExpertsLoRA, ExpertsTarget, LinearLoRA, ModelTargets


def merged_logits(
    model: PreTrainedModel, targets: ModelTargets, adapter: AdapterWeights | None, **inputs: torch.Tensor
) -> torch.Tensor:
    """Logits [B, S, V] in float32 of ``model`` with ``adapter`` merged (None: of the base).

    ``model`` must be as transformers built it, with nothing attached; it is left unchanged.
    """
    with torch.no_grad():
        return merge(model, targets, adapter)(**inputs).logits.float()


@torch.no_grad()
def merge(model: PreTrainedModel, targets: ModelTargets, adapter: AdapterWeights | None) -> PreTrainedModel:
    """A copy of ``model`` whose weights hold the adapter, each in the layout in which the model stores it.

    Its experts run transformers' eager loop.
    """
    merged = copy.deepcopy(model)
    merged.set_experts_implementation("eager")
    if adapter is None:
        return merged
    for name, tensors in adapter.saved.items():
        for key, tensor in tensors.items():
            _replace(merged.get_submodule(name), key, tensor)
    for name, experts in adapter.experts.items():
        _merge_experts(merged.get_submodule(name), targets.experts[name], experts)
    for name, linear in adapter.linears.items():
        module, param = merged.get_submodule(name), targets.linears[name].param
        _replace(module, param, _merged_linear(getattr(module, param), linear))
    for name, embedding in adapter.embeddings.items():
        module = merged.get_submodule(name)
        _replace(module, "weight", _merged_embedding(module.weight, embedding, targets.embeddings[name].scale))
    return merged


def _replace(module: nn.Module, key: str, value: torch.Tensor) -> None:
    """A new tensor under the old name: a weight tied to it elsewhere keeps its value."""
    old: Mapping[str, torch.Tensor | None] = module._parameters if key in module._parameters else module._buffers
    value = value.to(old[key].dtype).clone()
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value


def _merged_linear(weight: torch.Tensor, lora: LinearLoRA) -> torch.Tensor:
    gain = torch.ones(weight.shape[0]) if lora.gain is None else lora.gain
    return (weight.double() * gain.double()[:, None] + lora.b.double().T @ lora.a.double()).to(weight.dtype)


def _merged_embedding(weight: torch.Tensor, lora: EmbeddingLoRA, scale: float) -> torch.Tensor:
    """``scale``: by which the module multiplies the rows of its weight."""
    return (weight.double() + lora.a.double().T @ lora.b.double() / scale).to(weight.dtype)


def _merge_experts(module: nn.Module, target: ExpertsTarget, lora: ExpertsLoRA) -> None:
    w13, w2 = getattr(module, target.w13_param), getattr(module, target.w2_param)
    if target.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    gate, up = _halves(w13, target)
    for position, expert in enumerate(lora.expert_ids):
        if lora.b_gate is not None:
            b = _of_expert(lora.b_gate, position)
            gate[expert] += _product(b, _of_expert(lora.a13, position)[: b.shape[0]])
        if lora.b_up is not None:
            b = _of_expert(lora.b_up, position)
            lanes = slice(lora.up_lane, lora.up_lane + b.shape[0])
            up[expert] += _product(b, _of_expert(lora.a13, position)[lanes])
        if lora.b2 is not None:
            w2[expert] += _product(_of_expert(lora.b2, position), _of_expert(lora.a2, position))


def _halves(w13: torch.Tensor, target: ExpertsTarget) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Views of the gate and the up half [E, F, D]; no gate half where the expert has none."""
    if not target.has_gate:
        return None, w13
    if target.is_interleaved:
        return w13[:, 0::2], w13[:, 1::2]
    return w13[:, : target.intermediate_size], w13[:, target.intermediate_size :]


def _of_expert(factor: torch.Tensor, position: int) -> torch.Tensor:
    return factor[0 if factor.shape[0] == 1 else position]


def _product(b_rF: torch.Tensor, a_rD: torch.Tensor) -> torch.Tensor:
    return (b_rF.double().T @ a_rD.double()).float()

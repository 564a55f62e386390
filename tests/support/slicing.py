"""Whole adapters cut in memory to what one rank holds: the truth for the loader, which reads slices from files.

Shape letters: E experts · D hidden size · F expert intermediate size · h experts that an adapter holds · r rank
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.core.cuts import cut_axis, cut_tensor
from moegraft.lora.targets import (
    AdapterWeights,
    EmbeddingLoRA,
    ExpertsLoRA,
    ExpertsTarget,
    LinearLoRA,
    ModelTargets,
)
from moegraft.parallel.slices import (
    WHOLE_EXPERTS,
    WHOLE_LINEAR,
    ExpertsSlice,
    LinearSlice,
    RankSlice,
    Shard,
)


def slice_adapter(weights: AdapterWeights, targets: ModelTargets, mine: RankSlice) -> AdapterWeights:
    """What one rank holds of an adapter that was made for the whole model. Shares no memory that it does not need."""
    experts = {
        module: slice_experts(lora, targets.experts[module], mine.experts.get(module, WHOLE_EXPERTS))
        for module, lora in weights.experts.items()
    }
    return AdapterWeights(
        experts={module: lora for module, lora in experts.items() if lora is not None},
        linears={m: slice_linear(lora, mine.linears.get(m, WHOLE_LINEAR)) for m, lora in weights.linears.items()},
        embeddings={
            m: slice_embedding(lora, mine.linears.get(m, WHOLE_LINEAR)) for m, lora in weights.embeddings.items()
        },
        saved={
            module: {param: slice_parameter(tensor, mine, module, param) for param, tensor in params.items()}
            for module, params in weights.saved.items()
        },
    )


def slice_experts(lora: ExpertsLoRA, target: ExpertsTarget, mine: ExpertsSlice) -> ExpertsLoRA | None:
    """One experts module; None where the adapter touches none of the rank's experts. Expert ids become local."""
    local_ids, positions = mine.local_experts(lora.expert_ids)
    if not local_ids:
        return None
    columns, hidden = mine.columns(target.intermediate_size), mine.hidden(target.hidden_size)

    def take(factor: torch.Tensor | None, part: Shard | None = None) -> torch.Tensor | None:
        if factor is None:
            return None
        if factor.shape[0] > 1 or len(lora.expert_ids) == 1:
            factor = factor[positions]
        return factor.contiguous() if part is None else _cut_shard(factor, 2, part)

    a13 = take(lora.a13)
    if a13 is not None and mine.low_rank is not None:
        a13 = _cut_shard(a13, 1, mine.low_rank.of(a13.shape[1]))
    return replace(
        lora,
        expert_ids=local_ids,
        a13=a13,
        b_gate=take(lora.b_gate, columns),
        b_up=take(lora.b_up, columns),
        a2=take(lora.a2, columns),
        b2=take(lora.b2, hidden),
    )


def slice_linear(lora: LinearLoRA, mine: LinearSlice) -> LinearLoRA:
    """One linear map."""
    a = lora.a if mine.lanes is None else _cut_shard(lora.a, 0, mine.lanes.of(lora.a.shape[0]))
    return LinearLoRA(
        a=a if mine.inputs is None else cut_tensor(a, {1: mine.inputs}),
        b=lora.b if mine.outputs is None else cut_tensor(lora.b, {1: mine.outputs}),
        gain=lora.gain if lora.gain is None or mine.outputs is None else cut_tensor(lora.gain, {0: mine.outputs}),
    )


def slice_embedding(lora: EmbeddingLoRA, mine: LinearSlice) -> EmbeddingLoRA:
    """One embedding: ``inputs`` are of the vocabulary, ``outputs`` of its dimension."""
    return EmbeddingLoRA(
        a=lora.a if mine.inputs is None else cut_tensor(lora.a, {1: mine.inputs}),
        b=lora.b if mine.outputs is None else cut_tensor(lora.b, {1: mine.outputs}),
    )


def slice_parameter(tensor: torch.Tensor, mine: RankSlice, module: str, param: str) -> torch.Tensor:
    """A parameter that an adapter replaces."""
    part = mine.saved.get((module, param))
    return tensor if part is None else cut_tensor(tensor, {part.axis: part.pieces})


def _cut_shard(tensor: torch.Tensor, axis: int, part: Shard) -> torch.Tensor:
    return cut_axis(tensor, axis, part.start, part.stop, part.padding)

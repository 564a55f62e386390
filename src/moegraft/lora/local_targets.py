"""The sizes that one rank's bank has: the targets of the whole model, cut by a RankSlice."""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.core.errors import ParallelError
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets
from moegraft.parallel.rank_slice import (
    ExpertsSlice,
    LinearSlice,
    ParameterSlice,
    RankSlice,
)
from moegraft.parallel.slices import count


def local_targets(targets: ModelTargets, mine: RankSlice) -> ModelTargets:
    """What this rank's ``BankLayout`` is made of. An adapter is checked against ``targets``, kept as these.

    Raises ParallelError where the rank would hold nothing of a module.
    """
    return replace(
        targets,
        experts={
            name: local_experts(t, mine.experts[name]) if name in mine.experts else t
            for name, t in targets.experts.items()
        },
        linears={
            name: _local_linear(t, mine.linears[name]) if name in mine.linears else t
            for name, t in targets.linears.items()
        },
        embeddings={
            name: _local_embedding(t, mine.linears[name]) if name in mine.linears else t
            for name, t in targets.embeddings.items()
        },
        saveable={
            module: {
                param: _local_parameter(tensor, mine.saved[module, param]) if (module, param) in mine.saved else tensor
                for param, tensor in params.items()
            }
            for module, params in targets.saveable.items()
        },
    )


def local_experts(target: ExpertsTarget, mine: ExpertsSlice) -> ExpertsTarget:
    """One experts module as this rank holds it; its experts are numbered from 0."""
    _check(target.name, "experts", mine.num_experts(target.num_experts))
    return replace(
        target,
        num_experts=mine.num_experts(target.num_experts),
        intermediate_size=mine.columns(target.intermediate_size).padded,
        output_size=None if mine.low_rank is None else mine.hidden(target.hidden_size).padded,
        lane_shares=1 if mine.low_rank is None else mine.low_rank.world,
    )


def _local_linear(target: LinearTarget, mine: LinearSlice) -> LinearTarget:
    return replace(
        target,
        in_features=_check(target.name, "input features", mine.num_inputs(target.in_features)),
        out_features=_check(target.name, "output features", mine.num_outputs(target.out_features)),
        lane_shares=1 if mine.lanes is None else mine.lanes.world,
    )


def _local_embedding(target: EmbeddingTarget, mine: LinearSlice) -> EmbeddingTarget:
    return replace(
        target,
        num_embeddings=_check(target.name, "vocabulary", mine.num_inputs(target.num_embeddings)),
        embedding_dim=_check(target.name, "columns", mine.num_outputs(target.embedding_dim)),
    )


def _local_parameter(tensor: torch.Tensor, mine: ParameterSlice) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[mine.axis] = count(mine.pieces)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _check(module: str, what: str, size: int) -> int:
    if size == 0:
        raise ParallelError(f"this rank would hold no {what} of {module}: more ranks than there are to share out")
    return size

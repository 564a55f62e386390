"""A layer of which this rank holds a slice: from the weights of the whole layer to what the rank keeps and runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from moegraft.build.layers import build_fused_moe, punica_for
from moegraft.core.config import MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.punica import PunicaWrapperBase
from moegraft.lora.punica.sharded import ShardedLinearPunica
from moegraft.moe.expert_parallel import expert_parallel_pair
from moegraft.moe.layer import FusedMoE
from moegraft.oracle import Decision
from moegraft.parallel import Communicator, ExpertsSlice, LinearSlice, ParallelGroups
from moegraft.parallel.expert_map import ExpertMap


@torch.no_grad()  # a graph would hold what is cut off
def take_slice(weights: ExpertsWeights, mine: ExpertsSlice, *, adds_bias: bool) -> ExpertsWeights:
    """What a rank holds of a layer, in memory of its own.

    ``adds_bias``: of the ranks that share the F of an expert, one adds b2, since their outputs are summed.
    """
    if mine.experts is not None:
        weights = weights.take_experts(mine.experts)
    if mine.intermediate is not None:
        part = mine.intermediate
        weights = weights.take_intermediate(part.start, part.stop, padded_to=part.padded)
    if weights.b2 is not None and not adds_bias:
        weights = cast("ExpertsWeights", replace(cast("Any", weights), b2=torch.zeros_like(weights.b2)))
    return weights


def build_parallel_moe(
    config: MoEConfig,
    weights: ExpertsWeights,
    groups: ParallelGroups,
    expert_map: ExpertMap,
    *,
    backend: str | None = None,
    lora_experts: bool = True,
) -> tuple[FusedMoE, Decision]:
    """A FusedMoE over a rank's slice of ``take_slice`` (kept, not copied), whose output is that of the whole layer.

    ``config``: of the whole layer. ``lora_experts``: as of ``build_fused_moe``. Raises NoBackendError.
    """
    local = replace(config, num_experts=weights.num_experts, intermediate_size=weights.intermediate_size)
    pair = expert_parallel_pair(config, weights, groups, expert_map)
    return build_fused_moe(
        local,
        weights,
        backend=backend,
        lora_experts=lora_experts,
        prepare_finalize=pair,
        parallel=groups.config,
    )


def linear_punica_for(
    device: torch.device, mine: LinearSlice | None, ranks: Communicator, *, gathers: bool
) -> PunicaWrapperBase:
    """The punica wrapper of a linear map whose host sums its output up before the delta is added.

    A rank that has all inputs adds its own columns of the delta by itself, unless the host ``gathers`` them first.
    """
    if mine is None or (mine.inputs is None and not gathers):
        return punica_for(device)
    return ShardedLinearPunica(ranks, mine, is_reduced=True)

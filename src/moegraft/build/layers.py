"""From weights and sizes to a layer, or to the layer of which this rank holds a slice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.tables import ExpertsTables
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.punica import PunicaWrapperBase, PunicaWrapperCPU, PunicaWrapperGPU
from moegraft.lora.punica.sharded import (
    ShardedExpertsPunica,
    ShardedExpertsPunicaGPU,
    ShardedLinearPunica,
    ShardedLinearPunicaGPU,
)
from moegraft.moe.expert_parallel.all_gather import AllGatherPrepareAndFinalize
from moegraft.moe.expert_parallel.all_to_all import AllToAllPrepareAndFinalize
from moegraft.moe.expert_parallel.replicated import ReplicatedPrepareAndFinalize
from moegraft.moe.experts.triton_experts import MIN_CAPABILITY
from moegraft.moe.layer import (
    FusedMoE,
    FusedMoEModularMethod,
    FusedMoEPrepareAndFinalize,
    FusedMoEWithLoRA,
    NoDispatchPrepareAndFinalize,
)
from moegraft.moe.router import RouterConfig
from moegraft.moe.tensor_parallel import TensorParallelPrepareAndFinalize
from moegraft.oracle import Decision, select_experts
from moegraft.parallel import Communicator, ExpertsSlice, LinearSlice, ParallelConfig, ParallelGroups
from moegraft.parallel.slices import ExpertMap


def punica_for(device: torch.device) -> PunicaWrapperBase:
    """The punica wrapper of a device."""
    return PunicaWrapperGPU() if _runs_kernels(device) else PunicaWrapperCPU()


def _runs_kernels(device: torch.device) -> bool:
    target = DeviceTarget.of(device)
    return target.has_triton and target.capability is not None and target.capability >= MIN_CAPABILITY


def build_fused_moe(
    config: MoEConfig,
    weights: ExpertsWeights,
    *,
    router: RouterConfig | None = None,
    correction_bias_E: torch.Tensor | None = None,
    lora_experts: bool = True,
    backend: str | None = None,
    prepare_finalize: FusedMoEPrepareAndFinalize | None = None,
    parallel: ParallelConfig | None = None,
) -> tuple[FusedMoE, Decision]:
    """A FusedMoE over ``weights`` (kept, not copied) and the oracle's decision.

    ``lora_experts``: only backends that take LoRA are considered; False where adapters will touch no expert.
    ``backend``: a class by name. ``prepare_finalize``: how rows meet experts of other ranks; by default all experts
    are here. ``parallel``: the world that the weights are a slice for. Raises NoBackendError.
    """
    parallel = parallel or ParallelConfig()
    request = BackendRequest(
        config=config,
        device=DeviceTarget.of(weights.device),
        format_name=weights.format_name,
        adapters_touch_experts=lora_experts,
        tp_size=parallel.tp,
        ep_size=parallel.ep,
        fully_sharded=parallel.fully_sharded and parallel.tp > 1,
    )
    decision = select_experts(request, backend=backend)
    prepare_finalize = prepare_finalize or NoDispatchPrepareAndFinalize(config)
    method = FusedMoEModularMethod(config, weights, decision.experts_cls, prepare_finalize)
    return FusedMoE(config, method, router, correction_bias_E), decision


def build_fused_moe_with_lora(
    layer: FusedMoE, tables: ExpertsTables, groups: ParallelGroups | None = None
) -> FusedMoEWithLoRA:
    """The layer with LoRA from the bank's tables (``AdapterBank.experts_tables``).

    ``groups``: of a rank; where they are fully sharded, the tables hold this rank's share of the low-rank side.
    """
    punica = punica_for(tables.pool.device)
    if groups is not None and groups.config.fully_sharded and groups.tp.size > 1:
        sharded = ShardedExpertsPunicaGPU if _runs_kernels(tables.pool.device) else ShardedExpertsPunica
        punica = sharded(groups.tp, layer.config.hidden_size)
    return FusedMoEWithLoRA(layer, tables, punica)


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
    if _runs_kernels(device):
        return ShardedLinearPunicaGPU(ranks, mine)
    return ShardedLinearPunica(ranks, mine, is_reduced=True)


def expert_parallel_pair(
    config: MoEConfig, weights: ExpertsWeights, groups: ParallelGroups, expert_map: ExpertMap
) -> FusedMoEPrepareAndFinalize:
    """Rows that all ranks have stay where they are; data-parallel ones go as ``ParallelConfig.dispatch`` says.

    ``config`` is the whole layer's, ``weights`` are this rank's.
    """
    if groups.ep.size == 1:
        return TensorParallelPrepareAndFinalize(config, groups.tp)
    if not groups.config.data_parallel:
        return ReplicatedPrepareAndFinalize(config, weights, groups, expert_map)
    if groups.config.dispatch == "all_gather":
        return AllGatherPrepareAndFinalize(config, weights, groups, expert_map)
    return AllToAllPrepareAndFinalize(config, weights, groups, expert_map)

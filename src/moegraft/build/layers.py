"""From weights and sizes to a layer."""

from __future__ import annotations

import torch

from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.tables import ExpertsTables
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.punica import PunicaWrapperBase, PunicaWrapperCPU, PunicaWrapperGPU
from moegraft.lora.punica.sharded import ShardedExpertsPunica
from moegraft.moe.experts.triton_experts import MIN_CAPABILITY
from moegraft.moe.layer import (
    FusedMoE,
    FusedMoEModularMethod,
    FusedMoEPrepareAndFinalize,
    FusedMoEWithLoRA,
    NoDispatchPrepareAndFinalize,
)
from moegraft.moe.router import RouterConfig
from moegraft.oracle import Decision, select_experts
from moegraft.parallel import ParallelConfig, ParallelGroups


def punica_for(device: torch.device) -> PunicaWrapperBase:
    """The punica wrapper of a device."""
    target = DeviceTarget.of(device)
    runs_kernels = target.has_triton and target.capability is not None and target.capability >= MIN_CAPABILITY
    return PunicaWrapperGPU() if runs_kernels else PunicaWrapperCPU()


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
        punica = ShardedExpertsPunica(groups.tp, layer.config.hidden_size)
    return FusedMoEWithLoRA(layer, tables, punica)

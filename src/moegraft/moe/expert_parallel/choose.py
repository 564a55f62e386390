"""Which pair a world needs."""

from __future__ import annotations

from moegraft.core.config import MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.moe.expert_parallel.all_gather import AllGatherPrepareAndFinalize
from moegraft.moe.expert_parallel.all_to_all import AllToAllPrepareAndFinalize
from moegraft.moe.expert_parallel.replicated import ReplicatedPrepareAndFinalize
from moegraft.moe.layer import FusedMoEPrepareAndFinalize
from moegraft.moe.tensor_parallel import TensorParallelPrepareAndFinalize
from moegraft.parallel.expert_map import ExpertMap
from moegraft.parallel.groups import ParallelGroups


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

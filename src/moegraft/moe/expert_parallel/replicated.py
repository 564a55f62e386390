"""Every rank has every row: each computes what its own experts give, and the sums are added up."""

from __future__ import annotations

import torch

from moegraft.core.config import MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.context import MoELoRAContext
from moegraft.moe.expert_parallel.exchange import ExpertParallelPrepareAndFinalize
from moegraft.moe.layer import ExpertsOutput, PreparedRows, slots_of_call, weigh_input, weighted_sum
from moegraft.parallel.groups import ParallelGroups
from moegraft.parallel.slices import NOWHERE, ExpertMap


class ReplicatedPrepareAndFinalize(ExpertParallelPrepareAndFinalize):
    """The ranks bring the same batch. Nothing is dispatched; one all-reduce over all ranks of the world."""

    def __init__(
        self, config: MoEConfig, weights: ExpertsWeights, groups: ParallelGroups, expert_map: ExpertMap
    ) -> None:
        super().__init__(config, weights, groups, expert_map)
        self.world = groups.world

    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> PreparedRows:
        T, K = topk_ids_TK.shape
        x_TD, weights_TK = weigh_input(x_TD, topk_weights_TK, on_input=self.weight_on_input)
        rank_TK, local_TK = self.placement.locate(topk_ids_TK)
        return PreparedRows(
            x_MD=x_TD,
            unquantised_MD=x_TD,
            topk_weights_MK=weights_TK,
            topk_ids_MK=torch.where(rank_TK == self.ep.rank, local_TK, NOWHERE).int(),
            slots_M=slots_of_call(x_TD, lora_context),
            expected_choices=-(-T * K // self.ep.size),
        )

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        return self.world.all_reduce(weighted_sum(output, rows))

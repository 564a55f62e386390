"""What the expert-parallel pairs share: where experts stand, which adapters rows carry, how many rows each rank sends.

Shape letters: T tokens · K experts per token · R ranks of the expert-parallel group
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.core.config import MoEConfig
from moegraft.core.errors import BatchError
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.rows import BASE_SLOT, base_slots
from moegraft.moe.expert_parallel.packing import PlainRows, RowCodec, codec_for
from moegraft.moe.layer import FusedMoEPrepareAndFinalize, weighs_input
from moegraft.parallel.collectives import Communicator
from moegraft.parallel.expert_map import ExpertMap, ExpertPlacement
from moegraft.parallel.groups import ParallelGroups


class ExpertParallelPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """A pair whose ranks hold different experts. All ranks of the world call it together, layer by layer.

    ``weights``: this rank's experts, in the order of their local ids; their format says how rows are sent. Inside an
    expert-parallel rank the F of its experts may be shared by a tensor-parallel group, whose ranks bring the same rows.
    Raises ValueError where map, groups and weights do not fit.
    """

    def __init__(
        self, config: MoEConfig, weights: ExpertsWeights, groups: ParallelGroups, expert_map: ExpertMap
    ) -> None:
        if expert_map.num_ranks != groups.ep.size:
            raise ValueError(f"the expert map is for {expert_map.num_ranks} ranks, the group has {groups.ep.size}")
        held = len(expert_map.experts_of_rank[groups.ep_rank])
        if weights.num_experts != held:
            raise ValueError(f"the weights are of {weights.num_experts} experts, the map gives this rank {held}")
        self.expert_map = expert_map
        self.most_held = max(map(len, expert_map.experts_of_rank))
        self.weight_on_input = weighs_input(config)
        self.codec: RowCodec = codec_for(weights)
        self.ep = groups.ep
        self.tp = groups.tp
        self.placement = ExpertPlacement.of(expert_map, weights.device)


@dataclass(frozen=True, kw_only=True)
class RowParts:
    """This rank's rows by the way they are sent: one part, or base rows and rows with an adapter.

    has_adapters: of any rank's rows · codecs: of each part · is_in_part_PT: the rows of each part, bool; None for one
    part · adapter_T: id of each row's adapter, int32.
    """

    has_adapters: bool
    codecs: tuple[RowCodec, ...]
    is_in_part_PT: torch.Tensor | None
    adapter_T: torch.Tensor


def split_rows(codec: RowCodec, num_rows: int, context: MoELoRAContext | None, device: torch.device) -> RowParts:
    """Base rows as the format sends them; rows with an adapter unquantised, since LoRA reads them so.

    What receives a row with an adapter quantises it itself: no row is sent twice. Raises BatchError for a context
    that has no adapter ids to send.
    """
    if context is None:
        adapter_T = base_slots(num_rows, device)
        return RowParts(has_adapters=False, codecs=(codec,), is_in_part_PT=None, adapter_T=adapter_T)
    group = context.group
    if group is None:
        raise BatchError("rows that travel between ranks need adapter ids: acquire the batch from a CollectiveBank")
    adapter_T, has_adapters = group.id_of_slot[context.rows.slots_M.long()], bool(group.ids)
    if isinstance(codec, PlainRows) or not has_adapters:
        return RowParts(has_adapters=has_adapters, codecs=(codec,), is_in_part_PT=None, adapter_T=adapter_T)
    has_adapter_T = adapter_T != BASE_SLOT
    return RowParts(
        has_adapters=True,
        codecs=(codec, PlainRows()),
        is_in_part_PT=torch.stack([~has_adapter_T, has_adapter_T]),
        adapter_T=adapter_T,
    )


def slots_of(adapter_M: torch.Tensor, context: MoELoRAContext | None) -> torch.Tensor:
    """[M] int32: this rank's slots of the adapters that rows brought along."""
    if context is None or context.group is None:
        return base_slots(adapter_M.shape[0], adapter_M.device)
    return context.group.slot_of_id[adapter_M.long()]


def exchange_counts(ep: Communicator, sent_PR: torch.Tensor, parts: RowParts) -> tuple[list[list[int]], ...]:
    """(sent [P][R], received [P][R], [1][R] rows T of each rank): one small exchange between the hosts.

    ``sent_PR``: rows of each part for each rank; reading it is the one wait for the device. Raises BatchError where
    some ranks run a batch with adapters and others one without.
    """
    sent, ranks = sent_PR.tolist(), ep.size
    mine = torch.zeros(ranks, 4, dtype=torch.int64)
    mine[:, 0], mine[:, 1] = parts.has_adapters, parts.adapter_T.shape[0]
    mine[:, 2 : 2 + len(sent)] = torch.tensor(sent).t()
    theirs = ep.all_to_all(mine, [1] * ranks, [1] * ranks).t().tolist()
    other = [ep.ranks[i] for i, has_adapters in enumerate(theirs[0]) if has_adapters != parts.has_adapters]
    if other:
        kinds = ("without", "with") if parts.has_adapters else ("with", "without")
        raise BatchError(
            f"ranks {other} run a batch {kinds[0]} adapters, rank {ep.ranks[ep.rank]} one {kinds[1]}; acquire it on "
            "all ranks together, and pass its group on every rank"
        )
    return sent, theirs[2 : 2 + len(sent)], theirs[1:2]

"""The routing build in plain torch and Python: the truth that the kernel is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.core.routing import LANE_GRANULE
from moegraft.core.tables import ExpertsFactor, Field
from moegraft.kernels.records import LoRABatch


@dataclass(frozen=True, kw_only=True)
class ReferenceRouting:
    """``MoERouting`` as Python lists, ascending: blocks (expert, first, end), tiles (expert, slot, first, end).

    ``segment``: first position of the segment of each position. ``block_lanes``: lanes (of w13, of w2) of each block.
    """

    order: list[int]
    segment: list[int]
    blocks: list[tuple[int, int, int]]
    tiles: list[tuple[int, int, int, int]]
    block_lanes: list[tuple[int, int]]


def route_rows_reference(
    topk_ids_TK: torch.Tensor, lora: LoRABatch | None, *, num_experts: int, block_m: int, tile_m: int
) -> ReferenceRouting:
    """Semantics: see ``host.route_rows``."""
    K = topk_ids_TK.shape[1]
    slots = [-1] * topk_ids_TK.shape[0] if lora is None else lora.token_slots_T.tolist()
    experts = topk_ids_TK.flatten().tolist()
    keyed = sorted((e, slots[n // K], n) for n, e in enumerate(experts) if 0 <= e < num_experts)
    segment: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    tiles: list[tuple[int, int, int, int]] = []
    block_lanes: list[tuple[int, int]] = []
    for p, (expert, slot, _) in enumerate(keyed):
        is_new_segment = p == 0 or keyed[p - 1][:2] != (expert, slot)
        segment.append(p if is_new_segment else segment[-1])
        if p == 0 or keyed[p - 1][0] != expert or p - blocks[-1][1] == block_m:
            members = [row for row in keyed[p : p + block_m] if row[0] == expert]
            blocks.append((expert, p, p + len(members)))
            granules = [_granules(lora, expert, s) for s in sorted({row[1] for row in members})]
            block_lanes.append((LANE_GRANULE * sum(g[0] for g in granules), LANE_GRANULE * sum(g[1] for g in granules)))
        if any(_granules(lora, expert, slot)) and (p - segment[-1]) % tile_m == 0:
            members = [row for row in keyed[p : p + tile_m] if row[:2] == (expert, slot)]
            tiles.append((expert, slot, p, p + len(members)))
    return ReferenceRouting(
        order=[n for _, _, n in keyed], segment=segment, blocks=blocks, tiles=tiles, block_lanes=block_lanes
    )


def _granules(lora: LoRABatch | None, expert: int, slot: int) -> tuple[int, int]:
    """Granules of lanes (w13, w2) that an (expert, slot) segment brings."""
    if lora is None or slot < 0 or lora.tables.expert_index[slot, expert] < 0:
        return 0, 0
    ranks = lora.tables.factors[slot, :, Field.RANK].tolist()
    gate_up = max(ranks[ExpertsFactor.B_GATE], ranks[ExpertsFactor.B_UP])
    return -(-gate_up // LANE_GRANULE), -(-ranks[ExpertsFactor.B2] // LANE_GRANULE)

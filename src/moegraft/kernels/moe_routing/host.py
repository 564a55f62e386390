"""Routing build: the order of the rows, blocks for the GEMMs, tiles and lanes for LoRA. On the device, no host sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moegraft.core.routing import LANE_GRANULE, Lanes, MoERouting
from moegraft.kernels.moe_routing.device import route_kernel
from moegraft.kernels.records import LayerSizes, LoRABatch, cdiv, next_power_of_2, pdl_options

DENSE_ROWS = 4096
"""Up to here the lists have no holes for experts without rows; a histogram of all rows is cheap."""
FEW_ROWS = 32
"""Up to so many rows of an expert are compared with each other; of more, so many at a time are placed:"""
SORT_ROWS = 64
LANE_CELLS = 2048
"""Segments (or slots) times lanes that a program resolves at a time."""


@dataclass(frozen=True, kw_only=True)
class RoutingBuffers:
    """Memory of one build: order, rows, segment [N], blocks [*, 8], tiles [*, 8], counts [2], all int32, and lanes."""

    order: torch.Tensor
    rows: torch.Tensor
    segment: torch.Tensor
    blocks: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    lanes13: Lanes | None = None
    lanes2: Lanes | None = None


def route_rows(
    topk_ids_TK: torch.Tensor,
    sizes: LayerSizes,
    lora: LoRABatch | None,
    buffers: RoutingBuffers,
    *,
    block_m: int,
    tile_m: int,
) -> MoERouting:
    """Sorts the N = T*K rows by (expert, adapter slot) and cuts the order into blocks, tiles and lanes.

    Semantics: ``order`` is the stable argsort of (expert, slot) without the sentinels (ids outside [0, E)), base rows
    first in their expert; blocks cut each expert's positions every ``block_m``, tiles each (expert, slot) segment's
    every ``tile_m`` where the slot's adapter has LoRA for the expert; lanes as ``MoERouting`` says. Without ``lora``
    rows are sorted by expert alone and there are no tiles and no lanes. Topk ids int32 or int64, contiguous.
    """
    T, K = topk_ids_TK.shape
    routing = MoERouting(
        order=buffers.order,
        segment=buffers.segment,
        blocks=buffers.blocks,
        tiles=buffers.tiles,
        counts=buffers.counts,
        lanes13=buffers.lanes13,
        lanes2=buffers.lanes2,
        num_rows=T * K,
        top_k=K,
        block_m=block_m,
        tile_m=tile_m,
    )
    if T > 0:
        _launch(topk_ids_TK, sizes, lora, buffers, routing)
    return routing


def _launch(
    topk_ids_TK: torch.Tensor,
    sizes: LayerSizes,
    lora: LoRABatch | None,
    buffers: RoutingBuffers,
    routing: MoERouting,
) -> None:
    num_rows, E = routing.num_rows, sizes.num_experts
    route_kernel[(E,)](
        buffers.order, buffers.rows, buffers.segment, buffers.blocks, buffers.tiles, *_lane_operands(buffers),
        buffers.counts, topk_ids_TK, *_lora_operands(lora, buffers, num_rows), E=E, K=routing.top_k,
        D=sizes.hidden_size, F=sizes.intermediate_size, GATED=sizes.gated, BLOCK_M=routing.block_m,
        TILE_M=routing.tile_m, E_BINS=next_power_of_2(E + 1), CHUNK=max(32, min(4096, next_power_of_2(num_rows))),
        FEW=FEW_ROWS, ROWS=SORT_ROWS, DENSE=num_rows <= DENSE_ROWS, ALL_FEW=num_rows <= FEW_ROWS,
        num_warps=4 if num_rows <= 64 else 8, **_lora_sizes(lora),
        **pdl_options(topk_ids_TK.device),
    )  # fmt: skip


def _lane_operands(buffers: RoutingBuffers) -> tuple[torch.Tensor | None, ...]:
    lists = (buffers.lanes13, buffers.lanes2)
    return tuple(
        t for lanes in lists for t in ((lanes.segment, lanes.granule, lanes.element) if lanes else (None,) * 3)
    )


def _lora_operands(lora: LoRABatch | None, buffers: RoutingBuffers, num_rows: int) -> tuple[Any, ...]:
    if lora is None or buffers.lanes13 is None or buffers.lanes2 is None:
        return None, None, None, None, 0, 0, 0, num_rows, 0, 0
    tables = lora.tables
    return (
        lora.token_slots_T, tables.page_table, tables.factors, tables.expert_index, tables.page_table.stride(0),
        tables.factors.stride(0), tables.expert_index.stride(0), num_rows, buffers.lanes13.segment.shape[0],
        buffers.lanes2.segment.shape[0],
    )  # fmt: skip


def _lora_sizes(lora: LoRABatch | None) -> dict[str, int]:
    if lora is None:
        return {"S": 0, "S_BINS": 1, "PAGE_ELEMS": 1, "GRANULES13": 0, "GRANULES2": 0, "FEW_LANES": 0, "LANES": 0}
    granules13, granules2 = cdiv(lora.rank13, LANE_GRANULE), cdiv(lora.rank2, LANE_GRANULE)
    bins = next_power_of_2(lora.num_slots + 1)
    widest = next_power_of_2(max(1, granules13, granules2)) * LANE_GRANULE
    return {
        "S": lora.num_slots,
        "S_BINS": bins,
        "PAGE_ELEMS": lora.tables.page_elems,
        "GRANULES13": granules13,
        "GRANULES2": granules2,
        "FEW_LANES": max(LANE_GRANULE, min(widest, LANE_CELLS // FEW_ROWS)),
        "LANES": max(LANE_GRANULE, min(widest, LANE_CELLS // bins)),
    }

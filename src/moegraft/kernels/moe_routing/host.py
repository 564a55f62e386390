"""Routing build: the order of the rows, blocks for the GEMMs, tiles and lanes for LoRA. On the device, no host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.core.routing import LANE_GRANULE, Lanes, MoERouting
from moegraft.kernels.device import groups
from moegraft.kernels.moe_routing.device import route_kernel
from moegraft.kernels.records import LayerSizes, LoRABatch, cdiv, next_power_of_2, pdl_options, tables_group

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
    num_rows, slots = routing.num_rows, 0 if lora is None else lora.tables.page_table.shape[0]
    LAYER = layer_group(sizes, lora, routing.top_k)
    bins, widest = next_power_of_2(slots + 1), next_power_of_2(max(1, LAYER.GRANULES13, LAYER.GRANULES2)) * LANE_GRANULE
    BUILD = groups.Build(
        BLOCK_M=routing.block_m,
        TILE_M=routing.tile_m,
        E_BINS=next_power_of_2(sizes.num_experts + 1),
        S_BINS=bins,
        CHUNK=max(32, min(4096, next_power_of_2(num_rows))),
        FEW=FEW_ROWS,
        ROWS=SORT_ROWS,
        FEW_LANES=max(LANE_GRANULE, min(widest, LANE_CELLS // FEW_ROWS)),
        LANES=max(LANE_GRANULE, min(widest, LANE_CELLS // bins)),
        DENSE=num_rows <= DENSE_ROWS,
        ALL_FEW=num_rows <= FEW_ROWS,
    )
    route_kernel[(sizes.num_experts,)](
        groups.Lists(
            buffers.order, buffers.rows, buffers.segment, buffers.blocks, buffers.tiles, buffers.counts
        ),
        lanes_group(buffers.lanes13), lanes_group(buffers.lanes2), topk_ids_TK,
        None if lora is None else lora.token_slots_T, tables_group(lora), num_rows, LAYER=LAYER, BUILD=BUILD,
        num_warps=4 if num_rows <= 64 else 8, **pdl_options(topk_ids_TK.device),
    )  # fmt: skip


def lanes_group(lanes: Lanes | None) -> groups.Lanes:
    """Where a routing build writes lanes."""
    if lanes is None:
        return groups.Lanes(None, None, None, 0)
    return groups.Lanes(lanes.segment, lanes.granule, lanes.element, lanes.segment.shape[0])


def layer_group(sizes: LayerSizes, lora: LoRABatch | None, top_k: int) -> groups.Layer:
    """Constants of the layer and its adapters."""
    return groups.Layer(
        E=sizes.num_experts,
        K=top_k,
        S=0 if lora is None else lora.tables.page_table.shape[0],
        D=sizes.hidden_size,
        F=sizes.intermediate_size,
        GATED=sizes.gated,
        PAGE_ELEMS=1 if lora is None else lora.tables.page_elems,
        GRANULES13=0 if lora is None else cdiv(lora.rank13, LANE_GRANULE),
        GRANULES2=0 if lora is None else cdiv(lora.rank2, LANE_GRANULE),
    )

"""Routing and shrink 13 of a single token in one launch: neither waits for the other."""

from __future__ import annotations

import torch

from moegraft.core.routing import LANE_GRANULE, MoERouting
from moegraft.kernels.device import groups
from moegraft.kernels.moe_route_token.device import route_token_kernel
from moegraft.kernels.moe_routing.host import RoutingBuffers, lanes_group, layer_group
from moegraft.kernels.records import (
    LayerSizes,
    LoRABatch,
    LowRank,
    cdiv,
    next_power_of_2,
    pdl_options,
    tables_group,
)
from moegraft.tuning.tiles import MoETiles

BLOCK_R = 8
BLOCK_ELEMENTS = 8192
"""Elements of A that a program has in flight."""


def route_token(
    low_rank: LowRank,
    x_1D: torch.Tensor,
    topk_ids_1K: torch.Tensor,
    sizes: LayerSizes,
    lora: LoRABatch,
    buffers: RoutingBuffers,
    tiles: MoETiles,
) -> MoERouting:
    """The routing record of one token, and u = A13 x of its K rows as ``lora_shrink13`` writes it.

    Every row is a block of its own: two choices of one expert, which models do not make, would read it twice. Sums of u
    are in another order than those of ``lora_shrink13``. The next kernel has to wait for this one before it reads the
    record.
    """
    K, lanes13, lanes2 = topk_ids_1K.shape[1], buffers.lanes13, buffers.lanes2
    assert lanes13 is not None and lanes2 is not None
    D, width = sizes.hidden_size, low_rank.u_NW.shape[1]
    LAYER = layer_group(sizes, lora, K)
    route_token_kernel[(K, cdiv(width, BLOCK_R))](
        groups.Lists(buffers.order, None, buffers.segment, buffers.blocks, buffers.tiles, buffers.counts),
        lanes_group(lanes13), lanes_group(lanes2), low_rank.u_NW, x_1D, topk_ids_1K, lora.token_slots_T,
        tables_group(lora), LAYER=LAYER,
        LANES=next_power_of_2(max(1, LAYER.GRANULES13, LAYER.GRANULES2)) * LANE_GRANULE,
        LOW_RANK=groups.LowRank(width, lora.row_alignment(D)), BLOCK_R=BLOCK_R,
        BLOCK_K=max(16, min(BLOCK_ELEMENTS // BLOCK_R, next_power_of_2(D))), num_warps=4, **pdl_options(x_1D.device),
    )  # fmt: skip
    return MoERouting(
        order=buffers.order,
        segment=buffers.segment,
        blocks=buffers.blocks,
        tiles=buffers.tiles,
        counts=buffers.counts,
        lanes13=lanes13,
        lanes2=lanes2,
        num_rows=K,
        top_k=K,
        block_m=tiles.block_m,
        tile_m=tiles.tile_m,
    )

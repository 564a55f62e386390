"""LoRA shrink: the low-rank rows of the (expert, adapter) segments of a routing."""

from __future__ import annotations

import torch

from moegraft.core.routing import MoERouting, Tile
from moegraft.core.tables import ExpertsFactor
from moegraft.kernels.device import groups
from moegraft.kernels.lora_shrink.device import place_kernel, shrink_kernel
from moegraft.kernels.records import (
    LoRABatch,
    LowRank,
    cdiv,
    dot_precision,
    next_power_of_2,
    pdl_options,
    tables_group,
)
from moegraft.tuning.tiles import ShrinkTile


def lora_shrink13(
    low_rank: LowRank,
    x_TD: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    *,
    tile: ShrinkTile,
    is_share: bool = False,
) -> None:
    """Semantics: for every position p with row n, token t = n // K and (expert, adapter) = (e, a),

        u[p, column(j)] = A13[a, e][j] . x[t]      0 <= j < R13

    summed in float32, rounded once to the compute dtype. column(j) = j for the lanes that the gate reads; lanes of an
    up factor with an A of its own follow from the next multiple of 16. Columns that pad to one become zero.
    ``is_share``: A13 holds a rank's share of the lanes of each adapter, and column(j) = j; see ``place_lanes``.
    """
    b_last = ExpertsFactor.B2 if is_share else ExpertsFactor.B_UP  # B2 begins at lane 0
    which = groups.Factor(int(ExpertsFactor.A13), int(b_last), routing.top_k, int(Tile.TICKET13))
    _launch(low_rank, x_TD, routing, lora, tile, which)


def lora_shrink2(
    low_rank: LowRank,
    h_NF: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    *,
    tile: ShrinkTile,
    in_row_order: bool = False,
) -> None:
    """Semantics: u[p, j] = A2[a, e][j] . h[p] for every position p.

    ``h`` lies in the order of positions, or ``in_row_order`` (where K = 1): then h[order[p]] takes the place of h[p].
    """
    K = routing.top_k if in_row_order else 0
    which = groups.Factor(int(ExpertsFactor.A2), int(ExpertsFactor.B2), K, int(Tile.TICKET2))
    _launch(low_rank, h_NF, routing, lora, tile, which)


def place_lanes(u_NW: torch.Tensor, gathered_RNV: torch.Tensor, routing: MoERouting, lora: LoRABatch) -> None:
    """Low-rank rows as ``lora_shrink13`` writes them, from those of R ranks with a share of the lanes each.

    Semantics, for every position p of an adapter whose A13 has r rank rows here: lane j of u[p] is
    gathered[j // r, p, j % r].
    """
    num_ranks, num_rows, share_width = gathered_RNV.shape
    width = u_NW.shape[1]
    block_c = min(64, next_power_of_2(width))
    place_kernel[(routing.tiles.shape[0] * cdiv(width, block_c),)](
        u_NW, gathered_RNV, routing.tiles, routing.counts, tables_group(lora), num_rows, NUM_RANKS=num_ranks,
        SHARE_WIDTH=share_width, U_WIDTH=width, TILE_M=routing.tile_m, BLOCK_C=block_c, **pdl_options(u_NW.device),
    )  # fmt: skip


def _launch(
    low_rank: LowRank,
    x: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    tile: ShrinkTile,
    which: groups.Factor,
) -> None:
    width = low_rank.u_NW.shape[1]
    if routing.num_rows == 0 or width == 0:
        return
    length, rank_blocks = x.shape[1], cdiv(width, tile.block_r)
    TILE = groups.ShrinkTile(
        TILE_M=routing.tile_m,
        RANK_BLOCKS=rank_blocks,
        BLOCK_R=tile.block_r,
        BLOCK_K=tile.block_k,
        SPLITS=tile.splits,
        PRECISION=dot_precision(x.dtype),
    )
    shrink_kernel[(routing.tiles.shape[0] * rank_blocks * tile.splits,)](
        low_rank.u_NW, low_rank.partial_SNW, groups.Rows(x, None, x.stride(0)),
        groups.Routing(routing.order, routing.segment, routing.blocks, routing.counts), routing.tiles,
        tables_group(lora), routing.num_rows, LENGTH=length, FACTOR=which,
        LOW_RANK=groups.LowRank(width, lora.row_alignment(length)), PAGE_ELEMS=lora.tables.page_elems, TILE=TILE,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl_options(x.device),
    )  # fmt: skip

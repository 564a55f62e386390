"""The separate form: adds the experts' LoRA to the output of a GEMM that is not ours.

Rows n are (token, expert) pairs in any order, each with an expert id and an adapter slot of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moegraft.core.halves import half_strides
from moegraft.core.routing import Block, Lanes, MoERouting
from moegraft.kernels.device import groups
from moegraft.kernels.lora_expand.device import expand_kernel
from moegraft.kernels.lora_shrink.host import lora_shrink2, lora_shrink13, place_lanes
from moegraft.kernels.moe_routing.host import route_rows
from moegraft.kernels.records import (
    Expand,
    LayerSizes,
    LoRABatch,
    LowRank,
    cdiv,
    check_low_rank_size,
    check_token_slots,
    dot_precision,
    lora_operands,
    low_rank_width,
    pdl_options,
)
from moegraft.kernels.workspace import Workspace
from moegraft.tuning.heuristic import expand_tile
from moegraft.tuning.table import choose_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape


@dataclass(frozen=True, kw_only=True)
class RoutedRows:
    """Rows that were sorted by (expert, adapter), and what both adds share; owns its memory.

    ``w2_columns``: length of a row of B of w2, which is less than the hidden size where ranks have a share each.
    """

    routing: MoERouting
    lora: LoRABatch
    low_rank13: LowRank | None
    low_rank2: LowRank | None
    tiles: MoETiles
    expand: GemmTile
    sizes: LayerSizes
    w2_columns: int


def route_lora_rows(
    expert_N: torch.Tensor,
    lora: LoRABatch,
    sizes: LayerSizes,
    *,
    tiles: MoETiles | None = None,
    expand: GemmTile | None = None,
    w2_columns: int | None = None,
) -> RoutedRows:
    """Sorts N rows with expert ids [N] (int32 or int64; outside [0, E): none) and slots ``lora.token_slots_T`` [N].

    One launch, no host sync. ``tiles``, ``expand``: by default the heuristic's. ``w2_columns``: of B of w2, by default
    the hidden size. Raises ValueError for shapes, dtypes or
    strides that do not fit, as the adds do.
    """
    if expert_N.dim() != 1 or not expert_N.is_contiguous():
        raise ValueError(f"route_lora_rows: expert ids {list(expert_N.shape)}, expected [N], contiguous")
    check_token_slots("route_lora_rows", lora.token_slots_T, expert_N.shape[0])
    width = low_rank_width(lora.rank13, num_halves=1 + sizes.gated)
    check_low_rank_size("route_lora_rows", expert_N.shape[0], max(width, low_rank_width(lora.rank2, num_halves=1)))
    shape = TuningShape(
        num_tokens=expert_N.shape[0],
        num_experts=sizes.num_experts,
        top_k=1,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_slots=lora.num_slots,
        rank13=lora.rank13,
        rank2=lora.rank2,
    )
    tiles = tiles or choose_tiles(shape)
    dtype, num_halves = lora.tables.pool.dtype, 1 + sizes.gated
    workspace = Workspace.for_lora(shape, tiles, dtype, expert_N.device, num_halves=num_halves)
    buffers = workspace.carve_lora(shape, tiles, dtype, num_halves=num_halves)
    w2_columns = w2_columns or sizes.hidden_size
    routing = route_rows(
        expert_N.view(-1, 1), replace(sizes, hidden_size=w2_columns), lora, buffers.routing, block_m=tiles.block_m,
        tile_m=tiles.tile_m,
    )  # fmt: skip
    return RoutedRows(
        routing=routing,
        lora=lora,
        low_rank13=buffers.low_rank13,
        low_rank2=buffers.low_rank2,
        tiles=tiles,
        expand=expand or expand_tile(shape, tiles.block_m),
        sizes=sizes,
        w2_columns=w2_columns,
    )


def add_lora_w13(
    u_NGF: torch.Tensor, x_ND: torch.Tensor, rows: RoutedRows, *, num_halves: int = 2, is_interleaved: bool = False
) -> None:
    """Semantics: u[n] += B13[a, e] (A13[a, e] x[n]) for every row n of expert e and adapter a; gate and up apart.

    The low-rank vector is rounded once to the compute dtype, the delta is added to u in float32 and rounded with it.
    Rows without adapter are not written. Two launches. x has the adapters' dtype and contiguous rows; u any dtype and
    strides.
    """
    D, F = rows.sizes.hidden_size, rows.sizes.intermediate_size
    _check("add_lora_w13", rows, x_ND, D, u_NGF, num_halves * F)
    if rows.routing.num_rows == 0 or rows.lora.rank13 == 0 or rows.low_rank13 is None:
        return
    lora_shrink13(rows.low_rank13, x_ND, rows.routing, rows.lora, tile=rows.tiles.shrink13)
    _expand(u_NGF, rows, rows.low_rank13, rows.routing.lanes13, F, Block.LANE13_FIRST, num_halves, is_interleaved)


def shrink_share13(x_ND: torch.Tensor, rows: RoutedRows, num_ranks: int) -> torch.Tensor | None:
    """Low-rank rows [N, V] of this rank's share of the lanes of A13, for ``expand_gathered13``; None without LoRA.

    ``rows.lora.rank13`` bounds the lanes of all ranks together. One launch.
    """
    if rows.routing.num_rows == 0 or rows.lora.rank13 == 0:
        return None
    tile, N = rows.tiles.shrink13, rows.routing.num_rows
    width = low_rank_width(cdiv(rows.lora.rank13, num_ranks), num_halves=1)
    partial = None if tile.splits == 1 else x_ND.new_empty(tile.splits, N, width, dtype=torch.float32)
    low_rank = LowRank(u_NW=x_ND.new_empty(N, width), partial_SNW=partial)
    lora_shrink13(low_rank, x_ND, rows.routing, rows.lora, tile=tile, is_share=True)
    return low_rank.u_NW


def expand_gathered13(
    u_NGF: torch.Tensor,
    gathered_RNV: torch.Tensor,
    rows: RoutedRows,
    *,
    num_halves: int = 2,
    is_interleaved: bool = False,
) -> None:
    """The other half of ``add_lora_w13``, from ``shrink_share13`` of all ranks. Two launches."""
    F = rows.sizes.intermediate_size
    assert rows.low_rank13 is not None
    place_lanes(rows.low_rank13.u_NW, gathered_RNV, rows.routing, rows.lora)
    _expand(u_NGF, rows, rows.low_rank13, rows.routing.lanes13, F, Block.LANE13_FIRST, num_halves, is_interleaved)


def shrink_partial2(h_NF: torch.Tensor, rows: RoutedRows) -> torch.Tensor | None:
    """Low-rank rows [N, W] of A2 over the columns of F that are here, float32, to be summed over the ranks; None
    without LoRA. One launch. Rows without an adapter hold anything."""
    if rows.routing.num_rows == 0 or rows.lora.rank2 == 0 or rows.low_rank2 is None:
        return None
    partial_NW = torch.empty_like(rows.low_rank2.u_NW, dtype=torch.float32)
    low_rank = replace(rows.low_rank2, u_NW=partial_NW)
    lora_shrink2(low_rank, h_NF, rows.routing, rows.lora, tile=rows.tiles.shrink2, in_row_order=True)
    return partial_NW


def expand_summed2(y_NC: torch.Tensor, summed_NW: torch.Tensor, rows: RoutedRows) -> None:
    """The other half of ``add_lora_w2``: to the columns of y that B of w2 has here, its first ``y.shape[1]``.

    The summed low-rank rows are rounded once. Two launches.
    """
    assert rows.low_rank2 is not None
    rows.low_rank2.u_NW.copy_(summed_NW)
    _expand(y_NC, rows, rows.low_rank2, rows.routing.lanes2, rows.w2_columns, Block.LANE2_FIRST)


def add_lora_w2(y_ND: torch.Tensor, h_NF: torch.Tensor, rows: RoutedRows) -> None:
    """Semantics: y[n] += B2[a, e] (A2[a, e] h[n]) for every row n of expert e and adapter a; as ``add_lora_w13``."""
    _check("add_lora_w2", rows, h_NF, rows.sizes.intermediate_size, y_ND, rows.sizes.hidden_size)
    if rows.routing.num_rows == 0 or rows.lora.rank2 == 0 or rows.low_rank2 is None:
        return
    lora_shrink2(rows.low_rank2, h_NF, rows.routing, rows.lora, tile=rows.tiles.shrink2, in_row_order=True)
    _expand(y_ND, rows, rows.low_rank2, rows.routing.lanes2, rows.sizes.hidden_size, Block.LANE2_FIRST)


def _check(
    op: str, rows: RoutedRows, x_NI: torch.Tensor, num_inputs: int, y_NO: torch.Tensor, num_outputs: int
) -> None:
    N = rows.routing.num_rows
    if x_NI.shape != (N, num_inputs) or y_NO.shape != (N, num_outputs):
        raise ValueError(
            f"{op}: rows {list(x_NI.shape)} and output {list(y_NO.shape)}, expected {[N, num_inputs]} and "
            f"{[N, num_outputs]}"
        )
    if x_NI.dtype != rows.lora.tables.pool.dtype or (N and x_NI.stride(1) != 1):
        raise ValueError(
            f"{op}: rows are {x_NI.dtype} with strides {list(x_NI.stride())}, expected contiguous rows of "
            f"{rows.lora.tables.pool.dtype}"
        )


def _expand(
    y_NC: torch.Tensor,
    rows: RoutedRows,
    low_rank: LowRank,
    lanes: Lanes | None,
    row_len: int,
    lane_field: Block,
    num_halves: int = 1,
    is_interleaved: bool = False,
) -> None:
    """``row_len``: of the rows of B."""
    assert lanes is not None
    routing, lora, tile = rows.routing, rows.lora, rows.expand
    columns, (stride_n, stride_c) = y_NC.shape[1] // num_halves, y_NC.stride()
    stride_c, half_offset = half_strides(stride_c, columns, num_halves=num_halves, is_interleaved=is_interleaved)
    operands, LOW_RANK = lora_operands(Expand(lora=lora, u_NW=low_rank.u_NW, lanes=lanes), row_len)
    expand_kernel[(routing.blocks.shape[0] * cdiv(columns, tile.block_n) * num_halves,)](
        y_NC, (stride_n, stride_c, half_offset),
        groups.Routing(routing.order, routing.segment, routing.blocks, routing.counts), operands, COLUMNS=columns,
        HALVES=num_halves, LANE_FIELD=int(lane_field), LOW_RANK=LOW_RANK, BLOCK_M=routing.block_m,
        BLOCK_N=tile.block_n, BLOCK_L=tile.block_l, PRECISION=dot_precision(low_rank.u_NW.dtype),
        num_warps=tile.num_warps, **pdl_options(y_NC.device),
    )  # fmt: skip

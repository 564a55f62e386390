"""The separate form: adds the experts' LoRA to the output of a GEMM that is not ours.

Rows n are (token, expert) pairs in any order; their routing is ``route_rows`` of expert ids [N, 1] with one slot a row.
"""

from __future__ import annotations

import torch

from moegraft.core.routing import Block, Lanes, MoERouting
from moegraft.kernels.launch import cdiv, dot_precision, pdl_options
from moegraft.kernels.lora_expand.device import expand_kernel
from moegraft.kernels.lora_shrink.host import lora_shrink2, lora_shrink13
from moegraft.kernels.records import LoRABatch, LowRank
from moegraft.tuning.tiles import GemmTile, ShrinkTile


def add_lora_w13(
    u_NGF: torch.Tensor,
    x_ND: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    low_rank: LowRank,
    *,
    num_halves: int = 2,
    is_interleaved: bool = False,
    shrink: ShrinkTile,
    expand: GemmTile,
) -> None:
    """Semantics: u[n] += B13[a, e] (A13[a, e] x[n]) for every row n of expert e and adapter a; gate and up apart.

    The low-rank vector is rounded once to the compute dtype, the delta is added to u in float32 and rounded with it.
    Rows without adapter are not written.
    """
    lanes = routing.lanes13
    if routing.num_rows == 0 or lanes is None:
        return
    lora_shrink13(low_rank, x_ND, routing, lora, tile=shrink)
    width = u_NGF.shape[1] // num_halves
    for half in range(num_halves):
        part = u_NGF[:, half::num_halves] if is_interleaved else u_NGF[:, half * width : (half + 1) * width]
        _expand(part, routing, lora, low_rank, lanes, half, Block.LANE13_FIRST, expand)


def add_lora_w2(
    y_ND: torch.Tensor,
    h_NF: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    low_rank: LowRank,
    *,
    shrink: ShrinkTile,
    expand: GemmTile,
) -> None:
    """Semantics: y[n] += B2[a, e] (A2[a, e] h[n]) for every row n of expert e and adapter a; as ``add_lora_w13``."""
    lanes = routing.lanes2
    if routing.num_rows == 0 or lanes is None:
        return
    lora_shrink2(low_rank, h_NF, routing, lora, tile=shrink, in_row_order=True)
    _expand(y_ND, routing, lora, low_rank, lanes, 0, Block.LANE2_FIRST, expand)


def _expand(
    y_NC: torch.Tensor,
    routing: MoERouting,
    lora: LoRABatch,
    low_rank: LowRank,
    lanes: Lanes,
    factor: int,
    lane_field: Block,
    tile: GemmTile,
) -> None:
    columns = y_NC.shape[1]
    expand_kernel[(routing.max_blocks * cdiv(columns, tile.block_n),)](
        y_NC, low_rank.u_NW, lora.tables.pool, routing.order, routing.segment, routing.blocks, routing.counts,
        lanes.segment, lanes.granule[factor], lanes.element[factor], y_NC.stride(0), y_NC.stride(1), COLUMNS=columns,
        LANE_FIELD=int(lane_field), U_WIDTH=low_rank.u_NW.shape[1], ALIGN=lora.row_alignment(columns),
        BLOCK_M=routing.block_m, BLOCK_N=tile.block_n, BLOCK_L=tile.block_l,
        PRECISION=dot_precision(low_rank.u_NW.dtype), num_warps=tile.num_warps, **pdl_options(y_NC.device),
    )  # fmt: skip

"""Deciding, allocating and launching one experts layer."""

from __future__ import annotations

import torch

from moegraft.core.routing import MoERouting
from moegraft.kernels.lora_shrink.host import lora_shrink2, lora_shrink13
from moegraft.kernels.moe_gemm2.host import moe_gemm2
from moegraft.kernels.moe_gemm13.host import moe_gemm13
from moegraft.kernels.moe_quantise.host import moe_quantise
from moegraft.kernels.moe_route_token.host import route_token
from moegraft.kernels.moe_routing.host import route_rows
from moegraft.kernels.moe_sum.host import moe_sum
from moegraft.kernels.records import (
    Expand,
    LoRABatch,
    MoEWeights,
    Quantisation,
    QuantisedRows,
    check_low_rank_size,
    check_token_slots,
    low_rank_width,
)
from moegraft.kernels.workspace import LayerBuffers, Workspace
from moegraft.tuning.eight_bit import fit_tiles, writes_groups
from moegraft.tuning.table import choose_tiles
from moegraft.tuning.tiles import MoETiles, TuningShape


def run_layer(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    lora: LoRABatch | None,
    *,
    weight_on_input: bool,
    workspace: Workspace | None = None,
    tiles: MoETiles | None = None,
    out_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``host.fused_moe_lora``."""
    _check(x_TD, weights, topk_ids_TK, topk_weights_TK, lora)
    shape = tuning_shape(x_TD, weights, topk_ids_TK, lora)
    tiles = fit_tiles(tiles or choose_tiles(shape), shape)
    num_halves = weights.activation.num_halves
    workspace = workspace or Workspace.for_layer(shape, tiles, x_TD.dtype, x_TD.device, num_halves=num_halves)
    buffers = workspace.carve(shape, tiles, x_TD.dtype, num_halves=num_halves)
    if out_TD is None:
        out_TD = torch.empty_like(x_TD)
    elif out_TD.shape != x_TD.shape or out_TD.dtype != x_TD.dtype or out_TD.stride(-1) != 1:
        found = f"{list(out_TD.shape)} {out_TD.dtype} with strides {out_TD.stride()}"
        raise ValueError(f"fused_moe_lora: out is {found}, expected contiguous rows {list(x_TD.shape)} of {x_TD.dtype}")
    _launch(out_TD, x_TD, weights, topk_ids_TK, topk_weights_TK, lora, weight_on_input, tiles, buffers)
    return out_TD


def tuning_shape(
    x_TD: torch.Tensor, weights: MoEWeights, topk_ids_TK: torch.Tensor, lora: LoRABatch | None
) -> TuningShape:
    """What tile choice and workspace depend on."""
    quantisation = weights.quantisation
    return TuningShape(
        num_tokens=x_TD.shape[0],
        num_experts=weights.num_experts,
        top_k=topk_ids_TK.shape[1],
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        num_slots=0 if lora is None else lora.num_slots,
        rank13=0 if lora is None else lora.rank13,
        rank2=0 if lora is None else lora.rank2,
        weight_format=weights.format.value,
        scale_group=0 if quantisation is None else quantisation.scale_group,
    )


def _check(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    lora: LoRABatch | None,
) -> None:
    T, D = x_TD.shape
    is_dense = weights.quantisation is None
    if weights.hidden_size != D:
        raise ValueError(f"fused_moe_lora: x has {D} columns, the layer's hidden size is {weights.hidden_size}")
    if is_dense and weights.w2_EDF.shape != (weights.num_experts, D, weights.intermediate_size):
        raise ValueError(
            f"fused_moe_lora: w2 is [E, D, F] = {list(weights.w2_EDF.shape)}, expected "
            f"{[weights.num_experts, D, weights.intermediate_size]} beside w13"
        )
    if topk_ids_TK.shape[0] != T or topk_weights_TK.shape != topk_ids_TK.shape:
        raise ValueError(
            f"fused_moe_lora: topk ids {list(topk_ids_TK.shape)} and weights {list(topk_weights_TK.shape)}, expected "
            f"both [{T}, K], as x has {T} rows"
        )
    if not (topk_ids_TK.is_contiguous() and topk_weights_TK.is_contiguous()) or (T and x_TD.stride(1) != 1):
        raise ValueError("fused_moe_lora: topk ids, topk weights and the rows of x must be contiguous")
    if is_dense and (weights.w13.dtype != x_TD.dtype or weights.w2.dtype != x_TD.dtype):
        raise ValueError(f"fused_moe_lora: x is {x_TD.dtype}, the weights {weights.w13.dtype} and {weights.w2.dtype}")
    if lora is None:
        return
    check_token_slots("fused_moe_lora", lora.token_slots_T, T)
    if lora.x_TD is not None and (lora.x_TD.shape != x_TD.shape or lora.x_TD.dtype != x_TD.dtype):
        raise ValueError(
            f"fused_moe_lora: LoRA reads rows {list(lora.x_TD.shape)} {lora.x_TD.dtype}, expected {list(x_TD.shape)} "
            f"{x_TD.dtype}, as x"
        )
    if lora.x_TD is not None and T and lora.x_TD.stride(1) != 1:
        raise ValueError("fused_moe_lora: the rows that LoRA reads must be contiguous")
    if lora.tables.pool.dtype != x_TD.dtype:
        raise ValueError(f"fused_moe_lora: x is {x_TD.dtype}, the adapters are {lora.tables.pool.dtype}")
    width = low_rank_width(lora.rank13, num_halves=weights.activation.num_halves)
    check_low_rank_size("fused_moe_lora", topk_ids_TK.numel(), max(width, low_rank_width(lora.rank2, num_halves=1)))


def _launch(
    out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    lora: LoRABatch | None,
    weight_on_input: bool,
    tiles: MoETiles,
    buffers: LayerBuffers,
) -> None:
    h_NF, y_ND, low_rank2 = buffers.h_NF, buffers.y_ND, buffers.low_rank2
    expand2 = None
    # Before the routing: with programmatic launch GEMM 13 waits for no kernel but the last two before it.
    x, x_scales = _quantise(x_TD, buffers.quantised_x, weights.quantisation, of_w2=False)
    routing, expand13 = _route_and_shrink(x_TD, topk_ids_TK, weights, lora, tiles, buffers)
    input_weights = topk_weights_TK if weight_on_input else None
    rows = buffers.quantised_h
    group = 0 if weights.quantisation is None else weights.quantisation.scale_group
    fused = rows if writes_groups(tiles, group) else None
    moe_gemm13(
        h_NF, x, weights, routing, x_scales=x_scales, quantised_h=fused, expand=expand13,
        input_weights_TK=input_weights, tile=tiles.gemm13,
    )  # fmt: skip
    if fused is None:
        h, h_scales = _quantise(h_NF, rows, weights.quantisation, of_w2=True)
    else:
        h, h_scales = fused.stored_MI, fused.scale_MQ
    # With an expand GEMM 2 reads h before it waits, since the shrink ran between GEMM 13 and it: never one without.
    if lora is not None and lora.rank2 > 0 and low_rank2 is not None and routing.lanes2 is not None:
        lora_shrink2(low_rank2, h_NF, routing, lora, tile=tiles.shrink2)
        expand2 = Expand(lora=lora, u_NW=low_rank2.u_NW, lanes=routing.lanes2)
    output_weights = None if weight_on_input else topk_weights_TK
    moe_gemm2(
        y_ND, h, weights, routing, h_scales=h_scales, expand=expand2, output_weights_TK=output_weights,
        tile=tiles.gemm2,
    )  # fmt: skip
    moe_sum(out_TD, y_ND, topk_ids_TK, num_experts=weights.num_experts)


def _route_and_shrink(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    weights: MoEWeights,
    lora: LoRABatch | None,
    tiles: MoETiles,
    buffers: LayerBuffers,
) -> tuple[MoERouting, Expand | None]:
    low_rank, buffer = buffers.low_rank13, buffers.routing
    if lora is None or lora.rank13 == 0 or low_rank is None or buffer.lanes13 is None:
        routing = route_rows(topk_ids_TK, weights.sizes, lora, buffer, block_m=tiles.block_m, tile_m=tiles.tile_m)
        return routing, None
    x_TD = x_TD if lora.x_TD is None else lora.x_TD
    is_one_launch = tiles.route_token and x_TD.shape[0] == 1
    if is_one_launch:
        routing = route_token(low_rank, x_TD, topk_ids_TK, weights.sizes, lora, buffer, tiles)
    else:
        routing = route_rows(topk_ids_TK, weights.sizes, lora, buffer, block_m=tiles.block_m, tile_m=tiles.tile_m)
        lora_shrink13(low_rank, x_TD, routing, lora, tile=tiles.shrink13)
    expand = Expand(lora=lora, u_NW=low_rank.u_NW, lanes=buffer.lanes13, is_behind_routing=not is_one_launch)
    return routing, expand


def _quantise(
    x_MI: torch.Tensor, rows: QuantisedRows | None, quantisation: Quantisation | None, *, of_w2: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a GEMM reads in place of x, and its scales: x itself where nobody quantises it, or the GEMM does."""
    if rows is None or quantisation is None:
        return x_MI, None
    static_scale = quantisation.input_scale2 if of_w2 else quantisation.input_scale13
    moe_quantise(rows.stored_MI, rows.scale_MQ, x_MI, group_size=quantisation.scale_group, static_scale=static_scale)
    return rows.stored_MI, rows.scale_MQ

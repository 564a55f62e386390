"""A whole experts layer with LoRA inside its GEMMs: hidden states and topk in, summed output out.

``torch.ops.moegraft.fused_moe_lora`` is the same as a custom op over plain tensors, for torch.compile and opcheck.
"""

from __future__ import annotations

from typing import Any

import torch

from moegraft.core.config import Activation, ActivationKind
from moegraft.core.routing import MoERouting
from moegraft.core.tables import ExpertsTables
from moegraft.kernels.lora_shrink.host import lora_shrink2, lora_shrink13
from moegraft.kernels.moe_gemm.host import moe_gemm2, moe_gemm13
from moegraft.kernels.moe_quantise.host import moe_quantise
from moegraft.kernels.moe_route_token.host import route_token
from moegraft.kernels.moe_routing.host import route_rows
from moegraft.kernels.moe_sum.host import moe_sum
from moegraft.kernels.moe_token.host import serves_token, token_layer
from moegraft.kernels.records import (
    Expand,
    LoRABatch,
    MoEWeights,
    Quantisation,
    QuantisedRows,
    WeightFormat,
    check_low_rank_size,
    check_token_slots,
    low_rank_width,
)
from moegraft.kernels.workspace import LayerBuffers, Workspace
from moegraft.tuning.table import choose_tiles
from moegraft.tuning.tiles import MoETiles, TuningShape
from moegraft.tuning.weight_formats import fit_tiles, writes_groups


def fused_moe_lora(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    lora: LoRABatch | None = None,
    apply_router_weight_on_input: bool = False,
    workspace: Workspace | None = None,
    tiles: MoETiles | None = None,
    out_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, D] of one experts layer.

    Semantics, for token t with adapter a = token_slots[t] (or none), choice k and expert e = topk_ids[t, k]:

        u = W13[e] x[t] + b13[e] + B13[a, e] (A13[a, e] x[t])
        y = W2[e] act(u) + b2[e] + B2[a, e] (A2[a, e] act(u))
        out[t] = sum over k of topk_weights[t, k] * y

    Sums in float32; low-rank vectors, act(u) and y are rounded once. An expert id outside [0, E) gives nothing. Rows
    without an adapter give the bits that they give without ``lora``; ``lora=None`` launches no LoRA kernel. The same
    batch gives the same bits. No host sync: may be captured in a CUDA graph, which then serves any adapters and ranks
    (up to ``lora``'s bounds) that the tables and ``token_slots_T`` come to hold.

    ``out_TD``: where the result goes, and what is returned; like x, and may be x itself. ``workspace``: memory of the
    call. Both come from torch's allocator by default. ``tiles``: by default those of ``tuning.table.choose_tiles``.
    Topk ids int32 or int64; ids, weights and the rows of x contiguous.
    Raises ValueError for shapes, dtypes or strides that do not fit, or a workspace that is too small.
    """
    # Outside a compiled graph the implementation itself: packing and unpacking 30 operands costs as much as a launch.
    if torch.compiler.is_compiling() and workspace is None and tiles is None:
        args = op_args(x_TD, weights, topk_ids_TK, topk_weights_TK, lora, weight_on_input=apply_router_weight_on_input)
        result_TD = torch.ops.moegraft.fused_moe_lora(*args)
        return result_TD if out_TD is None else out_TD.copy_(result_TD)
    _check(x_TD, weights, topk_ids_TK, topk_weights_TK, out_TD)
    _check_lora(x_TD, weights, topk_ids_TK, lora)
    shape = tuning_shape(x_TD, weights, topk_ids_TK, lora)
    tiles = fit_tiles(tiles or choose_tiles(shape), shape)
    num_halves = 1 + weights.sizes.gated
    workspace = workspace or Workspace.for_layer(shape, tiles, x_TD.dtype, x_TD.device, num_halves=num_halves)
    buffers = workspace.carve(shape, tiles, x_TD.dtype, num_halves=num_halves)
    out_TD = torch.empty_like(x_TD) if out_TD is None else out_TD
    if tiles.token is not None and serves_token(x_TD, weights, topk_ids_TK.shape[1]):
        token_layer(
            out_TD, x_TD, weights, topk_ids_TK, topk_weights_TK, lora, weight_on_input=apply_router_weight_on_input,
            tiles=tiles.token, buffers=buffers,
        )  # fmt: skip
        return out_TD
    _launch(
        out_TD, x_TD, weights, topk_ids_TK, topk_weights_TK, lora, apply_router_weight_on_input, tiles, buffers
    )  # fmt: skip
    return out_TD


def tuning_shape(
    x_TD: torch.Tensor, weights: MoEWeights, topk_ids_TK: torch.Tensor, lora: LoRABatch | None
) -> TuningShape:
    """What tile choice and workspace depend on."""
    quantisation = weights.quantisation
    return TuningShape(
        num_tokens=x_TD.shape[0],
        num_experts=weights.sizes.num_experts,
        top_k=topk_ids_TK.shape[1],
        hidden_size=weights.sizes.hidden_size,
        intermediate_size=weights.sizes.intermediate_size,
        num_slots=0 if lora is None else lora.tables.page_table.shape[0],
        rank13=0 if lora is None else lora.rank13,
        rank2=0 if lora is None else lora.rank2,
        weight_format=weights.format,
        scale_group=0 if quantisation is None else quantisation.scale_group,
    )


def _check(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    out_TD: torch.Tensor | None,
) -> None:
    (T, D), sizes = x_TD.shape, weights.sizes
    is_dense = weights.quantisation is None
    if sizes.hidden_size != D:
        raise ValueError(f"fused_moe_lora: x has {D} columns, the layer's hidden size is {sizes.hidden_size}")
    expected = (sizes.num_experts, D, sizes.intermediate_size)
    if is_dense and weights.w2_EDF.shape != expected:
        raise ValueError(
            f"fused_moe_lora: w2 is [E, D, F] = {list(weights.w2_EDF.shape)}, expected {list(expected)} beside w13"
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
    if out_TD is not None:
        _check_like(out_TD, x_TD, "out is")


def _check_lora(x_TD: torch.Tensor, weights: MoEWeights, topk_ids_TK: torch.Tensor, lora: LoRABatch | None) -> None:
    if lora is None:
        return
    check_token_slots("fused_moe_lora", lora.token_slots_T, x_TD.shape[0])
    if lora.x_TD is not None:
        _check_like(lora.x_TD, x_TD, "LoRA reads rows")
    if lora.tables.pool.dtype != x_TD.dtype:
        raise ValueError(f"fused_moe_lora: x is {x_TD.dtype}, the adapters are {lora.tables.pool.dtype}")
    width = low_rank_width(lora.rank13, num_halves=1 + weights.sizes.gated)
    check_low_rank_size("fused_moe_lora", topk_ids_TK.numel(), max(width, low_rank_width(lora.rank2, num_halves=1)))


def _check_like(found: torch.Tensor, x_TD: torch.Tensor, what: str) -> None:
    """Shape, dtype and device of x, and contiguous rows."""
    if found.shape != x_TD.shape or found.dtype != x_TD.dtype or found.device != x_TD.device:
        raise ValueError(
            f"fused_moe_lora: {what} {list(found.shape)} {found.dtype} on {found.device}, expected "
            f"{list(x_TD.shape)} {x_TD.dtype} on {x_TD.device}, as x"
        )
    if found.shape[0] and found.stride(1) != 1:
        raise ValueError(f"fused_moe_lora: {what} with strides {list(found.stride())}, expected contiguous rows")


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
    moe_sum(out_TD, y_ND, topk_ids_TK, num_experts=weights.sizes.num_experts)


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


def op_args(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    lora: LoRABatch | None,
    *,
    weight_on_input: bool,
) -> tuple[Any, ...]:
    """The records as the plain arguments of the op."""
    activation = weights.activation
    tables = None if lora is None else lora.tables
    quantisation = weights.quantisation
    return (
        x_TD, topk_ids_TK, topk_weights_TK, weights.w13, weights.w2, weights.b13, weights.b2, activation.kind.value,
        activation.gated, activation.alpha, activation.limit, weights.is_transposed, weights.is_interleaved,
        weight_on_input,
        None if lora is None else lora.token_slots_T,
        None if tables is None else tables.pool,
        None if tables is None else tables.page_table,
        None if tables is None else tables.factors,
        None if tables is None else tables.expert_index,
        0 if tables is None else tables.page_elems,
        0 if lora is None else lora.rank13,
        0 if lora is None else lora.rank2,
        None if lora is None else lora.x_TD,
        *(() if quantisation is None else (
            quantisation.format.value, quantisation.scales13, quantisation.scales2, quantisation.zeros13,
            quantisation.zeros2, quantisation.scale_group, quantisation.hidden_size, quantisation.intermediate_size,
            quantisation.input_scale13, quantisation.input_scale2,
        )),
    )  # fmt: skip


def _run_op(
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
    b13: torch.Tensor | None, b2: torch.Tensor | None, kind: str, gated: bool, alpha: float, limit: float,
    is_transposed: bool, is_interleaved: bool, weight_on_input: bool, token_slots_T: torch.Tensor | None,
    pool: torch.Tensor | None, page_table: torch.Tensor | None, factors: torch.Tensor | None,
    expert_index: torch.Tensor | None, page_elems: int, rank13: int, rank2: int,
    lora_x_TD: torch.Tensor | None = None, format: str = "dense", scales13: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None, zeros13: torch.Tensor | None = None, zeros2: torch.Tensor | None = None,
    scale_group: int = 0, hidden_size: int = 0, intermediate_size: int = 0,
    input_scale13: torch.Tensor | None = None, input_scale2: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    quantisation = None
    if scales13 is not None and scales2 is not None:
        quantisation = Quantisation(
            format=WeightFormat(format), scales13=scales13, scales2=scales2, zeros13=zeros13, zeros2=zeros2,
            scale_group=scale_group, hidden_size=hidden_size, intermediate_size=intermediate_size,
            input_scale13=input_scale13, input_scale2=input_scale2,
        )  # fmt: skip
    activation = Activation(kind=ActivationKind(kind), gated=gated, alpha=alpha, limit=limit)
    weights = MoEWeights(
        w13=w13, w2=w2, b13=b13, b2=b2, activation=activation, is_transposed=is_transposed,
        is_interleaved=is_interleaved, quantisation=quantisation,
    )  # fmt: skip
    lora = None
    if token_slots_T is not None and pool is not None:
        assert page_table is not None and factors is not None and expert_index is not None
        tables = ExpertsTables(
            pool=pool, page_table=page_table, factors=factors, expert_index=expert_index, page_elems=page_elems
        )
        lora = LoRABatch(tables=tables, token_slots_T=token_slots_T, rank13=rank13, rank2=rank2, x_TD=lora_x_TD)
    return fused_moe_lora(
        x_TD, weights, topk_ids_TK, topk_weights_TK, lora=lora, apply_router_weight_on_input=weight_on_input
    )


# define and impl instead of custom_op, whose wrapper costs ten times as much a call.
torch.library.define(
    "moegraft::fused_moe_lora",
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, str kind, "
    "bool gated, float alpha, float limit, bool is_transposed, bool is_interleaved, bool weight_on_input, "
    "Tensor? token_slots, Tensor? pool, Tensor? page_table, Tensor? factors, Tensor? expert_index, int page_elems, "
    "int rank13, int rank2, Tensor? lora_x=None, str format='dense', Tensor? scales13=None, Tensor? scales2=None, "
    "Tensor? zeros13=None, Tensor? zeros2=None, int scale_group=0, int hidden_size=0, int intermediate_size=0, "
    "Tensor? input_scale13=None, Tensor? input_scale2=None) -> Tensor",
)
torch.library.impl("moegraft::fused_moe_lora", "default", _run_op)
torch.library.register_fake("moegraft::fused_moe_lora", lambda x, *tensors_and_sizes: torch.empty_like(x))

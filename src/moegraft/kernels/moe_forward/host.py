"""A whole experts layer with LoRA inside its GEMMs: hidden states and topk in, summed output out."""

from __future__ import annotations

import torch

from moegraft.kernels.lora_shrink.host import lora_shrink2, lora_shrink13
from moegraft.kernels.moe_gemm2.host import moe_gemm2
from moegraft.kernels.moe_gemm13.host import moe_gemm13
from moegraft.kernels.moe_routing.host import route_rows
from moegraft.kernels.moe_sum.host import moe_sum
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.kernels.workspace import LayerBuffers, Workspace
from moegraft.tuning.heuristic import heuristic_tiles
from moegraft.tuning.tiles import MoETiles, TuningShape


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
    """
    shape = tuning_shape(x_TD, weights, topk_ids_TK, lora)
    tiles = tiles or heuristic_tiles(shape)
    num_halves = weights.activation.num_halves
    workspace = workspace or Workspace.for_layer(shape, tiles, x_TD.dtype, x_TD.device, num_halves=num_halves)
    buffers = workspace.carve(shape, tiles, x_TD.dtype, num_halves=num_halves)
    out_TD = torch.empty_like(x_TD)
    _launch(out_TD, x_TD, weights, topk_ids_TK, topk_weights_TK, lora, apply_router_weight_on_input, tiles, buffers)
    return out_TD


def tuning_shape(
    x_TD: torch.Tensor, weights: MoEWeights, topk_ids_TK: torch.Tensor, lora: LoRABatch | None
) -> TuningShape:
    """What tile choice and workspace depend on."""
    return TuningShape(
        num_tokens=x_TD.shape[0],
        num_experts=weights.num_experts,
        top_k=topk_ids_TK.shape[1],
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        num_slots=0 if lora is None else lora.num_slots,
        rank13=0 if lora is None else lora.rank13,
        rank2=0 if lora is None else lora.rank2,
        element_bytes=x_TD.element_size(),
    )


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
    h_NF, y_ND, low_rank13, low_rank2 = buffers.h_NF, buffers.y_ND, buffers.low_rank13, buffers.low_rank2
    u13_NW = u2_NW = None
    routing = route_rows(topk_ids_TK, weights, lora, buffers.routing, block_m=tiles.block_m, tile_m=tiles.tile_m)
    if lora is not None and low_rank13 is not None:
        lora_shrink13(low_rank13, x_TD, routing, lora, tile=tiles.shrink13)
        u13_NW = low_rank13.u_NW
    input_weights = topk_weights_TK if weight_on_input else None
    moe_gemm13(
        h_NF, x_TD, weights, routing, lora=lora, u_NW=u13_NW, input_weights_TK=input_weights, tile=tiles.gemm13
    )
    if lora is not None and low_rank2 is not None:
        lora_shrink2(low_rank2, h_NF, routing, lora, tile=tiles.shrink2)
        u2_NW = low_rank2.u_NW
    output_weights = None if weight_on_input else topk_weights_TK
    moe_gemm2(y_ND, h_NF, weights, routing, lora=lora, u_NW=u2_NW, output_weights_TK=output_weights, tile=tiles.gemm2)
    moe_sum(out_TD, y_ND, topk_ids_TK, num_experts=weights.num_experts)

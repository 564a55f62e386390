"""A whole experts layer with LoRA inside its GEMMs: hidden states and topk in, summed output out."""

from __future__ import annotations

import torch

from moegraft.kernels.moe_forward.op import op_args
from moegraft.kernels.moe_forward.run import run_layer
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.kernels.workspace import Workspace
from moegraft.tuning.tiles import MoETiles


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

    ``workspace``, ``out_TD``: memory of the call and of its result; from torch's allocator by default. ``tiles``: by
    default those of ``tuning.table.choose_tiles``. Topk ids int32 or int64; ids, weights and the rows of x contiguous.
    Raises ValueError for shapes, dtypes or strides that do not fit, or a workspace that is too small.
    """
    # Outside a compiled graph the implementation itself: packing and unpacking 30 operands costs as much as a launch.
    if torch.compiler.is_compiling() and workspace is None and tiles is None and out_TD is None:
        args = op_args(x_TD, weights, topk_ids_TK, topk_weights_TK, lora, weight_on_input=apply_router_weight_on_input)
        return torch.ops.moegraft.fused_moe_lora(*args)
    return run_layer(
        x_TD,
        weights,
        topk_ids_TK,
        topk_weights_TK,
        lora,
        weight_on_input=apply_router_weight_on_input,
        workspace=workspace,
        tiles=tiles,
        out_TD=out_TD,
    )

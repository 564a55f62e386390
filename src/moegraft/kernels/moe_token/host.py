"""The layer of a single token: what is too little for a matrix unit, and for a launch of its own, is neither."""

from __future__ import annotations

import torch

from moegraft.core.routing import LANE_GRANULE
from moegraft.core.tables import ExpertsFactor
from moegraft.kernels.device import groups
from moegraft.kernels.moe_gemm.host import KIND_CODES, operand2, operand13
from moegraft.kernels.moe_routing.host import layer_group
from moegraft.kernels.moe_token.device import token2_kernel, token13_kernel, token_shrink_kernel
from moegraft.kernels.records import (
    LoRABatch,
    LowRank,
    MoEWeights,
    cdiv,
    next_power_of_2,
    pdl_options,
    tables_group,
)
from moegraft.kernels.workspace import LayerBuffers
from moegraft.tuning.tiles import GemmTile, TokenTile, TokenTiles
from moegraft.tuning.weight_formats import RULES, WeightFormat

MAX_LANES = 128
"""Rank rows of a B that a program of a product has at once."""
MAX_CHOICES = 16
SHRINK_ELEMENTS = 8192
"""Elements of A that a program of a shrink has in flight."""
_BY_STRIDE = GemmTile()


def serves_token(x_TD: torch.Tensor, weights: MoEWeights, top_k: int) -> bool:
    """Whether ``token_layer`` computes this call: one token, and inputs of weights that are neighbours. Adapters do not
    decide it: a token without one has the same bits in any batch."""
    if x_TD.shape[0] != 1 or top_k > MAX_CHOICES:
        return False
    if weights.format in (WeightFormat.INT4, WeightFormat.MXFP4):
        return True
    if weights.format not in (WeightFormat.DENSE, WeightFormat.INT8):
        return False
    return weights.w13_EGFD.stride(2) == 1 and weights.w2_EDF.stride(2) == 1


def token_layer(
    out_1D: torch.Tensor,
    x_1D: torch.Tensor,
    weights: MoEWeights,
    topk_ids_1K: torch.Tensor,
    topk_weights_1K: torch.Tensor,
    lora: LoRABatch | None,
    *,
    weight_on_input: bool,
    tiles: TokenTiles,
    buffers: LayerBuffers,
) -> None:
    """Semantics: see ``fused_moe_lora``, but that y stays in float32 up to the sum over choices.

    Sums are in another order than those of other batches; a token without an adapter has the same bits with ``lora``
    and without. Expects what ``serves_token`` asks for.
    """
    K = topk_ids_1K.shape[1]
    low_rank13 = buffers.low_rank13 if lora is not None and lora.rank13 > 0 else None
    low_rank2 = buffers.low_rank2 if lora is not None and lora.rank2 > 0 else None
    if lora is not None and low_rank13 is not None:
        rows = x_1D if lora.x_TD is None else lora.x_TD
        _shrink(low_rank13, rows, topk_ids_1K, weights, lora, ExpertsFactor.A13, tiles)
    _product13(
        buffers.h_NF, x_1D, weights, topk_ids_1K, topk_weights_1K if weight_on_input else None, lora, low_rank13, tiles
    )
    h_KF = buffers.h_NF
    if lora is not None and low_rank2 is not None:
        _shrink(low_rank2, h_KF, topk_ids_1K, weights, lora, ExpertsFactor.A2, tiles)
    output_weights = None if weight_on_input else topk_weights_1K
    _product2(out_1D, h_KF, weights, topk_ids_1K, output_weights, lora, low_rank2, tiles.w2)
    assert h_KF.shape[0] == K


def _shrink(
    low_rank: LowRank,
    rows: torch.Tensor,
    topk_ids_1K: torch.Tensor,
    weights: MoEWeights,
    lora: LoRABatch,
    factor: ExpertsFactor,
    tiles: TokenTiles,
) -> None:
    """u [K, W] of x or of h: columns are the rank rows of A as they lie in the bank, without padding."""
    K, length = topk_ids_1K.shape[1], rows.shape[1]
    is_a13 = factor is ExpertsFactor.A13
    rank = lora.rank13 if is_a13 else lora.rank2
    token_shrink_kernel[(K, cdiv(rank, tiles.block_r))](
        low_rank.u_NW, groups.Rows(rows, None, rows.stride(0)), topk_ids_1K, lora.token_slots_T, tables_group(lora),
        E=weights.sizes.num_experts, A=int(factor), PER_CHOICE=not is_a13, LENGTH=length,
        PAGE_ELEMS=lora.tables.page_elems,
        LOW_RANK=groups.LowRank(low_rank.u_NW.shape[1], lora.row_alignment(length)), BLOCK_R=tiles.block_r,
        BLOCK_K=max(16, min(SHRINK_ELEMENTS // tiles.block_r, next_power_of_2(length))), num_warps=4,
        **pdl_options(rows.device),
    )  # fmt: skip


def _product13(
    h_KF: torch.Tensor,
    x_1D: torch.Tensor,
    weights: MoEWeights,
    topk_ids_1K: torch.Tensor,
    input_weights_1K: torch.Tensor | None,
    lora: LoRABatch | None,
    low_rank: LowRank | None,
    tiles: TokenTiles,
) -> None:
    activation, F, K = weights.activation, weights.sizes.intermediate_size, topk_ids_1K.shape[1]
    w, tile = operand13(weights, _BY_STRIDE), tiles.w13
    u, tables, LOW_RANK = _lanes(lora, low_rank, F)
    TILE = _tile(tile, weights, choices=1, rank=0 if lora is None else lora.rank13)
    token13_kernel[(K * cdiv(F, tile.block_n),)](
        h_KF, groups.Rows(x_1D, None, x_1D.stride(0)), w.numbers, w.weights, w.bias, input_weights_1K, topk_ids_1K,
        None if lora is None else lora.token_slots_T, u, tables, activation.alpha,
        activation.limit, SHAPE=w.SHAPE, LAYER=layer_group(weights.sizes, lora, K), KIND=KIND_CODES[activation.kind],
        LOW_RANK=LOW_RANK, TILE=TILE,
        num_warps=tile.num_warps, num_stages=1, **pdl_options(h_KF.device),
    )  # fmt: skip


def _product2(
    out_1D: torch.Tensor,
    h_KF: torch.Tensor,
    weights: MoEWeights,
    topk_ids_1K: torch.Tensor,
    output_weights_1K: torch.Tensor | None,
    lora: LoRABatch | None,
    low_rank: LowRank | None,
    tile: TokenTile,
) -> None:
    D, K = weights.sizes.hidden_size, topk_ids_1K.shape[1]
    w = operand2(weights, _BY_STRIDE)
    u, tables, LOW_RANK = _lanes(lora, low_rank, D)
    TILE = _tile(tile, weights, choices=next_power_of_2(K), rank=0 if lora is None else lora.rank2)
    token2_kernel[(cdiv(D, tile.block_n),)](
        out_1D, groups.Rows(h_KF, None, h_KF.stride(0)), w.numbers, w.weights, w.bias, output_weights_1K, topk_ids_1K,
        None if lora is None else lora.token_slots_T, u, tables, SHAPE=w.SHAPE,
        LAYER=layer_group(weights.sizes, lora, K), LOW_RANK=LOW_RANK, TILE=TILE, num_warps=tile.num_warps, num_stages=1,
        **pdl_options(out_1D.device),
    )  # fmt: skip


def _lanes(
    lora: LoRABatch | None, low_rank: LowRank | None, columns: int
) -> tuple[torch.Tensor | None, groups.Tables, groups.LowRank]:
    """(u, tables, widths); without low-rank rows nothing to read."""
    if lora is None or low_rank is None:
        return None, tables_group(None), groups.LowRank(0, 1)
    u_KW = low_rank.u_NW
    return u_KW, tables_group(lora), groups.LowRank(u_KW.shape[1], lora.row_alignment(columns))


def _tile(tile: TokenTile, weights: MoEWeights, *, choices: int, rank: int) -> groups.TokenTile:
    """4-bit weights have steps of whole granules."""
    block_k = max(tile.block_k, 128) if RULES[weights.format].is_granular else tile.block_k
    return groups.TokenTile(
        CHOICES=choices,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        LANES=max(LANE_GRANULE, min(MAX_LANES, next_power_of_2(rank))),
        RANK=rank,
    )

"""Attention of chunks of prompts over pages of keys and values: one launch, no host sync."""

from __future__ import annotations

import torch

from moegraft.kernels.paged_decode.device import Heads
from moegraft.kernels.paged_prefill import LARGEST_HEAD, PrefillChunks, choose_tile
from moegraft.kernels.paged_prefill.device import Chunks, prefill_kernel
from moegraft.kernels.records import dot_precision, next_power_of_2


def paged_prefill(
    out_THV: torch.Tensor,
    q_THC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    chunks: PrefillChunks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """Writes the attention of every chunk's rows into ``out`` [T, Hq, Cv] and leaves its other rows alone.

    Token i of a chunk of n tokens in a context of L attends over the first L - n + i + 1 tokens of the context, as
    ``paged_decode`` says for one token: its window, softcap and sinks. Keys and values of the chunk are in the pages
    already. q has contiguous heads, the pool's dtype, and heads of at most ``LARGEST_HEAD`` elements. No host sync: may
    be captured in a CUDA graph, which then serves whatever the tensors of ``chunks`` come to hold.
    """
    (_, Hq, C), (Hk, V) = q_THC.shape, values_PSHC.shape[2:]
    if max(C, V) > LARGEST_HEAD or q_THC.stride()[1:] != (C, 1) or out_THV.stride()[1:] != (V, 1):
        raise ValueError(
            f"paged_prefill: q {list(q_THC.shape)}, strides {q_THC.stride()}, out {list(out_THV.shape)}, strides "
            f"{out_THV.stride()}; expected contiguous heads of at most {LARGEST_HEAD} elements"
        )
    group = Hq // Hk
    tile = choose_tile(group, max(C, V), q_THC.element_size())
    heads = Heads(
        Q=Hq,
        K=Hk,
        GROUP=group,
        C=C,
        V=V,
        BLOCK_G=next_power_of_2(group),
        BLOCK_C=max(16, next_power_of_2(C)),
        BLOCK_V=max(16, next_power_of_2(V)),
    )
    table, blocks_B2 = chunks.page_table_NP, chunks.blocks[tile.block_m // heads.BLOCK_G]
    if blocks_B2.shape[0] == 0:
        return
    prefill_kernel[(blocks_B2.shape[0], Hk)](
        out_THV, q_THC, keys_PSHC, values_PSHC,
        Chunks(blocks_B2, chunks.rows_N, chunks.tokens_N, chunks.contexts_N, table, table.stride(0)),
        scale, softcap or 0.0, sinks_H, q_THC.stride(0), out_THV.stride(0), HEADS=heads,
        PAGE_SIZE=keys_PSHC.shape[1], WINDOW=window or 0, HAS_SOFTCAP=bool(softcap), HAS_SINKS=sinks_H is not None,
        BLOCK_M=tile.block_m, BLOCK_L=tile.block_l, PRECISION=dot_precision(q_THC.dtype), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip

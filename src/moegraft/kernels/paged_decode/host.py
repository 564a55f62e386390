"""Attention of one new token a row over pages of keys and values: two launches, no host sync."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moegraft.kernels.paged_decode.device import Heads, Partial, Pool, decode_kernel, sum_kernel, write_kernel
from moegraft.kernels.records import cdiv, dot_precision, next_power_of_2, pdl_options

_WAVE = 264
"""Programs that keep a device busy: twice the multiprocessors of an H200, which serves as the measure for all."""
_MIN_TOKENS = 128
"""A part of a sequence has at least so many tokens, where the page table has room for more."""


@dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """Sizes of one call. ``block_l``: tokens that a program takes at once · ``block_g``: query heads of one program ·
    ``splits``: parts of every sequence."""

    block_l: int
    block_g: int
    splits: int
    num_warps: int = 4
    num_stages: int = 2


def paged_decode(
    q_BHC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    page_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, Hq, Cv]: the attention of row b's query, the last of its tokens, over all of them. The custom op
    ``moegraft::paged_decode``.

    Semantics, for row b of length L = lengths[b], query head h, which reads head h // (Hq / Hk) of the keys:

        k[l], v[l] = keys, values[page_table[b, l // S], l % S]      0 <= l < L, and l >= L - window where there is one
        x[l]       = scale * q[b, h] . k[l]                          softcap * tanh(x / softcap) where there is one
        out[b, h]  = sum_l exp(x[l]) v[l] / (sum_l exp(x[l]) + exp(sinks[h]))       float32, rounded once

    A row of length 0 gives zeros. Entries of the table behind a row's last page are not read. The same batch gives the
    same bits; a row's bits depend on its own tokens, on B and on the width N of the table, which choose the parts.

    q has the pool's dtype and contiguous heads; keys and values are contiguous, of any head sizes; page_table and
    lengths int32. No host sync: may be captured in a CUDA graph, which then serves whatever the tensors come to hold.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    run = torch.ops.moegraft.paged_decode if torch.compiler.is_compiling() else run_paged_decode
    out: torch.Tensor = run(
        q_BHC, keys_PSHC, values_PSHC, page_table_BN, lengths_B, scale, window or 0, softcap or 0.0, sinks_H
    )
    return out


def run_paged_decode(  # the op's signature
    q_BHC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    page_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """The op's implementation: decides, allocates, launches. 0 stands for no window and no softcap."""
    _check(q_BHC, keys_PSHC, values_PSHC, page_table_BN, lengths_B, sinks_H)
    B, Hq, _ = q_BHC.shape
    Hk, V = values_PSHC.shape[2:]
    out_BHV = q_BHC.new_empty(B, Hq, V)
    if B == 0:
        return out_BHV
    longest = page_table_BN.shape[1] * keys_PSHC.shape[1]
    tile = choose_tile(B * Hk, Hq // Hk, min(longest, window) if window else longest, max(q_BHC.shape[2], V))
    partial = Partial(
        acc=torch.empty(B, Hq, tile.splits, V, dtype=torch.float32, device=q_BHC.device),
        best=torch.empty(B, Hq, tile.splits, dtype=torch.float32, device=q_BHC.device),
        total=torch.empty(B, Hq, tile.splits, dtype=torch.float32, device=q_BHC.device),
    )
    pool = Pool(keys_PSHC, values_PSHC, page_table_BN, lengths_B, page_table_BN.stride(0))
    heads = _heads(q_BHC, values_PSHC, tile.block_g)
    options = pdl_options(q_BHC.device)
    decode_kernel[(B, Hk * cdiv(heads.GROUP, tile.block_g), tile.splits)](
        q_BHC, pool, partial, scale, softcap, q_BHC.stride(0), HEADS=heads, PAGE_SIZE=keys_PSHC.shape[1],
        WINDOW=window, HAS_SOFTCAP=softcap > 0, BLOCK_L=tile.block_l, SPLITS=tile.splits,
        PRECISION=dot_precision(q_BHC.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        **options,
    )  # fmt: skip
    sum_kernel[(B, Hq)](
        out_BHV, partial, sinks_H, HEADS=heads, SPLITS=tile.splits, HAS_SINKS=sinks_H is not None, num_warps=1,
        **options,
    )  # fmt: skip
    return out_BHV


torch.library.define(
    "moegraft::paged_decode",
    "(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor lengths, float scale, int window, "
    "float softcap, Tensor? sinks) -> Tensor",
)
torch.library.impl("moegraft::paged_decode", "default", run_paged_decode)


@torch.library.register_fake("moegraft::paged_decode")
def _(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], values.shape[-1])


def write_pages(
    keys_PSHC: torch.Tensor, values_PSHC: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """Row t of k and v goes to slot ``slots_T[t]`` (page * S + offset, int64) of the pages, which are contiguous. Rows
    of one slot, as padding has, leave any of theirs there. No host sync; may be captured in a CUDA graph."""
    T, k_size, v_size = k_THC.shape[0], k_THC[0:1].numel(), v_THC[0:1].numel()
    if T == 0:
        return
    k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (k_THC, v_THC))
    write_kernel[(T,)](
        keys_PSHC, values_PSHC, k, v, slots_T, k.stride(0), v.stride(0), K_SIZE=k_size, V_SIZE=v_size,
        BLOCK=min(1024, next_power_of_2(max(k_size, v_size))), num_warps=2, **pdl_options(k.device),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def choose_tile(programs: int, group: int, longest: int, widest_head: int) -> DecodeTile:
    """``programs``: rows times heads of keys, ``group`` query heads each · ``longest``: tokens that a row may have to
    read."""
    is_wide = widest_head > 128
    block_g = 16 if is_wide else min(64, max(16, next_power_of_2(group)))
    programs *= cdiv(group, block_g)
    splits = 1
    while splits < 32 and programs * splits < _WAVE and splits * 2 * _MIN_TOKENS <= longest:
        splits *= 2
    block_l = 64 if not is_wide else 32 if widest_head <= 256 else 16
    return DecodeTile(block_l=block_l, block_g=block_g, splits=splits, num_stages=1 if is_wide else 2)


def _heads(q_BHC: torch.Tensor, values_PSHC: torch.Tensor, block_g: int) -> Heads:
    (_, Hq, C), (Hk, V) = q_BHC.shape, values_PSHC.shape[2:]
    return Heads(
        Q=Hq,
        K=Hk,
        GROUP=Hq // Hk,
        C=C,
        V=V,
        BLOCK_G=block_g,
        BLOCK_C=max(16, next_power_of_2(C)),
        BLOCK_V=max(16, next_power_of_2(V)),
    )


def _check(
    q_BHC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    page_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    sinks_H: torch.Tensor | None,
) -> None:
    name = "paged_decode"
    if q_BHC.dim() != 3 or keys_PSHC.dim() != 4 or keys_PSHC.shape[:3] != values_PSHC.shape[:3]:
        shapes = f"q {list(q_BHC.shape)}, keys {list(keys_PSHC.shape)}, values {list(values_PSHC.shape)}"
        raise ValueError(f"{name}: {shapes}, expected [B, Hq, C], [P, S, Hk, C], [P, S, Hk, Cv]")
    B, Hq, C = q_BHC.shape
    if keys_PSHC.shape[3] != C or Hq % keys_PSHC.shape[2]:
        raise ValueError(f"{name}: {Hq} query heads of {C} over keys {list(keys_PSHC.shape)}")
    if not q_BHC.dtype == keys_PSHC.dtype == values_PSHC.dtype:
        raise ValueError(f"{name}: q is {q_BHC.dtype}, keys {keys_PSHC.dtype}, values {values_PSHC.dtype}")
    if page_table_BN.shape[:1] != (B,) or page_table_BN.dim() != 2 or lengths_B.shape != (B,):
        found = f"page_table {list(page_table_BN.shape)}, lengths {list(lengths_B.shape)}"
        raise ValueError(f"{name}: {found}, expected [{B}, N] and [{B}]")
    if page_table_BN.dtype != torch.int32 or lengths_B.dtype != torch.int32:
        raise ValueError(f"{name}: page_table {page_table_BN.dtype}, lengths {lengths_B.dtype}, expected int32")
    if not (keys_PSHC.is_contiguous() and values_PSHC.is_contiguous()):
        raise ValueError(f"{name}: keys and values must be contiguous")
    if B and (q_BHC.stride()[1:] != (C, 1) or page_table_BN.stride(1) != 1):
        raise ValueError(f"{name}: heads of q {q_BHC.stride()} and rows of page_table must be contiguous")
    if sinks_H is not None and (sinks_H.shape != (Hq,) or not sinks_H.is_contiguous()):
        raise ValueError(f"{name}: sinks {list(sinks_H.shape)}, expected [{Hq}], contiguous")

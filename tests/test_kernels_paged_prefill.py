"""Paged prefill attention in Triton's interpreter (or on the GPU) against plain torch, a token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE

import moegraft.kernels.paged_prefill.host as paged_prefill_host
from moegraft.kernels import paged_prefill as shared
from moegraft.kernels.paged_prefill import PrefillChunks, PrefillTile, block_tokens, blocks_of, choose_tile
from moegraft.kernels.paged_prefill.host import paged_prefill
from moegraft.kernels.paged_prefill.reference import paged_prefill_reference
from moegraft.testing.errors import assert_close


def check(
    chunks: list[tuple[int, int]], *, heads: tuple[int, int] = (4, 2), sizes: tuple[int, int] = (16, 16), page: int = 4,
    dtype: torch.dtype = torch.float32, tol: float = 3e-6, **options: Any,
) -> None:  # fmt: skip
    """chunks: (tokens, context). Rows of no chunk lie around them and keep what they hold; pages that no chunk owns,
    and what lies behind a context, are NaN, and unused entries of the table point far outside of the pool."""
    generator = torch.Generator().manual_seed(0)
    owned = [-(-context // page) for _, context in chunks]
    order = torch.randperm(sum(owned) + 2, generator=generator).tolist()
    keys = torch.full((len(order), page, heads[1], sizes[0]), float("nan"))
    values = torch.full((len(order), page, heads[1], sizes[1]), float("nan"))
    table = torch.full((len(chunks), max(owned, default=1) + 1), 2**30, dtype=torch.int32)
    for n, (_, context) in enumerate(chunks):
        for at in range(context):
            if at % page == 0:
                table[n, at // page] = order.pop()
            where = (int(table[n, at // page]), at % page)
            keys[where], values[where] = (torch.randn(heads[1], size, generator=generator) for size in sizes)
    rows, total = [], 1
    for tokens, _ in chunks:
        rows.append(total)
        total += tokens + 1
    q = torch.randn(total, heads[0], sizes[0], generator=generator)
    per_block = block_tokens(heads[0] // heads[1], max(sizes), dtype.itemsize)
    blocks = [*blocks_of([tokens for tokens, _ in chunks], per_block), (-1, 7)]  # the last: a program without work
    made = PrefillChunks(
        rows_N=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        tokens_N=torch.tensor([tokens for tokens, _ in chunks], dtype=torch.int32, device=DEVICE),
        contexts_N=torch.tensor([context for _, context in chunks], dtype=torch.int32, device=DEVICE),
        page_table_NP=table.to(DEVICE),
        blocks={per_block: torch.tensor(blocks, dtype=torch.int32, device=DEVICE)},
    )
    q, keys, values = (x.to(DEVICE, dtype) for x in (q, keys, values))
    given = {"scale": 0.3, **options}
    expected = paged_prefill_reference(q, keys, values, made, **given)
    out = torch.zeros_like(expected)
    paged_prefill(out, q, keys, values, made, **given)
    assert_close(out, expected, tol=tol)


SINKS = torch.linspace(-1, 2, 4)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.7}, {"sinks_H": SINKS}, {"window": 1}], ids=str)
def test_chunks_of_all_kinds(options: dict[str, Any]) -> None:
    """Whole prompts, one token, the last of a long context, lengths that no block divides."""
    if "sinks_H" in options:
        options = {"sinks_H": SINKS.to(DEVICE)}
    check([], **options)
    check([(1, 1)], **options)
    check([(5, 5), (1, 9), (3, 17), (8, 8), (2, 6)], **options)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1), (3, 3)])
@pytest.mark.parametrize("sizes", [(24, 8), (8, 40)])
def test_heads(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    check([(7, 7), (4, 13)], heads=heads, sizes=sizes, page=16)


@pytest.mark.parametrize("block_m", [16, 32])
def test_small_blocks(monkeypatch: pytest.MonkeyPatch, block_m: int) -> None:
    """Several blocks a chunk, several blocks of keys: as long prompts have."""
    tile = PrefillTile(block_m=block_m, block_l=16, num_warps=4)
    for module in (shared, paged_prefill_host):
        monkeypatch.setattr(module, "choose_tile", lambda *_: tile)
    check([(37, 37), (20, 55), (1, 40)], window=None)
    check([(37, 37), (20, 55), (1, 40)], window=11)


@pytest.mark.gpu
def test_sizes_of_real_models_on_the_gpu() -> None:
    for heads, size in (((32, 4), 128), ((64, 8), 64), ((8, 8), 256), ((16, 2), 256), ((128, 128), 192)):
        check([(300, 300), (1, 900), (77, 512)], heads=heads, sizes=(size, size), page=16, dtype=torch.bfloat16,
              tol=2e-2)  # fmt: skip


def test_what_is_refused() -> None:
    assert choose_tile(8, 128, 2).block_m == 128
    with pytest.raises(ValueError, match="at most 256 elements"):
        check([(2, 2)], sizes=(320, 16))

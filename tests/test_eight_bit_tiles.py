"""Tiles of the GEMMs over fp8 and int8 weights: whatever a call asks for fits the format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moegraft.tuning.heuristic import batch_invariant_tiles, heuristic_tiles
from moegraft.tuning.table import choose_tiles, write_table
from moegraft.tuning.tiles import GemmTile, TuningShape
from moegraft.tuning.weight_formats import FP8_BLOCK, fit_tiles, stores_h, stores_x, writes_groups

QWEN = TuningShape(
    num_tokens=8,
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    weight_format="fp8",
    scale_group=128,
)
TOKENS = (0, 1, 8, 32, 128, 512, 4096, 100_000)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_a_step_has_one_scale_of_weights(num_tokens: int) -> None:
    for intermediate_size in (19, 256, 768, 14336):
        shape = replace(QWEN, num_tokens=num_tokens, intermediate_size=intermediate_size)
        for tiles in (heuristic_tiles(shape), fit_tiles(batch_invariant_tiles(), shape)):
            for gemm in (tiles.gemm13, tiles.gemm2):
                assert gemm.block_k == FP8_BLOCK and FP8_BLOCK % gemm.block_n == 0
            assert stores_x(shape, tiles) and stores_x(replace(shape, scale_group=0), tiles)


def test_a_step_over_weights_scaled_by_row_is_long_enough() -> None:
    """Wider and longer tiles than that stay as they were asked for."""
    shape, asked = replace(QWEN, scale_group=0), batch_invariant_tiles()
    fitted = fit_tiles(asked, shape)
    assert (fitted.gemm13, fitted.gemm2) == tuple(replace(t, block_k=128) for t in (asked.gemm13, asked.gemm2))
    long = replace(asked, gemm13=GemmTile(block_n=256, block_k=256), gemm2=GemmTile(block_n=256, block_k=128))
    assert fit_tiles(long, shape) == long
    assert fit_tiles(asked, replace(shape, weight_format="int8")) == asked


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_adapters_change_no_tile_of_the_base(num_tokens: int) -> None:
    """Or base rows would have other bits with adapters in the batch."""
    shape = replace(QWEN, num_tokens=num_tokens)
    with_adapters = replace(shape, num_slots=8, rank13=128, rank2=64)
    base, lora = heuristic_tiles(shape), heuristic_tiles(with_adapters)
    assert base.block_m == lora.block_m
    for name in ("gemm13", "gemm2"):
        assert replace(getattr(base, name), block_l=0) == replace(getattr(lora, name), block_l=0)
    assert stores_h(shape, base) == stores_h(with_adapters, lora)


def test_h_is_quantised_where_there_is_room() -> None:
    tiles = heuristic_tiles(QWEN)
    wide = replace(tiles, block_m=128, gemm13=GemmTile(block_n=128, block_k=128, num_warps=8))
    assert not writes_groups(wide, 128)
    assert writes_groups(replace(wide, gemm13=replace(wide.gemm13, num_warps=16)), 128)
    assert not writes_groups(replace(wide, gemm13=replace(wide.gemm13, block_n=64)), 128)
    assert stores_h(QWEN, wide) and not stores_h(replace(QWEN, weight_format="int4"), wide)
    assert not stores_h(QWEN, replace(tiles, block_m=16, gemm13=GemmTile(block_n=64)))
    assert stores_h(replace(QWEN, scale_group=0), replace(tiles, block_m=16, gemm13=GemmTile(block_n=64)))


def test_tables_of_dense_layers_are_not_for_others(tmp_path: Path) -> None:
    dense = replace(QWEN, weight_format="dense", scale_group=0)
    tile = {"block_n": 64, "block_k": 32, "group": 1, "num_warps": 4, "num_stages": 2, "tma": False}
    entry = {"num_tokens": QWEN.num_tokens, "block_m": 64, "gemm13": tile, "gemm2": tile}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_table(tmp_path / "t.json", device=device, date="", versions={}, shape=dense, entries=[entry])
    assert choose_tiles(dense, (tmp_path,)).gemm13.block_k == 32
    assert choose_tiles(QWEN, (tmp_path,)) == heuristic_tiles(QWEN)

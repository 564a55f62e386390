"""Tile choice and workspaces: pure host logic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moegraft.kernels.workspace import Workspace, layer_buffers
from moegraft.testing.poison import poison_allocations
from moegraft.tuning import table
from moegraft.tuning.heuristic import H200, heuristic_tiles
from moegraft.tuning.table import TABLES, choose_tiles, forget_tables
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

SHAPE = TuningShape(num_tokens=8, num_experts=16, top_k=4, hidden_size=256, intermediate_size=192)
WITH_LORA = {"num_slots": 8, "rank13": 128, "rank2": 64}
GEMM = {"block_n": 32, "block_k": 64, "num_stages": 2, "num_warps": 4, "group": 1, "tma": False}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "intermediate_size": 192}
    entries = [{"num_tokens": 8, "block_m": 32, "gemm13": GEMM, "gemm2": GEMM | {"block_n": 64}}]
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "GPU", "shape": sizes, "entries": entries}))
    monkeypatch.setattr(table, "tuning_device", lambda: replace(H200, name="GPU"))
    forget_tables()
    return tmp_path


def base_part(tiles: MoETiles) -> tuple[int, GemmTile, GemmTile]:
    """What decides the bits of base rows."""
    return tiles.block_m, replace(tiles.gemm13, block_l=0), replace(tiles.gemm2, block_l=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 31, 32, 100, 1000, 4096, 100_000])
@pytest.mark.parametrize("num_experts", [1, 8, 128, 1024])
def test_adapters_do_not_change_the_base_tiles(num_tokens: int, num_experts: int) -> None:
    shape = replace(SHAPE, num_tokens=num_tokens, num_experts=num_experts)
    assert base_part(heuristic_tiles(shape)) == base_part(heuristic_tiles(replace(shape, **WITH_LORA)))


def test_a_table_decides_the_base_tiles_near_its_entries(folder: Path) -> None:
    for num_tokens in (5, 8, 13):
        for lora in ({}, WITH_LORA):
            shape = replace(SHAPE, num_tokens=num_tokens, **lora)
            tiles = choose_tiles(shape, (folder,))
            assert (tiles.block_m, tiles.gemm13.block_n, tiles.gemm2.block_n) == (32, 32, 64)
            assert tiles.shrink13 == heuristic_tiles(shape).shrink13


@pytest.mark.parametrize("change", [{"num_tokens": 64}, {"num_tokens": 1}, {"hidden_size": 512}, {"top_k": 2}])
def test_the_heuristic_serves_what_no_table_covers(folder: Path, change: dict[str, int]) -> None:
    shape = replace(SHAPE, **change)
    assert choose_tiles(shape, (folder,)) == heuristic_tiles(shape)


def test_shipped_tables_are_well_formed() -> None:
    paths = list(TABLES.glob("*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        assert {"device", "date", "versions", "shape", "entries"} == data.keys()
        for entry in data["entries"]:
            assert entry["block_m"] in (16, 32, 64, 128)
            GemmTile(**entry["gemm13"]), GemmTile(**entry["gemm2"])


def test_workspace_is_exact_poisonable_and_refuses_what_does_not_fit() -> None:
    shape = replace(SHAPE, **WITH_LORA)
    tiles = heuristic_tiles(shape)
    with poison_allocations():
        workspace = Workspace.for_layer(shape, tiles, torch.bfloat16, "cpu")
    buffers = workspace.carve(shape, tiles, torch.bfloat16, num_halves=2)
    assert buffers.h_NF.shape == (32, 192) and buffers.low_rank2 is not None
    start = workspace.memory.data_ptr()
    assert start <= buffers.y_ND.data_ptr() < start + workspace.memory.numel()
    names = set(layer_buffers(shape, tiles, torch.bfloat16, num_halves=2))
    assert names > set(layer_buffers(SHAPE, tiles, torch.bfloat16, num_halves=2))
    with pytest.raises(ValueError, match="needs"):
        workspace.carve(replace(shape, num_tokens=64), tiles, torch.bfloat16, num_halves=2)

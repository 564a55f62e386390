"""Tile lookup: measured tables with the heuristic behind them.

A table is a JSON file: ``device`` (as torch names it), ``date``, ``versions``, ``shape`` (num_experts, top_k,
hidden_size, intermediate_size) and ``entries``: for some ``num_tokens``, ``block_m`` and the tiles ``gemm13`` and
``gemm2``. What only LoRA reads is the heuristic's, so that a call's base rows get the same tiles, and the same bits,
whatever adapters it has.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moegraft.tuning.heuristic import heuristic_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

TABLES = Path(__file__).parent / "tables"
USER_TABLES = Path.home() / ".config" / "moegraft" / "tiles"
"""Where ``moegraft tune`` writes; what lies here goes before what is shipped."""
MAX_OCTAVES = 0.75
"""A measured entry speaks for calls with up to 1.7 times more or fewer tokens."""


@lru_cache(maxsize=4096)
def choose_tiles(shape: TuningShape, folders: tuple[Path, ...] = (USER_TABLES, TABLES)) -> MoETiles:
    """Tiles of a call, the same for the same shape. Cached: a call pays for a dictionary lookup."""
    tiles = heuristic_tiles(shape)
    for folder in folders:
        entries = [entry for table in _tables(folder) if _is_for(table, shape) for entry in table["entries"]]
        nearest = min(entries, key=lambda entry: _octaves(entry, shape), default=None)
        if nearest is not None and _octaves(nearest, shape) <= MAX_OCTAVES:
            return replace(
                tiles,
                block_m=nearest["block_m"],
                gemm13=GemmTile(**nearest["gemm13"], block_l=tiles.gemm13.block_l),
                gemm2=GemmTile(**nearest["gemm2"], block_l=tiles.gemm2.block_l),
            )
    return tiles


def forget_tables() -> None:
    """Reads the table files again at the next call; graphs captured before keep their tiles."""
    _tables.cache_clear()
    choose_tiles.cache_clear()


@lru_cache(maxsize=8)
def _tables(folder: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))


def _is_for(table: dict[str, Any], shape: TuningShape) -> bool:
    return table["device"] == _device_name() and all(
        getattr(shape, name) == value for name, value in table["shape"].items()
    )


def _octaves(entry: dict[str, Any], shape: TuningShape) -> float:
    return abs(math.log2(entry["num_tokens"] / max(1, shape.num_tokens)))


@lru_cache(maxsize=1)
def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

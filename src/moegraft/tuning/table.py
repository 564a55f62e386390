"""Tile lookup: measured tables with the heuristic behind them.

A table is a JSON file: ``device`` (as torch names it), ``date``, ``versions``, ``shape`` (num_experts, top_k,
hidden_size, intermediate_size) and ``entries``: for some ``num_tokens``, ``block_m`` and the tiles ``gemm13`` and
``gemm2``. What only LoRA reads is the heuristic's, so that a call's base rows get the same tiles, and the same bits,
whatever adapters it has.

Folders are asked in order: those given to ``use_tables``, the user's (where ``moegraft tune`` writes), the shipped
one. The first that has an entry near enough decides; after them the heuristic.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moegraft.core.errors import MoegraftError
from moegraft.tuning.heuristic import heuristic_tiles, tuning_device
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

TABLES = Path(__file__).parent / "tables"
# expanduser, unlike Path.home, leaves the path as it is for a user without a home
USER_TABLES = Path(os.path.expanduser("~/.config/moegraft/tiles"))
"""Where ``moegraft tune`` writes; what lies here goes before what is shipped."""
MAX_OCTAVES = 0.75
"""A measured entry speaks for calls with up to 1.7 times more or fewer tokens."""

_KEYS = ("device", "shape", "entries")
_SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")
_first_folders: tuple[Path, ...] = ()


class TileTableError(MoegraftError, ValueError):
    """A file in a folder of tables is not a table; the message names it."""


def use_tables(*folders: str | os.PathLike[str]) -> None:
    """From now on, tables in these folders go before all others, in this order; without folders, none does.

    For the whole process. A CUDA graph that was captured before keeps its tiles. Raises TileTableError for a folder
    that does not exist or a file in it that is no table; nothing has changed then.
    """
    global _first_folders  # noqa: PLW0603  # one choice a process, made where the process is set up
    paths = tuple(map(Path, folders))
    for folder in paths:
        if not folder.is_dir():
            raise TileTableError(f"{folder} is not a folder of tile tables")
        for path in folder.glob("*.json"):
            read_table(path)
    _first_folders = paths
    forget_tables()


@lru_cache(maxsize=4096)
def choose_tiles(shape: TuningShape, folders: tuple[Path, ...] | None = None) -> MoETiles:
    """Tiles of a call, the same for the same shape. Cached: a call pays for a dictionary lookup.

    ``folders``: instead of those that the module names. Raises TileTableError for a file there that is no table.
    """
    tiles = heuristic_tiles(shape)
    for folder in (*_first_folders, USER_TABLES, TABLES) if folders is None else folders:
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


def read_table(path: Path) -> dict[str, Any]:
    """A table file. Raises TileTableError for one that is not."""
    try:
        table = json.loads(path.read_text())
        missing = [key for key in _KEYS if key not in table]
        if missing:
            raise KeyError(", ".join(missing))
        for entry in table["entries"]:
            GemmTile(**entry["gemm13"]), GemmTile(**entry["gemm2"])
            int(entry["block_m"]), math.log2(entry["num_tokens"])
        [int(table["shape"][name]) for name in _SIZES]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TileTableError(f"{path} is not a tile table: {type(error).__name__}: {error}") from error
    return dict(table)


def write_table(
    path: Path,
    *,
    device: str,
    date: str,
    versions: Mapping[str, str],
    shape: TuningShape,
    entries: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the table of a layer, at once or not at all; one line an entry, by ``num_tokens``.

    Of a table that is there for the same device and layer, entries for other ``num_tokens`` stay. Raises
    TileTableError where the file is anything else, and leaves it alone.
    """
    merged = {entry["num_tokens"]: entry for entry in [*_entries_there(path, device, shape), *entries]}
    head = {"device": device, "date": date, "versions": versions, "shape": layer_sizes(shape)}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = ",\n".join(f"    {json.dumps(merged[num_tokens])}" for num_tokens in sorted(merged))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text("\n".join(["{", *lines, '  "entries": [', body, "  ]", "}", ""]))
    unfinished.replace(path)


def check_writable(path: Path, device: str, shape: TuningShape) -> None:
    """Raises TileTableError where ``write_table`` would."""
    _entries_there(path, device, shape)


def _entries_there(path: Path, device: str, shape: TuningShape) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    table = read_table(path)
    if (table["device"], table["shape"]) != (device, layer_sizes(shape)):
        raise TileTableError(
            f"{path} is of {table['device']}, {table['shape']}; expected {device}, {layer_sizes(shape)}"
        )
    return list(table["entries"])


def layer_sizes(shape: TuningShape) -> dict[str, int]:
    """What a table is for, beside the device."""
    return {name: getattr(shape, name) for name in _SIZES}


@lru_cache(maxsize=8)
def _tables(folder: Path) -> tuple[dict[str, Any], ...]:
    return tuple(read_table(path) for path in sorted(folder.glob("*.json")))


def _is_for(table: dict[str, Any], shape: TuningShape) -> bool:
    is_format = table.get("format", "dense") == shape.weight_format
    return is_format and table["device"] == tuning_device().name and table["shape"] == layer_sizes(shape)


def _octaves(entry: dict[str, Any], shape: TuningShape) -> float:
    return abs(math.log2(entry["num_tokens"] / max(1, shape.num_tokens)))

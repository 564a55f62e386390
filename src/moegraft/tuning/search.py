"""Search for the base tiles of a layer on one device; what measures a choice is the caller's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moegraft.tuning.heuristic import gemm_tiles, heuristic_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

Measure = Callable[[TuningShape, MoETiles], float]
"""Microseconds of one layer call of that shape with those tiles. May raise: such tiles do not fit the device."""
OnTrial = Callable[[int, int, TuningShape, float], None]
"""Told after every trial: trials done, trials in all, the shape, microseconds."""

BLOCK_MS = (16, 32, 64, 128)


def search(
    shapes: Sequence[TuningShape], measure: Measure, *, journal: Path, on_trial: OnTrial | None = None
) -> list[dict[str, Any]]:
    """Entries of a table, one a shape (which differ in ``num_tokens``).

    For the heuristic's ``block_m`` and its neighbours, either GEMM's tile is varied alone: the two run one after the
    other, so their best choices are independent. Every trial is a line of ``journal``; a search that was interrupted
    takes the trials that are there as done.
    """
    done = _read_journal(journal)
    trials = [(shape, tiles) for shape in shapes for tiles in candidates(shape)]
    us: list[float] = []
    with journal.open("a") as lines:
        for count, (shape, tiles) in enumerate(trials, 1):
            key = _key(shape, tiles)
            if key not in done:
                done[key] = _try(measure, shape, tiles)
                lines.write(json.dumps({"trial": key, "us": done[key]}) + "\n")
                lines.flush()
            us.append(done[key])
            if on_trial is not None:
                on_trial(count, len(trials), shape, done[key])
    timed = list(zip(trials, us, strict=True))
    return [_best_entry(shape, [(tiles, t) for (other, tiles), t in timed if other == shape]) for shape in shapes]


def candidates(shape: TuningShape) -> Iterator[MoETiles]:
    """The heuristic's choice first; then, for each ``block_m``, its default and one GEMM's tile changed at a time."""
    start = heuristic_tiles(shape)
    yield start
    for block_m in BLOCK_MS:
        if not start.block_m // 2 <= block_m <= start.block_m * 2:
            continue
        gemm13, gemm2 = gemm_tiles(block_m, shape)
        default = replace(start, block_m=block_m, gemm13=gemm13, gemm2=gemm2)
        yield default
        for tile in _neighbours(gemm13, block_m):
            yield replace(default, gemm13=tile)
        for tile in _neighbours(gemm2, block_m):
            yield replace(default, gemm2=tile)


def table_document(
    device: str, date: str, versions: dict[str, str], shape: TuningShape, entries: list[dict[str, Any]]
) -> str:
    """The text of a table file, see ``table.py``; one line an entry."""
    sizes = {name: getattr(shape, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    head = {"device": device, "date": date, "versions": versions, "shape": sizes}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    return "\n".join(["{", *lines, '  "entries": [', body, "  ]", "}", ""])


def _neighbours(tile: GemmTile, block_m: int) -> Iterator[GemmTile]:
    yield replace(tile, tma=not tile.tma)
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        yield replace(tile, num_stages=stages)
    yield replace(tile, block_n=tile.block_n // 2)
    yield replace(tile, block_n=tile.block_n * 2)
    if block_m <= 32:
        yield replace(tile, block_n=tile.block_n // 2, block_k=tile.block_k * 2, num_stages=3)
    else:
        yield replace(tile, group=tile.group * 2)
        yield replace(tile, num_warps=12 - tile.num_warps)


def _try(measure: Measure, shape: TuningShape, tiles: MoETiles) -> float:
    try:
        return measure(shape, tiles)
    except Exception:  # whatever the compiler or the driver says: these tiles cannot be used
        return math.inf


def _best_entry(shape: TuningShape, trials: Sequence[tuple[MoETiles, float]]) -> dict[str, Any]:
    """The best tile of each GEMM, at the ``block_m`` where the two together gain most."""
    best: tuple[float, MoETiles] | None = None
    for block_m in {tiles.block_m for tiles, _ in trials}:
        mine = [(tiles, us) for tiles, us in trials if tiles.block_m == block_m]
        gemm13, gemm2 = gemm_tiles(block_m, shape)
        default_us = min((us for t, us in mine if (t.gemm13, t.gemm2) == (gemm13, gemm2)), default=math.inf)
        best13, us13 = min(((t, us) for t, us in mine if t.gemm2 == gemm2), key=lambda trial: trial[1])
        best2, us2 = min(((t, us) for t, us in mine if t.gemm13 == gemm13), key=lambda trial: trial[1])
        expected = us13 + us2 - default_us if math.isfinite(default_us) else min(us13, us2)
        if best is None or expected < best[0]:
            best = expected, replace(best13, gemm2=best2.gemm2)
    assert best is not None
    fields = {name: asdict(getattr(best[1], name)) for name in ("gemm13", "gemm2")}
    for tile in fields.values():
        del tile["block_l"]
    return {"num_tokens": shape.num_tokens, "block_m": best[1].block_m, **fields}


def _key(shape: TuningShape, tiles: MoETiles) -> str:
    return json.dumps([asdict(shape), tiles.block_m, asdict(tiles.gemm13), asdict(tiles.gemm2)], sort_keys=True)


def _read_journal(journal: Path) -> dict[str, float]:
    if not journal.exists():
        return {}
    done = {}
    for line in journal.read_text().splitlines():
        try:
            trial = json.loads(line)
        except json.JSONDecodeError:  # the last line of a search that was killed
            continue
        done[trial["trial"]] = trial["us"]
    return done

"""Rows of the MoE-LoRA grid as tables, and the rule for ratios: rows of one run on one card with one stopwatch only.

Row: shape, tokens, slots, rank, active_adapters; engine, device, stopwatch, date; lora_us and base_us (LoRA on and off,
microseconds); of ours also commit, what must move and be computed (bytes, flops and the same with ``base_``), and the
card's ceilings (copy_tb_s, matmul_tflop_s).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME_RUN = ("device", "stopwatch", "date")


class NotComparable(ValueError):
    """Rows whose ratio would mean nothing; says which and why."""


def read_rows(path: Path) -> list[Row]:
    """The rows of one JSON-lines file. Raises NotComparable where it holds none."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise NotComparable(f"{path.name}: found no row")
    return rows


def read_peers(paths: Iterable[Path], facts: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows by engine and version. Raises NotComparable where they are not of the run that ``facts`` describes."""
    peers: dict[str, list[Row]] = {}
    for path in paths:
        rows = read_rows(path)
        engine = the_one(rows, "engine", path.name)
        for field in SAME_RUN:
            theirs = the_one(rows, field, path.name)
            if theirs != facts[field]:
                raise NotComparable(
                    f"{path.name}: {field} is {theirs!r}, of our rows {facts[field]!r}; "
                    "a ratio needs rows of one run on one card with one stopwatch"
                )
        peers[engine] = rows
    return peers


def facts_of(rows: Sequence[Row], source: str) -> dict[str, Any]:
    """What the rows say of their run. Raises NotComparable where they do not all say the same."""
    return {field: the_one(rows, field, source) for field in SAME_RUN}


def the_one(rows: Sequence[Row], field: str, source: str) -> str:
    """The value that all rows have. Raises NotComparable."""
    values = {row.get(field) for row in rows}
    if None in values:
        raise NotComparable(f"{source}: a row does not say its {field}")
    if len(values) > 1:
        raise NotComparable(f"{source}: rows of several runs, {field} is {' and '.join(sorted(map(str, values)))}")
    return str(values.pop())


def cell_of(row: Row) -> str:
    """slots:rank:active adapters"""
    return f"{row['slots']}:{row['rank']}:{row['active_adapters']}"


def floor_us(row: Row, prefix: str = "") -> float:
    """The longer of moving what must move and computing what must be computed, at the row's ceilings."""
    return max(row[f"{prefix}bytes"] / row["copy_tb_s"], row[f"{prefix}flops"] / row["matmul_tflop_s"]) / 1e6


def on_over_floor(row: Row) -> float:
    """LoRA on."""
    return float(row["lora_us"]) / floor_us(row)


def off_over_floor(row: Row) -> float:
    """LoRA off."""
    return float(row["base_us"]) / floor_us(row, "base_")


def on_over_off(row: Row) -> float:
    """What adapters cost."""
    return float(row["lora_us"]) / float(row["base_us"])


def geomean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def by_tokens(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[int, list[float]]:
    """Values of the cells of each number of tokens, ascending."""
    found: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        found.setdefault(row["tokens"], []).append(value(row))
    return found


def speedups(rows: Sequence[Row], peer: Sequence[Row], field: str) -> dict[int, list[float]]:
    """A peer's time over ours in every cell that both have, by tokens."""
    theirs = {_key(row): row[field] for row in peer if field in row}
    return by_tokens([row for row in rows if _key(row) in theirs], lambda row: theirs[_key(row)] / row[field])


def _key(row: Row) -> tuple[str, ...]:
    shape = str(row["shape"]).partition(" ")[0]  # a peer says behind it what it had to pad
    return shape, str(row["tokens"]), cell_of(row), str(row.get("format", "bf16"))


def summary(rows: Sequence[Row], peers: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """One document of the run: geometric means by tokens, and against every peer by name."""
    timed = [row for row in rows if "lora_us" in row]
    against: dict[str, dict[str, float]] = {}
    for engine, peer in peers.items():
        against[engine] = {}
        for name, field in (("on", "lora_us"), ("off", "base_us")):
            ratios = [ratio for cell in speedups(timed, peer, field).values() for ratio in cell]
            if ratios:
                worst = round(min(ratios), 3)
                against[engine] |= {name: round(geomean(ratios), 3), f"{name}_worst": worst, "cells": len(ratios)}
    values = {"off_over_floor": off_over_floor, "on_over_floor": on_over_floor, "on_over_off": on_over_off}
    means = {
        name: {str(tokens): round(geomean(found), 3) for tokens, found in by_tokens(timed, value).items()}
        for name, value in values.items()
    }
    return {"cells": len(timed), "wrong_cells": len(rows) - len(timed), "against": against, **means}


def tables(rows: Sequence[Row], peers: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: times by shape and cell, means by tokens, and how much faster than each peer."""
    timed = [row for row in rows if "lora_us" in row]
    parts = [times_table(timed), means_table(timed)]
    if peers:
        parts.append(peers_table(timed, peers))
    return "\n\n".join(parts)


def times_table(rows: Sequence[Row]) -> str:
    """By tokens and shape: microseconds with LoRA off and in each cell, and below them the multiples of the floor."""
    shapes, cells = (list(dict.fromkeys(values)) for values in (map(_shape_of, rows), map(cell_of, rows)))
    lines = []
    for tokens in by_tokens(rows, on_over_off):
        line = [str(tokens)]
        for shape in shapes:
            found = [row for row in rows if (row["tokens"], row["shape"]) == (tokens, shape)]
            times = [_us(row["base_us"]) for row in found[:1]] + [_us(row["lora_us"]) for row in found]
            multiples = [*map(off_over_floor, found[:1]), *map(on_over_floor, found)]
            line.append(f"{' · '.join(times)} ({' · '.join(f'{m:.2f}' for m in multiples)})" if found else "")
        lines.append(line)
    return f"LoRA off · {' · '.join(cells)}, us (× floor)\n\n" + _markdown(["tokens", *shapes], lines)


def _shape_of(row: Row) -> str:
    return str(row["shape"])


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def means_table(rows: Sequence[Row]) -> str:
    """Geometric means over shapes and cells."""
    values = (off_over_floor, on_over_floor, on_over_off)
    columns = [by_tokens(rows, value) for value in values]
    lines = [[str(tokens), *(f"{geomean(column[tokens]):.2f}" for column in columns)] for tokens in columns[0]]
    return _markdown(["tokens", "off ÷ floor", "on ÷ floor", "on ÷ off"], lines)


def peers_table(rows: Sequence[Row], peers: Mapping[str, Sequence[Row]]) -> str:
    """The peer's time over ours: geometric mean (worst cell) by tokens, and over all cells that it has."""
    columns: dict[str, dict[int, list[float]]] = {}
    for engine, peer in peers.items():
        for name, field in (("on", "lora_us"), ("off", "base_us")):
            found = speedups(rows, peer, field)
            if found:
                columns[f"{engine}, {name}"] = found
    lines = [
        [str(tokens), *(_ratio(column.get(tokens, [])) for column in columns.values())]
        for tokens in by_tokens(rows, on_over_off)
    ]
    everything = [[ratio for cell in column.values() for ratio in cell] for column in columns.values()]
    lines.append(["all", *(f"**{_ratio(found)}**, {len(found)} cells" for found in everything)])
    return _markdown(["tokens", *columns], lines)


def _ratio(found: Sequence[float]) -> str:
    return f"{geomean(found):.2f} ({min(found):.2f})" if found else ""


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    shown = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
    return "\n".join([shown[0], "|" + "---|" * len(header), *shown[1:]])

"""A whole MoE layer with LoRA, own sorting included, over the grid of shapes, tokens and adapters.

    python benchmarks/moe_lora_grid.py [--format int4] [--shapes qwen3-30b,...] [--tokens 1,8,...] [--cells 8:16:8,...]
                                       [--tiles heuristic] [--plot x.png]
    python benchmarks/moe_lora_grid.py --plot x.png --rows benchmarks/results/moe_lora_grid-h200.jsonl

Correctness first, over every token: a cell whose output or delta is off by more than 1e-2 of the float32 oracle's, or
one token's delta by 5e-2, is not timed, and the run fails.
Times are medians of CUDA-graph replays. Prints a table, one JSON line a cell, and last a summary line against the peer.
Kernels are compiled beforehand by parallel processes. ``--tiles heuristic`` leaves the shipped and the user's tables
out; ``--rows`` measures nothing, and draws (and sums up) rows that an earlier run printed. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from grid_problem import (
    CELLS,
    FORMATS,
    SHAPES,
    TOKENS,
    Adapters,
    Batch,
    Cell,
    LayerShape,
    check_layer,
    empty_adapters,
    empty_like,
    floor_us,
    kernel_weights,
    lora_batch,
    make_adapters,
    make_batch,
    make_experts,
)

from moegraft.formats.base import ExpertsWeights
from moegraft.kernels.moe_forward.host import fused_moe_lora, tuning_shape
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.tuning.heuristic import heuristic_tiles

PEERS = Path(__file__).parent / "peers"
PEER = {"bf16": "vllm-0.24-h200.jsonl", "int4": "vllm-0.24-marlin-h200.jsonl", "mxfp4": "vllm-0.24-marlin-h200.jsonl"}
BF16 = Path(__file__).parent / "results" / "moe_lora_grid-h200.jsonl"
"""This layer in bf16, as it was measured."""
Row = dict[str, float | int | str]


def main() -> None:
    args = _parse()
    if args.plot:
        import matplotlib.pyplot  # noqa: F401  # a missing one is to be known before the run, not after it
    if args.rows:
        _report([json.loads(line) for line in args.rows.read_text().splitlines()], args)
        return
    if args.compile_part is not None:
        _compile_part(args)
        return
    _compile(args)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, failed = [], 0
    for shape in args.shapes:
        experts = make_experts(shape, args.format, "cuda")
        base_us: dict[int, float] = {}
        for cell in args.cells:
            adapters = make_adapters(shape, [cell.rank] * cell.slots, "cuda")
            for num_tokens in args.tokens:
                row = _measure(shape, cell, experts, adapters, num_tokens, base_us, args)
                rows.append(row)
                failed += "lora_us" not in row
                _print_row(row)
            del adapters
            torch.cuda.empty_cache()
        del experts
    for row in rows:
        print(json.dumps(row))
    _report(rows, args)
    if failed:
        sys.exit(f"{failed} cells are wrong and were not timed")


def _report(rows: Sequence[Row], args: argparse.Namespace) -> None:
    print(json.dumps(_summary(rows, args.format), allow_nan=False))
    if args.plot:
        _plot(rows, _read_peer(args.format), args.plot)


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES.values()))
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--tokens", type=lambda s: list(map(int, s.split(","))), default=list(TOKENS))
    parser.add_argument("--cells", type=lambda s: list(map(Cell.parse, s.split(","))), default=list(CELLS))
    parser.add_argument("--tiles", choices=("tables", "heuristic"), default="tables")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--compile-part", type=lambda s: tuple(map(int, s.split("/"))), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _shapes(text: str) -> list[LayerShape]:
    unknown = [name for name in text.split(",") if name not in SHAPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(SHAPES)}")
    return [SHAPES[name] for name in text.split(",")]


def _measure(
    shape: LayerShape,
    cell: Cell,
    experts: ExpertsWeights,
    adapters: Adapters,
    num_tokens: int,
    base_us: dict[int, float],
    args: argparse.Namespace,
) -> Row:
    batch = make_batch(shape, num_tokens, cell.active, "cuda")
    weights = kernel_weights(experts)
    with_lora, without = (_call(batch, weights, lora, args.tiles) for lora in (lora_batch(adapters, batch), None))

    row: Row = {"shape": shape.name, "tokens": num_tokens, "slots": cell.slots, "active_adapters": cell.active}
    errors = check_layer(with_lora(), without(), experts, adapters, batch)
    row |= {"rank": cell.rank, "rel_err": errors.delta, "base_rel_err": errors.base}
    row |= {"worst_token_err": errors.worst_token}
    if args.format != "bf16":
        row["format"] = args.format
    if not errors.small:
        return row
    if num_tokens not in base_us:
        base_us[num_tokens] = graph_us(without)
    row |= {
        "base_us": base_us[num_tokens],
        "lora_us": graph_us(with_lora),
        "floor_us": floor_us(shape, batch, cell.rank, experts.num_bytes / shape.E),
        "base_floor_us": floor_us(shape, batch, 0, experts.num_bytes / shape.E),
    }
    return row


def _call(batch: Batch, weights: MoEWeights, lora: LoRABatch | None, tiles: str) -> Callable[[], torch.Tensor]:
    """One call of the layer, with the tiles of the tables or of the heuristic alone."""
    args = (batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK)
    shape = tuning_shape(batch.x_TD, weights, batch.topk_ids_TK, lora)
    chosen = heuristic_tiles(shape) if tiles == "heuristic" else None
    return lambda: fused_moe_lora(*args, lora=lora, tiles=chosen)


def graph_us(call: Callable[[], object], *, batches: int = 7) -> float:
    """Median microseconds of one call: batches of back-to-back replays of a graph that holds one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / times

    replays = max(3, min(30, int(2e4 / max(replay(3), 1.0))))
    return statistics.median(replay(replays) for _ in range(batches))


def _compile(args: argparse.Namespace) -> None:
    """Fills Triton's cache: processes on the same GPU run their share of the cells once."""
    parts = max(1, min(15, (os.cpu_count() or 2) - 1))
    command = [sys.executable, __file__, *sys.argv[1:], "--compile-part"]
    processes = [subprocess.Popen([*command, f"{part}/{parts}"]) for part in range(parts)]
    if sum(process.wait() for process in processes):
        sys.exit("compiling the kernels failed")


def _compile_part(args: argparse.Namespace) -> None:
    """Weights and adapters hold nothing: which kernels there are does not depend on it."""
    part, parts = args.compile_part
    for shape in args.shapes:
        weights = empty_like(kernel_weights(make_experts(shape, args.format, "meta")), "cuda")
        cases = [(num_tokens, cell) for num_tokens in args.tokens for cell in args.cells]
        for num_tokens, cell in cases[part::parts]:
            batch = make_batch(shape, num_tokens, cell.active, "cuda")
            lora = lora_batch(empty_adapters(shape, cell, "cuda"), batch)
            for adapters in (lora, None):
                _call(batch, weights, adapters, args.tiles)()
        torch.cuda.synchronize()


def _print_row(row: Row) -> None:
    cell = f"{row['slots']}:{row['rank']}:{row['active_adapters']}"
    head = f"{row['shape']:10s} {row['tokens']:5d} {cell:8s} err {row['base_rel_err']:.4f}, delta {row['rel_err']:.4f}"
    if "lora_us" not in row:
        print(head, "WRONG", flush=True)
        return
    base, lora, floor = float(row["base_us"]), float(row["lora_us"]), float(row["floor_us"])
    print(
        f"{head}  off {base:8.1f} us  on {lora:8.1f} us  on/off {lora / base:5.2f}  on/floor {lora / floor:5.2f}",
        flush=True,
    )


def _key(row: Row) -> tuple[float | int | str, ...]:
    shape = str(row["shape"]).partition(" ")[0]  # a peer says behind it what it had to pad
    return shape, row["tokens"], row["slots"], row["rank"], row["active_adapters"]


def _read_peer(format_name: str) -> dict[tuple[float | int | str, ...], Row]:
    """The peer's rows of a format; none where it was not measured."""
    if format_name not in PEER:
        return {}
    rows = map(json.loads, (PEERS / PEER[format_name]).read_text().splitlines())
    return {_key(row): row for row in rows if row.get("format", "bf16") == format_name}


def _speedups(rows: Sequence[Row], others: dict[tuple[float | int | str, ...], Row]) -> dict[str, float]:
    """Another's time over ours, over the cells that it has."""
    both = [(row, others[_key(row)]) for row in rows if _key(row) in others]
    found = {}
    for name, field in (("on", "lora_us"), ("off", "base_us")):
        ratios = [float(other[field]) / float(row[field]) for row, other in both]
        found |= {name: _geomean(ratios), f"{name}_worst": min(ratios)} if ratios else {}
    return {name: round(value, 3) for name, value in found.items()}


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _summary(rows: Sequence[Row], format_name: str) -> dict[str, object]:
    """Geometric means over the cells that were timed; ``speedup``: the peer's time over ours, ``over_bf16`` ours.

    Both are empty where there is nothing to compare with.
    """
    timed = [row for row in rows if "lora_us" in row]
    bf16 = {} if format_name == "bf16" else {_key(row): row for row in map(json.loads, BF16.read_text().splitlines())}

    def by_tokens(above: str, below: str) -> dict[str, float]:
        """Of the rows that have both; those of earlier runs may lack a field."""
        ratios: dict[int, list[float]] = {}
        for row in timed:
            if row.keys() >= {above, below}:
                ratios.setdefault(int(row["tokens"]), []).append(float(row[above]) / float(row[below]))
        return {str(tokens): round(_geomean(ratios[tokens]), 3) for tokens in sorted(ratios)}

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cells": len(timed),
        "wrong_cells": len(rows) - len(timed),
        "format": format_name,
        "speedup": _speedups(timed, _read_peer(format_name)),
        "over_bf16": _speedups(timed, bf16),
        "off_over_floor": by_tokens("base_us", "base_floor_us"),
        "on_over_floor": by_tokens("lora_us", "floor_us"),
        "on_over_off": by_tokens("lora_us", "base_us"),
    }


def _plot(rows: Sequence[Row], peer: dict[tuple[float | int | str, ...], Row], path: Path) -> None:
    """Multiples of the floor over tokens, geometric mean over shapes and cells: ours and, of its cells, the peer's."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "lora_us" in row]
    tokens = sorted({int(row["tokens"]) for row in timed})
    fig, axes = plt.subplots(figsize=(6, 4))
    for label, source in (("moegraft", {_key(row): row for row in timed}), ("vLLM 0.24", peer)):
        both = [row for row in timed if _key(row) in source]
        multiples = {
            t: [float(source[_key(r)]["lora_us"]) / float(r["floor_us"]) for r in both if r["tokens"] == t]
            for t in tokens
        }
        measured = [t for t in tokens if multiples[t]]
        axes.plot(measured, [_geomean(multiples[t]) for t in measured], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time with LoRA / floor")
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.legend()
    fig.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()

"""A whole MoE layer with LoRA, own sorting included, over the grid of shapes, tokens and adapters.

    python benchmarks/moe_lora_grid.py [--format int4] [--shapes qwen3-30b,...] [--tokens 1,8,...] [--cells 8:16:8,...]
                                       [--tiles heuristic] [--cold] [--out ROWS] [--against PEER_ROWS...]
                                       [--kits FOLDER...]
    python benchmarks/moe_lora_grid.py --variants [--format ...] [--shapes ...] [--tokens ...] [--cells ...]
    python benchmarks/moe_lora_grid.py --rows ROWS [--against PEER_ROWS...]

Correctness first, over every token: a cell whose output or delta is off by more than 1e-2 of the float32 oracle's, or
one token's delta by 5e-2, is not timed, and the run fails.
Times are medians of back-to-back CUDA-graph replays; ``--cold`` adds times with L2 overwritten before each. The card's
ceilings are measured in the run. ``--against`` compares with other engines' rows of the same device, stopwatch and
date, and refuses others. Prints a line a cell, tables, and last one JSON document. Kernels are compiled beforehand by
parallel processes. ``--tiles heuristic`` leaves the shipped and the user's tables out; ``--rows`` measures nothing and
needs no GPU: it prints the tables of rows that a run left in ``--out``, of the shapes, tokens and cells asked for.
``--kits`` measures other engines in the same run, before ours: each folder has a ``layer.sh`` that is given FORMAT,
SHAPES, TOKENS, CELLS and OUT, and writes rows to the JSON-lines file OUT: engine (name and version), the cell, lora_us,
base_us and the errors that it found (rel_err, base_rel_err), timed as ``stopwatch.graph_us`` does. A format that it
does not have gives no rows. A row without its errors, or with one above 2e-2, is in no ratio, and the run fails.
``--variants`` times the other ways of a call that ``tuner.search.variants`` lists, each checked as a cell is, a line
each with its times over the floor; the first is the way that calls take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    count_work,
    empty_adapters,
    empty_like,
    kernel_weights,
    lora_batch,
    make_adapters,
    make_batch,
    make_experts,
)
from grid_report import (
    SAME_RUN,
    NotComparable,
    Row,
    cell_of,
    facts_of,
    on_over_floor,
    on_over_off,
    read_peers,
    read_rows,
    summary,
    tables,
)
from stopwatch import cold_us, graph_us, measure_ceilings, run_facts

from moegraft.formats.base import ExpertsWeights
from moegraft.kernels.moe_forward.host import fused_moe_lora, tuning_shape
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.tuner.search import variants
from moegraft.tuning.heuristic import heuristic_tiles
from moegraft.tuning.tiles import MoETiles

DEVICE = "cuda"
MAX_PEER_ERR = 2e-2


def main() -> None:
    args = _parse()
    try:
        if args.rows is not None:
            rows = _chosen(read_rows(args.rows), args)
            _report(rows, facts_of(rows, args.rows.name), args.against)
            return
        if args.compile_part is not None:
            _compile_part(args)
            return
        if args.variants:
            _measure_variants(args)
            return
        read_peers(args.against, run_facts())  # refused before hours go into a run
        peers, num_wrong = _measure_kits(args)
        rows = _measure_all(args)
        _report(rows, run_facts(), [*args.against, *peers])
        if num_wrong:
            sys.exit(f"{num_wrong} rows of other engines are wrong, and in no ratio")
    except NotComparable as error:
        sys.exit(str(error))
    failed = sum("lora_us" not in row for row in rows)
    if failed:
        sys.exit(f"{failed} cells are wrong and were not timed")


def _measure_all(args: argparse.Namespace) -> list[Row]:
    facts = {"engine": "moegraft", **run_facts()}
    _compile(args)
    torch.backends.cuda.matmul.allow_tf32 = False
    facts |= measure_ceilings(args.format).row()
    rows: list[Row] = []
    for shape in args.shapes:
        experts = make_experts(shape, args.format, DEVICE)
        base: dict[int, Row] = {}
        for cell in args.cells:
            adapters = make_adapters(shape, [cell.rank] * cell.slots, DEVICE)
            for num_tokens in args.tokens:
                rows.append({**facts, **_measure(shape, cell, experts, adapters, num_tokens, base, args)})
                _print_row(rows[-1])
                if args.out is not None:
                    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
            del adapters
            torch.cuda.empty_cache()
        del experts
    return rows


def _measure_kits(args: argparse.Namespace) -> tuple[list[Path], int]:
    """(files of rows, one an engine; rows that were wrong). A kit that fails ends the run."""
    facts = {field: run_facts()[field] for field in SAME_RUN}
    asked = [
        args.format, ",".join(shape.name for shape in args.shapes), ",".join(map(str, args.tokens)),
        ",".join(map(str, args.cells)),
    ]  # fmt: skip
    folder = Path(tempfile.mkdtemp()) if args.out is None else args.out.parent
    files, wrong = [], 0
    for kit in args.kits:
        raw = Path(tempfile.mkdtemp()) / "rows.jsonl"
        subprocess.run(["bash", str(kit / "layer.sh"), *asked, str(raw)], check=True)
        rows = [] if not raw.exists() else [json.loads(line) for line in raw.read_text().splitlines()]
        right = [row for row in rows if _is_right(row)]
        wrong += len(rows) - len(right)
        for engine in dict.fromkeys(row["engine"] for row in right):
            files.append(folder / f"{engine}.jsonl")
            of_engine = [{**row, **facts, "format": args.format} for row in right if row["engine"] == engine]
            files[-1].write_text("".join(json.dumps(row) + "\n" for row in of_engine))
            print(f"{engine}: {len(of_engine)} cells", flush=True)
    return files, wrong


def _is_right(row: Row) -> bool:
    """A peer's row: timed, and small errors; NaN is none."""
    errors = (row.get("rel_err", math.inf), row.get("base_rel_err", math.inf))
    return "lora_us" in row and all(error <= MAX_PEER_ERR for error in errors)


def _measure_variants(args: argparse.Namespace) -> None:
    """A line a variant: off and on in microseconds and over the floor, and the sum of both over the first variant's."""
    _compile(args)
    torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = measure_ceilings(args.format)
    print(f"{torch.cuda.get_device_name()}, copy {ceilings.bytes_per_s / 1e12:.3f} TB/s", flush=True)
    for shape in args.shapes:
        experts = make_experts(shape, args.format, DEVICE)
        weights = kernel_weights(experts)
        for cell in args.cells:
            adapters = make_adapters(shape, [cell.rank] * cell.slots, DEVICE)
            for num_tokens in args.tokens:
                batch = make_batch(shape, num_tokens, cell.active, DEVICE)
                works = [count_work(shape, batch, rank, experts.num_bytes / shape.E) for rank in (0, cell.rank)]
                floors = [w.floor_us(bytes_per_s=ceilings.bytes_per_s, flops_per_s=ceilings.flops_per_s) for w in works]
                _print_variants(f"{shape.name} {num_tokens} {cell}", batch, weights, experts, adapters, floors)
            del adapters


def _print_variants(
    name: str, batch: Batch, weights: MoEWeights, experts: ExpertsWeights, adapters: Adapters, floors: Sequence[float]
) -> None:
    print(f"{name}: floor {floors[0]:.1f} · {floors[1]:.1f} us", flush=True)
    loras = (None, lora_batch(adapters, batch))
    first = None
    for variant, tiles in _variants(batch, weights, loras[1]).items():
        off, on = (_call(batch, weights, lora, tiles) for lora in loras)
        try:
            errors = check_layer(on(), off(), experts, adapters, batch)
            times = [graph_us(call) for call in (off, on)]
        except Exception as error:  # what does not fit the device
            print(f"  {variant:32s} {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}", flush=True)
            continue
        first = first or sum(times)
        over = " ".join(f"{us:8.2f} ({us / floor:.2f})" for us, floor in zip(times, floors, strict=True))
        verdict = "" if errors.small else f"  WRONG {errors}"
        print(f"  {variant:32s} {over}  {sum(times) / first:.3f}{verdict}", flush=True)


def _variants(batch: Batch, weights: MoEWeights, lora: LoRABatch | None) -> dict[str, MoETiles]:
    return variants(tuning_shape(batch.x_TD, weights, batch.topk_ids_TK, lora))


def _chosen(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """The rows of the shapes, tokens and cells that were asked for."""
    shapes, cells = {shape.name for shape in args.shapes}, set(map(str, args.cells))
    return [row for row in rows if row["shape"] in shapes and row["tokens"] in args.tokens and cell_of(row) in cells]


def _report(rows: Sequence[Row], facts: dict[str, Any], against: Sequence[Path]) -> None:
    peers = read_peers(against, facts)
    print(", ".join(f"{field}: {facts[field]}" for field in SAME_RUN))
    if any("lora_us" in row for row in rows):
        print(f"\n{tables(rows, peers)}\n")
    print(json.dumps({**facts, **summary(rows, peers)}, allow_nan=False))


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES.values()))
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--tokens", type=lambda s: list(map(int, s.split(","))), default=list(TOKENS))
    parser.add_argument("--cells", type=lambda s: list(map(Cell.parse, s.split(","))), default=list(CELLS))
    parser.add_argument("--tiles", choices=("tables", "heuristic"), default="tables")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--kits", type=Path, nargs="+", default=[])
    parser.add_argument("--against", type=Path, nargs="+", default=[])
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
    base: dict[int, Row],
    args: argparse.Namespace,
) -> Row:
    """One cell; ``base``: times without adapters that other cells of the layer share, by tokens."""
    batch = make_batch(shape, num_tokens, cell.active, DEVICE)
    weights = kernel_weights(experts)
    with_lora, without = (_call(batch, weights, lora, args.tiles) for lora in (lora_batch(adapters, batch), None))

    row: Row = {"shape": shape.name, "tokens": num_tokens, "slots": cell.slots, "active_adapters": cell.active}
    errors = check_layer(with_lora(), without(), experts, adapters, batch)
    row |= {"rank": cell.rank, "rel_err": errors.delta, "base_rel_err": errors.base}
    row |= {"worst_token_err": errors.worst_token, "format": args.format}
    for prefix, rank in (("", cell.rank), ("base_", 0)):
        work = count_work(shape, batch, rank, experts.num_bytes / shape.E)
        row |= {f"{prefix}bytes": work.num_bytes, f"{prefix}flops": work.flops}
    if not errors.small:
        return row
    if num_tokens not in base:
        base[num_tokens] = _times("base", without, args.cold)
    return row | base[num_tokens] | _times("lora", with_lora, args.cold)


def _times(name: str, call: Callable[[], object], cold: bool) -> Row:
    times = {f"{name}_us": round(graph_us(call), 2)}
    return times | ({f"{name}_cold_us": round(cold_us(call), 2)} if cold else {})


def _call(
    batch: Batch, weights: MoEWeights, lora: LoRABatch | None, tiles: MoETiles | str
) -> Callable[[], torch.Tensor]:
    """One call of the layer, with these tiles, those of the "tables" or of the "heuristic" alone."""
    args = (batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK)
    shape = tuning_shape(batch.x_TD, weights, batch.topk_ids_TK, lora)
    chosen = tiles if isinstance(tiles, MoETiles) else heuristic_tiles(shape) if tiles == "heuristic" else None
    return lambda: fused_moe_lora(*args, lora=lora, tiles=chosen)


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
        weights = empty_like(kernel_weights(make_experts(shape, args.format, "meta")), DEVICE)
        calls = []
        for num_tokens, cell in itertools.product(args.tokens, args.cells):
            batch = make_batch(shape, num_tokens, cell.active, DEVICE)
            lora = lora_batch(empty_adapters(shape, cell, DEVICE), batch)
            ways = _variants(batch, weights, lora).values() if args.variants else [args.tiles]
            calls += [_call(batch, weights, adapters, tiles) for tiles in ways for adapters in (lora, None)]
        for call in calls[part::parts]:
            try:
                call()
            except Exception:  # a variant that does not fit is told of when it is timed
                if not args.variants:
                    raise
        torch.cuda.synchronize()


def _print_row(row: Row) -> None:
    head = f"{row['shape']:10s} {row['tokens']:5d} {cell_of(row):8s}"
    head += f" err {row['base_rel_err']:.4f}, delta {row['rel_err']:.4f}"
    if "lora_us" not in row:
        print(head, "WRONG", flush=True)
        return
    print(
        f"{head}  off {row['base_us']:8.1f} us  on {row['lora_us']:8.1f} us  on/off {on_over_off(row):5.2f}  "
        f"on/floor {on_over_floor(row):5.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

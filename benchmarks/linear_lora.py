"""LoRA on linear maps: microseconds of ``add_lora_linear`` beside the base GEMM and beside its byte floor.

    python benchmarks/linear_lora.py [--quick]
    python benchmarks/linear_lora.py --few-rows      # q, k, v and o of decode steps, with LoRA inside the product

Correctness first: no number is printed for a cell whose delta is off. Every call of a cell reads a map (and adapters)
of its own, and all calls of a cell are one CUDA graph. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from stopwatch import Ceilings, measure_ceilings, run_facts

import moegraft.kernels.linear_few_rows.host as few_rows
from moegraft.kernels.linear_few_rows.host import FewRowsTile, linear_few_rows
from moegraft.kernels.lora_linear.host import add_lora_linear, add_lora_linears
from moegraft.kernels.lora_linear.reference import add_lora_linear_reference
from moegraft.kernels.rms_norm.host import rms_norm
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, LinearLoRA, LinearTarget, ModelTargets
from moegraft.testing.errors import relative_error

DTYPE = torch.bfloat16
MAPS = 12
SHAPES = {"q_proj": (2048, 4096), "k_proj": (2048, 512), "o_proj": (4096, 2048)}
MIXES = {"1 x 16": [16], "32 x 16": [16] * 32, "8 x 64": [64] * 8, "8 of 4..64": [4, 8, 16, 64] * 2}


def make_bank(in_features: int, widths: Sequence[int], ranks: Sequence[int]) -> AdapterBank:
    """Maps "g.i" of ``widths[g]`` outputs, i < MAPS."""
    targets = [
        LinearTarget(name=f"{g}.{i}", in_features=in_features, out_features=width)
        for i in range(MAPS)
        for g, width in enumerate(widths)
    ]
    layout = BankLayout(ModelTargets(model_type="bench", linears={t.name: t for t in targets}), dtype=DTYPE)
    size = 4 * sum(ranks) * sum(in_features + width for width in widths) * MAPS + 64 * layout.page_bytes * len(ranks)
    bank = AdapterBank(layout, capacity_bytes=size, device="cuda", max_slots=len(ranks))
    for i, rank in enumerate(ranks):
        loras = {
            width: LinearLoRA(
                a=torch.randn(rank, in_features, dtype=DTYPE) / in_features**0.5,
                b=torch.randn(rank, width, dtype=DTYPE) / rank**0.5,
            )
            for width in widths
        }
        bank.load(f"a{i}", AdapterWeights(linears={t.name: loras[t.out_features] for t in targets}))
    return bank


def microseconds(call: Callable[[int], None]) -> float:
    """Time of one call, from replays of a graph of one call a map."""
    for i in range(MAPS):
        call(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(MAPS):
            call(i)
    times = []
    for _ in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / MAPS)
    return statistics.median(times)


def run_cell(
    bank: AdapterBank, shape: tuple[int, int], ranks: list[int], num_rows: int, ceilings: Ceilings
) -> dict[str, float]:
    in_features, out_features = shape
    x = torch.randn(num_rows, in_features, dtype=DTYPE, device="cuda")
    ys = [torch.randn(num_rows, out_features, dtype=DTYPE, device="cuda") for _ in range(MAPS)]
    weights = [torch.randn(out_features, in_features, dtype=DTYPE, device="cuda") for _ in range(MAPS)]
    run_length = max(1, num_rows // 8) if num_rows > 128 else 1
    slots = torch.randint(len(ranks), (-(-num_rows // run_length),)).repeat_interleave(run_length)[:num_rows]
    tables = [bank.linear_tables(f"0.{i}") for i in range(MAPS)]
    token_slots = slots.int().cuda()

    def lora(i: int) -> None:
        add_lora_linear(ys[i], x, token_slots, tables[i], rank_bound=max(ranks), run_length=run_length)

    def base(i: int) -> None:
        torch.mm(x, weights[i].T, out=ys[i])

    before, expected = ys[0].clone(), ys[0].clone()
    lora(0)
    add_lora_linear_reference(expected, x, token_slots, tables[0])
    error = relative_error(ys[0].double() - before.double(), expected.double() - before.double())
    if not error <= 1e-2:
        raise SystemExit(f"wrong delta: {shape} {ranks} {num_rows} rows: relative error {error:.2e}")
    del expected, before
    distinct = slots.unique().tolist()
    floor_bytes = 2 * sum(ranks[s] for s in distinct) * (in_features + out_features)
    floor_bytes += 2 * num_rows * (in_features + 2 * out_features)
    lora_us = microseconds(lora)
    for y in ys:
        y.zero_()
    return {
        "lora_us": lora_us,
        "base_us": microseconds(base),
        "floor_us": 1e6 * floor_bytes / ceilings.bytes_per_s,
        "rel_err": error,
    }


def few_rows_cells(
    bank: AdapterBank, in_features: int, widths: Sequence[int], num_rows: int, tiles: Sequence[FewRowsTile]
) -> list[dict[str, Any]]:
    """A norm, then maps of one input: torch's products and LoRA behind them, and each tile of the product with LoRA
    inside; without adapters, and with eight of rank 16. Microseconds of norm and maps."""
    x = torch.randn(num_rows, in_features, dtype=DTYPE, device="cuda")
    gamma = torch.ones(in_features, dtype=DTYPE, device="cuda")
    scale = in_features**-0.5
    weights = [[torch.randn(n, in_features, dtype=DTYPE, device="cuda") * scale for n in widths] for _ in range(MAPS)]
    slots = (torch.arange(num_rows) % 8).int().cuda()
    tables = [[bank.linear_tables(f"{g}.{i}") for g in range(len(widths))] for i in range(MAPS)]
    biases: list[None] = [None] * len(widths)

    def behind(i: int, *, has_lora: bool) -> list[torch.Tensor]:
        h = rms_norm(x, gamma, 1e-6)
        ys = [torch.nn.functional.linear(h, weight) for weight in weights[i]]
        if has_lora and len(ys) > 1:
            add_lora_linears(ys, h, slots, tables[i], rank_bound=16, biases=biases)
        elif has_lora:
            add_lora_linear(ys[0], h, slots, tables[i][0], rank_bound=16)
        return ys

    def inside(i: int, tile: FewRowsTile, *, has_lora: bool) -> list[torch.Tensor]:
        h = rms_norm(x, gamma, 1e-6)
        options = {"token_slots_M": slots, "tables": tables[i], "rank_bound": 16} if has_lora else {}
        return linear_few_rows(h, weights[i], biases, tile=tile, **options)

    cells = []
    for tile in (None, *tiles):
        cell: dict[str, Any] = {"rows": num_rows, "widths": widths, "tile": tile and asdict(tile)}
        for has_lora in (False, True):
            call = partial(behind, has_lora=has_lora) if tile is None else partial(inside, tile=tile, has_lora=has_lora)
            for y, expected in zip(call(0), behind(0, has_lora=has_lora), strict=True):
                error = relative_error(y.double(), expected.double())
                if not error <= 1e-2:
                    raise SystemExit(f"wrong: {cell}: relative error {error:.2e}")
            cell["lora_us" if has_lora else "base_us"] = microseconds(call)
        cells.append(cell)
        name = "torch" if tile is None else " ".join(str(value) for value in asdict(tile).values())
        print(f"{num_rows:4} {widths!s:18} {name:28} {cell['base_us']:7.2f} {cell['lora_us']:7.2f}", flush=True)
    return cells


def few_rows_tiles(num_rows: int, widths: Sequence[int], in_features: int) -> list[FewRowsTile]:
    """What is chosen, and its neighbours."""
    chosen = few_rows.choose_tile(num_rows, sum(widths), in_features)
    changes: list[dict[str, Any]] = [{}, {"block_n": 16}, {"block_n": 32}, {"block_n": 64}]
    if num_rows == 8:
        changes += [{"num_stages": 6}, {"block_n": 16, "block_k": 256}, {"num_warps": 2}]
    tiles = [replace(chosen, **change) for change in changes]
    shared = {tile: 2 * tile.block_k * (max(16, num_rows) + tile.block_n) * (tile.num_stages - 1) for tile in tiles}
    return [tile for tile in dict.fromkeys(tiles) if shared[tile] <= 200 * 1024]


def run_few_rows(all_rows: Sequence[int]) -> None:
    few_rows.MAX_ROWS = max(all_rows)
    cells = []
    print("rows widths             tile (n, k, slots, r, stages, warps)  base us  LoRA us")
    for in_features, widths in ((2048, (4096, 512, 512)), (4096, (2048,))):
        bank = make_bank(in_features, widths, [16] * 8)
        for num_rows in all_rows:
            tiles = few_rows_tiles(num_rows, widths, in_features)
            cells += few_rows_cells(bank, in_features, widths, num_rows, tiles)
    print(json.dumps({"benchmark": "linear_few_rows", **run_facts(), "cells": cells}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--few-rows", action="store_true", help="the product with LoRA inside")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.few_rows:
        run_few_rows((8, 32, 64))
        return
    ceilings, rows = measure_ceilings(), []
    print(f"{'map':8} {'adapters':12} {'rows':>5} {'base us':>8} {'LoRA us':>8} {'floor us':>8} {'x floor':>8}")
    for shape_name in list(SHAPES)[: 1 if args.quick else None]:
        for mix_name, ranks in MIXES.items():
            bank = make_bank(SHAPES[shape_name][0], SHAPES[shape_name][1:], ranks)
            for num_rows in (1, 8, 32, 128, 4096):
                cell = run_cell(bank, SHAPES[shape_name], ranks, num_rows, ceilings)
                rows.append({"map": shape_name, "adapters": mix_name, "rows": num_rows, **cell})
                print(
                    f"{shape_name:8} {mix_name:12} {num_rows:5} {cell['base_us']:8.1f} {cell['lora_us']:8.1f} "
                    f"{cell['floor_us']:8.2f} {cell['lora_us'] / cell['floor_us']:8.1f}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "linear_lora", **run_facts(), "cells": rows}))


if __name__ == "__main__":
    main()

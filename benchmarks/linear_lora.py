"""LoRA on linear maps: microseconds of ``add_lora_linear`` beside the base GEMM and beside its byte floor.

    python benchmarks/linear_lora.py [--quick]

Correctness first: no number is printed for a cell whose delta is off. Every call of a cell reads a map (and adapters)
of its own, and all calls of a cell are one CUDA graph. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from stopwatch import Ceilings, measure_ceilings, run_facts

from moegraft.kernels.lora_linear.host import add_lora_linear
from moegraft.kernels.lora_linear.reference import add_lora_linear_reference
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, LinearLoRA, LinearTarget, ModelTargets
from moegraft.testing.errors import relative_error

DTYPE = torch.bfloat16
MAPS = 12
SHAPES = {"q_proj": (2048, 4096), "k_proj": (2048, 512), "o_proj": (4096, 2048)}
MIXES = {"1 x 16": [16], "32 x 16": [16] * 32, "8 x 64": [64] * 8, "8 of 4..64": [4, 8, 16, 64] * 2}


def make_bank(in_features: int, out_features: int, ranks: list[int]) -> AdapterBank:
    targets = [LinearTarget(name=str(i), in_features=in_features, out_features=out_features) for i in range(MAPS)]
    layout = BankLayout(ModelTargets(model_type="bench", linears={t.name: t for t in targets}), dtype=DTYPE)
    size = 2 * sum(ranks) * (in_features + out_features) * MAPS * 2 + 64 * layout.page_bytes * len(ranks)
    bank = AdapterBank(layout, capacity_bytes=size, device="cuda", max_slots=len(ranks))
    for i, rank in enumerate(ranks):
        lora = LinearLoRA(
            a=torch.randn(rank, in_features, dtype=DTYPE) / in_features**0.5,
            b=torch.randn(rank, out_features, dtype=DTYPE) / rank**0.5,
        )
        bank.load(f"a{i}", AdapterWeights(linears={t.name: lora for t in targets}))
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
    tables = [bank.linear_tables(str(i)) for i in range(MAPS)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    ceilings, rows = measure_ceilings(), []
    print(f"{'map':8} {'adapters':12} {'rows':>5} {'base us':>8} {'LoRA us':>8} {'floor us':>8} {'x floor':>8}")
    for shape_name in list(SHAPES)[: 1 if quick else None]:
        for mix_name, ranks in MIXES.items():
            bank = make_bank(*SHAPES[shape_name], ranks)
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

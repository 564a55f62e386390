"""What one rank of an 8-GPU node has to do in an experts layer: tensor parallel, expert parallel, or the whole layer.

    python benchmarks/parallel_ranks.py [--shapes qwen3-30b,...] [--tokens 8,...] [--cells 8:16:8,...] [--volumes]

One device stands for a rank: its slice of the experts, the rows that reach it, LoRA off and on. Beside the times stand
the bytes that it sends to others, from the routing and the row formats of moegraft.parallel: no byte travels here.
Correctness first: a cell whose delta is off by more than 1e-2 of the float32 oracle's is not timed, and the run fails.
``--volumes`` prints the bytes alone and needs no GPU. The last line is one JSON document.

Shape letters: T tokens of the node · M rows on the rank · K experts per token · E experts · D hidden size · F
intermediate size · R ranks · r rank of an adapter
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from grid_problem import (
    DTYPE,
    SHAPES,
    Adapters,
    Batch,
    Cell,
    LayerShape,
    check_layer,
    count_work,
    empty_adapters,
    lora_batch,
    make_adapters,
    make_batch,
    make_layer,
)
from stopwatch import Ceilings, graph_us, measure_ceilings, run_facts

from moegraft.kernels.records import MoEWeights
from moegraft.moe.expert_parallel.all_to_all import ranks_needed
from moegraft.parallel.slices import NOWHERE, ExpertMap, ExpertPlacement, shard

RANKS = 8
LAYOUTS = ("whole", "tp8", "ep8")
NODE_SHAPES = {
    **{name: SHAPES[name] for name in ("qwen3-30b", "mixtral", "gptoss20b")},
    "dsv3": LayerShape(name="dsv3", E=256, D=7168, F=2048, K=8),
}
TOKENS = (8, 64, 512, 4096)
CELLS = (Cell(slots=8, rank=16, active=8),)
ID_BYTES, WEIGHT_BYTES, ADAPTER_BYTES = 4, 4, 4
LARGE_LAYER_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class RankProblem:
    """What reaches one rank: its share of the layer, its rows, and which of their choices are its own."""

    shape: LayerShape
    batch: Batch


def main() -> None:
    args = _parse()
    if args.compile_part is not None:
        _compile_part(args)
        return
    volumes = [_volumes(shape, tokens, cell) for shape in args.shapes for tokens in args.tokens for cell in args.cells]
    for row in volumes:
        _print_volumes(row)
    rows: list[dict[str, object]] = []
    if not args.volumes:
        _compile()
        rows = _measure_all(args)
    document = {
        **({} if args.volumes else run_facts()),
        "ranks": RANKS,
        "bytes_sent": volumes,
        "cells": rows,
    }
    print(json.dumps(document))
    wrong = sum("off_us" not in row for row in rows)
    if wrong:
        sys.exit(f"{wrong} cells are wrong and were not timed")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", type=lambda s: [NODE_SHAPES[name] for name in s.split(",")], default=list(NODE_SHAPES.values())
    )
    parser.add_argument("--tokens", type=lambda s: list(map(int, s.split(","))), default=list(TOKENS))
    parser.add_argument("--cells", type=lambda s: list(map(Cell.parse, s.split(","))), default=list(CELLS))
    parser.add_argument("--volumes", action="store_true", help="bytes only")
    parser.add_argument("--compile-part", type=lambda s: tuple(map(int, s.split("/"))), help=argparse.SUPPRESS)
    return parser.parse_args()


def rank_problem(shape: LayerShape, layout: str, num_tokens: int, active: int, device: str) -> RankProblem:
    """What rank 0 holds and sees of a batch of ``num_tokens`` on the node."""
    batch = make_batch(shape, num_tokens, active, "cpu")
    if layout == "tp8":
        shape = replace(shape, name=f"{shape.name}-tp8", F=shard(shape.F, RANKS, 0).padded)
    elif layout == "ep8":
        rank_TK, local_TK = _placement(shape).locate(batch.topk_ids_TK)
        is_mine_TK = rank_TK == 0
        rows_M = is_mine_TK.any(1).nonzero().squeeze(1)
        ids_TK = torch.where(is_mine_TK, local_TK, NOWHERE).int()
        batch = Batch(
            x_TD=batch.x_TD[rows_M],
            topk_ids_TK=ids_TK[rows_M],
            topk_weights_TK=batch.topk_weights_TK.masked_fill(~is_mine_TK, 0)[rows_M],
            token_slots_T=batch.token_slots_T[rows_M],
        )
        shape = replace(shape, name=f"{shape.name}-ep8", E=shape.E // RANKS)
    tensors = {name: tensor.to(device) for name, tensor in vars(batch).items()}
    return RankProblem(shape=shape, batch=Batch(**tensors))


def _placement(shape: LayerShape) -> ExpertPlacement:
    return ExpertPlacement.of(ExpertMap.contiguous(shape.E, RANKS), torch.device("cpu"))


def _volumes(shape: LayerShape, num_tokens: int, cell: Cell) -> dict[str, object]:
    """Bytes that one rank sends to others in a step of one layer, the mean over the ranks.

    The node's tokens are spread over the ranks (expert parallel) or known to all (tensor parallel). An all-reduce is a
    reduce-scatter and an all-gather. ``ep8_minimum``: rows and sums without headers. LoRA adds nothing to what travels
    but the adapter's id, save in the fully sharded layout: low-rank rows of w13 gathered, of w2 reduced.
    """
    T, D, K, r = num_tokens, shape.D, shape.K, cell.rank
    others = (RANKS - 1) / RANKS
    row, header = D * DTYPE.itemsize, K * (ID_BYTES + WEIGHT_BYTES) + ADAPTER_BYTES
    batch = make_batch(shape, T, cell.active, "cpu")
    rank_TK, _ = _placement(shape).locate(batch.topk_ids_TK)
    needed_RT = ranks_needed(rank_TK, RANKS)
    home_T = torch.arange(T) * RANKS // T
    travelling = int(needed_RT.sum() - needed_RT[home_T, torch.arange(T)].sum())
    low_rank = T * K * (2 * -(-r // RANKS) * (RANKS - 1) + 2 * others * r) * DTYPE.itemsize
    return {
        "shape": shape.name,
        "tokens": T,
        "cell": str(cell),
        "tp8": round(2 * others * T * row),
        "tp8_fully_sharded": round(2 * others * T * row + low_rank),
        "ep8_all_to_all": round(travelling * (2 * row + header) / RANKS),
        "ep8_minimum": round(travelling * 2 * row / RANKS),
        "ep8_all_gather": round(T * (RANKS - 1) * (2 * row + header) / RANKS),
        "rows_reaching_a_rank": round(float(needed_RT.sum()) / RANKS, 1),
    }


def _measure_all(args: argparse.Namespace) -> list[dict[str, object]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = measure_ceilings()
    rows: list[dict[str, object]] = []
    for shape in args.shapes:
        for layout in LAYOUTS:
            local = rank_problem(shape, layout, 1, 1, "cpu").shape
            weights = make_layer(local, "cuda")
            for cell in args.cells:
                adapters = make_adapters(local, [cell.rank] * cell.slots, "cuda")
                for num_tokens in args.tokens:
                    problem = rank_problem(shape, layout, num_tokens, cell.active, "cuda")
                    row: dict[str, object] = {"shape": shape.name, "layout": layout, "tokens": num_tokens}
                    row |= {"cell": str(cell), "rows": problem.batch.x_TD.shape[0]}
                    empty = {"off_us": 0.0, "on_us": 0.0}
                    row |= _measure(problem, weights, adapters, cell, ceilings) if row["rows"] else empty
                    rows.append(row)
                    _print_row(row)
                del adapters
            del weights
            torch.cuda.empty_cache()
    return rows


def _measure(
    problem: RankProblem, weights: MoEWeights, adapters: Adapters, cell: Cell, ceilings: Ceilings
) -> dict[str, object]:
    from moegraft.kernels.moe_forward.host import fused_moe_lora

    batch = problem.batch
    lora = lora_batch(adapters, batch)
    args = (batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK)

    def with_lora() -> torch.Tensor:
        return fused_moe_lora(*args, lora=lora)

    def without() -> torch.Tensor:
        return fused_moe_lora(*args)

    errors = check_layer(with_lora(), without(), weights, adapters, batch)
    if not errors.small:
        return {"rel_err": errors.delta}
    return {
        "rel_err": errors.delta,
        "off_us": graph_us(without),
        "on_us": graph_us(with_lora),
        "floor_us": count_work(problem.shape, batch, cell.rank).floor_us(**vars(ceilings)),
    }


def _compile() -> None:
    """Fills Triton's cache: processes on the same GPU run their share of the cells once."""
    parts = max(1, min(15, (os.cpu_count() or 2) - 1))
    command = [sys.executable, __file__, *sys.argv[1:], "--compile-part"]
    processes = [subprocess.Popen([*command, f"{part}/{parts}"]) for part in range(parts)]
    if sum(process.wait() for process in processes):
        sys.exit("compiling the kernels failed")


def _compile_part(args: argparse.Namespace) -> None:
    """Weights hold anything and the adapters nothing: which kernels there are depends on neither."""
    from moegraft.kernels.moe_forward.host import fused_moe_lora

    part, parts = args.compile_part
    layers = [
        (rank_problem(shape, layout, 1, 1, "cpu").shape, shape, layout) for shape in args.shapes for layout in LAYOUTS
    ]
    cases = [(*layer, tokens, cell) for layer in layers for tokens in args.tokens for cell in args.cells]
    # The processes share the device: one of them runs all that is large.
    large = [case for case in cases if 6 * case[0].E * case[0].F * case[0].D > LARGE_LAYER_BYTES]
    small = [case for case in cases if case not in large]
    for local, shape, layout, tokens, cell in [*(large if part == 0 else ()), *small[part::parts]]:
        batch = rank_problem(shape, layout, tokens, cell.active, "cuda").batch
        if not batch.x_TD.shape[0]:
            continue
        weights = MoEWeights(
            w13=torch.empty(local.E, 2 * local.F, local.D, dtype=DTYPE, device="cuda"),
            w2=torch.empty(local.E, local.D, local.F, dtype=DTYPE, device="cuda"),
        )
        for lora in (lora_batch(empty_adapters(local, cell, "cuda"), batch), None):
            fused_moe_lora(batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK, lora=lora)
        del weights
        torch.cuda.empty_cache()
    torch.cuda.synchronize()


def _print_row(row: dict[str, object]) -> None:
    head = f"{row['shape']:10s} {row['layout']:6s} {row['tokens']:5d} tokens, {row['rows']:5d} rows, {row['cell']}"
    if "off_us" not in row:
        print(head, f"delta err {row['rel_err']:.4f} WRONG", flush=True)
        return
    print(head, f"off {row['off_us']:8.1f} us  on {row['on_us']:8.1f} us", flush=True)


def _print_volumes(row: dict[str, object]) -> None:
    names: Sequence[str] = ("tp8", "tp8_fully_sharded", "ep8_all_to_all", "ep8_minimum", "ep8_all_gather")
    sizes = "  ".join(f"{name} {int(str(row[name])) / 1024:.0f} KiB" for name in names)
    print(f"{row['shape']:10s} {row['tokens']:5d} tokens: {sizes}")


if __name__ == "__main__":
    main()

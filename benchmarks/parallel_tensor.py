"""What a tensor-parallel step sends, keeps and takes: adapters cut along F, and fully sharded; real ranks over gloo.

    python benchmarks/parallel_tensor.py [--worlds 1,2,4] [--shapes qwen3-30b,...] [--tokens 1,32] [--steps 20]
                                         [--device cuda]

Every token of a cell with adapters uses one of four, of rank 8. Bytes are counted by the communicators as they send;
what a rank keeps of the adapters is what its bank says. Correctness first: a cell whose output or delta is off from
one process's is not reported, and the run fails. The ranks share this machine's cores, so a step's time is that of all
ranks' work. ``--device cuda``: a GPU a rank, over NCCL; each step is waited for, and timed once more as a CUDA graph
that holds its collectives. Experts have the F of the model, of
which there are fewer than it has. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import torch
from parallel_bytes import Cell, RankLayer, Shape, check, device_name, make_batch, make_weights

from moegraft.cli.launch import run_on_ranks
from moegraft.parallel import ParallelConfig, ParallelGroups

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3-30b", D=2048, E=16, K=8, F=768),
        Shape(name="mixtral", D=4096, E=2, K=2, F=14336),
        Shape(name="gptoss20b", D=2880, E=8, K=4, F=2880),
    )
}


@dataclass(frozen=True, kw_only=True)
class Request:
    shape: Shape
    world: int
    tokens: tuple[int, ...]
    steps: int
    device: str


def work(request: Request, rank: int) -> list[dict[str, object]]:
    """On every rank: one shape, both ways; the rows are rank 0's."""
    torch.set_num_threads(1)
    weights = make_weights(request.shape, "bf16", request.device)
    one = RankLayer(request.shape, weights, ParallelGroups.alone()) if rank == 0 else None
    rows = []
    for fully_sharded in (False, True) if request.world > 1 else (False,):
        groups = ParallelGroups.create(ParallelConfig(tp=request.world, fully_sharded=fully_sharded), request.device)
        layer = RankLayer(request.shape, weights, groups)
        rows += [run_cell(request, tokens, groups, layer, one) for tokens in request.tokens]
    return rows


def run_cell(
    request: Request, tokens: int, groups: ParallelGroups, layer: RankLayer, one: RankLayer | None
) -> dict[str, object]:
    cell = Cell(shape=request.shape, layout="tp", format="bf16", tokens=tokens, adapters=1.0, skewed=False)
    batch = make_batch(cell, 1, request.device)
    without, found = (layer.steps(batch, 1, lora=lora) for lora in (False, True))
    wrong = None if one is None else check(without.out, found.out, one, batch)
    groups.world.barrier()
    base, lora = (layer.steps(batch, request.steps, lora=lora) for lora in (False, True))
    bank = layer.bank.bank
    graphs = [layer.graph_us(batch, lora=lora) for lora in (False, True)] if request.device == "cuda" else []
    return {
        "shape": request.shape.name,
        "world": request.world,
        "fully_sharded": groups.config.fully_sharded,
        "tokens": tokens,
        "sent_without_adapters": round(base.sent_bytes),
        "sent": round(lora.sent_bytes),
        "adapter_bytes": sum(bank.info(name).num_bytes for name in bank.names()),
        "base_ms": round(base.milliseconds, 3),
        "lora_ms": round(lora.milliseconds, 3),
        "graph_us": [round(us, 1) for us in graphs],
        "wrong": wrong,
    }


def print_row(row: dict[str, object]) -> None:
    way = "fully sharded" if row["fully_sharded"] else "cut along F"
    head = f"{row['shape']:10s} tp={row['world']} {way:13s} {row['tokens']:4d} tokens"
    if row["wrong"]:
        print(head, "WRONG:", row["wrong"], flush=True)
        return
    base, sent, held = (int(str(row[name])) / 1024 for name in ("sent_without_adapters", "sent", "adapter_bytes"))
    print(
        f"{head}  a rank sends {base:8.1f} KiB, with adapters {sent:8.1f}, and keeps {held:8.1f} KiB of them"
        f"  base {row['base_ms']:7.2f} ms  lora {row['lora_ms']:7.2f} ms"
        f"  as graphs {row['graph_us']} us",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=lambda s: list(map(int, s.split(","))), default=[1, 2, 4])
    parser.add_argument(
        "--shapes", type=lambda s: [SHAPES[name] for name in s.split(",")], default=list(SHAPES.values())
    )
    parser.add_argument("--tokens", type=lambda s: tuple(map(int, s.split(","))), default=(1, 32))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for shape in args.shapes:
        for world in args.worlds:
            request = Request(shape=shape, world=world, tokens=args.tokens, steps=args.steps, device=args.device)
            found = run_on_ranks(work, request, size=world, device=torch.device(args.device))
            for row in found:
                print_row(row)
            rows += found
    wrong = sum(row["wrong"] is not None for row in rows)
    right = [row for row in rows if row["wrong"] is None]
    print(json.dumps({"device": device_name(args.device), "steps": args.steps, "cells": right}))
    if wrong:
        sys.exit(f"{wrong} cells are wrong and are not reported")


if __name__ == "__main__":
    main()

"""What an expert-parallel step sends against what its routing demands, and what it takes: real ranks over gloo.

    python benchmarks/parallel_bytes.py [--worlds 2,4] [--shapes qwen3-30b,...] [--tokens 1,32] [--formats bf16]
                                        [--device cuda]

Bytes are counted by the communicators as they send. What the routing demands is counted apart from the code that
dispatches, token by token: each rank that holds an expert of a token is sent the token's row once and sends one sum
back. A row is 2 D bytes in bfloat16, D bytes and its scales where fp8 weights read it and no adapter does. Headers (the
choices and the adapter's id of each row sent, and the exchanged counts) are listed beside it.

Correctness first: a cell whose output or delta is off from one process's, or whose base rows have other bits than
without adapters, is not reported, and the run fails. Ranks share this machine's cores: a step's time is that of all
ranks' work, and F is small, so that it is the exchange that is seen. ``--device cuda``: a GPU a rank, over NCCL; each
step is waited for, so that its time is what the host spends on it too. The last line is one JSON document.

Shape letters: T tokens of a rank · K experts per token · E experts · D hidden size · F intermediate size · R ranks
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from stopwatch import graph_us

from moegraft.build import build_fused_moe_with_lora, build_parallel_moe, take_slice
from moegraft.cli.launch import run_on_ranks
from moegraft.core.config import MoEConfig
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.collective_bank import CollectiveBank
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets, local_targets
from moegraft.moe.layer import FusedMoE, FusedMoEWithLoRA
from moegraft.parallel import ParallelConfig, ParallelGroups
from moegraft.parallel.slices import ExpertMap, RankSlice, Share, experts_slice
from moegraft.testing import LoRASpec, make_lora, relative_error

MODULE = "experts"
DTYPE = torch.bfloat16
# Outputs are rounded to bfloat16 (2**-9) once in one process, and once more on each rank that sends a partial sum.
MAX_OUTPUT_ERR, MAX_DELTA_ERR = 1e-2, 3e-2
RANK_OF_ADAPTER, NUM_ADAPTERS, GROUP = 8, 4, 128
TURNS = 5
COUNTS_BYTES = 32
"""A peer: rows of both kinds, tokens, and whether there are adapters, as int64."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """D, E and K of a model; F small, since no byte that travels depends on it."""

    name: str
    D: int
    E: int
    K: int
    F: int = 64

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(num_experts=self.E, top_k=self.K, hidden_size=self.D, intermediate_size=self.F, dtype=DTYPE)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3-30b", D=2048, E=128, K=8),
        Shape(name="mixtral", D=4096, E=8, K=2),
        Shape(name="gptoss20b", D=2880, E=32, K=4),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``adapters``: share of the rows that use one of four adapters · ``skewed``: experts chosen by a Zipf law."""

    shape: Shape
    layout: str
    format: str
    tokens: int
    adapters: float
    skewed: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    cells: tuple[Cell, ...]
    world: int
    steps: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of all ranks, T each, rank after rank."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    names: list[str | None]

    def of(self, rows: slice) -> Batch:
        return Batch(x=self.x[rows], ids=self.ids[rows], weights=self.weights[rows], names=self.names[rows])


def make_batch(cell: Cell, world: int, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(7)
    shape, total = cell.shape, cell.tokens * world
    logits = torch.randn(total, shape.E, generator=generator)
    if cell.skewed:
        logits -= 1.5 * torch.arange(1, shape.E + 1).log()
    has_adapter = torch.rand(total, generator=generator) < cell.adapters
    which = torch.randint(NUM_ADAPTERS, (total,), generator=generator)
    return Batch(
        x=torch.randn(total, shape.D, generator=generator).to(device, DTYPE),
        ids=logits.topk(shape.K, dim=1).indices.int().to(device),
        weights=(torch.rand(total, shape.K, generator=generator) / shape.K).to(device),
        names=[f"a{i}" if has else None for i, has in zip(which.tolist(), has_adapter.tolist(), strict=True)],
    )


def make_weights(shape: Shape, format_name: str, device: str = "cpu") -> ExpertsWeights:
    generator = torch.Generator().manual_seed(1)
    w13 = (torch.randn(shape.E, 2 * shape.F, shape.D, generator=generator) / shape.D**0.5).to(device)
    w2 = (torch.randn(shape.E, shape.D, shape.F, generator=generator) / shape.F**0.5).to(device)
    return Fp8Experts.pack(w13, w2) if format_name == "fp8" else DenseExperts(w13=w13.to(DTYPE), w2=w2.to(DTYPE))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Output of a step, median time of it, and bytes that this rank sent in it."""

    out: torch.Tensor
    milliseconds: float
    sent_bytes: float


class RankLayer:
    """One rank's slice of a layer and of its adapters; with groups of one rank, the whole layer."""

    def __init__(self, shape: Shape, weights: ExpertsWeights, groups: ParallelGroups) -> None:
        self.groups = groups
        target = ExpertsTarget(name=MODULE, num_experts=shape.E, hidden_size=shape.D, intermediate_size=shape.F)
        targets = ModelTargets(model_type="plain", experts={MODULE: target})
        expert_map = ExpertMap.contiguous(shape.E, groups.ep.size)
        mine = RankSlice(
            experts={
                MODULE: experts_slice(
                    num_experts=shape.E,
                    intermediate_size=shape.F,
                    tp=Share(groups.tp.size, groups.tp.rank),
                    ep=Share(groups.ep.size, groups.ep.rank),
                    experts=expert_map.experts_of_rank[groups.ep.rank],
                    fully_sharded=groups.config.fully_sharded,
                )
            }
        )
        local = take_slice(weights, mine.experts[MODULE], adds_bias=groups.tp.rank == 0)
        self.base: FusedMoE = build_parallel_moe(shape.config, local, groups, expert_map)[0]
        layout = BankLayout(local_targets(targets, mine), dtype=DTYPE)
        self.bank = CollectiveBank(
            AdapterBank(layout, capacity_bytes=256 << 20, device=weights.device, max_slots=NUM_ADAPTERS), groups
        )
        from support.slicing import slice_adapter

        generator = torch.Generator().manual_seed(2)
        spec = LoRASpec(r_gate=RANK_OF_ADAPTER, r_up=RANK_OF_ADAPTER, r2=RANK_OF_ADAPTER)
        for i in range(NUM_ADAPTERS):
            whole = AdapterWeights(
                experts={MODULE: ExpertsLoRA(**vars(make_lora(spec, shape.config, generator=generator)))}
            )
            part = slice_adapter(whole, targets, mine)
            self.bank.load(f"a{i}", lambda step, part=part: (part, None))
        tables = self.bank.bank.experts_tables(MODULE)
        self.with_lora: FusedMoEWithLoRA = build_fused_moe_with_lora(self.base, tables, groups)

    def steps(self, batch: Batch, count: int, *, lora: bool) -> Steps:
        """``count`` times the same step. Its adapters are acquired once, as an engine does for many steps."""
        seconds = []
        with self.bank.acquire(batch.names) as held:
            rows = AdapterRows.of(held.own.row_slots, device=batch.x.device)
            bounds = RankBounds.of(held.union.max_ranks(MODULE))
            context = self.with_lora.lora_context(rows, bounds, held.group) if lora else None
            before = self._sent_bytes()
            for _ in range(count):
                began = time.perf_counter()
                out = self.base.apply_experts(batch.x, batch.weights, batch.ids, context)
                if out.is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            sent = (self._sent_bytes() - before) / count
        return Steps(out=out, milliseconds=1e3 * statistics.median(seconds), sent_bytes=sent)

    def graph_us(self, batch: Batch, *, lora: bool) -> float:
        """Microseconds of a step as a CUDA graph with its collectives: all ranks replay together."""
        with self.bank.acquire(batch.names) as held:
            rows = AdapterRows.of(held.own.row_slots, device=batch.x.device)
            bounds = RankBounds.of(held.union.max_ranks(MODULE))
            context = self.with_lora.lora_context(rows, bounds, held.group) if lora else None
            return graph_us(lambda: self.base.apply_experts(batch.x, batch.weights, batch.ids, context), replays=30)

    def _sent_bytes(self) -> int:
        groups = self.groups
        return sum(group.traffic.total_bytes for group in (groups.ep, groups.tp, groups.world))


LAYOUTS: dict[str, Callable[[int], ParallelConfig]] = {
    "replicated": lambda world: ParallelConfig(ep=world),
    "all-gather": lambda world: ParallelConfig(ep=world, data_parallel=True, dispatch="all_gather"),
    "all-to-all": lambda world: ParallelConfig(ep=world, data_parallel=True),
}


def demanded_bytes(cell: Cell, batch: Batch, world: int) -> tuple[int, int]:
    """(rows and sums, headers) that all ranks together must send, by the routing alone; one token after the other."""
    shape = cell.shape
    first_of = [sum(shape.E // world + (r < shape.E % world) for r in range(rank)) for rank in range(world + 1)]
    plain = shape.D * DTYPE.itemsize
    packed = shape.D + 4 * -(-shape.D // GROUP) if cell.format == "fp8" else plain
    rows = headers = 0
    for token, ids in enumerate(batch.ids.tolist()):
        home = token // cell.tokens
        needed = {next(r for r in range(world) if first_of[r] <= e < first_of[r + 1]) for e in ids} - {home}
        rows += len(needed) * ((plain if batch.names[token] else packed) + plain)
        headers += len(needed) * (8 * shape.K + 4)
    return rows, headers + world * (world - 1) * COUNTS_BYTES


def work(request: Request, rank: int) -> list[dict[str, object]]:
    """On every rank: all cells of one world; the rows are rank 0's."""
    torch.set_num_threads(1)
    rows, layers, groups = [], {}, {}
    for cell in request.cells:
        if cell.layout not in groups:
            groups[cell.layout] = ParallelGroups.create(LAYOUTS[cell.layout](request.world), request.device)
        key = (cell.shape, cell.format, cell.layout)
        if key not in layers:
            weights = make_weights(cell.shape, cell.format, request.device)
            one = RankLayer(cell.shape, weights, ParallelGroups.alone()) if rank == 0 else None
            layers = {key: (RankLayer(cell.shape, weights, groups[cell.layout]), one)}
        rows.append(run_cell(cell, request, groups[cell.layout], *layers[key]))
    return rows


def run_cell(
    cell: Cell, request: Request, groups: ParallelGroups, layer: RankLayer, one: RankLayer | None
) -> dict[str, object]:
    whole = make_batch(cell, request.world, request.device)
    is_split = cell.layout != "replicated"
    mine = whole.of(slice(groups.rank * cell.tokens, (groups.rank + 1) * cell.tokens)) if is_split else whole

    without, found = (layer.steps(mine, 1, lora=lora) for lora in (False, True))
    outputs = groups.world.all_gather_object((without.out.cpu(), found.out.cpu()))
    wrong = None
    if one is not None:
        gathered = [
            (torch.cat(parts) if is_split else parts[0]).to(whole.x.device) for parts in zip(*outputs, strict=True)
        ]
        wrong = check(gathered[0], gathered[1], one, whole)
    groups.world.barrier()
    # In turns, so that whatever else the machine does meets both.
    turns = [tuple(layer.steps(mine, request.steps, lora=lora) for lora in (False, True)) for _ in range(TURNS)]
    base, lora = turns[0]
    assert torch.equal(base.out, without.out) and torch.equal(lora.out, found.out), "the same batch gave other bits"
    sent = groups.world.all_gather_object((base.sent_bytes, lora.sent_bytes))
    demanded, headers = demanded_bytes(cell, whole, request.world)
    return {
        "shape": cell.shape.name,
        "world": request.world,
        "layout": cell.layout,
        "format": cell.format,
        "tokens": cell.tokens,
        "adapters": cell.adapters,
        "skewed": cell.skewed,
        "demanded": demanded,
        "headers": headers,
        "sent": round(sum(by_rank[1] for by_rank in sent)),
        "sent_without_adapters": round(sum(by_rank[0] for by_rank in sent)),
        "base_ms": round(statistics.median(turn[0].milliseconds for turn in turns), 3),
        "lora_ms": round(statistics.median(turn[1].milliseconds for turn in turns), 3),
        "wrong": wrong,
    }


def check(without: torch.Tensor, found: torch.Tensor, one: RankLayer, batch: Batch) -> str | None:
    """What is wrong with the outputs of all ranks, against one process."""
    expected_base, expected = (one.steps(batch, 1, lora=lora).out for lora in (False, True))
    has_adapter = torch.tensor([name is not None for name in batch.names], device=found.device)
    errors = {"base": relative_error(without, expected_base), "output": relative_error(found, expected)}
    wrong = [f"{what} off by {error:.1e}" for what, error in errors.items() if not error <= MAX_OUTPUT_ERR]
    if has_adapter.any():
        delta = (found.float() - without.float())[has_adapter]
        error = relative_error(delta, (expected.float() - expected_base.float())[has_adapter])
        wrong += [] if error <= MAX_DELTA_ERR else [f"delta off by {error:.1e}"]
    if not torch.equal(found[~has_adapter], without[~has_adapter]):
        wrong.append("base rows have other bits")
    return "; ".join(wrong) or None


def make_cells(shapes: Sequence[Shape], formats: Sequence[str], tokens: Sequence[int]) -> tuple[Cell, ...]:
    """Ordered by layer, so that each is built once."""
    return tuple(
        Cell(shape=shape, layout=layout, format=format_name, tokens=t, adapters=adapters, skewed=skewed)
        for shape in shapes
        for format_name in formats
        for layout in LAYOUTS
        for t in tokens
        for skewed in (False, True)
        for adapters in (0.0, 0.5, 1.0)
        if not (skewed and adapters != 0.5)
    )


def device_name(device: str) -> str:
    """The GPU's name, or cpu."""
    return device if device == "cpu" else torch.cuda.get_device_name()


def print_row(row: dict[str, object]) -> None:
    head = (
        f"{row['shape']:10s} R={row['world']} {row['layout']:10s} {row['format']:4s} {row['tokens']:4d} tokens a rank, "
        f"{100 * row['adapters']:3.0f} % with adapters{', skewed' if row['skewed'] else '        '}"  # type: ignore[operator]
    )
    if row["wrong"]:
        print(head, "WRONG:", row["wrong"], flush=True)
        return
    demanded, headers, sent = (int(str(row[name])) for name in ("demanded", "headers", "sent"))
    ratio = sent / (demanded + headers) if demanded else 0.0
    print(
        f"{head}  demanded {demanded / 1024:8.1f} KiB + {headers / 1024:5.1f}  sent {sent / 1024:8.1f}  {ratio:4.2f} x"
        f"  base {row['base_ms']:7.2f} ms  lora {row['lora_ms']:7.2f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=lambda s: list(map(int, s.split(","))), default=[2, 4])
    parser.add_argument(
        "--shapes", type=lambda s: [SHAPES[name] for name in s.split(",")], default=list(SHAPES.values())
    )
    parser.add_argument("--tokens", type=lambda s: list(map(int, s.split(","))), default=[1, 32])
    parser.add_argument("--formats", type=lambda s: s.split(","), default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=5, help=f"of each of {TURNS} turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for world in args.worlds:
        cells = make_cells(args.shapes, args.formats, args.tokens)
        request = Request(cells=cells, world=world, steps=args.steps, device=args.device)
        found = run_on_ranks(work, request, size=world, device=torch.device(args.device))
        for row in found:
            print_row(row)
        rows += found
    wrong = sum(row["wrong"] is not None for row in rows)
    right = [row for row in rows if row["wrong"] is None]
    print(json.dumps({"device": device_name(args.device), "steps": args.steps, "cells": right}))
    if wrong:
        sys.exit(f"{wrong} cells are wrong and are not reported")


sys.path.append(str(Path(__file__).parents[1] / "tests"))

if __name__ == "__main__":
    main()

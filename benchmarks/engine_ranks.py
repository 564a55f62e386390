"""The whole engine over two or more GPUs, by layout, against one: decode, prefill, adapters off and on.

    python benchmarks/engine_ranks.py [--ranks 2] [--layouts tp,ep,dp] [--batches 1,8,32,128] [--adapters 0,8]
    python benchmarks/engine_ranks.py --device cpu --tiny          over gloo, to try it

A Qwen3-30B-A3B of ``--layers`` layers at full width with random bfloat16 weights, adapters of one rank on experts and
attention, read from safetensors. ``tp``: ranks share F · ``ep``: ranks share the experts, all bring all rows · ``dp``:
the same with a batch and pages on each rank, all-to-all. ``step``: milliseconds between two tokens of a sequence in a
full batch, as a caller of the engine sees them, in the median; ``prefill``: prompts that share nothing.

Correctness first: every request of a mixed batch must get the tokens that one GPU gives it. Sums in another order may
turn near-ties, of which random weights have many: tokens may part where one GPU's log-probabilities of the two are
within ``--tie`` of each other. Anything else, or log-probabilities before that which differ by more than 0.05 in the
mean, and nothing is reported.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from end_to_end_decode import adapter_shapes, write_adapter
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moegraft
from moegraft import ParallelConfig, SamplingParams
from moegraft.cli.launch import run_on_ranks
from moegraft.serving.requests import Completion, Request

CHECKED, CHECKED_TOKENS = 24, 12
SIZES = {"one": (1, 1, False), "tp": (2, 1, False), "ep": (1, 2, False), "dp": (1, 2, True)}


@dataclass(frozen=True, kw_only=True)
class Work:
    layout: str
    args: argparse.Namespace


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured batch. Prefill in tokens a second."""

    layout: str
    batch: int
    adapters: int
    step_ms: float
    prefill: float | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What rank 0 of one layout made: (token, its likeliest log-probabilities) of every step of every request."""

    cells: tuple[Cell, ...]
    checked: tuple[tuple[tuple[int, dict[int, float]], ...], ...]
    captures: int
    load_seconds: float
    sent: dict[str, int]


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    found: dict[str, Found] = {}
    verdicts: dict[str, Any] = {}
    for layout in ("one", *args.layouts):
        start = time.perf_counter()
        size = 1 if layout == "one" else args.ranks
        found[layout] = run_on_ranks(run_layout, Work(layout=layout, args=args), size=size, device=device)
        verdicts[layout] = compare(found["one"], found[layout], args.tie, layout)
        log(f"{layout}: {time.perf_counter() - start:.0f} s, {verdicts[layout]}")
        report(found[layout], found["one"])
    print(json.dumps(summary(found, verdicts, args)))


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=["tp", "ep", "dp"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--adapters", type=numbers, default=[0, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=224, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=60, help="tokens of each sequence in decode")
    parser.add_argument("--prefill", type=int, default=16384, help="tokens of prompts in a prefill run")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--kv-memory", default="6GiB")
    parser.add_argument("--tie", type=float, default=0.1, help="log-probabilities this close are a near-tie")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--dump-after", type=float, help="seconds after which each rank shows where it is")
    parser.add_argument("--scratch", default="/dev/shm", help="where the adapter files are written")
    return parser.parse_args()


def run_layout(work: Work, rank: int) -> Found | None:
    """On every rank: the same weights, then the engine, or its steps."""
    args = work.args
    if args.dump_after:
        faulthandler.dump_traceback_later(args.dump_after, repeat=True)
    start = time.perf_counter()
    torch.manual_seed(0)
    device = "cpu" if args.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    model = make_model(args, device)
    options: dict[str, Any] = {
        "kv_memory": args.kv_memory,
        "max_model_len": max(2048, args.context + args.new + 1),
        "max_rows": max(args.batches),
        "chunk_tokens": args.chunk,
        "prefix_cache": False,
        "cuda_graphs": not args.eager,
        "device": args.device,
    }
    tp, ep, spread = SIZES[work.layout]
    parallel = ParallelConfig(
        tp=args.ranks if tp > 1 else 1, ep=args.ranks if ep > 1 else 1, data_parallel=spread, timeout_seconds=120.0
    )
    count = max(args.adapters)
    options["adapter_memory"] = count * adapter_bytes(model, args.rank) + (64 << 20)
    if dist.get_rank() > 0:
        moegraft.Engine.follow(model, parallel=parallel, **options)
        return None
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        files = [write_adapter(model, Path(scratch) / f"file{i}", rank=args.rank, seed=i) for i in range(min(count, 2))]
        with moegraft.Engine(model, parallel=parallel, **options) as engine:
            log(f"{work.layout}: open after {time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
            for i in range(count):
                engine.load_adapter(f"a{i}", files[i % 2])
            load_seconds = (time.perf_counter() - start) / max(count, 1)
            log(f"{work.layout}: {load_seconds:.2f} s an adapter")
            checked = generate(engine, draw(CHECKED, 40, args, seed=7), count, CHECKED_TOKENS, logprobs=20)
            cells = [
                measure(engine, work.layout, *cell, args) for cell in itertools.product(args.batches, args.adapters)
            ]
            groups = engine._graft.layout.groups
            sent = {
                comm.name: comm.traffic.total_bytes for comm in (groups.tp, groups.ep, groups.world) if comm.size > 1
            }
            captures = engine.stats().graph_captures
    return Found(
        cells=tuple(cells),
        checked=tuple(tuple((entry.token_id, dict(entry.top)) for entry in one.outputs[0].logprobs) for one in checked),
        captures=captures,
        load_seconds=load_seconds,
        sent=sent,
    )


def make_model(args: argparse.Namespace, device: str) -> PreTrainedModel:
    sizes: dict[str, int] = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8,
    }  # fmt: skip
    if args.tiny:
        sizes = {
            "vocab_size": 160, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
            "num_experts_per_tok": 2,
        }  # fmt: skip
    dtype = torch.float32 if args.tiny else torch.bfloat16
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=args.layers, norm_topk_prob=True, max_position_embeddings=40960, dtype=dtype
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def adapter_bytes(model: PreTrainedModel, rank: int) -> int:
    """In the bank, where gate and up have lanes of their own, with room for pages that are not full."""
    layer = sum(lanes * (size_in + size_out) for lanes, size_in, size_out in adapter_shapes(model, rank).values())
    return int(layer * model.config.num_hidden_layers * model.dtype.itemsize * 1.3) + (4 << 20)


def draw(count: int, length: int, args: argparse.Namespace, *, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 150 if args.tiny else 150_000
    return [tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()) for _ in range(count)]


def names_of(rows: int, adapters: int) -> list[str | None]:
    return [f"a{row % adapters}" if adapters else None for row in range(rows)]


def generate(
    engine: moegraft.Engine, prompts: Sequence[tuple[int, ...]], adapters: int, tokens: int, **options: Any
) -> list[Completion]:
    """With adapters in turn, every third row none, where log-probabilities are asked for."""
    names = names_of(len(prompts), adapters)
    if options:
        names = [None if row % 3 == 2 else name for row, name in enumerate(names)]
    params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, **options)
    found = list(engine.generate(list(zip(prompts, names, strict=True)), params))
    for one in found:
        if one.outputs[0].error or len(one.outputs[0].token_ids) != tokens:
            sys.exit(f"{one.request_id}: {one.outputs[0].error or 'cut short'}; nothing is reported")
    return found


def measure(engine: moegraft.Engine, layout: str, batch: int, adapters: int, args: argparse.Namespace) -> Cell:
    adapters = min(adapters, batch)
    generate(engine, draw(batch, args.context, args, seed=3), adapters, 4)  # compiles and captures
    step_ms = min(median_gap(engine, draw(batch, args.context, args, seed=i), adapters, args) for i in range(2))
    prefill = None
    if batch == max(args.batches):
        length = min(1024, args.prefill)
        count = args.prefill // length
        times = []
        for seed in range(3):  # the first compiles
            prompts = draw(count, length, args, seed=seed)
            start = time.perf_counter()
            generate(engine, prompts, adapters, 1)
            times.append(time.perf_counter() - start)
        prefill = count * length / min(times[1:])
    cell = Cell(layout=layout, batch=batch, adapters=adapters, step_ms=step_ms, prefill=prefill)
    log(str(cell))
    return cell


_runs = itertools.count()


def median_gap(
    engine: moegraft.Engine, prompts: Sequence[tuple[int, ...]], adapters: int, args: argparse.Namespace
) -> float:
    """Milliseconds between tokens of the last sequence to begin, while all of them decode."""
    params = SamplingParams(temperature=0, max_tokens=args.new, min_tokens=args.new, ignore_eos=True)
    run = next(_runs)
    streams = [
        engine.submit(Request(request_id=f"{run}-{i}", prompt_ids=ids, adapter=name, sampling=params))
        for i, (ids, name) in enumerate(zip(prompts, names_of(len(prompts), adapters), strict=True))
    ]
    times = [time.perf_counter() for _ in streams[-1]]
    for stream in streams[:-1]:
        for event in stream:
            if event.error:
                sys.exit(f"{event.request_id}: {event.error}; nothing is reported")
    gaps = [after - before for before, after in itertools.pairwise(times[args.new // 4 :])]
    return statistics.median(gaps) * 1e3


def compare(one: Found, other: Found, tie: float, layout: str) -> dict[str, float]:
    """Requests with the tokens of one GPU, those that part at a near-tie, and the mean difference of log-probabilities
    before; exits for anything else."""
    counts, errors = {"same": 0, "near-ties": 0}, []
    for number, (right, found) in enumerate(zip(one.checked, other.checked, strict=True)):
        for (token, top), (taken, other_top) in zip(right, found, strict=True):
            if token == taken:
                errors.append(abs(top[token] - other_top[token]))
            elif taken not in top or top[token] - top[taken] > tie:
                sys.exit(f"{layout}: request {number} has other tokens than on one GPU: {token}, {taken}, {top}")
            else:
                counts["near-ties"] += 1
                break
        else:
            counts["same"] += 1
    error = statistics.mean(errors)
    if error > 0.05:
        sys.exit(f"{layout}: log-probabilities differ from one GPU's by {error:.3f} in the mean; nothing is reported")
    return {**counts, "error": error}


def report(found: Found, one: Found) -> None:
    alone = {(cell.batch, cell.adapters): cell for cell in one.cells}
    print("layout batch LoRAs  step ms    tok/s  vs one   prefill  vs one")
    for cell in found.cells:
        other = alone[cell.batch, cell.adapters]
        prefill = "" if cell.prefill is None else f"{cell.prefill:9.0f} {cell.prefill / (other.prefill or 1):7.2f}"
        rate = cell.batch / cell.step_ms * 1e3
        ratio = other.step_ms / cell.step_ms
        print(
            f"{cell.layout:>6} {cell.batch:5} {cell.adapters:5} {cell.step_ms:8.2f} {rate:8.0f} {ratio:7.2f} {prefill}"
        )
    sys.stdout.flush()


def summary(found: dict[str, Found], verdicts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "engine_ranks",
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": {name: value for name, value in vars(args).items() if name != "scratch"},
        "cells": [asdict(cell) for one in found.values() for cell in one.cells],
        "tokens": verdicts,
        "captures": {layout: one.captures for layout, one in found.items()},
        "load_seconds": {layout: one.load_seconds for layout, one in found.items()},
        "sent_bytes": {layout: one.sent for layout, one in found.items()},
    }


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

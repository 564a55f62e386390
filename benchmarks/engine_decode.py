"""The whole engine on one GPU: decode, prefill, the share of the host, with and without adapters.

    python benchmarks/engine_decode.py [--layers 12] [--batches 1,8,32,128] [--adapters 0,1,8] [--context 224]

A Qwen3-30B-A3B at full width with random bfloat16 weights, adapters of one rank on experts and attention, read from
safetensors. ``step``: milliseconds between two tokens of a sequence in a full batch, as a caller of the engine sees
them, in the median; ``graph``: the same step's CUDA graph alone; ``prefill``: prompts that share nothing, to their
first token. Correctness first: the log-probabilities of what the engine generated, with mixed adapters, must be those
of the attached model over transformers' own attention, or nothing is reported. Prints a table and, last, one JSON line.
``--trace`` also lists each cell's kernels: launches a step, their microseconds, and how much later the step's end is by
each: kernels that run at once share the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from end_to_end_decode import log, make_model, milliseconds, write_adapter
from transformers import PreTrainedModel

import moegraft
import moegraft.kernels.linear_few_rows.host as few_rows
from moegraft import SamplingParams
from moegraft.serving.attention import IMPLEMENTATION
from moegraft.serving.fused import FusedParts
from moegraft.serving.requests import Completion, Request

VOCABULARY = 150_000
NEW = 80
"""Tokens of each sequence; the gaps between the last three quarters of them are timed."""


_runs = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured batch. Prefill in tokens a second."""

    batch: int
    adapters: int
    step_ms: float
    graph_ms: float | None
    prefill: float | None


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    if args.few_rows is not None:
        few_rows.MAX_ROWS = args.few_rows
    model = make_model(args.layers)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        count = max(args.adapters)
        paths = [write_adapter(model, Path(scratch) / f"file{i}", rank=args.rank, seed=i) for i in range(min(count, 2))]
        size = sum(file.stat().st_size for path in paths[:1] for file in path.iterdir())
        adapters = {f"a{i}": paths[i % len(paths)] for i in range(count)}
        memory = int(count * size * 1.02) + (64 << 20)
        start = time.perf_counter()
        engine = moegraft.Engine(
            model,
            adapters=adapters,
            adapter_memory=memory,
            kv_memory=args.kv_memory,
            max_model_len=2048,
            max_rows=max(args.batches),
            chunk_tokens=args.chunk,
            prefix_cache=False,
            **({"cuda_graphs": False} if args.eager else {}),
        )
        log(f"engine with {count} adapters of {size / 2**20:.0f} MiB: {time.perf_counter() - start:.0f} s")
        with engine:
            found = generate(engine, draw(8, 40, seed=7), mixed(8, count), 12, logprobs=0)
            correctness = engine._loop.call(lambda: check(engine, found))
            log(f"correct: {correctness}")
            cells = []
            for batch in args.batches:
                for adapters_used in args.adapters:
                    if adapters_used <= batch:
                        cells.append(measure(engine, batch, adapters_used, args))
                        log(str(cells[-1]))
                        if args.trace:
                            trace(engine, batch, adapters_used > 0)
            stats = engine.stats()
    report(cells, correctness, stats.graph_captures, args)


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--adapters", type=numbers, default=[0, 1, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=224, help="tokens of a prompt; decode adds 80")
    parser.add_argument("--prefill", type=int, default=16384, help="tokens of prompts in a prefill run")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--kv-memory", default="8GiB")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--trace", action="store_true", help="list the kernels of each cell's step")
    parser.add_argument("--few-rows", type=int, help="rows up to which linear maps have LoRA inside their product")
    parser.add_argument("--scratch", default="/dev/shm", help="where the adapter files are written")
    return parser.parse_args()


def draw(count: int, length: int, *, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()) for _ in range(count)]


def mixed(rows: int, adapters: int) -> list[str | None]:
    """Adapters in turn, every third row none."""
    return [None if row % 3 == 2 or not adapters else f"a{row % adapters}" for row in range(rows)]


def generate(
    engine: moegraft.Engine,
    prompts: Sequence[tuple[int, ...]],
    names: Sequence[str | None],
    tokens: int,
    **options: Any,
) -> list[Completion]:
    params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, **options)
    found = list(engine.generate(list(zip(prompts, names, strict=True)), params))
    for one in found:
        if one.outputs[0].error or len(one.outputs[0].token_ids) != tokens:
            sys.exit(f"{one.request_id}: {one.outputs[0].error or 'cut short'}; nothing is reported")
    return found


def measure(engine: moegraft.Engine, batch: int, adapters: int, args: argparse.Namespace) -> Cell:
    names = [f"a{row % adapters}" if adapters else None for row in range(batch)]

    def seconds(tokens: int, length: int, count: int = batch, seed: int = 0) -> float:
        prompts = draw(count, length, seed=seed)
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(engine, prompts, [names[row % batch] for row in range(count)], tokens)
        return time.perf_counter() - start

    seconds(4, args.context)  # compiles and captures
    step_ms = min(median_gap(engine, draw(batch, args.context, seed=0), names) for _ in range(2))
    prefill = None
    if batch == max(args.batches):
        count, length = args.prefill // 1024, 1024
        seconds(1, length, count)
        prefill = count * length / min(seconds(1, length, count, seed) for seed in (1, 2))
    return Cell(
        batch=batch,
        adapters=adapters,
        step_ms=step_ms,
        graph_ms=graph_milliseconds(engine, batch, adapters > 0),
        prefill=prefill,
    )


def median_gap(engine: moegraft.Engine, prompts: Sequence[tuple[int, ...]], names: Sequence[str | None]) -> float:
    """Milliseconds between tokens of the first sequence, while all of them decode."""
    params = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
    run = next(_runs)
    streams = [
        engine.submit(Request(request_id=f"{run}-{i}", prompt_ids=ids, adapter=name, sampling=params))
        for i, (ids, name) in enumerate(zip(prompts, names, strict=True))
    ]
    times = [time.perf_counter() for _ in streams[-1]]  # the last to begin: all others decode by then
    for stream in streams[:-1]:
        for event in stream:
            if event.error:
                sys.exit(f"{event.request_id}: {event.error}; nothing is reported")
    gaps = [after - before for before, after in itertools.pairwise(times[NEW // 4 :])]
    return statistics.median(gaps) * 1e3


def graph_milliseconds(engine: moegraft.Engine, batch: int, has_adapters: bool) -> float | None:
    """The graph of the step that ran last at this size; None without graphs."""
    replay = replay_of(engine, batch, has_adapters)
    return None if replay is None else engine._loop.call(lambda: milliseconds(replay, 20))


def replay_of(engine: moegraft.Engine, batch: int, has_adapters: bool) -> Callable[[], None] | None:
    graphs = engine._loop.runner._graphs
    captured = None if graphs is None else graphs.captured(batch, has_adapters)
    return None if captured is None else captured.replay


def trace(engine: moegraft.Engine, batch: int, has_adapters: bool) -> None:
    """Logs the kernels of a captured step, the longest first."""
    replay = replay_of(engine, batch, has_adapters)
    if replay is None:
        return

    def record() -> torch.profiler.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                replay()
            torch.cuda.synchronize()
        return profile

    events = sorted(
        (event for event in engine._loop.call(record).events() if event.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda event: event.time_range.end,
    )
    found: dict[str, list[float]] = {}
    last = events[0].time_range.start
    for event in events:
        times = found.setdefault(event.name, [0.0, 0.0, 0.0])
        times[0] += 0.1
        times[1] += event.time_range.elapsed_us() / 10
        times[2] += (event.time_range.end - last) / 10
        last = event.time_range.end
    log(f"kernels at batch {batch}{' with adapters' if has_adapters else ''}: launches, own us and added us a step")
    for name, (launches, own, added) in sorted(found.items(), key=lambda item: -item[1][2]):
        log(f"  {launches:6.1f} {own:9.1f} {added:9.1f}  {name[:90]}")


def check(engine: moegraft.Engine, found: Sequence[Completion]) -> dict[str, float]:
    """Differences of log-probabilities from the attached model's, over transformers' own attention, norms and routers;
    ends the run where they are not small beside what an adapter does."""
    runner, graft = engine._loop.runner, engine._graft
    model: PreTrainedModel = graft.model
    runner._fused.remove()
    model.set_attn_implementation("sdpa")
    tokens = len(found[0].outputs[0].token_ids)
    ids = torch.tensor([[*one.prompt_ids, *one.outputs[0].token_ids] for one in found], device=model.device)

    def logprobs(adapters: Sequence[str | None] | None) -> torch.Tensor:
        logits = graft(input_ids=ids, adapters=adapters, use_cache=False).logits[:, -tokens - 1 : -1].float()
        return logits.log_softmax(-1).gather(2, ids[:, -tokens:, None])[..., 0].cpu()

    served = torch.tensor([[entry.logprob for entry in one.outputs[0].logprobs] for one in found])
    versions = {one.adapter: engine._store.use(one.adapter) for one in found if one.adapter is not None}
    names = [one.adapter and versions[one.adapter].key for one in found]
    right, base = logprobs(names), logprobs(None)
    for version in versions.values():
        engine._store.done(version)
    model.set_attn_implementation(IMPLEMENTATION)
    runner._fused = FusedParts(graft, model.device)
    rows = torch.tensor([name is not None for name in names])
    result = {
        "error": float((served - right).abs().mean()),
        "effect": float((right - base)[rows].abs().mean()) if rows.any() else 0.0,
    }
    # bfloat16 moves near-ties of the router; a lost delta is the whole effect.
    if not result["error"] <= max(0.02, 0.25 * result["effect"]):
        sys.exit(f"the engine's log-probabilities are not the model's: {result}; nothing is reported")
    return result


def report(cells: Sequence[Cell], correctness: dict[str, float], captures: int, args: argparse.Namespace) -> None:
    base = {cell.batch: cell for cell in cells if cell.adapters == 0}
    print(f"{'batch':>5} {'LoRAs':>5} {'step ms':>8} {'graph ms':>8} {'tok/s':>8} {'vs none':>7} {'prefill tok/s':>13}")
    for cell in cells:
        ratio = cell.step_ms / base[cell.batch].step_ms if cell.batch in base else float("nan")
        graph = float("nan") if cell.graph_ms is None else cell.graph_ms
        prefill = "" if cell.prefill is None else f"{cell.prefill:13.0f}"
        rate = cell.batch / cell.step_ms * 1e3
        print(f"{cell.batch:5} {cell.adapters:5} {cell.step_ms:8.2f} {graph:8.2f} {rate:8.0f} {ratio:7.2f} {prefill}")
    summary = {
        "benchmark": "engine_decode",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "rank": args.rank,
        "context": args.context,
        "eager": args.eager,
        "captures": captures,
        "correctness": correctness,
        "cells": [asdict(cell) for cell in cells],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""The whole engine over two or more GPUs, by layout, against one: decode, prefill, adapters off and on.

    python benchmarks/engine_ranks.py [--ranks 2] [--layouts ep,tp,dp] [--batches 1,32,8,128] [--adapters 0,8]
    python benchmarks/engine_ranks.py --device cpu --tiny          over gloo, to try it

A Qwen3-30B-A3B of ``--layers`` layers at full width with random bfloat16 weights, adapters of one rank on experts and
attention, read from safetensors. ``tp``: ranks share F · ``ep``: ranks share the experts, all bring all rows · ``dp``:
the same with a batch and pages on each rank, all-to-all. Decode: milliseconds between two tokens of a sequence in a
full batch, as a caller of the engine sees them, in the median; prefill: tokens a second of prompts that share nothing.

Each layout runs in processes of its own, which show on stderr where they are. After ``--seconds`` it begins no further
cell, 15 seconds later every rank shows its stacks, and 15 more later it is ended; what was measured is kept, and the
next layout follows.

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
import logging
import os
import pickle
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from end_to_end_decode import adapter_shapes, write_adapter
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moegraft
from moegraft import ParallelConfig, SamplingParams
from moegraft.serving.requests import Completion, Request

CHECKED, CHECKED_TOKENS = 24, 12
SIZES = {"one": (1, 1, False), "tp": (2, 1, False), "ep": (1, 2, False), "dp": (1, 2, True)}
GRACE_SECONDS = 15.0
PARENT, STARTED = "ENGINE_RANKS_LAYOUT", "ENGINE_RANKS_STARTED"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: milliseconds of a step of ``batch`` rows, or tokens a second where ``batch`` is 0: prefill."""

    batch: int
    adapters: int
    value: float


@dataclass(kw_only=True)
class Found:
    """What rank 0 of one layout has made so far. ``checked``: (token, its likeliest log-probabilities) of every step of
    every request · ``sent``: bytes that this rank sent, by group."""

    checked: tuple[tuple[tuple[int, dict[int, float]], ...], ...]
    cells: list[Cell] = field(default_factory=list)
    captures: int = 0
    load_seconds: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    is_complete: bool = False


def main() -> None:
    args = parse_arguments()
    if PARENT in os.environ:
        run_layout(os.environ[PARENT], args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the ranks end with it
    found: dict[str, Found] = {}
    verdicts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for layout in ("one", *args.layouts):
            start = time.perf_counter()
            one = run_ranks(layout, args, Path(scratch) / layout)
            seconds = time.perf_counter() - start
            if one is None:
                log(f"{layout}: nothing was found in {seconds:.0f} s")
                if layout == "one":
                    sys.exit(1)
                continue
            found[layout] = one
            verdicts[layout] = compare(found["one"], one, args.tie, layout)
            log(f"{layout}: {seconds:.0f} s{'' if one.is_complete else ', cut short'}, {verdicts[layout]}")
            report(layout, one, found["one"])
    print(json.dumps(summary(found, verdicts, args)), flush=True)
    if not all(one.is_complete for one in found.values()) or len(found) <= len(args.layouts):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=["ep", "tp", "dp"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=numbers, default=[1, 32, 8, 128], help="the most important first")
    parser.add_argument("--adapters", type=numbers, default=[0, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=224, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=60, help="tokens of each sequence in decode")
    parser.add_argument("--prefill", type=int, default=16384, help="tokens of prompts in a prefill run")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--kv-memory", default="6GiB")
    parser.add_argument("--tie", type=float, default=0.1, help="log-probabilities this close are a near-tie")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a layout, after which it begins no cell")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--scratch", default="/dev/shm", help="where the adapter files are written")
    return parser.parse_args()


# The parent


def run_ranks(layout: str, args: argparse.Namespace, folder: Path) -> Found | None:
    """The ranks of one layout as processes, until they end or have to be ended; what rank 0 has left behind."""
    folder.mkdir()
    size = 1 if layout == "one" else args.ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TMPDIR": str(folder)}
    world |= {PARENT: layout, STARTED: str(time.time())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *sys.argv],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + args.seconds + 2 * GRACE_SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):  # one has failed: the others wait for it
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        log(f"{layout}: the ranks ended with {codes}")
    file = folder / "found"
    found: Found | None = pickle.loads(file.read_bytes()) if file.exists() else None
    return found


# A rank


def run_layout(layout: str, args: argparse.Namespace) -> None:
    """On every rank: the same weights, then the engine, or its steps."""
    imported = time.time() - float(os.environ[STARTED])
    start = time.perf_counter() - imported
    rank = int(os.environ["RANK"])
    where = f"{layout}, rank {rank}"
    log(f"{where}: imported after {imported:.1f} s")
    faulthandler.dump_traceback_later(max(1.0, args.seconds + GRACE_SECONDS - imported))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {where}: %(message)s", datefmt="%H:%M:%S")
    tp, ep, spread = SIZES[layout]
    parallel = ParallelConfig(
        tp=args.ranks if tp > 1 else 1,
        ep=args.ranks if ep > 1 else 1,
        data_parallel=spread,
        timeout_seconds=120.0,  # one may compile while the other waits
    )
    device = str(moegraft.init_parallel(args.device)) if parallel.world_size > 1 else args.device
    if args.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // parallel.world_size))
    torch.manual_seed(0)
    model = make_model(args, device)
    log(f"{where}: a model of {args.layers} layers after {time.perf_counter() - start:.1f} s")
    count = max(args.adapters)
    options: dict[str, Any] = {
        "kv_memory": args.kv_memory,
        "max_model_len": max(2048, args.context + args.new + 1),
        "max_rows": max(args.batches),
        "chunk_tokens": args.chunk,
        "prefix_cache": False,
        "cuda_graphs": not args.eager,
        "device": args.device,
        "adapter_memory": count * adapter_bytes(model, args.rank) + (64 << 20),
    }
    if rank > 0:
        moegraft.Engine.follow(model, parallel=parallel, **options)
        dist.destroy_process_group()
        log(f"{where}: left")
        return
    folder = Path(tempfile.gettempdir())
    files = [write_adapter(model, folder / f"file{i}", rank=args.rank, seed=i) for i in range(min(count, 2))]
    with moegraft.Engine(model, parallel=parallel, **options) as engine:
        log(f"{where}: open after {time.perf_counter() - start:.1f} s")
        threading.Thread(target=show_steps, args=(engine, where), daemon=True).start()
        began = time.perf_counter()
        for i in range(count):
            engine.load_adapter(f"a{i}", files[i % 2])
        load_seconds = (time.perf_counter() - began) / max(count, 1)
        log(f"{where}: {load_seconds:.2f} s an adapter")
        checked = generate(engine, draw(CHECKED, 40, args, seed=7), count, CHECKED_TOKENS, logprobs=20)
        log(f"{where}: the check has run after {time.perf_counter() - start:.1f} s")
        found = Found(
            checked=tuple(
                tuple((entry.token_id, dict(entry.top)) for entry in one.outputs[0].logprobs) for one in checked
            ),
            load_seconds=load_seconds,
        )
        keep(found, folder)
        for batch, adapters in cells(args):
            if time.perf_counter() - start > args.seconds:
                log(f"{where}: no time for batch {batch}, {adapters} adapters")
                continue
            cell = measure(engine, batch, adapters, args)
            log(f"{where}: {time.perf_counter() - start:.1f} s {cell}")
            found.cells.append(cell)
            groups = engine._graft.layout.groups
            found.sent = {
                comm.name: comm.traffic.total_bytes for comm in (groups.tp, groups.ep, groups.world) if comm.size > 1
            }
            found.captures = engine.stats().graph_captures
            keep(found, folder)
    found.is_complete = len(found.cells) == len(list(cells(args)))
    keep(found, folder)
    log(f"{where}: closed after {time.perf_counter() - start:.1f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


def show_steps(engine: moegraft.Engine, where: str) -> None:
    """On a cold machine kernels are compiled for minutes: whether it still moves."""
    while engine.is_ready:
        time.sleep(5)
        stats = engine.stats()
        log(f"{where}: {stats.steps} steps, {stats.graph_captures} captures")


def cells(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(batch, adapters), the most important first; batch 0: prefill, behind the first two batches."""
    for batch in (*args.batches[:2], 0, *args.batches[2:]):
        yield from dict.fromkeys((batch, min(adapters, batch or adapters)) for adapters in args.adapters)


def keep(found: Found, folder: Path) -> None:
    (folder / "new").write_bytes(pickle.dumps(found))
    (folder / "new").rename(folder / "found")


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


def measure(engine: moegraft.Engine, batch: int, adapters: int, args: argparse.Namespace) -> Cell:
    if batch == 0:
        return Cell(batch=0, adapters=adapters, value=prefill_rate(engine, adapters, args))
    generate(engine, draw(batch, args.context, args, seed=3), adapters, 4)  # compiles and captures
    gaps = [median_gap(engine, draw(batch, args.context, args, seed=i), adapters, args) for i in range(2)]
    return Cell(batch=batch, adapters=adapters, value=min(gaps))


def prefill_rate(engine: moegraft.Engine, adapters: int, args: argparse.Namespace) -> float:
    length = min(1024, args.prefill)
    count = args.prefill // length
    times = []
    for seed in range(3):  # the first compiles
        prompts = draw(count, length, args, seed=seed)
        start = time.perf_counter()
        generate(engine, prompts, adapters, 1)
        times.append(time.perf_counter() - start)
    return count * length / min(times[1:])


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


def report(layout: str, found: Found, one: Found) -> None:
    alone = {(cell.batch, cell.adapters): cell.value for cell in one.cells}
    print("layout batch LoRAs  step ms    tok/s  vs one")
    for cell in found.cells:
        other = alone.get((cell.batch, cell.adapters), float("nan"))
        if cell.batch:
            shown = f"{cell.batch:5} {cell.adapters:5} {cell.value:8.2f} {cell.batch / cell.value * 1e3:8.0f}"
            print(f"{layout:>6} {shown} {other / cell.value:7.2f}")
        else:
            print(f"{layout:>6} {'pre':>5} {cell.adapters:5} {'':8} {cell.value:8.0f} {cell.value / other:7.2f}")
    sys.stdout.flush()


def summary(found: dict[str, Found], verdicts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "engine_ranks",
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": {name: value for name, value in vars(args).items() if name != "scratch"},
        "cells": [{"layout": layout, **asdict(cell)} for layout, one in found.items() for cell in one.cells],
        "tokens": verdicts,
        "captures": {layout: one.captures for layout, one in found.items()},
        "load_seconds": {layout: one.load_seconds for layout, one in found.items()},
        "sent_bytes": {layout: one.sent for layout, one in found.items()},
    }


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

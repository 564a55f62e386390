"""Decode of a whole Qwen3-30B-A3B with many adapters on it: tokens a second, overhead, memory, time to load.

    python benchmarks/end_to_end_decode.py [--layers 8] [--batches 1,8,32,128] [--adapters 0,1,8,32] [--compiled]

Full-size architecture, random bfloat16 weights made on the device, adapters of one rank on experts and attention read
from safetensors. A step is what ``generate`` does a token for greedy decoding over a StaticCache: forward, argmax. It
is timed twice: as transformers runs it (eager), and as one CUDA graph, which leaves the kernels. Correctness first: no
number is printed unless the rows of a mixed batch are what they are among rows of their own adapter, and alone.
``--compiled`` adds the attached model under torch.compile(fullgraph=True), one call with fixed bounds for all adapters,
whose logits must be those of the eager model. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

import moegraft
from moegraft.integrations.transformers import GraftedModel
from moegraft.testing.errors import relative_error

DTYPE = torch.bfloat16
CACHE_LENGTH = 256
WARM_UP, EAGER_STEPS, GRAPH_STEPS = 3, 5, 20


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured batch. ``model``: ``unattached`` (transformers' own experts), ``attached`` or ``compiled``; times a
    step."""

    model: str
    batch: int
    adapters: int
    eager_ms: float | None
    graph_ms: float | None
    memory_gib: float


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = make_model(args.layers)
    log(f"model: {memory_gib():.1f} GiB of weights in {time.perf_counter() - start:.0f} s")
    cells = [measure(model, None, batch, 0, args) for batch in args.batches]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        paths = [write_adapter(model, Path(scratch) / f"file{i}", rank=args.rank, seed=i) for i in range(args.files)]
        size = sum(file.stat().st_size for file in paths[0].iterdir())
        memory = int(max(args.adapters) * size * 1.02) + (64 << 20)
        graft = moegraft.attach(model, adapter_memory=memory, compiled=args.compiled)
        log(f"attached: {graft.explain()!s:.60}; an adapter has {size / 2**20:.0f} MiB")
        loading = load_adapters(graft, paths, size, args)
    correctness = check(graft, batch=8)
    log(f"correct: {correctness}")
    loaded = loading["loaded"]
    for batch in args.batches:
        for count in args.adapters:
            if count <= min(batch, loaded):
                cells.append(measure(model, graft, batch, count, args))
                if args.compiled:
                    cells.append(measure_compiled(graft, batch, count, args))
    report(cells, loading, correctness, args)


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--adapters", type=numbers, default=[0, 1, 8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--files", type=int, default=4, help="different adapters; more are loaded from the same files")
    parser.add_argument("--scratch", default="/dev/shm", help="where the adapter files are written")
    parser.add_argument("--load-seconds", type=float, default=120.0, help="load no more adapters after this time")
    parser.add_argument("--compiled", action="store_true", help="the attached model under torch.compile as well")
    parser.add_argument("--no-eager", action="store_true", help="time CUDA graphs only")
    return parser.parse_args()


def make_model(num_layers: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=num_layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, rope_theta=1e6, max_position_embeddings=40960, dtype=DTYPE,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def adapter_shapes(model: PreTrainedModel, rank: int) -> dict[str, tuple[int, int, int]]:
    """(rank rows, input, output) of what an adapter touches in a layer."""
    config = model.config
    hidden, inter, rows = config.hidden_size, config.moe_intermediate_size, config.num_experts * rank
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "self_attn.q_proj": (rank, hidden, heads),
        "self_attn.k_proj": (rank, hidden, kv_heads),
        "self_attn.v_proj": (rank, hidden, kv_heads),
        "self_attn.o_proj": (rank, heads, hidden),
        "mlp.experts.base_layer": (rows, hidden, 2 * inter),
        "mlp.experts": (rows, inter, hidden),
    }


def write_adapter(model: PreTrainedModel, folder: Path, *, rank: int, seed: int) -> Path:
    """A PEFT folder: rank ``rank`` on the experts and on attention, of a size that shows in the logits."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device).mul_(scale).cpu()

    tensors = {}
    for layer in range(model.config.num_hidden_layers):
        for name, (lanes, size_in, size_out) in adapter_shapes(model, rank).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = draw(lanes, size_in, scale=size_in**-0.5)
            tensors[f"{key}.lora_B.weight"] = draw(size_out, lanes, scale=0.1 * rank**-0.5)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA", "peft_version": "0.19.1", "r": rank, "lora_alpha": rank,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    return folder


def load_adapters(
    graft: GraftedModel, paths: Sequence[Path], num_bytes: int, args: argparse.Namespace
) -> dict[str, float]:
    """Loads ``a0``, ``a1``, ... and tells the median time from files to usable, beside the PCIe copy alone."""
    seconds: list[float] = []
    for i in range(max(args.adapters)):
        if sum(seconds) > args.load_seconds:
            log(f"loaded {i} adapters in {sum(seconds):.0f} s and stopped there")
            break
        torch.cuda.synchronize()
        start = time.perf_counter()
        graft.load_adapter(paths[i % len(paths)], f"a{i}")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    pinned = torch.empty(num_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    copies = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        copies.append(time.perf_counter() - start)
    load, copy = statistics.median(seconds) if seconds else 0.0, min(copies)
    found = {"loaded": len(seconds), "adapter_mib": num_bytes / 2**20, "load_s": load, "pcie_copy_s": copy}
    log(f"loading: {found}")
    return found


@torch.no_grad()
def check(graft: GraftedModel, *, batch: int) -> dict[str, float]:
    """Relative errors of the last logits; exits where they say that a number would be worthless."""
    names = list(graft.adapters)[: batch // 2] or [None]
    ids = torch.randint(1000, (batch, 6), generator=torch.Generator().manual_seed(0)).cuda()
    adapters = [None if row % 3 == 2 else names[row % len(names)] for row in range(batch)]

    def logits(rows: slice, names: Sequence[str | None] | None) -> torch.Tensor:
        return graft(input_ids=ids[rows], adapters=names, logits_to_keep=1).logits.float()

    everything = slice(None)
    base, mixed = logits(everything, None), logits(everything, adapters)
    among_its_like, alone, effect = [], [], []
    for row in (0, 1):
        uniform = logits(everything, [adapters[row]] * batch)
        among_its_like.append(relative_error(mixed[row], uniform[row]))
        alone.append(relative_error(mixed[row], logits(slice(row, row + 1), adapters[row : row + 1])[0]))
        effect.append(relative_error(mixed[row], base[row]))
    found = {
        "mixed_vs_uniform": max(among_its_like),
        "mixed_vs_alone": max(alone),
        "adapter_effect": min(effect),
        "base_rows_equal": float(torch.equal(mixed[2], base[2])),
    }
    if not (found["base_rows_equal"] and found["mixed_vs_uniform"] <= 1e-2):
        sys.exit(f"rows of a mixed batch depend on their neighbours: {found}")
    # Another batch size takes other GEMMs for the base; in bfloat16 that alone moves near-ties of the router.
    if not found["mixed_vs_alone"] <= 0.25 * found["adapter_effect"]:
        sys.exit(f"a row of a mixed batch is not what it is alone: {found}")
    return found


class DecodeStep:
    """Greedy decoding of ``batch`` rows, one token a call, all state on the device."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        self.ids_B1 = torch.randint(1000, (batch, 1), device="cuda")
        self.position_11 = torch.zeros(1, 1, dtype=torch.long, device="cuda")
        self.columns = torch.arange(CACHE_LENGTH, device="cuda")

    def __call__(self) -> None:
        self.ids_B1.copy_(self.logits()[:, -1].argmax(dim=-1, keepdim=True))
        self.position_11.add_(1)

    def logits(self) -> torch.Tensor:
        """Logits of the next token of each row; the cache has grown by one token afterwards."""
        mask = (self.columns <= self.position_11).view(1, 1, 1, -1).expand(self.ids_B1.shape[0], 1, 1, -1)
        logits: torch.Tensor = self.model(
            input_ids=self.ids_B1,
            attention_mask=mask,
            position_ids=self.position_11,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def rewind(self) -> None:
        self.position_11.zero_()
        self.cache.reset()


@torch.no_grad()
def measure(
    model: PreTrainedModel, graft: GraftedModel | None, batch: int, adapters: int, args: argparse.Namespace
) -> Cell:
    with serving(graft, batch, adapters):
        step = DecodeStep(model, batch)
        for _ in range(WARM_UP):
            step()
        eager_ms = None if args.no_eager else milliseconds(step, EAGER_STEPS)
        memory = memory_gib()
        step.rewind()
        graph_ms = graph_milliseconds(step)
    name = "unattached" if graft is None else "attached"
    cell = Cell(model=name, batch=batch, adapters=adapters, eager_ms=eager_ms, graph_ms=graph_ms, memory_gib=memory)
    log(str(cell))
    gc.collect()
    torch.cuda.empty_cache()
    return cell


@torch.no_grad()
def measure_compiled(graft: GraftedModel, batch: int, adapters: int, args: argparse.Namespace) -> Cell:
    """One graph for any adapters: slots in a buffer, bounds fixed. Exits where its logits are not the eager model's."""
    names = [f"a{row % adapters}" if adapters else None for row in range(batch)]
    slots_B = torch.full((batch,), -1, dtype=torch.int32, device="cuda")
    torch._dynamo.reset()
    with graft.batch(names, slots=slots_B, rank_bound=args.rank, all_threads=True) as call:
        assert call is not None
        slots_B.copy_(torch.tensor(call.batch.row_slots, dtype=torch.int32))
        start = time.perf_counter()
        step = DecodeStep(graft.model, batch)
        expected = step.logits()
        step.rewind()
        step.model = torch.compile(graft.model, fullgraph=True, dynamic=False)
        error = relative_error(step.logits(), expected)
        # Inductor's own norms and attention round in other places than the eager kernels; a lost delta is 0.1 and more.
        if not error <= 0.05:
            sys.exit(f"batch {batch}, {adapters} adapters: compiled logits are off by {error}")
        for _ in range(WARM_UP):
            step()
        log(f"compiled in {time.perf_counter() - start:.0f} s, relative difference from eager {error:.1e}")
        eager_ms = None if args.no_eager else milliseconds(step, EAGER_STEPS)
        step.rewind()
        graph_ms = graph_milliseconds(step)
    cell = Cell(
        model="compiled", batch=batch, adapters=adapters, eager_ms=eager_ms, graph_ms=graph_ms, memory_gib=memory_gib()
    )
    log(str(cell))
    gc.collect()
    torch.cuda.empty_cache()
    return cell


def serving(graft: GraftedModel | None, batch: int, adapters: int) -> AbstractContextManager[None]:
    """Row i uses adapter i modulo ``adapters``."""
    if graft is None or adapters == 0:
        return nullcontext()
    return graft.batch([f"a{row % adapters}" for row in range(batch)], batch)


def graph_milliseconds(step: DecodeStep) -> float | None:
    """None where the step cannot be captured."""
    try:
        with captured(step) as replay:
            return milliseconds(replay, GRAPH_STEPS)
    except RuntimeError as error:
        log(f"cannot be captured: {str(error).splitlines()[0]}")
        return None


@contextmanager
def captured(step: DecodeStep) -> Iterator[Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        graph.replay()
    yield graph.replay
    graph.reset()


def milliseconds(call: Callable[[], None], steps: int) -> float:
    """Median of single steps, timed on the device's clock with the queue kept full."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def memory_gib() -> float:
    return torch.cuda.memory_allocated() / 2**30


def report(
    cells: Sequence[Cell], loading: dict[str, float], correctness: dict[str, float], args: argparse.Namespace
) -> None:
    def find(model: str, batch: int) -> Cell | None:
        return next((c for c in cells if (c.model, c.batch, c.adapters) == (model, batch, 0)), None)

    def ratio(cell: Cell, other: Cell | None, field: str) -> str:
        mine, base = getattr(cell, field), None if other is None else getattr(other, field)
        return f"{mine / base:6.2f}x" if mine and base else f"{'-':>7}"

    def speed(cell: Cell, milliseconds: float | None) -> str:
        return f"{cell.batch / milliseconds * 1000:8.0f}" if milliseconds else f"{'-':>8}"

    print(f"{'':11}{'':5} {'':5}|{'CUDA graph':^41}|{'eager':^41}|")
    head = f"{'ms':>7} {'tok/s':>8} {'vs base':>7} {'vs 0 adapters':>14} |"
    print(f"{'model':11}{'batch':>5} {'LoRAs':>5}| {head} {head} {'GiB':>6}")
    for cell in cells:
        line = f"{cell.model:11}{cell.batch:5} {cell.adapters:5}|"
        for field in ("graph_ms", "eager_ms"):
            time_ms = getattr(cell, field)
            line += f" {time_ms or float('nan'):7.2f} {speed(cell, time_ms)} "
            line += f"{ratio(cell, find('unattached', cell.batch), field)} "
            line += f"{ratio(cell, find('attached', cell.batch), field):>14} |"
        print(f"{line} {cell.memory_gib:6.1f}")
    if loading["load_s"]:
        print(
            f"loading an adapter of {loading['adapter_mib']:.0f} MiB takes {loading['load_s']:.2f} s, "
            f"{loading['load_s'] / loading['pcie_copy_s']:.1f} times the PCIe copy alone"
        )
    summary = {
        "benchmark": "end_to_end_decode",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "rank": args.rank,
        "loading": loading,
        "correctness": correctness,
        "cells": [asdict(cell) for cell in cells],
    }
    print(json.dumps(summary))


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

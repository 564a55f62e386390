"""How far a reader has to go: what the main ways through moegraft call, and how often they change the file.

    python scripts/trace_ways.py [--calls WAY]

  cpu_forward   a mixed batch of six rows through a tiny Qwen3-MoE of two layers, on the CPU; a second call
  gpu_layer     one experts layer, from ``apply_experts`` to the launches of its kernels (in Triton's interpreter)
  load_adapter  an adapter on the experts of the two layers, saved by PEFT 0.20
  attach_ep2    ``attach`` with two ranks over gloo that share the experts and bring rows each, on one of them
  call_ep2      and there the forward of ``cpu_forward``

A *call* enters a function of moegraft; a generator that goes on counts again, what runs inside a kernel does not
count. A *change* is a call in another file than the call before it, *files* are the distinct ones, *depth* is the
largest number of moegraft's functions that wait for each other. The moegraft that Python imports is the one that is
measured: with ``PYTHONPATH=<tree>/src`` another revision's. Beside each figure stands how far it is from ``BEFORE``.
``--calls`` prints all calls of one way, indented by depth. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import moegraft

SOURCE = Path(moegraft.__file__).parent
TREE = SOURCE.parents[1]
FIXTURE = TREE / "tests" / "fixtures" / "peft" / "peft0.20.0_qwen3_moe_both"
WAYS = ("cpu_forward", "gpu_layer", "load_adapter", "attach_ep2", "call_ep2")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one way."""

    calls: int
    changes: int
    files: int
    depth: int


# At 7f6cf18.
BEFORE = {
    "cpu_forward": Figures(calls=462, changes=200, files=27, depth=14),
    "gpu_layer": Figures(calls=303, changes=138, files=27, depth=12),
    "load_adapter": Figures(calls=1246, changes=448, files=33, depth=16),
    "attach_ep2": Figures(calls=1116, changes=340, files=41, depth=13),
    "call_ep2": Figures(calls=698, changes=285, files=35, depth=14),
}


class Tracer:
    """Counts calls inside ``counting``. ``begins_at``: only below a function of this name."""

    def __init__(self, begins_at: str | None = None) -> None:
        self.begins_at = begins_at
        self.calls: list[tuple[int, str, str]] = []  # depth, file, function
        self._stack: list[str] = []  # of every Python frame: "ours", "kernel" or "other"
        self._open = 0 if begins_at else 1
        self._depth = self._in_kernel = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._enter(frame)
        elif event == "return" and self._stack:
            self._leave(self._stack.pop())

    def _enter(self, frame: FrameType) -> None:
        code = frame.f_code
        path = code.co_filename
        is_ours = path.startswith(str(SOURCE)) and code.co_name != "<module>"
        kind = "ours" if is_ours else "kernel" if f"{os.sep}triton{os.sep}" in path else "other"
        if self.begins_at and is_ours and code.co_name == self.begins_at:
            kind, self._open = "begin", self._open + 1
        self._stack.append(kind)
        if kind == "kernel":
            self._in_kernel += 1
        elif kind in ("ours", "begin") and self._open and not self._in_kernel:
            self._depth += 1
            self.calls.append((self._depth, str(Path(path).relative_to(SOURCE)), code.co_qualname))
            self._stack[-1] += " counted"

    def _leave(self, kind: str) -> None:
        self._depth -= kind.endswith("counted")
        self._in_kernel -= kind == "kernel"
        self._open -= kind.startswith("begin")

    def figures(self) -> Figures:
        files = [file for _, file, _ in self.calls]
        return Figures(
            calls=len(files),
            changes=sum(one != other for one, other in pairwise(files)),
            files=len(set(files)),
            depth=max((depth for depth, _, _ in self.calls), default=0),
        )


def traced(run: Callable[[], object], begins_at: str | None = None) -> Tracer:
    """The calls of one run."""
    tracer = Tracer(begins_at)
    with tracer.counting():
        run()
    return tracer


def load_model() -> Any:
    """A Qwen3-MoE of two layers, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FIXTURE / "base")


def forward(graft: Any) -> Callable[[], object]:
    """A forward of six rows, four with an adapter."""
    import torch

    ids = torch.arange(30).reshape(6, 5) + 3
    return lambda: graft(input_ids=ids, adapters=["a", None, "b", "c", None, "a"])


def trace_model() -> dict[str, Tracer]:
    """``load_adapter`` and ``cpu_forward``."""
    with moegraft.attach(load_model(), adapter_memory="4MiB") as graft:
        loading = traced(lambda: graft.load_adapter(FIXTURE / "adapter", name="a"))
        for name in ("b", "c"):
            graft.load_adapter(FIXTURE / "adapter", name=name)
        run = forward(graft)
        run()
        return {"load_adapter": loading, "cpu_forward": traced(run)}


def trace_layer() -> dict[str, Tracer]:
    """``gpu_layer``."""
    from support.layers import build_layer, over_class

    from moegraft.moe.experts import TritonExperts
    from moegraft.testing import MOE_CASES

    case = next(case for case in MOE_CASES if case.name == "some_experts")
    layer = over_class(build_layer(case), TritonExperts)
    return {"gpu_layer": traced(layer.run, begins_at="apply_experts")}


def trace_rank(rank: int, folder: Path) -> dict[str, Tracer]:
    """``attach_ep2`` and ``call_ep2``, on one of two ranks."""
    import torch.distributed as dist

    from moegraft.parallel import ParallelConfig

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    grafts: list[Any] = []
    model, config = load_model(), ParallelConfig(ep=2, data_parallel=True)
    attaching = traced(lambda: grafts.append(moegraft.attach(model, adapter_memory="4MiB", parallel=config)))
    [graft] = grafts
    for name in ("a", "b", "c"):
        graft.load_adapter(FIXTURE / "adapter", name=name)
    run = forward(graft)
    run()
    ways = {"attach_ep2": attaching, "call_ep2": traced(run)}
    graft.detach()
    dist.destroy_process_group()
    return ways


def serve_rank(folder: Path) -> None:
    """The other rank, whose figures nobody reads."""
    trace_rank(1, folder)


def trace_all(folder: Path) -> dict[str, Tracer]:
    """All ways, in the order of ``WAYS``."""
    import torch.multiprocessing as mp

    other = mp.get_context("spawn").Process(target=serve_rank, args=(folder,), daemon=True)
    other.start()
    ways = trace_model() | trace_layer() | trace_rank(0, folder)
    other.join()
    return {way: ways[way] for way in WAYS}


def print_table(figures: dict[str, Figures]) -> None:
    """A line a way; behind each figure its distance from ``BEFORE``."""
    print(f"{'way':14}{'calls':>14}{'changes':>14}{'files':>12}{'depth':>12}")
    for way, found in figures.items():
        pairs = zip(asdict(found).values(), asdict(BEFORE[way]).values(), strict=True)
        calls, changes, files, depth = (f"{value} ({value / old - 1:+.0%})" for value, old in pairs)
        print(f"{way:14}{calls:>14}{changes:>14}{files:>12}{depth:>12}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", choices=WAYS, help="print every call of this way")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ways = trace_all(Path(folder))
    if options.calls:
        for depth, file, function in ways[options.calls].calls:
            print(f"{file:58} {'  ' * depth}{function}")
    figures = {way: tracer.figures() for way, tracer in ways.items()}
    print_table(figures)
    print(json.dumps({way: asdict(found) for way, found in figures.items()}))


sys.path.insert(0, str(TREE / "tests"))

if __name__ == "__main__":
    main()

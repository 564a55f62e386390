"""The one stopwatch of the GPU benchmarks, what the card can do at most, and what a row says of its run."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

STOPWATCH = "back-to-back CUDA-graph replays, median"
"""What ``*_us`` of a row are measured with; ``*_cold_us``: L2 overwritten before each replay."""
COLD_BYTES = 256 * 2**20
CEILING_BYTES = 2**31
Call = Callable[[], object]


def run_facts() -> dict[str, str]:
    """What makes two rows comparable (device, stopwatch, date), and what makes them repeatable."""
    return {
        "device": torch.cuda.get_device_name(),
        "stopwatch": STOPWATCH,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
    }


def _commit() -> str:
    """Short hash of the tree that runs, marked where it was changed; "unknown" outside of a repository."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        found = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of one call, which has run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def graph_us(call: Call, *, batches: int = 7, replays: int = 0) -> float:
    """Median microseconds of one call: batches of back-to-back replays of a graph that holds one call.

    ``replays``: of a batch; 0: as many as a call is short. Ranks whose graphs wait for each other state it.
    """
    graph = capture(call)

    def batch_us(times: int) -> float:
        return _elapsed_us(lambda: [graph.replay() for _ in range(times)]) / times

    replays = replays or max(3, min(30, int(2e4 / max(batch_us(3), 1.0))))
    return statistics.median(batch_us(replays) for _ in range(batches))


def cold_us(call: Call, *, replays: int = 50) -> float:
    """Median microseconds of one replay, with L2 full of other, dirty lines before each."""
    graph = capture(call)
    other = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(replays):
        other.zero_()
        times.append(_elapsed_us(graph.replay))
    return statistics.median(times)


def _elapsed_us(work: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What one card reaches: bytes copied (read and written) and FLOPs of a large product, a second."""

    bytes_per_s: float
    flops_per_s: float

    def row(self) -> dict[str, float | str]:
        """As a row of a run says it."""
        return {
            "ceilings": "measured in the run",
            "copy_tb_s": round(self.bytes_per_s / 1e12, 3),
            "matmul_tflop_s": round(self.flops_per_s / 1e12, 1),
        }


def measure_ceilings(format_name: str = "bf16") -> Ceilings:
    """Ceilings of this card: a copy of 2 GiB, and a product of 8192 x 8192 x 8192 in the format's own dtype."""
    copied_us, product_us = graph_us(_copy()), graph_us(_product(format_name))
    return Ceilings(bytes_per_s=1e6 * 2 * CEILING_BYTES / copied_us, flops_per_s=1e6 * 2 * 8192**3 / product_us)


def _copy() -> Call:
    source = torch.zeros(CEILING_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(format_name: str) -> Call:
    """fp8 experts multiply in fp8; all others, also those stored in four or eight bits of integers, in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if format_name == "fp8":
        one = torch.ones((), device="cuda")
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)

"""One engine in a world of ranks that is there already: rank 0 asks, the others follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moegraft import Engine, ParallelConfig, SamplingParams
from moegraft.serving.batch import StepBatch
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.runner import Runner
from support.families import build

Requests = Sequence[tuple[tuple[int, ...], str | None]]


@dataclass(frozen=True, kw_only=True)
class RankCase:
    """rounds: adapters that are loaded (replaced) before each batch of requests · graphs: of the interpreter, where
    there is no GPU: a replay is the step run again over the same buffers."""

    family: str = "qwen3_moe"
    parallel: ParallelConfig
    rounds: Sequence[tuple[Mapping[str, Path], Requests]]
    new: int = 6
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    graphs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def serve_case(case: RankCase) -> tuple[list[list[tuple[int, ...]]], int, set[str]] | None:
    """On rank 0: the tokens of every request, how many graphs were captured, the backends."""
    if case.graphs and case.device == "cpu":
        _interpret_graphs()
    model = build(case.family).to(case.dtype)
    shared: dict[str, Any] = {"parallel": case.parallel, "device": case.device, "adapter_memory": "16MiB"}
    if dist.get_rank() > 0:
        Engine.follow(model, **shared, **case.options)
        return None
    greedy = SamplingParams(temperature=0, max_tokens=case.new, min_tokens=case.new)
    found = []
    with Engine(model, **shared, **case.options) as engine:
        for adapters, requests in case.rounds:
            for name, path in adapters.items():
                engine.load_adapter(name, path, replace=True)
            answers = list(engine.generate(requests, greedy))
            errors = [each.outputs[0].error for each in answers]
            assert errors == [None] * len(answers), errors
            found.append([each.token_ids for each in answers])
        engine.check_integrity()
        captures = engine.stats().graph_captures
        return found, captures, {choice.backend for choice in engine._graft.explain()}


def _interpret_graphs() -> None:
    """In a process of its own, which ends with the pool."""

    def record(self: DecodeGraphs, step: StepBatch, bind: Any) -> tuple[Callable[[], None], torch.Tensor]:
        def run() -> torch.Tensor:
            with bind():
                return self._forward(step)

        logits = run()
        return lambda: logits.copy_(run()), logits

    def open_pool(self: Runner, *sizes: int) -> None:
        opened(self, *sizes)
        self.open_graphs(40, 64)

    opened = Runner.open_pool
    if opened.__name__ == "open_pool" and opened.__module__ == Runner.__module__:
        Runner.open_pool = open_pool  # type: ignore[method-assign]
        DecodeGraphs.record = record  # type: ignore[method-assign]

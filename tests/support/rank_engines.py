"""One engine in a world of ranks that is there already: rank 0 asks, the others follow."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from moegraft import Engine, ParallelConfig, SamplingParams
from moegraft.serving.batch import StepBatch
from moegraft.serving.engine import collect
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.requests import Request
from moegraft.serving.runner import Runner
from support.churn import Churn
from support.families import build

Requests = Sequence[tuple[tuple[int, ...], str | None]]


@dataclass(frozen=True, kw_only=True)
class RankCase:
    """rounds: adapters that are loaded (replaced) before each batch of requests · checkpoint: of the model, in place of
    a family's · plan: transformers' own · graphs: of the interpreter, where there is no GPU: a replay is the step run
    again over the same buffers · churn: (adapters, right tokens) of a ``Churn`` behind the rounds, of three seconds."""

    family: str = "qwen3_moe"
    checkpoint: Path | None = None
    plan: bool = False
    parallel: ParallelConfig
    rounds: Sequence[tuple[Mapping[str, Path], Requests]]
    new: int = 6
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    graphs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    churn: tuple[dict[str, Path], dict[Any, tuple[int, ...]]] | None = None

    def open(self) -> Engine | None:
        """The engine on rank 0; on the others its life."""
        model = self.checkpoint or build(self.family).to(self.dtype)
        dtype = str(self.dtype).removeprefix("torch.")
        shared: dict[str, Any] = {"parallel": self.parallel, "plan": self.plan, "device": self.device, "dtype": dtype}
        shared |= {"adapter_memory": "16MiB", **self.options}
        if dist.get_rank() == 0:
            return Engine(model, **shared)
        Engine.follow(model, **shared)
        return None


def serve_case(case: RankCase) -> tuple[list[list[tuple[int, ...]]], int, set[str]] | None:
    """On rank 0: the tokens of every request, how many graphs were captured, the backends."""
    if case.device == "cuda":  # kernels are compiled for a minute: with -s one sees that it moves
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    with _interpreted_graphs() if case.graphs and case.device == "cpu" else nullcontext():
        return _serve_case(case)


def _serve_case(case: RankCase) -> tuple[list[list[tuple[int, ...]]], int, set[str]] | None:
    opened = case.open()
    if opened is None:
        return None
    greedy = SamplingParams(temperature=0, max_tokens=case.new, min_tokens=case.new)
    found = []
    with opened as engine:
        for adapters, requests in case.rounds:
            for name, path in adapters.items():
                engine.load_adapter(name, path, replace=True)
            answers = list(engine.generate(requests, greedy))
            errors = [each.outputs[0].error for each in answers]
            assert errors == [None] * len(answers), errors
            found.append([each.token_ids for each in answers])
            logging.info("a round of %d requests, %d captures", len(answers), engine.stats().graph_captures)
        if case.churn is not None:
            for name in list(engine.adapters):
                engine.unload_adapter(name)
            churn = Churn(engine, *case.churn)
            churn.run(3)
            churn.check_end()
        engine.check_integrity()
        captures = engine.stats().graph_captures
        return found, captures, {choice.backend for choice in engine._graft.explain()}


def same_bits(case: RankCase, adapters: Mapping[str, Path], requests: Requests) -> list[bool] | None:
    """On rank 0: whether each base request has the tokens and log-probabilities, to the bit, that it has where the
    others of its batch are base requests too."""
    opened = case.open()
    if opened is None:
        return None
    params = SamplingParams(temperature=0, max_tokens=case.new, logprobs=5, ignore_eos=True)
    with opened as engine:
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        found = []
        for turn, names in enumerate(([name for _, name in requests], [None] * len(requests))):
            begin = threading.Event()
            engine._loop._inbox.put(partial(begin.wait, 30))  # all are there when the first step begins
            asked = [
                Request(request_id=f"{turn} {row}", prompt_ids=prompt, adapter=name, sampling=params)
                for row, ((prompt, _), name) in enumerate(zip(requests, names, strict=True))
            ]
            streams = [engine.submit(request) for request in asked]
            begin.set()
            found.append([collect(*each).outputs for each in zip(asked, streams, strict=True)])
        return [found[0][row] == found[1][row] for row, (_, name) in enumerate(requests) if name is None]


def lose_rank(case: RankCase, killed: int, meeting: Path) -> str | None:
    """``killed`` dies by SIGKILL while a request decodes; on rank 0: what the request is told."""

    def die_at_sign() -> None:
        while not meeting.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == killed:
        threading.Thread(target=die_at_sign, daemon=True).start()
    opened = case.open()
    if opened is None:
        return None
    sampling = SamplingParams(temperature=0, max_tokens=100, min_tokens=100)
    with opened as engine:
        stream = engine.submit(Request(request_id="1", prompt_ids=(5, 6, 7), sampling=sampling))
        assert stream.get(30) is not None
        meeting.touch()
        while (event := stream.get(30)) is not None:
            last = event
    return last.error


@contextmanager
def _interpreted_graphs() -> Iterator[None]:
    """What follows in this process runs without them."""

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
    with patch.object(Runner, "open_pool", open_pool), patch.object(DecodeGraphs, "record", record):
        yield

"""One engine on two GPUs, over NCCL: its tokens are those of one GPU, graphs included; a lost rank ends it at once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import WorldPool
from support.families import build
from support.family_adapters import save_everything, save_experts, save_part
from support.rank_engines import RankCase, serve_case
from support.serving import draw_prompts

from moegraft import Engine, ParallelConfig, SamplingParams
from moegraft.serving.requests import FinishReason, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LAYOUTS = [
    pytest.param(ParallelConfig(tp=2, timeout_seconds=120.0), id="tensor parallel"),
    pytest.param(ParallelConfig(ep=2, timeout_seconds=120.0), id="expert parallel"),
    pytest.param(ParallelConfig(ep=2, data_parallel=True, timeout_seconds=120.0), id="data parallel"),
]
OPTIONS: dict[str, Any] = {"page_size": 16, "max_model_len": 64, "max_rows": 8, "chunk_tokens": 64}
NEW = 12
_TRUTHS: dict[torch.dtype, list[list[tuple[int, ...]]]] = {}


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorldPool]:
    with WorldPool(2, device="cuda", timeout_seconds=180.0) as pool:
        yield pool


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a test that starts its own ranks hangs: the stacks of all threads of all of them, and the end."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")

    def end() -> None:
        faulthandler.dump_traceback(sys.__stderr__)
        for child in multiprocessing.active_children():
            if child.name.startswith("rank "):
                os.kill(child.pid or 0, signal.SIGABRT)
        time.sleep(2)
        os._exit(1)

    timer = threading.Timer(180.0, end)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    save = {"everything": save_everything, "experts": save_experts, "part": save_part}
    return {name: make("qwen3_moe", folder / name).path for name, make in save.items()}


def case(adapters: dict[str, Path], parallel: ParallelConfig, dtype: torch.dtype) -> RankCase:
    """The base alone; then mixed; then an adapter replaced."""
    prompts = draw_prompts((5, 9, 3, 26, 14))
    files = adapters["experts"], adapters["part"]
    rounds: list[Any] = [
        ({}, [(prompt, None) for prompt in prompts]),
        ({"a": files[0], "b": files[1]}, list(zip(prompts, ("a", None, "b", "a", None), strict=True))),
        ({"a": adapters["everything"]}, list(zip(prompts, ("a", "b", None, "b", "a"), strict=True))),
    ]
    return RankCase(parallel=parallel, rounds=rounds, new=NEW, device="cuda", dtype=dtype, options=OPTIONS)


def alone(case: RankCase) -> list[list[tuple[int, ...]]]:
    """On one GPU, in this process; the same for all layouts."""
    if case.dtype not in _TRUTHS:
        _TRUTHS[case.dtype] = _serve_alone(case)
    return _TRUTHS[case.dtype]


def _serve_alone(case: RankCase) -> list[list[tuple[int, ...]]]:
    greedy = SamplingParams(temperature=0, max_tokens=case.new, min_tokens=case.new)
    found = []
    model = build(case.family).to("cuda:0", case.dtype)
    with Engine(model, adapter_memory="16MiB", **case.options) as engine:
        for loaded, requests in case.rounds:
            for name, path in loaded.items():
                engine.load_adapter(name, path, replace=True)
            found.append([each.token_ids for each in engine.generate(requests, greedy)])
    return found


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_kernels_in_bfloat16(adapters: dict[str, Path], parallel: ParallelConfig, gpus: WorldPool) -> None:
    """In CUDA graphs with the collectives inside, where no rows travel. Sums in another order may turn a near-tie."""
    mine = case(adapters, parallel, torch.bfloat16)
    found, captures, backends = gpus.run(serve_case, mine)[0]
    assert backends == {"TritonExperts"}
    assert (captures > 0) != parallel.data_parallel
    pairs = [pair for a, b in zip(found, alone(mine), strict=True) for pair in zip(a, b, strict=True)]
    firsts = [a[0] == b[0] for a, b in pairs]
    tokens = [x == y for a, b in pairs for x, y in zip(a, b, strict=True)]
    assert sum(firsts) >= 0.9 * len(firsts) and sum(tokens) >= 0.8 * len(tokens), f"{pairs}"
    if captures:
        eager = replace(mine, options={**OPTIONS, "cuda_graphs": False})
        again = gpus.run(serve_case, eager)[0][0]
        same = [x == y for a, b in zip(found, again, strict=True) for x, y in zip(a, b, strict=True)]
        assert sum(same) >= 0.8 * len(same), (found, again)


@pytest.mark.usefixtures("stacks")
def test_a_plan_of_transformers(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Attention, pages and vocabulary are cut too; the engine starts its other rank."""
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    mine = case(adapters, ParallelConfig(tp=2, timeout_seconds=120.0), torch.float32)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW)
    found = []
    with Engine(tmp_path / "model", plan=True, parallel=mine.parallel, adapter_memory="16MiB", **OPTIONS) as engine:
        for loaded, requests in mine.rounds:
            for name, path in loaded.items():
                engine.load_adapter(name, path, replace=True)
            found.append([each.token_ids for each in engine.generate(requests, greedy)])
    assert found == alone(mine)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_float32(adapters: dict[str, Path], parallel: ParallelConfig, gpus: WorldPool) -> None:
    """Experts in torch's own operations, without graphs."""
    mine = case(adapters, parallel, torch.float32)
    found, _, _ = gpus.run(serve_case, mine)[0]
    assert found == alone(mine)


@pytest.mark.usefixtures("stacks")
def test_a_lost_rank(adapters: dict[str, Path], tmp_path: Path) -> None:
    """NCCL's kernel waits for it for ever: the request is told all the same."""
    build("qwen3_moe", max_position_embeddings=8192).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    parallel = ParallelConfig(tp=2, timeout_seconds=120.0)
    engine = Engine(tmp_path / "model", parallel=parallel, adapter_memory="16MiB", max_rows=4)
    long = SamplingParams(temperature=0, max_tokens=4000, min_tokens=4000)
    stream = engine.submit(Request(request_id="1", prompt_ids=draw_prompts([5])[0], sampling=long))
    assert stream.get(60) is not None
    (rank_1,) = [child for child in multiprocessing.active_children() if child.name == "rank 1"]
    os.kill(rank_1.pid or 0, signal.SIGKILL)
    began = time.monotonic()
    while (event := stream.get(60)) is not None:
        last = event
    assert time.monotonic() - began < 30
    assert last.finish_reason is FinishReason.ERROR and last.error == "rank 1 of 2: was killed by SIGKILL"
    # Not closed: the device waits for the rank, until torch's watchdog ends the process.

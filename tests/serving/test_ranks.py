"""One engine over two ranks, real processes over gloo: its tokens are those of each request alone, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from support.checkpoints import write_checkpoint
from support.churn import NARROW, Churn, expect
from support.distributed import WorldPool
from support.families import FAMILIES, build
from support.family_adapters import save_all_of, save_everything
from support.http_server import Served, eventually, make_served
from support.rank_engines import RankCase, lose_rank, same_bits, serve_case
from support.serving import draw_prompts, serving
from transformers import AutoModelForCausalLM

from moegraft import Engine, ParallelConfig, SamplingParams
from moegraft.core.errors import ParallelError
from moegraft.serving.requests import EngineClosedError, FinishReason, Request

GREEDY = SamplingParams(temperature=0, max_tokens=8, min_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=120, min_tokens=120)
NAMES = ("fused", None, "per_expert", "dora", "everything", "save lm_head", None, "lm_head", "embeddings", "save norms",
         ("fused", ("embeddings", 0.5), "per_expert"))  # fmt: skip
LENGTHS = (7, 4, 16, 3, 5, 20, 33, 8, 9, 12, 6)


def layout(**sizes: Any) -> dict[str, Any]:
    return {"parallel": ParallelConfig(timeout_seconds=20.0, **sizes), "device": "cpu"}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": layout(tp=2),
    "ep": layout(ep=2),
    "ep, data parallel": layout(ep=2, data_parallel=True),
    "tp by transformers' plan": {**layout(tp=2), "plan": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build("qwen3_moe").save_pretrained(folder)
    return folder


def followers() -> list[multiprocessing.process.BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("rank ")]


@pytest.mark.parametrize("how", LAYOUTS)
def test_tokens_are_those_of_one_process(checkpoint: Path, kinds: dict[str, Path], truth: Any, how: str) -> None:
    """Mixed adapters in chunks; then they come, go and change under fire, and some cannot be read."""
    requests = list(zip(draw_prompts(LENGTHS), NAMES, strict=True))
    # The same number of pages in all: where ranks share heads or sequences, a rank has half.
    kv_memory = NARROW["kv_memory"] // (2 if "data" in how or "plan" in how else 1)
    with Engine(checkpoint, **{**NARROW, "kv_memory": kv_memory}, **LAYOUTS[how]) as engine:
        assert len(followers()) == 1
        heads = {shape.kv_heads for shape in engine._loop.runner.shapes.values()}
        assert heads == ({1} if "plan" in how else {2})  # pages hold the keys of this rank's heads
        for name, path in kinds.items():
            engine.load_adapter(name, path)
        found = list(engine.generate(requests, GREEDY))
        assert [each.outputs[0].error for each in found] == [None] * len(found)
        assert [each.token_ids for each in found] == truth(requests, 8)
        saved = [(requests[0][0], "save lm_head")]
        for _ in range(2):
            assert [each.token_ids for each in engine.generate(saved, GREEDY)] == truth(saved, 8)
            engine._graft.bank.evict("save lm_head@1")  # on this rank alone, as its own room may ask for
        for name in kinds:
            engine.unload_adapter(name)
        churn = Churn(engine, kinds, expect(truth))
        churn.run(3)
        churn.check_end()
    assert not followers()


def test_a_lost_rank_ends_all(checkpoint: Path, kinds: dict[str, Path]) -> None:
    """Requests that run, requests that come later, and loading say which rank is gone."""
    spread = LAYOUTS["ep, data parallel"]
    with Engine(checkpoint, adapters={"a": kinds["fused"]}, adapter_memory="4MiB", **spread) as engine:
        heard: list[str] = []
        engine.on_failure = heard.append
        prompt = draw_prompts([5])[0]
        stream = engine.submit(Request(request_id="1", prompt_ids=prompt, adapter="a", sampling=LONG))
        assert stream.get(30) is not None
        os.kill(followers()[0].pid or 0, signal.SIGKILL)
        began = time.monotonic()
        while (event := stream.get(60)) is not None:
            last = event
        assert time.monotonic() - began < 20
        assert last.finish_reason is FinishReason.ERROR
        assert last.error == "rank 1 of 2: was killed by SIGKILL" == engine.failure
        eventually(lambda: heard == [engine.failure])
        with pytest.raises(EngineClosedError, match="rank 1 of 2: was killed by SIGKILL"):
            engine.submit(Request(request_id="2", prompt_ids=prompt, sampling=GREEDY))
        with pytest.raises(EngineClosedError, match="rank 1 of 2: was killed by SIGKILL"):
            engine.load_adapter("b", kinds["fused"])
    assert not followers()


def children(process: subprocess.Popen[str]) -> list[int]:
    """Ranks, beside multiprocessing's own tracker."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("killed", [0, 1])
def test_the_server_ends_with_a_lost_rank(served: Served, killed: int) -> None:
    """Its supervisor starts it again: the exit code is not zero, and no rank is left."""
    adapter = f"a={served.adapters['experts']}"
    with serving(served.model, "--adapter", adapter, "--device", "cpu", "--ep", "2") as (process, url):
        body = {"model": "a", "prompt": "x", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        expected = served.tokenizer.decode(served.alone("x", "experts", max_new_tokens=4), skip_special_tokens=True)
        assert answer["choices"][0]["text"] == expected
        (rank_1,) = children(process)
        body |= {"max_tokens": 400, "min_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            os.kill(process.pid if killed == 0 else rank_1, signal.SIGKILL)
            if killed == 1:
                assert "rank 1 of 2: was killed by SIGKILL" in "".join(lines)
        assert process.wait(30) == (-signal.SIGKILL if killed == 0 else 1)
        assert process.stderr is not None
        if killed == 1:
            assert "error: rank 1 of 2: was killed by SIGKILL" in process.stderr.read()
        deadline = time.monotonic() + 20
        while is_running(rank_1):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_all_ranks_capture_and_replay_the_same_steps(world2: WorldPool, kinds: dict[str, Path], truth: Any) -> None:
    """In a world that is there already. Steps begin before the tokens of the one before are known; adapters of larger
    ranks, on further modules, and such that no graph may serve, come one after the other."""
    prompts = draw_prompts((5, 3))
    rounds: list[Any] = []
    files: list[Any] = []
    for loaded, names in (
        ({}, (None, None)),
        ({"a": "fused", "b": "per_expert"}, ("a", "b")),
        ({"c": "lm_head"}, ("c", "a")),
        ({"d": "save lm_head"}, ("a", "d")),
        ({"a": "dora"}, ("a", None)),
    ):
        behind = {**(files[-1][0] if files else {}), **loaded}
        rounds.append(({name: kinds[file] for name, file in loaded.items()}, list(zip(prompts, names, strict=True))))
        files.append((behind, [(p, None if n is None else behind[n]) for p, n in zip(prompts, names, strict=True)]))
    case = RankCase(
        parallel=ParallelConfig(ep=2, timeout_seconds=60.0),
        rounds=rounds,
        graphs=True,
        new=4,
        options={"page_size": 4, "max_model_len": 40, "max_rows": 2, "batch_sizes": (2,), "overlap": True},
    )
    found, captures, _ = world2.run(serve_case, case)[0]
    assert found == [truth(requests, 4) for _, requests in files]
    assert captures >= 3  # the base, adapters, adapters on the head


def test_what_no_graph_serves_runs_without(world2: WorldPool, tmp_path: Path) -> None:
    """LoRA on the map behind latents, which a step of decode rows does not run."""
    model = build("deepseek_v3")
    adapter = save_everything("deepseek_v3", tmp_path / "a").path
    requests = list(zip(draw_prompts((5, 3)), ("a", "a"), strict=True))
    options = {"page_size": 4, "max_model_len": 40, "max_rows": 2, "batch_sizes": (2,)}
    parallel = ParallelConfig(ep=2, timeout_seconds=60.0)
    rounds: list[Any] = [({}, [(prompt, None) for prompt, _ in requests]), ({"a": adapter}, requests)]
    case = RankCase(family="deepseek_v3", parallel=parallel, rounds=rounds, graphs=True, options=options)
    found, captures, _ = world2.run(serve_case, case)[0]
    assert found[1] == greedy_alone(model, adapter, requests, case.new)
    assert captures == 1


FOUR = {
    "tp 2 x ep 2": ParallelConfig(tp=2, ep=2, timeout_seconds=60.0),
    "tp 2 x ep 2, data parallel": ParallelConfig(tp=2, ep=2, data_parallel=True, timeout_seconds=60.0),
    "ep 4, data parallel": ParallelConfig(ep=4, data_parallel=True, timeout_seconds=60.0),
    "tp 4": ParallelConfig(tp=4, timeout_seconds=60.0),
}


@pytest.mark.parametrize("how", FOUR)
def test_four_ranks(world4: WorldPool, kinds: dict[str, Path], truth: Any, how: str) -> None:
    """Mixed adapters in chunks; adapters that come and go under fire where both sizes are cut."""
    requests = list(zip(draw_prompts(LENGTHS), NAMES, strict=True))
    kv_memory = NARROW["kv_memory"] // (2 if FOUR[how].data_parallel else 1)
    case = RankCase(
        parallel=FOUR[how],
        rounds=[(kinds, requests)],
        new=8,
        options={**NARROW, "kv_memory": kv_memory},
        churn=(kinds, expect(truth)) if how == "tp 2 x ep 2" else None,
    )
    found, _, _ = world4.run(serve_case, case)[0]
    assert found == [truth(requests, 8)]


def test_four_ranks_by_the_plan(world4: WorldPool, tmp_path: Path) -> None:
    """One head of keys a rank; adapters on every linear map, by PEFT's own file."""
    model = build("qwen3_moe", num_key_value_heads=4)
    model.save_pretrained(tmp_path / "base")
    adapter = save_all_of(model, tmp_path / "a").path
    prompts = draw_prompts((5, 20, 9))
    requests = list(zip(prompts, ("a", None, "a"), strict=True))
    options = {"page_size": 4, "max_model_len": 40, "max_rows": 4, "chunk_tokens": 16}
    parallel = ParallelConfig(tp=4, timeout_seconds=60.0)
    rounds: list[Any] = [({"a": adapter}, requests)]
    case = RankCase(checkpoint=tmp_path / "base", plan=True, parallel=parallel, rounds=rounds, options=options)
    found, _, _ = world4.run(serve_case, case)[0]
    assert found == [greedy_alone(build("qwen3_moe", num_key_value_heads=4), adapter, requests, case.new)]


def greedy_alone(model: Any, adapter: Path, requests: Any, new: int) -> list[tuple[int, ...]]:
    """By transformers' own generate, each request alone, the adapter in PEFT's own hands."""
    found = []
    for name in ("a", None):
        if name is not None:
            model = PeftModel.from_pretrained(model, adapter)
        else:
            model = model.unload()
        for prompt, wanted in requests:
            if wanted == name:
                ids = torch.tensor([prompt])
                options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
                with torch.no_grad():
                    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
                found.append((prompt, name, tuple(tokens[0, len(prompt) :].tolist())))
    return [next(tokens for p, n, tokens in found if (p, n) == request) for request in requests]


@pytest.mark.parametrize(
    ("stored", "parallel"),
    [
        ("gptq, groups of 64, zero points", ParallelConfig(tp=2, ep=2, timeout_seconds=60.0)),
        ("fp8 blocks", ParallelConfig(ep=4, data_parallel=True, timeout_seconds=60.0)),
    ],
    ids=["int4, tp 2 x ep 2", "fp8, ep 4, rows travel in fp8"],
)
def test_quantised_experts(world4: WorldPool, tmp_path: Path, stored: str, parallel: ParallelConfig) -> None:
    """Tokens of one process; in int4, whose GEMMs read rows as they are, of the weights that it stands for too."""
    checkpoint = write_checkpoint(stored, tmp_path)
    adapter = save_all_of(checkpoint.dense, tmp_path / "a").path
    requests = list(zip(draw_prompts((5, 20, 9, 3)), ("a", None, "a", None), strict=True))
    options = {"page_size": 4, "max_model_len": 40, "max_rows": 4, "chunk_tokens": 16, "device": "cpu"}
    rounds: list[Any] = [({"a": adapter}, requests)]
    case = RankCase(checkpoint=checkpoint.path, parallel=parallel, rounds=rounds, options=options)
    found, _, _ = world4.run(serve_case, case)[0]
    with Engine(checkpoint.path, adapters={"a": adapter}, dtype="float32", adapter_memory="16MiB", **options) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=case.new, min_tokens=case.new)
        assert found == [[each.token_ids for each in engine.generate(requests, greedy)]]
    if "gptq" in stored:
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
        assert found == [greedy_alone(dense, adapter, requests, case.new)]


TWO = {
    "tp": (ParallelConfig(tp=2, timeout_seconds=60.0), False),
    "ep": (ParallelConfig(ep=2, timeout_seconds=60.0), False),
    "data parallel": (ParallelConfig(ep=2, data_parallel=True, timeout_seconds=60.0), False),
    "plan": (ParallelConfig(tp=2, timeout_seconds=60.0), True),
}
# Latent attention; sinks and a plan that leaves experts whole; two kinds of recurrent state.
HANDFUL = [("deepseek_v3", "plan"), ("gpt_oss", "plan"), ("qwen3_next", "plan"), ("nemotron_h", "data parallel")]
REST = [(family, how) for family in sorted(FAMILIES) for how in TWO if (family, how) not in HANDFUL]


def check_family(world2: WorldPool, family: str, how: str, folder: Path) -> None:
    build(family).save_pretrained(folder / "base")
    adapter = save_everything(family, folder / "a").path
    requests = list(zip(draw_prompts((9, 5, 13)), ("a", None, "a"), strict=True))
    options: dict[str, Any] = {"page_size": 4, "max_rows": 4, "chunk_tokens": 9, "max_model_len": 32, "device": "cpu"}
    parallel, plan = TWO[how]
    rounds: list[Any] = [({"a": adapter}, requests)]
    case = RankCase(checkpoint=folder / "base", plan=plan, parallel=parallel, rounds=rounds, options=options)
    greedy = SamplingParams(temperature=0, max_tokens=case.new, min_tokens=case.new)
    with Engine(folder / "base", adapters={"a": adapter}, dtype="float32", adapter_memory="16MiB", **options) as engine:
        expected = [each.token_ids for each in engine.generate(requests, greedy)]
    found, _, _ = world2.run(serve_case, case)[0]
    assert found == [expected]


@pytest.mark.parametrize(("family", "how"), HANDFUL)
def test_families(world2: WorldPool, family: str, how: str, tmp_path: Path) -> None:
    """Tokens of one process, under an adapter on every linear map and all experts."""
    check_family(world2, family, how, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("family", "how"), REST)
def test_every_family_in_every_layout(world2: WorldPool, family: str, how: str, tmp_path: Path) -> None:
    check_family(world2, family, how, tmp_path)


@pytest.mark.parametrize("how", ["tp 2 x ep 2", "ep 4, data parallel"])
def test_base_requests_have_the_same_bits_whatever_else_runs(
    world4: WorldPool, kinds: dict[str, Path], tmp_path: Path, how: str
) -> None:
    """In one layout, in batches of one composition: an all-reduce of four sums an element in an order that follows its
    place. As in one process, of which the test of this name says why all experts are chosen."""
    build("qwen3_moe", num_experts_per_tok=7).save_pretrained(tmp_path / "base")
    options = {"batch_sizes": (32,), "max_rows": 8, "chunk_tokens": 32, "prefix_cache": False}
    case = RankCase(checkpoint=tmp_path / "base", parallel=FOUR[how], rounds=[], options=options)
    adapters = {name: kinds[name] for name in ("fused", "dora", "lm_head")}
    requests = list(zip(draw_prompts((7, 4, 9, 6, 5)), (None, "fused", None, "dora", "lm_head"), strict=True))
    assert world4.run(same_bits, case, adapters, requests)[0] == [True, True]


@pytest.mark.parametrize("killed", range(4))
def test_kill_of_every_rank(tmp_path: Path, killed: int) -> None:
    """The request ends with an error, and no rank waits for ever."""
    case = RankCase(parallel=ParallelConfig(tp=2, ep=2, timeout_seconds=10.0), rounds=[])
    with WorldPool(4, timeout_seconds=50.0) as pool:
        outcomes = pool.outcomes(lose_rank, case, killed, tmp_path / "now")
    for rank, outcome in enumerate(outcomes):
        assert outcome.died == (rank == killed), (rank, outcome)
        if rank > 0 and rank != killed:
            assert isinstance(outcome.error, ParallelError), (rank, outcome)
    if killed > 0:
        assert "a peer is dead" in (outcomes[0].result or "")

"""attach(parallel=...) in real processes: what ranks make of a model together is what one process makes of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import WorldPool
from support.families import build
from support.family_adapters import save_everything, save_experts, save_part, save_replacements
from support.parallel_acts import (
    act_differently,
    call_from_two_threads,
    fail_between_tokens,
    hold_and_give_up,
    load_badly,
    lose_a_rank,
    mistake_a_call,
    serve_unevenly,
)
from support.parallel_models import (
    ModelCase,
    ModelResult,
    check_ranks,
    make_batch,
    run_alone,
    run_rank,
)

import moegraft
from moegraft.core.errors import AdapterFileError, AdapterTensorError, BatchError, ParallelError, UnsupportedModelError
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.parallel import ParallelConfig
from moegraft.parallel.slices import ExpertMap

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
NAMES = (None, "everything", "experts", "part", "replacements")
TP2 = ParallelConfig(tp=2)
EP2 = ParallelConfig(ep=2)
LAYOUTS = {
    "tensor parallel": TP2,
    "fully sharded": ParallelConfig(tp=2, fully_sharded=True),
    "expert parallel": EP2,
    "data parallel, all-to-all": ParallelConfig(ep=2, data_parallel=True),
    "data parallel, all-gather": ParallelConfig(ep=2, data_parallel=True, dispatch="all_gather"),
    "both": ParallelConfig(tp=2, ep=2),
    "both, fully sharded, data parallel": ParallelConfig(tp=2, ep=2, fully_sharded=True, data_parallel=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    return _case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    return _case("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


def _case(family: str, folder: Path) -> ModelCase:
    save = {
        "everything": save_everything,
        "experts": save_experts,
        "part": save_part,
        "replacements": save_replacements,
    }
    adapters = {name: make(family, folder / name).path for name, make in save.items()}
    return ModelCase(family=family, adapters=adapters, names=NAMES)


@pytest.fixture(scope="module")
def alone(case: ModelCase) -> ModelResult:
    return run_alone(case)


def _pool(config: ParallelConfig, world2: WorldPool, world4: WorldPool) -> WorldPool:
    return world2 if config.world_size == 2 else world4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_together_are_one_process(
    case: ModelCase, alone: ModelResult, layout: str, world2: WorldPool, world4: WorldPool
) -> None:
    config = LAYOUTS[layout]
    mine = replace(case, config=config)
    results = _pool(config, world2, world4).run(run_rank, mine)
    check_ranks(mine, results, alone)
    # Each rank holds its share of the experts, and of the adapters on them.
    biases = alone.experts_bytes // 10 if case.family == "gpt_oss" else 0
    share = -(-build_experts(case.family) // config.ep) / build_experts(case.family) / config.tp
    bound = 0.95 if config.ep == 1 and not config.fully_sharded else 0.65
    for result in results:
        assert result.experts_bytes <= share * alone.experts_bytes + biases
        assert result.adapter_bytes["experts"] < bound * alone.adapter_bytes["experts"]
        assert result.adapter_bytes["replacements"] == alone.adapter_bytes["replacements"]
    assert sum(result.experts_bytes for result in results) >= alone.experts_bytes


def build_experts(family: str) -> int:
    return next(iter(discover_targets(build(family)).experts.values())).num_experts


@pytest.mark.parametrize("layout", ["tensor parallel", "expert parallel", "data parallel, all-to-all"])
def test_base_rows_keep_their_bits_in_bfloat16(qwen3: ModelCase, world2: WorldPool, layout: str) -> None:
    """Where roundings would show what float32 hides."""
    case = replace(qwen3, config=LAYOUTS[layout], dtype=torch.bfloat16, names=(None, "everything", "experts", None))
    for rank, result in enumerate(world2.run(run_rank, case)):
        for i, row in enumerate(case.rows(LAYOUTS[layout].ep_rank_of(rank))):
            assert torch.equal(result.mixed[i], result.plain[i]) == (case.names[row] is None)


def test_experts_on_any_rank(qwen3: ModelCase, world2: WorldPool) -> None:
    """Dealt out one by one, and one of them on both ranks."""
    spread = ExpertMap.round_robin(7, 2).with_copies({3: [0]})
    maps = {f"model.layers.{layer}.mlp.experts": spread for layer in range(2)}
    config = replace(EP2, data_parallel=True)
    mine = replace(qwen3, config=config, expert_maps=maps)
    check_ranks(mine, world2.run(run_rank, mine), run_alone(qwen3))


def test_what_is_cut_is_freed_and_not_given_back(world2: WorldPool) -> None:
    for found in world2.run(hold_and_give_up, EP2):
        assert found["freed"]
        assert found["parameters"] == 0
        errors = found["errors"]
        assert all(error.startswith("UnsupportedModelError") for error in errors.values()), errors
        for what in ("gradients", "detached", "detached, no gradients"):
            assert "MixtralExperts was cut to a rank's slice" in errors[what]
        assert "is grafted already" in errors["twice"]
        assert "given up by detach(); load it again" in errors["again"]
        assert "was detached" in errors["used"]


def _count_groups(config: ParallelConfig) -> list[int]:
    """Groups of torch.distributed that this process is in: before attach, while attached, after detach."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    counts = [len(groups)]
    with moegraft.attach(build("qwen3_moe"), parallel=config, adapter_memory="4MiB"):
        counts.append(len(groups))
    return [*counts, len(groups)]


@pytest.mark.parametrize("config", [TP2, EP2], ids=["tp", "ep"])
def test_detach_gives_the_groups_back(world2: WorldPool, config: ParallelConfig) -> None:
    """A server that attaches one model after the other would else keep the sockets of all of them."""
    for before, attached, after in world2.run(_count_groups, config):
        assert before == after < attached


@pytest.mark.parametrize("config", [TP2, replace(EP2, data_parallel=False)], ids=["tp", "ep"])
def test_an_adapter_that_is_bad_on_one_rank(
    qwen3: ModelCase, world2: WorldPool, config: ParallelConfig, tmp_path: Path
) -> None:
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in qwen3.adapters["everything"].iterdir():
        if file.is_file():
            data = file.read_bytes()
            (truncated / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    expected = _load_badly_alone(qwen3)
    for found in world2.run(load_badly, qwen3, config, {1: truncated}):
        assert "rank 1: " in found["message"]
        assert found["message"].startswith((AdapterFileError.__name__, AdapterTensorError.__name__))
        assert found["names"] == ["part"]
        assert found["as before"]
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)


def _load_badly_alone(case: ModelCase) -> torch.Tensor:
    with moegraft.attach(build(case.family), adapter_memory="4MiB") as graft:
        for name, path in (("part", "part"), ("new", "everything")):
            graft.load_adapter(case.adapters[path], name=name)
        return graft(**make_batch(3), adapters=["new", None, "part"]).logits


def test_ranks_with_different_adapters(qwen3: ModelCase, world2: WorldPool) -> None:
    for found in world2.run(load_badly, qwen3, TP2, {1: qwen3.adapters["experts"]}):
        assert "differ in the files of adapter" in found["message"]
        assert found["names"] == ["part"]
        assert found["as before"]


def test_ranks_that_do_not_act_alike(world2: WorldPool) -> None:
    first, second = world2.run(act_differently, TP2)
    for errors in (first, second):
        for what, message in {
            "inputs": f"{BatchError.__name__}: ranks [0, 1] share their rows, but differ in their inputs",
            "prompts": "differ in their inputs",
            "order": "differ in their inputs",
            "masks": "differ in their inputs",
            "options": "differ in their inputs",
            "with and without": "differ in their inputs",
            "names": "no adapter 'x' is loaded",
            "sampling": "differ in their random states",
            "models": "differ in their models",
            "dtypes": "differ in their models",
            "spreads": "differ in expert_maps",
            "backends": "differ in lora_experts",
            "cuts": "differ in the ParallelConfig that they were started with",
            "world": "tp = 3 and ep = 1 need 3 processes, but the world of torch.distributed has 2",
            "maps": f"{UnsupportedModelError.__name__}: expert_maps names 'model.x'",
        }.items():
            assert message in errors[what], (what, errors[what])
        assert errors["a model of its own"] == ""
    for what, kind in {"one rank cannot": "NoBackendError", "no model": "UnsupportedModelError"}.items():
        assert first[what] == second[what]
        assert first[what].startswith(f"{kind}: rank 1: "), first[what]
    # What is no error of moegraft's is itself on its rank alone.
    assert first["memory"].startswith(f"{ParallelError.__name__}: rank 1: ValueError: found the size"), first["memory"]
    assert second["memory"].startswith("ValueError: found the size"), second["memory"]
    assert first["sampled"] == second["sampled"]


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_a_rank_without_requests(qwen3: ModelCase, world2: WorldPool, dispatch: Any) -> None:
    config = replace(EP2, data_parallel=True, dispatch=dispatch)
    first, second = world2.run(serve_unevenly, qwen3, config)
    with moegraft.attach(build(qwen3.family), adapter_memory="64MiB") as graft:
        for name, path in qwen3.adapters.items():
            graft.load_adapter(path, name=name)
        batch = make_batch(len(NAMES))
        expected = graft(**batch, adapters=NAMES).logits
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        tokens = graft.generate(**prompts, adapters=NAMES, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for what in ("mixed", "other rank has adapters"):
        torch.testing.assert_close(first[what], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second[what], expected[:1], rtol=1e-4, atol=1e-4)
    assert first["tokens"].tolist() == tokens.tolist()
    assert second["tokens"].tolist() == tokens[:1, : batch["input_ids"].shape[1] + 2].tolist()
    assert "every rank needs a row" in first["no rows"]


@pytest.mark.parametrize("config", [TP2, replace(EP2, data_parallel=True)], ids=["tp", "ep"])
def test_a_rank_dies_in_a_step(config: ParallelConfig) -> None:
    with WorldPool(2) as doomed:
        began = time.monotonic()
        first, second = doomed.outcomes(lose_a_rank, replace(config, timeout_seconds=10.0), 1)
        assert second.died
        assert isinstance(first.result, str), first.trace
        error, again = first.result.split(" | ")
        assert error.startswith("ParallelError: rank 0, ")
        assert "a peer is dead, late, or runs another collective" in error
        assert "refused, an earlier collective failed" in again
        assert first.seconds < 20
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("config", [TP2, replace(EP2, data_parallel=True)], ids=["tp", "ep"])
def test_a_mistake_on_one_rank_leaves_the_ranks_in_step(
    qwen3: ModelCase, world2: WorldPool, config: ParallelConfig
) -> None:
    first, second = world2.run(mistake_a_call, qwen3, config)
    with moegraft.attach(build(qwen3.family), adapter_memory="64MiB") as graft:
        graft.load_adapter(qwen3.adapters["everything"], name="a")
        expected = graft(**make_batch(2), adapters=["a", None]).logits
    for what, message in {
        "count": "adapters= has 3 entries for a batch of 2 rows",
        "a word": "is a string, expected one entry a row",
        "option": "prompt_lookup_num_tokens=...) is not served",
    }.items():
        assert message in second[what]
        assert first[what].startswith(f"{BatchError.__name__}: rank 1: "), first[what]
        assert message in first[what]
        for found in (first, second):
            torch.testing.assert_close(found[f"after {what}"], expected, rtol=1e-4, atol=1e-4)


def test_a_second_thread_is_refused(world2: WorldPool) -> None:
    for errors in world2.run(call_from_two_threads, TP2):
        assert "another thread is calling the model" in errors["second"]
        assert errors["first"] == errors["afterwards"] == ""


def test_generate_ends_where_a_rank_has_left_it() -> None:
    """Between two tokens transformers asks over torch's default group whether all are done."""
    with WorldPool(2, group_seconds=3.0) as pool:
        first, second = pool.run(fail_between_tokens, replace(EP2, data_parallel=True, timeout_seconds=3.0))
    assert second[0] == "ZeroDivisionError: between two tokens"
    error, seconds = first
    assert error.startswith("ParallelError: rank 0"), error
    assert seconds < 12.0

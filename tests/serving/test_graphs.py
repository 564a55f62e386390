"""Decode through the paged kernel and static buffers, as on a GPU; here in Triton's interpreter, a replay being the
step run again over the same buffers. With a GPU, the graphs themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.serving import draw_prompts

from moegraft import Engine, SamplingParams, attach
from moegraft.serving.batch import StepBatch
from moegraft.serving.few_rows import take_linears
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.runner import Runner

pytest.importorskip("triton", reason="needs triton")

import moegraft.kernels.linear_few_rows.host as linear_few_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 4
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW)
OPTIONS: dict[str, Any] = {"page_size": 4, "adapter_memory": "4MiB", "max_model_len": 40, "max_rows": 8}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine whose decode steps go through ``DecodeGraphs`` and the kernel, whatever the device."""

    def record(self: DecodeGraphs, step: StepBatch, bind: Any) -> tuple[Callable[[], None], torch.Tensor]:
        def run() -> torch.Tensor:
            with bind():
                return self._forward(step)

        logits = run()
        return lambda: logits.copy_(run()), logits

    def open_pool(self: Runner, *sizes: int) -> None:
        opened(self, *sizes)
        self.open_graphs(40, 24)

    opened = Runner.open_pool
    if DEVICE == "cpu":
        monkeypatch.setattr("moegraft.serving.runner._has_kernels", lambda device: True)
        monkeypatch.setattr(Runner, "open_pool", open_pool)
        monkeypatch.setattr(DecodeGraphs, "record", record)
    return lambda **options: Engine(build("qwen3_moe").to(DEVICE), **OPTIONS, **options)


def run(engine: Engine, requests: list[tuple[tuple[int, ...], str | None]]) -> list[tuple[int, ...]]:
    found = list(engine.generate(requests, GREEDY))
    assert [each.outputs[0].error for each in found] == [None] * len(found)
    return [each.token_ids for each in found]


def test_replays_serve_any_adapters(served: Any, kinds: dict[str, Path], truth: Any) -> None:
    """One capture a size and kind, which stay what they are while adapters come, change and go."""
    prompts = draw_prompts((5, 3))
    adapters = {name: kinds[name] for name in ("fused", "per_expert", "lm_head")}
    with served(adapters=adapters, batch_sizes=(2,), chunk_tokens=64) as engine:
        for names in ((None, None), ("fused", "per_expert"), ("lm_head", None)):
            requests = list(zip(prompts, names, strict=True))
            assert run(engine, requests) == truth(requests, NEW)
        captures = engine.stats().graph_captures
        assert captures == 2
        engine.load_adapter("fused", kinds["per_expert"], replace=True)
        engine.unload_adapter("lm_head")
        requests = list(zip(prompts, ("fused", None), strict=True))
        behind = list(zip(prompts, ("per_expert", None), strict=True))
        assert run(engine, requests) == truth(behind, NEW)
        assert engine.stats().graph_captures == captures


def test_chunks_of_prompts_run_as_graphs(served: Any, kinds: dict[str, Path], truth: Any) -> None:
    """Long and short prompts, whole ones and parts, beside decode rows, under any adapters: one graph a padded size."""
    prompts = draw_prompts((11, 2))
    adapters = {name: kinds[name] for name in ("fused", "lm_head")}
    params = SamplingParams(temperature=0, max_tokens=2, min_tokens=2)
    with served(adapters=adapters, chunk_tokens=8, prefix_cache=False) as engine:
        chunks = engine._loop.runner._chunk_graphs
        for names in ((None, None), ("fused", "lm_head"), ("lm_head", None)):
            requests = list(zip(prompts, names, strict=True))
            found = [each.token_ids for each in engine.generate(requests, params)]
            assert found == truth(requests, 2)
        captures = chunks.captures
        assert captures == 2  # steps of up to 8 tokens, without adapters and with any
        engine.load_adapter("fused", kinds["per_expert"], replace=True)
        (found_behind,) = engine.generate([(prompts[0], "fused")], params)
        assert [found_behind.token_ids] == truth([(prompts[0], "per_expert")], 2)
        assert chunks.captures == captures


def test_new_modules_and_ranks_are_captured_again(served: Any, kinds: dict[str, Path], truth: Any) -> None:
    """A delta on a module that had none when the step was captured is not lost."""
    (prompt,) = draw_prompts((6,))
    with served(adapters={"per_expert": kinds["per_expert"]}, batch_sizes=(4,), chunk_tokens=64) as engine:
        assert run(engine, [(prompt, "per_expert")]) == truth([(prompt, "per_expert")], NEW)
        engine.load_adapter("lm_head", kinds["lm_head"])
        assert run(engine, [(prompt, "lm_head")]) == truth([(prompt, "lm_head")], NEW)
        assert engine.stats().graph_captures == 2


def test_an_adapter_that_replaces_parameters_runs_eagerly(served: Any, kinds: dict[str, Path], truth: Any) -> None:
    prompts = draw_prompts((6, 4))
    adapters = {name: kinds[name] for name in ("save lm_head", "fused")}
    with served(adapters=adapters, batch_sizes=(4,), chunk_tokens=64) as engine:
        requests = [(prompts[0], "save lm_head"), (prompts[1], "fused")]
        assert run(engine, requests) == truth(requests, NEW)
        assert engine.stats().graph_captures == 0
        assert run(engine, [(prompts[0], None)]) == truth([(prompts[0], None)], NEW)
        assert engine.stats().graph_captures == 1


FUSED = {"qwen3_moe": (9, 2, 1, 4), "gpt_oss": (5, 2, 1, 4), "gemma4_text": (22, 0, 0, 15)}


@pytest.mark.parametrize("family", FUSED)
def test_norms_routers_and_rotary_embeddings_in_few_launches(
    served: Any, family: str, kinds: dict[str, Path], truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are what the model's own code gives are taken over, and given back; text as without."""
    model = build(family)
    file, norm = sys.modules[type(model).__module__], next(m for m in model.modules() if "RMSNorm" in type(m).__name__)
    own = (file.apply_rotary_pos_emb, norm.forward)
    monkeypatch.setattr("moegraft.serving.few_rows._FEWEST_COLUMNS", 1)
    (prompt,) = draw_prompts((3,))
    # The router has LoRA too, which hangs on its product.
    adapters = {"everything": kinds["everything"]} if family == "qwen3_moe" else {}
    requests = [(prompt, None), *((prompt, name) for name in adapters)]
    with Engine(model, adapters=adapters, **OPTIONS) as engine:
        fused = engine._loop.runner._fused
        assert fused is not None
        taken = (fused.norms, fused.routers, fused.rotaries, fused.linears)
        assert tuple(map(len, taken)) == FUSED[family]
        found = run(engine, requests)
        turned = {key: half for rotary in fused.rotaries for key, half in rotary._known.items()}
    assert (file.apply_rotary_pos_emb, norm.forward) == own
    assert None not in turned.values()
    if adapters:
        assert found == truth(requests, NEW)
    else:
        monkeypatch.setattr("moegraft.serving.runner._has_kernels", lambda device: False)
        with Engine(build(family), **OPTIONS, cuda_graphs=False) as plain:
            assert found == run(plain, requests)


def test_results_of_maps_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of q's input serve k and v once, and not where it was changed in place; where nobody comes for them, maps
    go alone."""
    monkeypatch.setattr("moegraft.serving.few_rows._FEWEST_COLUMNS", 1)
    model = build("qwen3_moe").to(DEVICE)
    graft = attach(model, adapter_memory="1MiB")
    attention = model.model.layers[0].self_attn
    q, k, v = maps = attention.q_proj, attention.k_proj, attention.v_proj
    launches: list[int] = []
    own = linear_few_rows.linear_few_rows

    def counted(x: torch.Tensor, weights: list[torch.Tensor], *args: Any, **options: Any) -> list[torch.Tensor]:
        launches.append(len(weights))
        return own(x, weights, *args, **options)

    monkeypatch.setattr(linear_few_rows, "linear_few_rows", counted)
    taken = take_linears(graft, q.weight.device)
    with torch.no_grad():
        x = torch.randn(3, q.in_features, device=DEVICE)
        for each in maps:
            torch.testing.assert_close(each(x), torch.nn.functional.linear(x, each.weight), rtol=1e-5, atol=1e-5)
        assert launches == [3]
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight), rtol=1e-5, atol=1e-5)
        del launches[:]
        for _ in range(12):
            q(torch.randn(3, q.in_features, device=DEVICE))
        assert launches[0] == 3
        assert launches[-1] == 1
        v(x)
    for each in taken:
        each.remove()
    assert not any("forward" in vars(each) for each in maps)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "gemma4_text", "qwen3_moe"])
def test_on_the_gpu_graphs_and_eager_code_give_the_same_tokens(family: str) -> None:
    prompts = draw_prompts((9, 5, 20, 33, 3))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    found = []
    for options in ({"cuda_graphs": False}, {"cuda_graphs": True}, {"chunk_tokens": 8, "page_size": 4}):
        model = build(family).to("cuda", torch.bfloat16)  # float32 experts are torch's, which no graph captures
        with Engine(model, **{"max_rows": 8, "max_model_len": 64, **options}) as engine:  # type: ignore[arg-type]
            found.append([each.token_ids for each in engine.generate(prompts, params)])
            assert (engine.stats().graph_captures > 0) == options.get("cuda_graphs", True)
    assert found[0] == found[1] == found[2]

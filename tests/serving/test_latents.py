"""Latent attention over pages of latents: what kv_b_proj makes of them is right under every kind of adapter on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.families import build
from support.family_adapters import save_with_config
from support.serving import draw_prompts

from moegraft import Engine, SamplingParams
from moegraft.serving.attention.latents import LatentExpansion
from moegraft.serving.runner import Runner

FAMILY, LAYERS, NEW = "deepseek_v3", 3, 6
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
PROMPTS = draw_prompts((9, 5, 20, 12))
KINDS = {
    "lora": LoraConfig(r=5, lora_alpha=7, target_modules=["kv_b_proj", "q_b_proj"]),
    "narrow": LoraConfig(r=2, target_modules=["kv_b_proj", "kv_a_proj_with_mqa"]),
    "other": LoraConfig(r=3, target_modules=["o_proj"]),
    "dora": LoraConfig(r=3, target_modules=["kv_b_proj"], use_dora=True),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("latents")
    return {name: save_with_config(build(FAMILY), config, folder / name) for name, config in KINDS.items()}


@pytest.fixture(scope="module")
def alone(adapters: dict[str, Any]) -> Callable[[tuple[int, ...], str | None], tuple[int, ...]]:
    """Greedy tokens under one adapter, by PEFT and without a cache."""
    model = build(FAMILY)

    def run(prompt: tuple[int, ...], name: str | None) -> tuple[int, ...]:
        tokens = list(prompt)
        for _ in range(NEW):
            ids = torch.tensor([tokens])
            with torch.no_grad():
                logits = model(ids).logits if name is None else adapters[name].truth(input_ids=ids)
            tokens.append(int(logits[0, -1].argmax()))
        return tuple(tokens[len(prompt) :])

    return run


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each way was taken."""
    counted: Counter[str] = Counter()
    for name in ("expand", "absorb"):
        method = getattr(LatentExpansion, name)

        def count(self: Any, *args: Any, name: str = name, method: Any = method) -> Any:
            counted[name] += 1
            return method(self, *args)

        monkeypatch.setattr(LatentExpansion, name, count)
    return counted


def serve(adapters: dict[str, Any], names: tuple[str | None, ...], **options: Any) -> list[tuple[int, ...]]:
    paths: dict[str, Path] = {name: adapters[name].path for name in names if name is not None}
    with Engine(build(FAMILY), adapters=paths, adapter_memory="8MiB", page_size=4, **options) as engine:
        token_bytes = sum(shape.bytes_per_token for shape in engine._loop.runner.shapes.values())
        has_latents = options.get("latent_cache") is not False
        assert token_bytes == LAYERS * 4 * ((16 + 8) if has_latents else 4 * (16 + 8))
        found = list(engine.generate(list(zip(PROMPTS, names, strict=True)), GREEDY))
    assert [each.outputs[0].error for each in found] == [None] * len(found)
    return [each.token_ids for each in found]


MIXED = ("lora", None, "narrow", "other")


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (MIXED, {}),
        (MIXED, {"chunk_tokens": 7, "max_rows": 4}),
        (MIXED, {"latent_cache": False}),
        (("dora", None, "lora", "other"), {}),
        (("dora",) * 4, {}),
    ],
    ids=["lora", "chunks", "heads", "mixed with dora", "dora"],
)
def test_mixed_adapters(
    adapters: Any, alone: Any, ways: Counter[str], names: tuple[str | None, ...], options: dict[str, Any]
) -> None:
    expected = [alone(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert serve(adapters, names, **options) == expected
    assert len(set(expected)) == len(expected)
    if names == MIXED:
        has_latents = "latent_cache" not in options
        assert (ways["absorb"] > 2 * LAYERS, ways["expand"] > 0) == (has_latents, has_latents)
    elif None not in names:
        assert ways["absorb"] == LAYERS  # when the engine starts: DoRA cannot be absorbed


@pytest.mark.parametrize("names", [MIXED, ("dora", None, "lora", "other")], ids=["lora", "mixed with dora"])
def test_through_the_paged_kernel(
    adapters: Any, alone: Any, names: tuple[str | None, ...], ways: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in Triton's interpreter there: absorbed queries over one head of keys."""
    pytest.importorskip("triton", reason="needs triton")
    opened = Runner.open_pool

    def open_pool(self: Runner, *sizes: int) -> None:
        opened(self, *sizes)
        object.__setattr__(self._packing, "has_kernel", True)

    monkeypatch.setattr(Runner, "open_pool", open_pool)
    expected = [alone(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert serve(adapters, names, latent_cache=True) == expected
    # When the engine starts; then in steps without the row that DoRA expands, of which there need be none.
    assert ways["absorb"] >= LAYERS * (1 if "dora" in names else 2)


def test_the_model_gets_its_own_back() -> None:
    model = build(FAMILY)
    with Engine(model):
        assert any("expand_kv" in vars(module) for module in model.modules())
    assert not any("expand_kv" in vars(module) for module in model.modules())
    assert model(torch.tensor([[3, 4]])).logits.isfinite().all()

"""Greedy tokens through the engine, with everything that could disturb them, against each request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.families import build
from support.mixed import MixedBatch
from support.serving import draw_prompts

from moegraft import Engine, SamplingParams
from moegraft.serving.requests import Completion, FinishReason

GREEDY = SamplingParams(temperature=0, max_tokens=8, min_tokens=8)
NAMES = ("fused", None, "per_expert", "dora", "everything", "save lm_head", None, "lm_head", "embeddings", "save norms")
LENGTHS = (7, 4, 16, 3, 5, 20, 33, 8, 9, 12)
TOKEN_BYTES = 2 * 2 * (8 + 8) * 4  # two layers, two heads, keys and values of 8, float32

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_tokens": 6, "max_rows": 4, "page_size": 4},
    "padded": {"batch_sizes": (16, 64), "max_rows": 16, "chunk_tokens": 64},
    "few pages": {"page_size": 4, "kv_memory": 4 * TOKEN_BYTES * 24, "max_model_len": 48},
    "few slots": {"max_adapters": 2, "page_size": 4},
    "ahead": {
        "overlap": True,
        "chunk_tokens": 6,
        "max_rows": 4,
        "page_size": 4,
        "kv_memory": 4 * TOKEN_BYTES * 14,
        "max_model_len": 48,
    },
    "no prefix cache": {"prefix_cache": False, "page_size": 4},
}


def tokens(found: list[Completion]) -> list[tuple[int, ...]]:
    assert [each.outputs[0].error for each in found] == [None] * len(found)
    return [each.token_ids for each in found]


@pytest.mark.parametrize("way", WAYS)
def test_mixed_equals_each_alone(mixed: MixedBatch, kinds: dict[str, Path], truth: Any, way: str) -> None:
    requests = list(zip(draw_prompts(LENGTHS), NAMES, strict=True))
    expected = truth(requests, 8)
    with Engine(mixed.model, adapters=kinds, adapter_memory="4MiB", **WAYS[way]) as engine:
        assert tokens(list(engine.generate(requests, GREEDY))) == expected
        engine.check_integrity()
        again = list(engine.generate(requests, GREEDY))
        assert tokens(again) == expected
        stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == stats.failed_steps == 0
    assert (stats.preemptions > 0) == (way in ("few pages", "ahead"))
    hits = sum(each.usage.cached_tokens for each in again)
    assert (hits > 0) == (way not in ("no prefix cache",))
    base, others = truth([(prompt, None) for prompt, _ in requests], 8), NAMES
    assert all(found != plain for found, plain, name in zip(expected, base, others, strict=True) if name == "fused")


def test_the_same_prompt_under_each_adapter_shares_no_page(mixed: MixedBatch, kinds: Any, truth: Any) -> None:
    """Keys and values of one adapter's prompt are wrong for every other's."""
    prompt = draw_prompts([24])[0]
    requests = [(prompt, name) for name in (None, "fused", "dora", "per_expert", None, "fused")]
    with Engine(mixed.model, adapters=kinds, page_size=4, adapter_memory="4MiB") as engine:
        found = [next(engine.generate([request], GREEDY)) for request in requests]
    assert tokens(found) == truth(requests, 8)
    assert [each.usage.cached_tokens for each in found] == [0, 0, 0, 0, 20, 20]


def test_base_requests_have_the_same_bits_whatever_else_runs(kinds: dict[str, Path]) -> None:
    """Under one padded size. Every token goes to every expert here: a BLAS sums in another order where more rows meet,
    and on the CPU no experts class promises otherwise."""
    model = build("qwen3_moe", num_experts_per_tok=7)
    prompts = draw_prompts((7, 4, 9, 6))
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    options: dict[str, Any] = {"batch_sizes": (32,), "max_rows": 8, "chunk_tokens": 32, "adapter_memory": "4MiB"}
    with Engine(model, adapters=kinds, prefix_cache=False, **options) as engine:
        names = (None, "fused", None, "dora")
        among_others = list(engine.generate(list(zip(prompts, names, strict=True)), params))
        for row, name in enumerate(names):
            if name is None:
                alone = next(engine.generate([prompts[row]], params))
                assert among_others[row].outputs == alone.outputs


def test_stream_of_events(mixed: MixedBatch) -> None:
    with Engine(mixed.model) as engine:
        found = next(engine.generate([draw_prompts([5])[0]], GREEDY))
    assert found.outputs[0].finish_reason is FinishReason.LENGTH
    assert found.usage.completion_tokens == 8
    assert found.usage.prompt_tokens == 5

"""Families through the engine: what crosses from token to token goes through pages, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, build
from support.family_adapters import save_everything, save_part
from support.serving import draw_prompts

import moegraft
from moegraft import Engine, SamplingParams
from moegraft.core.errors import UnsupportedModelError

NEW = 14
RECURRENT = {
    "qwen3_next",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "minimax",
    "nemotron_h",
    "lfm2_moe",
    "jamba",
}
# Sliding windows and sinks; latent attention; a window by layer and a router's softcap; a gate behind attention.
HANDFUL = ("gpt_oss", "deepseek_v3", "gemma4_text", "afmoe")
REST = sorted(FAMILIES.keys() - RECURRENT - set(HANDFUL))


def serve(family: str, folder: Path) -> None:
    """Chunks of prompts, preemption and prefix hits, all at once, against each request alone."""
    adapters = {
        "everything": save_everything(family, folder / "everything").path,
        "part": save_part(family, folder / "part").path,
    }
    prompts = draw_prompts((9, 5, 13, 9, 3))
    prompts[3] = prompts[0]
    requests = list(zip(prompts, ("everything", None, "part", "everything", None), strict=True))
    expected = []
    with moegraft.attach(build(family), adapter_memory="64MiB") as graft:
        for name, path in adapters.items():
            graft.load_adapter(path, name=name)
        for prompt, name in requests:
            ids = torch.tensor([prompt])
            options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
            found = graft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=[name], **options)
            expected.append(tuple(found[0, len(prompt) :].tolist()))
    params = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW)
    model = build(family)
    sizes = {"page_size": 4, "max_rows": 4, "chunk_tokens": 9, "max_model_len": 32}
    with Engine(model, adapters=adapters, adapter_memory="64MiB", **sizes) as engine:
        token_bytes = sum(shape.bytes_per_token for shape in engine._loop.runner.shapes.values())
        found = list(engine.generate(requests, params))
        again = list(engine.generate(requests, params))
        assert again[0].usage.cached_tokens > 0
    assert [each.token_ids for each in found] == expected
    assert [each.token_ids for each in again] == expected
    with Engine(model, adapters=adapters, adapter_memory="64MiB", kv_memory=4 * token_bytes * 14, **sizes) as engine:
        assert [each.token_ids for each in engine.generate(requests, params)] == expected
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("family", HANDFUL)
def test_served(family: str, tmp_path: Path) -> None:
    serve(family, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("family", REST)
def test_every_other_family_is_served(family: str, tmp_path: Path) -> None:
    serve(family, tmp_path)


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_refused_by_name(family: str) -> None:
    model = build(family)
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=f"{family}.*does not serve yet"):
        Engine(model)
    assert model.config._attn_implementation == attention
    with moegraft.attach(model) as graft:
        graft.generate(torch.tensor([[3, 4]]), max_new_tokens=1)


def test_a_state_that_is_unknown_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that nobody has named yet: its logits over pages are not its own."""
    monkeypatch.setattr("moegraft.serving.runner.check_can_be_paged", lambda model: None)
    for family in ("jamba", "lfm2_moe", "qwen3_next"):
        with pytest.raises(UnsupportedModelError, match=r"other logits over pages|sizes|shape|state"):
            Engine(build(family))

"""Families through the engine: what crosses from token to token goes through pages and state slots."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.families import FAMILIES, build
from support.family_adapters import save_everything, save_part, save_with_config
from support.serving import draw_prompts
from support.zoo import IMAGE_TOKEN, tiny_model
from transformers import PreTrainedModel

import moegraft
from moegraft import Engine, SamplingParams
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.serving.requests import RequestError
from moegraft.serving.runner import Runner

NEW = 14
# Delta nets, state spaces that continue chunks and one that does not, a short convolution, a plain linear attention.
RECURRENT = (
    "qwen3_next",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "minimax",
    "nemotron_h",
    "lfm2_moe",
    "jamba",
)
# Sliding windows and sinks; latent attention; a window by layer and a router's softcap; a gate behind attention.
HANDFUL = ("gpt_oss", "deepseek_v3", "gemma4_text", "afmoe")
REST = sorted(FAMILIES.keys() - set(RECURRENT) - set(HANDFUL))


def serve(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of prompts, preemption and prefix hits, all at once, against each request alone."""
    adapters = {
        "everything": save_everything(family, folder / "everything").path,
        "part": save_part(family, folder / "part").path,
    }
    prompts = draw_prompts((9, 5, 13, 9, 1))
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
        found = list(engine.generate(requests, params))
        again = list(engine.generate(requests, params))
        assert (again[0].usage.cached_tokens > 0) == (family not in RECURRENT)
        engine.check_integrity()
    assert [each.token_ids for each in found] == expected
    assert [each.token_ids for each in again] == expected
    monkeypatch.setattr("moegraft.serving.opening._num_pages", lambda *args: 14)
    with Engine(model, adapters=adapters, adapter_memory="64MiB", **sizes) as engine:
        assert [each.token_ids for each in engine.generate(requests, params)] == expected
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("family", HANDFUL)
def test_served(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(family, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_state_is_served(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(family, tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("family", REST)
def test_every_other_family_is_served(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(family, tmp_path, monkeypatch)


@pytest.mark.parametrize("model_type", ["gemma4", "nemotron_h_omni", "qwen3_omni_moe"])
def test_wrappers_with_images_and_sound_serve_text(model_type: str, tmp_path: Path) -> None:
    """As a model that reads each sequence anew gives it. Qwen3-Omni's thinker is found in its checkpoint."""
    model = tiny_model(model_type)
    source: Any = model
    if model_type == "qwen3_omni_moe":
        source = tmp_path / "model"
        model.save_pretrained(source)
        model = model.thinker
    linears = [name for name in discover_targets(model).linears if name.endswith(("q_proj", "o_proj"))]
    save_with_config(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=64, target_modules=linears), tmp_path / "a")
    before = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    prompt = (5, 6, 7, 8)
    with Engine(
        source, adapters={"a": tmp_path / "a"}, page_size=2, chunk_tokens=3, max_rows=2, dtype="float32"
    ) as engine:
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4)
        found = [each.token_ids for each in engine.generate([(prompt, "a"), (prompt, None)], params)]
        with pytest.raises(RequestError, match="the config's image_token_id, and no images"):
            list(engine.generate([(5, IMAGE_TOKEN)], params))
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        graft.load_adapter(tmp_path / "a")
        both = graft(input_ids=torch.tensor([prompt, prompt]), adapters=["a", None], use_cache=False).logits
        assert not torch.allclose(both[0], both[1], atol=0.01)
        for tokens, name in zip(found, ("a", None), strict=True):
            ids = torch.tensor([(*prompt, *tokens)])
            logits = graft(input_ids=ids, adapters=[name], use_cache=False).logits[0]
            assert tuple(logits[len(prompt) - 1 : -1].argmax(-1).tolist()) == tokens
    after = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert after == before


def test_a_model_that_needs_more_than_text_is_refused() -> None:
    """Whatever its code raises for want of pictures or sound, the error is the engine's."""
    model = build("qwen3_moe")
    model.model.forward = lambda **inputs: inputs["pixel_values"].shape  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="a step of text alone, over pages, raises KeyError"):
        Engine(model)


def test_a_kind_of_layer_that_is_unknown_is_refused_by_name() -> None:
    model = build("qwen3_moe")
    model.config.layer_types = ["full_attention", "compressed_sparse_attention"]
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"qwen3_moe.*compressed_sparse_attention.*does not serve yet"):
        Engine(model)
    assert model.config._attn_implementation == attention


def test_a_state_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose state no cache shows: its logits are not its own."""
    monkeypatch.setattr("moegraft.serving.runner.find_states", lambda *args: None)
    for family in ("jamba", "lfm2_moe", "qwen3_next"):
        model = build(family)
        with pytest.raises(UnsupportedModelError, match=r"other logits over pages|sizes|shape|state"):
            Engine(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_states_have_their_share_of_the_memory() -> None:
    """Fewer sequences run at once where their states do not fit, and none where not one does."""
    model = build("qwen3_next")
    with Engine(model) as engine:
        states = engine._loop.runner.states
        assert states is not None
        slot_bytes = states.bytes_per_slot
    assert slot_bytes == (64 * 4 + 4 * 8 * 8) * 4
    with Engine(model, kv_memory=8 * slot_bytes, page_size=1) as engine:
        states = engine._loop.runner.states
        assert states is not None
        assert states.num_slots == 3
        assert engine.stats().pages_total == 4 * slot_bytes // (2 * (8 + 8) * 4) - 1
        prompts = draw_prompts((3,) * 5)
        assert all(each.outputs[0].error is None for each in engine.generate(prompts, SamplingParams(max_tokens=3)))
        engine.check_integrity()
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UnsupportedModelError, match="recurrent layers keep"):
        Engine(model, kv_memory=3 * slot_bytes)
    with moegraft.attach(model) as graft, pytest.raises(UnsupportedModelError, match="batch_invariant"):
        Runner(graft, names=str, row_by_row=True)


@pytest.mark.parametrize(("family", "limit"), [("olmoe", 12), ("phimoe", 12), ("mixtral", 64), ("qwen3_moe", 64)])
def test_contexts_end_where_mask_and_attention_disagree(family: str, limit: int) -> None:
    """OLMoE gives its window to attention and not to the mask, PhiMoE the other way round: pages would follow one."""
    model = build(family, sliding_window=12, max_position_embeddings=64)
    with Engine(model, page_size=4, max_rows=2) as engine:
        assert engine.max_model_len == limit

"""Every family of MoE models: four adapters and the base in one batch, against independent truths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.adapters import write_adapter
from support.families import FAMILIES, VOCAB_SIZE, build
from support.family_adapters import (
    FamilyAdapter,
    save_all_of,
    save_everything,
    save_experts,
    save_part,
    save_replacements,
    save_with_config,
)
from support.oracle import merge, merged_logits
from support.sweep import mixed_batch_error, stray_rows
from support.zoo import image_inputs, text_inputs, tiny_model

import moegraft
from moegraft.integrations.transformers.host.targets import TextScope, discover_targets
from moegraft.lora.peft import load_peft_adapter
from moegraft.lora.targets import ModelTargets

# One of every kind of stack, by itself or in a wrapper: ``pytest -m families_all`` has all of them.
ROWS = (
    "mixtral",
    "gpt_oss",
    "deepseek_v4",
    "glm4v_moe",
    "dots3_note",
    "gemma4",
    "hy_v4",
    "inkling2",
    "internvl",
    "jamba",
    "kolibri1",
    "nemotron_h_omni",
    "qwen3_omni_moe_thinker",
    "qwen4_exp",
    "zaya",
)
LENGTHS = (9, 7, 5, 8, 6)
NAMES = (None, "everything", "experts", "part", "replacements")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these tiny products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_mixed_batch_equals_independent_truths(family: str, tmp_path: Path) -> None:
    adapters = {
        "everything": save_everything(family, tmp_path / "everything"),
        "experts": save_experts(family, tmp_path / "experts"),
        "part": save_part(family, tmp_path / "part"),
        "replacements": save_replacements(family, tmp_path / "replacements"),
    }
    rows = _rows()
    batch = _left_padded(rows)
    with moegraft.attach(build(family), adapter_memory="64MiB") as graft:
        for name, adapter in adapters.items():
            report = graft.load_adapter(adapter.path, name=name)
            assert report.tensors_applied == report.tensors_in_file > 0
        mixed = graft(**batch, adapters=list(NAMES)).logits
        plain = graft(**batch, adapters=[None] * len(rows)).logits
        alone = [graft(input_ids=row[None], adapters=[name]).logits[0] for row, name in zip(rows, NAMES, strict=True)]

    assert torch.equal(mixed[0], plain[0])
    for i, (row, name) in enumerate(zip(rows, NAMES, strict=True)):
        base = merged_logits(build(family), _targets(family), None, input_ids=row[None])[0]
        _assert_within(plain[i, -len(row) :], base, scale=base, what="without adapters")
        if name is None:
            continue
        delta = mixed[i, -len(row) :] - plain[i, -len(row) :]
        for what, logits in _truths(family, adapters[name], row).items():
            _assert_within(delta, logits - base, scale=logits - base, what=f"{name}, {what}")
        _assert_within(alone[i] - base, delta, scale=delta, what=f"{name}, alone")


def test_mixed_generation_equals_merged_models(family: str, tmp_path: Path) -> None:
    adapters = {
        "everything": save_everything(family, tmp_path / "everything"),
        "part": save_part(family, tmp_path / "part"),
    }
    names = [None, "everything", "part"]
    targets = _targets(family)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batch = _left_padded(_rows()[: len(names)])
    del batch["position_ids"]
    with moegraft.attach(build(family), adapter_memory="64MiB") as graft:
        for name, adapter in adapters.items():
            graft.load_adapter(adapter.path, name=name)
        mixed = graft.generate(**batch, **options, adapters=names)

    for i, name in enumerate(names):
        weights = None
        if name is not None:
            weights, _ = load_peft_adapter(adapters[name].path, targets, dtype=torch.float32)
        # The same padding: transformers' MiniMax does not give a padded row the tokens of the row alone.
        expected = merge(build(family), targets, weights).generate(**batch, **options)
        assert mixed[i].tolist() == expected[i].tolist(), name


@pytest.mark.parametrize("model_type", ROWS)
def test_every_described_module_sees_the_rows_of_the_tokens(model_type: str) -> None:
    model = tiny_model(model_type)
    assert stray_rows(model, text_inputs(model)) == {}
    images = image_inputs(model)
    assert images is None or stray_rows(model, images) == {}


@pytest.mark.parametrize("model_type", [name for name in ROWS if name not in FAMILIES])
def test_mixed_batch_with_images_where_the_model_takes_them(model_type: str) -> None:
    model = tiny_model(model_type)
    assert mixed_batch_error(model_type, image_inputs(model) or text_inputs(model)) < 1e-4


@pytest.mark.parametrize("model_type", ["ernie4_5_vl_moe", "diffusion_gemma", "zaya", "dots3_note"])
def test_stray_rows_are_found(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of rows above fails where a module that sees other rows is described: here, all of them are."""
    model = tiny_model(model_type)
    monkeypatch.setattr(TextScope, "why_not", lambda *_: None)
    monkeypatch.setattr(TextScope, "why_shared", lambda *_: None)
    assert stray_rows(model, text_inputs(model))


def test_the_thinker_of_a_model_that_generates_by_its_parts(tmp_path: Path) -> None:
    """The full Qwen3-Omni model runs inside a batch of its thinker; the truths have PEFT layers in their thinkers."""
    model, *truths = (tiny_model("qwen3_omni_moe") for _ in range(4))
    inputs = text_inputs(model.thinker)
    options = {"thinker_max_new_tokens": 4, "thinker_eos_token_id": 95, "return_audio": False}
    with torch.no_grad(), moegraft.attach(model.thinker, adapter_memory="8MiB") as graft:
        for seed, name in ((0, "a"), (2, "b")):
            save_all_of(truths[seed].thinker, tmp_path / name, seed=seed)
            graft.load_adapter(tmp_path / name)
        with graft.batch(["a", None, "b"]):
            mixed = model.generate(**inputs, **options)
        expected = torch.stack([truth.generate(**inputs, **options)[row] for row, truth in enumerate(truths)])
    assert mixed.tolist() == expected.tolist()
    assert len({tuple(row[-4:]) for row in mixed.tolist()}) == 3


def test_a_router_that_multiplies_by_mm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kolibri1's does on CUDA in half precision, past F.linear."""
    router = type(tiny_model("kolibri1").model.layers[0].mlp.gate)

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.mm(hidden_states.reshape(-1, self.hidden_dim), self.weight.t())
        indices = torch.topk(logits + self.e_score_correction_bias, self.top_k, dim=-1)[1]
        scores = logits.gather(1, indices).sigmoid()
        return logits, scores / scores.sum(dim=-1, keepdim=True), indices

    monkeypatch.setattr(router, "forward", forward)
    model = tiny_model("kolibri1")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    adapter = save_with_config(tiny_model("kolibri1"), config, tmp_path / "router")
    inputs = text_inputs(model)
    base, truth = model(**inputs).logits, adapter.truth(**inputs)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        graft.load_adapter(adapter.path)
        mixed = graft(**inputs, adapters=["router", None, "router"]).logits
    for i in (0, 2):
        _assert_within((mixed - base)[i], (truth - base)[i], scale=(truth - base)[i], what="router")
    _assert_within(mixed[1], base[1], scale=base[1], what="base")


def test_lora_on_a_weight_that_is_read_past_its_module(tmp_path: Path) -> None:
    """Jamba's mixer multiplies with dt_proj.weight; in PEFT's live model the adapter has no effect, merged it has."""
    model, generator = build("jamba"), torch.Generator().manual_seed(3)
    names = [name for name in discover_targets(model).linears if name.endswith("dt_proj")]
    assert len(names) == 3
    tensors = {}
    for name in names:
        weight = model.get_submodule(name).weight
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
    write_adapter(tmp_path / "dt", tensors, r=2, lora_alpha=2, target_modules=["dt_proj"])
    rows = _rows()[:3]
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        report = graft.load_adapter(tmp_path / "dt", name="dt")
        assert report.tensors_applied == report.tensors_in_file == 6
        mixed = graft(**_left_padded(rows), adapters=["dt", None, "dt"]).logits
        plain = graft(**_left_padded(rows)).logits
    assert torch.equal(mixed[1], plain[1])
    weights, _ = load_peft_adapter(tmp_path / "dt", _targets("jamba"), dtype=torch.float32)
    for i in (0, 2):
        truth = merged_logits(build("jamba"), _targets("jamba"), weights, input_ids=rows[i][None])[0]
        delta = truth - merged_logits(build("jamba"), _targets("jamba"), None, input_ids=rows[i][None])[0]
        _assert_within((mixed - plain)[i, -len(rows[i]) :], delta, scale=delta, what="dt_proj")


def _targets(family: str) -> ModelTargets:
    return discover_targets(build(family))


def _truths(family: str, adapter: FamilyAdapter, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits [S, V] of one row: as the adapter's maker has them, and merged from what the loader read."""
    targets = _targets(family)
    weights, _ = load_peft_adapter(adapter.path, targets, dtype=torch.float32)
    return {
        "maker": adapter.truth(input_ids=row[None])[0],
        "merged": merged_logits(build(family), targets, weights, input_ids=row[None])[0],
    }


def _rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def _left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = row
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _assert_within(found: torch.Tensor, expected: torch.Tensor, *, scale: torch.Tensor, what: str) -> None:
    """Float32 rounding through a few layers stays below 1e-5 of the largest value; 1e-4 leaves room for the rest."""
    largest = scale.abs().max().item()
    assert largest > 0.01, f"{what}: nothing to compare"
    error = (found - expected).abs().max().item()
    assert error <= 1e-4 * largest, f"{what}: {error} of {largest}"

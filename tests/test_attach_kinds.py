"""Everything that an adapter may touch, in float32 and bfloat16, each against PEFT's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.adapters import save_with_peft
from support.families import build
from support.mixed import KINDS, ROWS, MixedBatch, random_ids, save_kinds
from support.oracle import merged_logits
from support.zoo import tiny_model

import moegraft
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import load_peft_adapter
from moegraft.testing import assert_close_delta, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

# Relative error of what an adapter does to the logits; float32, two layers, other orders of sums: about 1e-6 is seen.
TOL = 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_one_batch_of_every_kind_equals_peft(family: str, tmp_path: Path) -> None:
    """Base and every kind of adapter in one batch; each row against the logits of PEFT alone."""
    model = build(family)
    names = [None, *KINDS]
    ids = random_ids(len(names))
    with torch.no_grad():
        base = model(input_ids=ids).logits
    truths = save_kinds(model, tmp_path, ids)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        for name in KINDS:
            report = graft.load_adapter(tmp_path / name)
            assert report.tensors_applied == report.tensors_in_file
        found = graft(input_ids=ids, adapters=names).logits
        plain = graft(input_ids=ids, adapters=[None] * len(names)).logits
        assert torch.equal(found[0], plain[0])
        for i, name in enumerate(names):
            if name is not None:
                assert_close_delta(found[i], plain[i], truths[name][i], base[i], TOL)


def test_a_router_that_is_a_linear_map(tmp_path: Path) -> None:
    """Hunyuan's router is an nn.Linear: PEFT's ``all-linear`` reaches it, and modules_to_save too."""
    model, ids = build("hunyuan_v1_moe"), random_ids(4)
    configs = {
        "lora": LoraConfig(r=3, target_modules=["gate.wg"]),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=["gate.wg"]),
        "saved": LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["gate.wg"]),
    }
    truths = {name: save_with_peft(model, config, tmp_path / name, ids) for name, config in configs.items()}
    with torch.no_grad():
        base = model(input_ids=ids).logits
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        for name in configs:
            graft.load_adapter(tmp_path / name)
        found = graft(input_ids=ids, adapters=["lora", None, "dora", "saved"]).logits
        plain = graft(input_ids=ids).logits
    assert torch.equal(found[1], plain[1])
    for i, name in ((0, "lora"), (2, "dora"), (3, "saved")):
        assert_close_delta(found[i], plain[i], truths[name][i], base[i], TOL)


@pytest.mark.parametrize("rows", [6, 4])
def test_as_many_tokens_as_experts(tmp_path: Path, rows: int) -> None:
    """MiniMax-M2 hands its router a bias [E]: not one of the tensors that have a row for each token."""
    model, ids = build("minimax_m2"), random_ids(rows, 1)
    config = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["gate"])
    truth = save_with_peft(model, config, tmp_path / "a", ids)
    names = ["a", None] * (rows // 2)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        graft.load_adapter(tmp_path / "a")
        found, plain = graft(input_ids=ids, adapters=names).logits, graft(input_ids=ids).logits
    assert torch.equal(found[1::2], plain[1::2])
    torch.testing.assert_close(found[0::2], truth[0::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_tied_embeddings(tmp_path: Path, config: dict[str, Any]) -> None:
    """One weight, two modules: an adapter moves the one that it names, or both where PEFT was told to tie them."""
    model, ids = build("qwen3_moe"), random_ids(2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    truth = save_with_peft(model, LoraConfig(r=2, **config), tmp_path / "a", ids)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        graft.load_adapter(tmp_path / "a")
        found, plain = graft(input_ids=ids, adapters=["a", None]).logits, graft(input_ids=ids).logits
    assert torch.equal(found[1], plain[1])
    assert_close_delta(found[0], plain[0], truth[0], plain[0], TOL)


class TestBfloat16:
    def test_end_to_end(self, mixed: MixedBatch) -> None:
        """A merge in bfloat16 rounds its weights as well: what it differs from float32 is a fair measure. By token and
        in the median, for in bfloat16 a token may choose another expert where two are nearly as good."""
        model = build("qwen3_moe").to(torch.bfloat16)
        targets = discover_targets(model)
        with moegraft.attach(model, adapter_memory="4MiB") as graft:
            for name, path in mixed.adapters.items():
                graft.load_adapter(path, name=name)
            assert graft.bank.layout.dtype == torch.bfloat16
            found = graft(input_ids=mixed.input_ids, adapters=ROWS).logits
            plain = graft(input_ids=mixed.input_ids, adapters=[None] * len(ROWS)).logits
        assert found.dtype == torch.bfloat16
        assert torch.equal(found[1], plain[1])
        ours, theirs = [], []
        for i, name in enumerate(ROWS):
            if name is not None:
                weights, _ = load_peft_adapter(mixed.adapters[name], targets, dtype=torch.bfloat16)
                merged = merged_logits(model, targets, weights, input_ids=mixed.input_ids[i : i + 1])[0]
                ours.append(token_errors(found[i], mixed.truths[name][i]))
                theirs.append(token_errors(merged, mixed.truths[name][i]))
        median, fair = torch.cat(ours).median(), torch.cat(theirs).median()
        assert median <= 2 * fair, f"{median} against {fair} of merged models"
        assert median <= 0.05  # dozens of roundings to 2**-9 on the way

    def test_delta_of_the_head(self, tmp_path: Path) -> None:
        """Behind all routing: float32 and bfloat16 agree on what an adapter does, to the rounding of two logits."""
        save_with_peft(build("qwen3_moe"), LoraConfig(**KINDS["lm_head"]), tmp_path, random_ids())
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            with moegraft.attach(build("qwen3_moe").to(dtype), adapter_memory="4MiB") as graft:
                graft.load_adapter(tmp_path, name="a")
                with_a, without = (graft(input_ids=random_ids(), adapters=[name] * 2).logits for name in ("a", None))
                found[dtype] = with_a.float() - without.float()
        assert relative_error(found[torch.bfloat16], found[torch.float32]) < 0.1

    def test_the_model_keeps_its_dtype(self) -> None:
        model = build("gpt_oss").to(torch.bfloat16)
        with moegraft.attach(model, adapter_memory="1MiB") as graft:
            assert graft(input_ids=random_ids()).logits.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def token_errors(found_SV: torch.Tensor, truth_SV: torch.Tensor) -> torch.Tensor:
    return (found_SV.float() - truth_SV).norm(dim=1) / truth_SV.norm(dim=1)


class TestExpertsThatTransformersCallsItself:
    """Llama 4: every token for each expert, weighted before; no implementation to choose."""

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_against_peft(self, top_k: int, tmp_path: Path) -> None:
        model = tiny_model("llama4_text", num_experts_per_tok=top_k)
        experts = "model.layers.1.feed_forward.experts"
        config = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "shared_expert.up_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        input_ids = torch.tensor([[1, 5, 9, 2, 7, 3, 11]] * 2)
        expected = save_with_peft(model, config, tmp_path, input_ids)
        before = model(input_ids=input_ids).logits
        with moegraft.attach(model, adapter_memory="8MiB") as graft:
            graft.load_adapter(tmp_path, "a")
            base = graft(input_ids=input_ids).logits
            found = graft(input_ids=input_ids, adapters=["a", None]).logits
            assert "forward" in vars(model.get_submodule(experts))
            assert model(input_ids=input_ids).logits.requires_grad  # as without a graft
        torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
        assert torch.equal(found[1], base[1])
        torch.testing.assert_close(base, before, atol=1e-5, rtol=0)
        assert (found[0] - base[0]).abs().max() > 0.01
        assert "forward" not in vars(model.get_submodule(experts))
        assert torch.equal(model(input_ids=input_ids).logits, before)

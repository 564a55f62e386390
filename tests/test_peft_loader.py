from __future__ import annotations

import copy
import json
import math
import re
import warnings
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from support.adapters import (
    FIXTURE_NAMES,
    PREFIX,
    TensorFactory,
    expert_delta,
    linear_delta,
    load_fixture,
    random_ids,
    save_with_peft,
    write_adapter,
)
from support.families import FAMILIES, build
from support.oracle import merged_logits
from transformers import PreTrainedModel

from moegraft.core.errors import (
    AdapterConfigError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterNameError,
    AdapterTensorError,
    FileError,
)
from moegraft.files.safetensors import SafetensorsFile
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import inspect_peft_adapter, load_peft_adapter
from moegraft.lora.peft.patterns import Budget, Expression, ModulePatterns
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets

# float32 models of hidden size 32 to 40; the merge is in float64, so what differs is the order of float32 sums.
ATOL = 1e-4
HIDDEN, INTER, EXPERTS = 8, 12, 5


@cache
def model_of(family: str) -> tuple[PreTrainedModel, ModelTargets]:
    model = build(family)
    return model, discover_targets(model)


def small_targets(**experts: Any) -> ModelTargets:
    """One layer, without a model behind it."""
    fields = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTER} | experts
    name = "model.layers.0.mlp.experts"
    q_proj, router = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"
    return ModelTargets(
        model_type="mixtral",
        experts={name: ExpertsTarget(name=name, **fields)},
        linears={
            q_proj: LinearTarget(
                name=q_proj, in_features=HIDDEN, out_features=20, weight=lambda: torch.ones(20, HIDDEN)
            ),
            router: LinearTarget(name=router, in_features=HIDDEN, out_features=EXPERTS, router=True),
        },
        embeddings={
            "model.embed_tokens": EmbeddingTarget(name="model.embed_tokens", num_embeddings=33, embedding_dim=HIDDEN)
        },
        saveable={
            "model.embed_tokens": {"weight": torch.arange(33.0 * HIDDEN).reshape(33, HIDDEN)},
            "lm_head": {"weight": torch.ones(33, HIDDEN, dtype=torch.bfloat16)},
            router: {"weight": torch.zeros(EXPERTS, HIDDEN), "calls": torch.tensor([0])},
        },
    )


BOTH_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODULE = "model.layers.0.mlp.experts"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def load(folder: Path, targets: ModelTargets | None = None, dtype: torch.dtype = torch.float32) -> Any:
    weights, report = load_peft_adapter(folder, targets or small_targets(), dtype=dtype)
    assert report.tensors_applied == report.tensors_in_file
    inspection = inspect_peft_adapter(folder, targets or small_targets())
    assert inspection.ok, inspection.problems
    assert sum(module.tensors for module in inspection.modules) == report.tensors_in_file
    return weights, report


class TestAgainstPeft:
    """The adapter as loaded, merged into the base, gives the logits that PEFT gave."""

    @pytest.mark.parametrize("name", FIXTURE_NAMES)
    def test_checkpoints_of_all_generations(self, name: str) -> None:
        fixture = load_fixture(name)
        targets = discover_targets(fixture.model)
        weights, _ = load(fixture.adapter, targets)
        base = merged_logits(fixture.model, targets, None, input_ids=fixture.input_ids)
        adapted = merged_logits(fixture.model, targets, weights, input_ids=fixture.input_ids)
        effect = fixture.logits_adapter - fixture.logits_base
        assert effect.abs().max() > 100 * ATOL
        torch.testing.assert_close(adapted, fixture.logits_adapter, atol=ATOL, rtol=0)
        torch.testing.assert_close(adapted - base, effect, atol=ATOL, rtol=0)

    @pytest.mark.parametrize("name", ["v4_mixtral", "v4_qwen3"])
    def test_what_peft_converts_and_saves_again(self, name: str, tmp_path: Path) -> None:
        """PEFT turns an adapter of transformers 4 into a fused one of twice the rank, B block-diagonal."""
        fixture = load_fixture(name)
        targets = discover_targets(fixture.model)
        trained = peft.PeftModel.from_pretrained(copy.deepcopy(fixture.model), fixture.adapter)
        trained.save_pretrained(tmp_path)
        weights, report = load(tmp_path, targets)
        assert all(ranks == {"gate_up": 6, "down": 3} for ranks in report.experts.values())
        adapted = merged_logits(fixture.model, targets, weights, input_ids=fixture.input_ids)
        torch.testing.assert_close(adapted, fixture.logits_adapter, atol=ATOL, rtol=0)

    @pytest.mark.parametrize(
        ("family", "config"),
        [
            pytest.param("qwen3_moe", {"target_parameters": BOTH_PARAMETERS}, id="both"),
            pytest.param("qwen3_moe", {"target_parameters": BOTH_PARAMETERS[:1]}, id="gate_up"),
            pytest.param("qwen3_moe", {"target_parameters": BOTH_PARAMETERS[1:], "target_modules": []}, id="down"),
            pytest.param("gpt_oss", {"target_parameters": BOTH_PARAMETERS}, id="gpt_oss-both"),
            pytest.param("gpt_oss", {"target_parameters": BOTH_PARAMETERS[1:]}, id="gpt_oss-down"),
            pytest.param(
                "nemotron_h", {"target_parameters": ["experts.up_proj", "experts.down_proj"]}, id="no_gate-both"
            ),
            pytest.param("nemotron_h", {"target_parameters": ["experts.up_proj"]}, id="no_gate-up"),
            pytest.param("nemotron_h", {"target_parameters": ["experts.down_proj"]}, id="no_gate-down"),
            pytest.param(
                "qwen3_moe",
                {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": ["mlp.gate.weight"]},
                id="attention-router",
            ),
            pytest.param("qwen2_moe", {"target_modules": "all-linear"}, id="all_linear-shared_expert"),
            pytest.param("qwen3_moe", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}, id="dora"),
            pytest.param(
                "gpt_oss",
                {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True, "r": 6},
                id="dora-rslora-bias_in_base",
            ),
            pytest.param(
                "qwen3_moe",
                {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm", "gate"]},
                id="modules_to_save",
            ),
            pytest.param("qwen3_moe", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, id="embeddings"),
            pytest.param(
                "qwen3_moe",
                {
                    "target_modules": ["q_proj", "v_proj"],
                    "target_parameters": BOTH_PARAMETERS,
                    "rank_pattern": {r"layers\.0\..*q_proj": 5, "gate_up_proj": 1, "v_proj": 4},
                    "alpha_pattern": {"layers.1.self_attn.q_proj": 7, r".*\.down_proj": 3},
                },
                id="patterns",
            ),
            pytest.param("mixtral", {"target_parameters": BOTH_PARAMETERS, "use_rslora": True, "r": 4}, id="rslora"),
            pytest.param("qwen2_moe", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, id="one_layer"),
        ],
    )
    def test_adapters_of_the_installed_peft(self, family: str, config: dict[str, Any], tmp_path: Path) -> None:
        model, targets = model_of(family)
        fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | config
        input_ids = random_ids()
        expected = save_with_peft(model, peft.LoraConfig(**fields), tmp_path, input_ids)
        weights, _ = load(tmp_path, targets)
        base = merged_logits(model, targets, None, input_ids=input_ids)
        adapted = merged_logits(model, targets, weights, input_ids=input_ids)
        assert (expected - base).abs().max() > 100 * ATOL
        torch.testing.assert_close(adapted - base, expected - base, atol=ATOL, rtol=0)

    def test_base_weights_saved_beside_lora_are_recognised(self, tmp_path: Path) -> None:
        """PEFT saves the base's embedding along with the LoRA on it; keeping that copy would cost a vocabulary."""
        model, targets = model_of("qwen3_moe")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens"])
        save_with_peft(model, config, tmp_path, random_ids())
        weights, report = load(tmp_path, targets)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert any(name.endswith("embed_tokens.base_layer.weight") for name in stored)
        assert not weights.saved
        assert any("equals the base model's model.embed_tokens.weight" in note for note in report.notes)
        assert report.embeddings == {"model.embed_tokens": 2}


LEGACY_FAMILIES = sorted(name for name, family in FAMILIES.items() if family.legacy is not None)


def legacy_name(name: str, family: str) -> str:
    """A module's name in the transformers of the time when experts were separate modules."""
    legacy = FAMILIES[family].legacy
    assert legacy is not None
    if family == "nemotron_h":
        name = re.sub(r"^model\.", "backbone.", name)
    return re.sub(r"\.mlp(?=\.|$)", f".{legacy.block}", name) if legacy.block == "block_sparse_moe" else name


class TestNamesOfTransformers4:
    @pytest.mark.parametrize("family", LEGACY_FAMILIES)
    def test_per_expert_adapters_of_every_family(self, family: str, tmp_path: Path) -> None:
        _, targets = model_of(family)
        legacy = FAMILIES[family].legacy
        assert legacy is not None
        factory = TensorFactory()
        for name, target in targets.experts.items():
            for expert in range(target.num_experts):
                factory.expert(legacy_name(name, family), expert, target, legacy)
        weights, report = load(write_adapter(tmp_path, factory.tensors), targets)
        assert report.experts.keys() == targets.experts.keys()
        for name, target in targets.experts.items():
            for expert in range(target.num_experts):
                found = expert_delta(weights.experts[name], expert)
                prefix = f"{legacy_name(name, family)}.{expert}"
                wanted = {"gate": legacy.gate, "up": legacy.up, "down": legacy.down}
                wanted = {key: factory.deltas[f"{prefix}.{proj}"] for key, proj in wanted.items() if proj}
                assert found.keys() == wanted.keys()
                for key, delta in wanted.items():
                    torch.testing.assert_close(found[key], 2 * delta)

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_every_linear_map_keeps_its_name_or_is_renamed(self, family: str, tmp_path: Path) -> None:
        _, targets = model_of(family)
        rename = (lambda name: legacy_name(name, family)) if FAMILIES[family].legacy else (lambda name: name)
        factory = TensorFactory()
        for name, target in targets.linears.items():
            factory.linear(rename(name), target.in_features, target.out_features)
        weights, _ = load(write_adapter(tmp_path, factory.tensors), targets)
        for name in targets.linears:
            torch.testing.assert_close(linear_delta(weights, name), 2 * factory.deltas[rename(name)])

    @pytest.mark.parametrize(
        ("model_type", "today", "then"),
        [
            ("phimoe", "model.layers.0.mlp.router", "model.layers.0.block_sparse_moe.gate"),
            ("granitemoe", "model.layers.0.block_sparse_moe.router", "model.layers.0.block_sparse_moe.router.layer"),
            ("hy_v3", "model.layers.0.mlp.gate", "model.layers.0.mlp.router.gate"),
            ("hy_v3", "model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.shared_mlp.up_proj"),
            ("laguna", "model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.shared_expert.up_proj"),
            ("bailing_hybrid", "model.layers.0.self_attn.o_proj", "model.layers.0.attention.dense"),
            ("kimi_linear", "model.layers.0.self_attn.forget_gate.f_a_proj", "model.layers.0.self_attn.f_a_proj"),
            (
                "minimax_m3_vl",
                "model.language_model.layers.0.mlp.shared_experts.up_proj",
                "language_model.model.layers.0.block_sparse_moe.shared_experts.up_proj",
            ),
            ("qwen3_vl_moe", "model.language_model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
            ("qwen3_5_moe_text", "model.layers.0.mlp.gate", "model.language_model.layers.0.mlp.gate"),
            ("aria", "model.language_model.layers.0.mlp.router", "language_model.model.layers.0.mlp.router"),
            ("mixtral", "layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
            ("mixtral", "model.layers.0.mlp.gate", "layers.0.block_sparse_moe.gate"),
        ],
    )
    def test_renamed_modules(self, model_type: str, today: str, then: str, tmp_path: Path) -> None:
        targets = ModelTargets(
            model_type=model_type, linears={today: LinearTarget(name=today, in_features=6, out_features=4)}
        )
        factory = TensorFactory()
        factory.linear(then, 6, 4)
        weights, report = load(write_adapter(tmp_path, factory.tensors), targets)
        assert report.linears == {today: 2}
        torch.testing.assert_close(linear_delta(weights, today), 2 * factory.deltas[then])

    @pytest.mark.parametrize(
        ("model_type", "today", "then"),
        [
            ("ernie4_5_moe", "mlp.gate.moe_statics.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
            ("exaone_moe", "mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
            ("laguna", "mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
            ("minimax_m2", "mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
        ],
    )
    def test_renamed_parameters(self, model_type: str, today: str, then: str, tmp_path: Path) -> None:
        module, _, param = f"model.layers.0.{today}".rpartition(".")
        targets = ModelTargets(model_type=model_type, saveable={module: {param: torch.zeros(4)}})
        name = f"{PREFIX}model.layers.0.{then}"
        weights, _ = load(write_adapter(tmp_path, {name: torch.ones(4)}), targets)
        assert weights.saved[module][param].equal(torch.ones(4))

    @pytest.mark.parametrize(
        ("model_type", "first", "second", "experts"),
        [
            (
                "granitemoe",
                "block_sparse_moe.input_linear",
                "block_sparse_moe.output_linear",
                "block_sparse_moe.experts",
            ),
            ("aria_text", "mlp.experts.fc1", "mlp.experts.fc2", "mlp.experts"),
        ],
    )
    def test_fused_modules_of_their_own(
        self, model_type: str, first: str, second: str, experts: str, tmp_path: Path
    ) -> None:
        """GraniteMoe and Aria kept each fused parameter, called weight, in a module of its own."""
        name = f"model.layers.0.{experts}"
        target = ExpertsTarget(name=name, num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTER)
        targets = ModelTargets(model_type=model_type, experts={name: target})
        factory = TensorFactory()
        p13 = factory.fused(f"model.layers.0.{first}", EXPERTS, HIDDEN, 2 * INTER)
        p2 = factory.fused(f"model.layers.0.{second}", EXPERTS, INTER, HIDDEN)
        weights, report = load(write_adapter(tmp_path, factory.tensors), targets)
        assert report.experts == {name: {"gate_up": 2, "down": 2}}
        assert_fused(weights.experts[name], target, 2 * p13, 2 * p2)

    def test_a_name_that_might_be_two_modules_is_refused(self, tmp_path: Path) -> None:
        names = ("model.language_model.layers.0.q", "layers.0.q")
        linears = {name: LinearTarget(name=name, in_features=6, out_features=4) for name in names}
        factory = TensorFactory()
        factory.linear("model.layers.0.q", 6, 4)
        folder = write_adapter(tmp_path, factory.tensors)
        with pytest.raises(AdapterMismatchError, match=r"might belong to .* or "):
            load_peft_adapter(folder, ModelTargets(model_type="x", linears=linears), dtype=torch.float32)

    def test_an_unknown_module_is_named_with_its_nearest(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear("model.layers.0.self_attn.q_prj", HIDDEN, 20)
        with pytest.raises(AdapterMismatchError, match=r"q_prj.*the nearest are model\.layers\.0\.self_attn\.q_proj"):
            load(write_adapter(tmp_path, factory.tensors))


def assert_fused(lora: Any, target: ExpertsTarget, delta13: torch.Tensor, delta2: torch.Tensor | None) -> None:
    """``delta13`` [E, 2F, D] (gate before up, or interleaved), ``delta2`` [E, D, F]: what each expert must gain."""
    assert lora.expert_ids == tuple(range(target.num_experts))
    halves = (
        (delta13[:, 0::2], delta13[:, 1::2]) if target.is_interleaved else delta13.split(target.intermediate_size, 1)
    )
    for expert in range(target.num_experts):
        found = expert_delta(lora, expert)
        torch.testing.assert_close(found["gate"], halves[0][expert])
        torch.testing.assert_close(found["up"], halves[1][expert])
        if delta2 is not None:
            torch.testing.assert_close(found["down"], delta2[expert])


class TestFusedExperts:
    @pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.0.dev0@abc", None])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("inter", [4, 6], ids=["square", "oblong"])
    @pytest.mark.parametrize("both", [False, True])
    def test_orientations(self, version: str | None, transposed: bool, inter: int, both: bool, tmp_path: Path) -> None:
        """The table of the three generations, where the gate_up parameter is square (2F = D) and where it is not."""
        stored_is_transpose_of_p = {"0.19.0": not transposed}.get(version or "", transposed)
        if version in ("0.17.1", "0.18.1", None):
            stored_is_transpose_of_p = True
        target = ExpertsTarget(
            name=MODULE,
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=inter,
            is_transposed=transposed,
            is_interleaved=transposed,
        )
        a_is_input = stored_is_transpose_of_p == transposed
        factory = TensorFactory()
        sizes13 = (HIDDEN, 2 * inter) if a_is_input else (2 * inter, HIDDEN)
        sizes2 = (inter, HIDDEN) if a_is_input else (HIDDEN, inter)
        inner = f"{MODULE}.base_layer" if both else MODULE
        p13 = factory.fused(inner, EXPERTS, *sizes13)
        p2 = factory.fused(MODULE, EXPERTS, *sizes2) if both else None
        named = BOTH_PARAMETERS if both else BOTH_PARAMETERS[:1]
        folder = write_adapter(tmp_path, factory.tensors, peft_version=version, target_parameters=named)
        weights, report = load(folder, ModelTargets(model_type="x", experts={MODULE: target}))
        delta13 = p13 if a_is_input else p13.transpose(1, 2)
        delta2 = None if p2 is None else 2 * (p2 if a_is_input else p2.transpose(1, 2))
        assert_fused(weights.experts[MODULE], target, 2 * delta13, delta2)
        told = "shapes" if both or inter != 4 else "peft_version"
        assert any(f"told by {told}" in note.replace("the ", "") for note in report.notes)

    def test_shapes_of_another_parameter_outweigh_the_version(self, tmp_path: Path) -> None:
        """gpt-oss has a square down_proj; its gate_up_proj tells which way both lie, whatever the version says."""
        target = ExpertsTarget(
            name=MODULE,
            num_experts=EXPERTS,
            hidden_size=8,
            intermediate_size=8,
            is_transposed=True,
            is_interleaved=True,
        )
        factory = TensorFactory()
        p13 = factory.fused(f"{MODULE}.base_layer", EXPERTS, 16, 8)
        p2 = factory.fused(MODULE, EXPERTS, 8, 8)
        folder = write_adapter(tmp_path, factory.tensors, peft_version="0.20.0", target_parameters=BOTH_PARAMETERS)
        weights, _ = load(folder, ModelTargets(model_type="gpt_oss", experts={MODULE: target}))
        assert_fused(weights.experts[MODULE], target, 2 * p13.transpose(1, 2), 2 * p2.transpose(1, 2))

    def test_gate_and_up_share_one_a(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.fused(MODULE, EXPERTS, HIDDEN, 2 * INTER, r=3)
        folder = write_adapter(tmp_path, factory.tensors, r=3, target_parameters=["experts.gate_up_proj"])
        lora = load(folder)[0].experts[MODULE]
        assert lora.a13.shape == (EXPERTS, 3, HIDDEN)
        assert lora.up_lane == 0
        assert lora.b_gate.shape == lora.b_up.shape == (EXPERTS, 3, INTER)
        assert lora.a2 is None

    def test_roles_by_shape_where_the_down_projection_is_the_inner_one(self, tmp_path: Path) -> None:
        target = small_targets().experts[MODULE]
        factory = TensorFactory()
        p2 = factory.fused(f"{MODULE}.base_layer", EXPERTS, INTER, HIDDEN)
        p13 = factory.fused(MODULE, EXPERTS, HIDDEN, 2 * INTER)
        weights, _ = load(write_adapter(tmp_path, factory.tensors, target_parameters=BOTH_PARAMETERS))
        assert_fused(weights.experts[MODULE], target, 2 * p13, 2 * p2)

    def test_without_target_parameters_the_shape_tells(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        p2 = factory.fused(MODULE, EXPERTS, INTER, HIDDEN)
        lora = load(write_adapter(tmp_path, factory.tensors))[0].experts[MODULE]
        torch.testing.assert_close(expert_delta(lora, 2)["down"], 2 * p2[2])
        assert lora.a13 is None

    def test_without_a_gate_nothing_tells(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.fused(MODULE, EXPERTS, INTER, HIDDEN)
        folder = write_adapter(tmp_path, factory.tensors)
        with pytest.raises(AdapterConfigError, match="target_parameters names neither up_proj nor down_proj"):
            load(folder, small_targets(has_gate=False, w13_param="up_proj"))

    def test_without_a_gate_a_lone_pair_is_the_one_that_peft_puts_there(self, tmp_path: Path) -> None:
        """Both are named, one is in the file: the outer wrapper is down_proj, the inner one up_proj."""
        targets = small_targets(has_gate=False, w13_param="up_proj")
        named = ["experts.up_proj", "experts.down_proj"]
        for depth, expected, sizes in (("", "down", (INTER, HIDDEN)), (".base_layer", "up", (HIDDEN, INTER))):
            factory = TensorFactory()
            factory.fused(f"{MODULE}{depth}", EXPERTS, *sizes)
            folder = write_adapter(tmp_path / expected, factory.tensors, target_parameters=named)
            assert load(folder, targets)[1].experts[MODULE] == {expected: 2}

    def test_lora_on_a_third_parameter_is_refused(self, tmp_path: Path) -> None:
        """gpt-oss has biases; PEFT can wrap one more parameter of the module."""
        factory = TensorFactory()
        for depth in ("", ".base_layer", ".base_layer.base_layer"):
            factory.fused(f"{MODULE}{depth}", EXPERTS, HIDDEN, 2 * INTER)
        with pytest.raises(AdapterTensorError, match=r"base_layer\.base_layer.*more than the two weights"):
            load(write_adapter(tmp_path, factory.tensors, target_parameters=BOTH_PARAMETERS))

    def test_the_named_parameter_must_have_the_shape(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.fused(MODULE, EXPERTS, INTER, HIDDEN)
        folder = write_adapter(tmp_path, factory.tensors, target_parameters=["experts.gate_up_proj"])
        with pytest.raises(AdapterTensorError, match=r"lora_A.*expected gate_up A \[5\*r, 8\] and B \[24, 5\*r\]"):
            load(folder)

    def test_rank_and_scale_by_the_name_of_the_parameter(self, tmp_path: Path) -> None:
        """So PEFT writes an adapter of transformers 4 that it converted: gate_up of twice the rank, and of twice the
        alpha."""
        factory = TensorFactory()
        p13 = factory.fused(f"{MODULE}.base_layer", EXPERTS, HIDDEN, 2 * INTER, r=4)
        p2 = factory.fused(MODULE, EXPERTS, INTER, HIDDEN, r=2)
        folder = write_adapter(
            tmp_path,
            factory.tensors,
            lora_alpha=3,
            rank_pattern={r".*\.gate_up_proj": 4},
            alpha_pattern={r".*\.gate_up_proj": 6},
            target_parameters=BOTH_PARAMETERS,
        )
        weights, report = load(folder)
        assert report.experts[MODULE] == {"gate_up": 4, "down": 2}
        assert_fused(weights.experts[MODULE], small_targets().experts[MODULE], 1.5 * p13, 1.5 * p2)


GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def per_expert(factory: TensorFactory, experts: list[int], projections: tuple[str, ...], *, r: int = 2) -> None:
    for expert in experts:
        for proj in projections:
            sizes = (INTER, HIDDEN) if proj == DOWN else (HIDDEN, INTER)
            factory.linear(f"{MODULE}.{expert}.{proj}", *sizes, r=r)


class TestPerExpert:
    def test_a_subset_of_experts(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [4, 1], (GATE, UP, DOWN))
        lora = load(write_adapter(tmp_path, factory.tensors))[0].experts[MODULE]
        assert lora.expert_ids == (1, 4)
        assert lora.a13.shape == (2, 4, HIDDEN)
        assert lora.up_lane == 2
        for expert in (1, 4):
            found = expert_delta(lora, expert)
            torch.testing.assert_close(found["gate"], 2 * factory.deltas[f"{MODULE}.{expert}.{GATE}"])
            torch.testing.assert_close(found["up"], 2 * factory.deltas[f"{MODULE}.{expert}.{UP}"])

    @pytest.mark.parametrize("projection", [GATE, UP, DOWN])
    def test_one_projection_only(self, projection: str, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0, 2], (projection,))
        lora = load(write_adapter(tmp_path, factory.tensors))[0].experts[MODULE]
        assert lora.up_lane == 0
        found = expert_delta(lora, 2)
        assert list(found) == [projection.removesuffix("_proj")]
        torch.testing.assert_close(*found.values(), 2 * factory.deltas[f"{MODULE}.2.{projection}"])

    def test_projections_of_different_experts(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0, 1], (GATE,))
        per_expert(factory, [1, 3], (DOWN,))
        lora = load(write_adapter(tmp_path, factory.tensors))[0].experts[MODULE]
        assert lora.expert_ids == (0, 1, 3)
        assert expert_delta(lora, 0)["down"].count_nonzero() == 0
        assert expert_delta(lora, 3)["gate"].count_nonzero() == 0
        torch.testing.assert_close(expert_delta(lora, 3)["down"], 2 * factory.deltas[f"{MODULE}.3.{DOWN}"])

    def test_ranks_and_scales_of_their_own(self, tmp_path: Path) -> None:
        """Experts of smaller rank are padded with zero rows; every scale uses the expert's own rank."""
        factory = TensorFactory()
        per_expert(factory, [0], (GATE, UP), r=2)
        per_expert(factory, [1], (GATE,), r=5)
        per_expert(factory, [1], (UP,), r=2)
        folder = write_adapter(
            tmp_path,
            factory.tensors,
            use_rslora=True,
            rank_pattern={"experts.1.gate_proj": 5},
            alpha_pattern={r"experts\.\d\.up_proj": 3},
        )
        weights, report = load(folder)
        lora = weights.experts[MODULE]
        assert report.experts[MODULE] == {"gate": 5, "up": 2}
        assert lora.up_lane == 5
        scales = {(0, GATE): 4 / math.sqrt(2), (1, GATE): 4 / math.sqrt(5), (0, UP): 3 / math.sqrt(2)}
        for (expert, proj), scale in scales.items():
            found = expert_delta(lora, expert)[proj.removesuffix("_proj")]
            torch.testing.assert_close(found, scale * factory.deltas[f"{MODULE}.{expert}.{proj}"])

    def test_one_large_rank_cannot_blow_up_the_others(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0], (GATE,), r=400)
        per_expert(factory, list(range(1, 40)), (GATE,), r=1)
        folder = write_adapter(tmp_path, factory.tensors, r=1, rank_pattern={f"{MODULE}.0.{GATE}": 400})
        with pytest.raises(AdapterTensorError, match=r"experts\.0\.gate_proj.*rank 400"):
            load(folder, small_targets(num_experts=40))

    def test_a_gate_that_the_base_does_not_have_is_refused(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0], (GATE,))
        with pytest.raises(AdapterMismatchError, match=r"experts\.0\.gate_proj.* have no gate"):
            load(write_adapter(tmp_path, factory.tensors), small_targets(has_gate=False, w13_param="up_proj"))

    def test_an_expert_beyond_the_last_is_refused(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [EXPERTS], (GATE,))
        with pytest.raises(AdapterMismatchError, match=r"expert 5, but .* has 5"):
            load(write_adapter(tmp_path, factory.tensors))


class TestSharedOuter:
    """Three-dimensional A [E or 1, r, in] and B [E or 1, out, r] under ``experts.w1`` or ``experts.gate_proj``."""

    @pytest.mark.parametrize("names", [("w1", "w3", "w2"), (GATE, UP, DOWN)])
    @pytest.mark.parametrize(
        "copies",
        [((1, EXPERTS), (1, EXPERTS), (EXPERTS, 1)), ((1, 1), (EXPERTS, 1), (1, 1)), ((EXPERTS, EXPERTS),) * 3],
        ids=["shared_outer", "mixed", "none_shared"],
    )
    def test_all_forms(self, names: tuple[str, ...], copies: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
        factory, wanted = TensorFactory(), {}
        for key, name, (a_copies, b_copies) in zip(("gate", "up", "down"), names, copies, strict=True):
            size_in, size_out = (INTER, HIDDEN) if key == "down" else (HIDDEN, INTER)
            a, b = factory.draw(a_copies, 3, size_in), factory.draw(b_copies, size_out, 3)
            factory.tensors[f"{PREFIX}{MODULE}.{name}.lora_A.weight"] = a
            factory.tensors[f"{PREFIX}{MODULE}.{name}.lora_B.weight"] = b
            wanted[key] = 2 * (b @ a).expand(EXPERTS, -1, -1)
        lora = load(write_adapter(tmp_path, factory.tensors, r=3, lora_alpha=6))[0].experts[MODULE]
        assert lora.expert_ids == tuple(range(EXPERTS))
        assert lora.a13.shape[0] == max(copies[0][0], copies[1][0])
        assert (lora.b_gate.shape[0], lora.b_up.shape[0]) == (copies[0][1], copies[1][1])
        assert (lora.a2.shape[0], lora.b2.shape[0]) == copies[2]
        for expert in range(EXPERTS):
            for key, delta in expert_delta(lora, expert).items():
                torch.testing.assert_close(delta, wanted[key][expert])


class TestEverythingElse:
    def test_dora_gain_and_its_edges(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        magnitude = factory.draw(20).abs()
        factory.tensors[f"{PREFIX}{Q_PROJ}.lora_magnitude_vector.weight"] = magnitude
        folder = write_adapter(tmp_path, factory.tensors, use_dora=True)
        lora = load(folder)[0].linears[Q_PROJ]
        merged = torch.ones(20, HIDDEN) + 2 * factory.deltas[Q_PROJ]
        gain = magnitude / merged.norm(dim=1)
        torch.testing.assert_close(lora.gain, gain)
        torch.testing.assert_close(lora.b.T @ lora.a, gain[:, None] * 2 * factory.deltas[Q_PROJ])
        unreadable = LinearTarget(name=Q_PROJ, in_features=HIDDEN, out_features=20)
        with pytest.raises(AdapterConfigError, match=f"use_dora: .*{Q_PROJ}.* cannot be read"):
            load(folder, ModelTargets(model_type="x", linears={Q_PROJ: unreadable}))
        factory.tensors[f"{PREFIX}{Q_PROJ}.lora_magnitude_vector.weight"] = magnitude[:-1]
        with pytest.raises(AdapterTensorError, match=r"lora_magnitude_vector.*shape \[19\], expected \[20\]"):
            load(write_adapter(tmp_path, factory.tensors, use_dora=True))
        del factory.tensors[f"{PREFIX}{Q_PROJ}.lora_magnitude_vector.weight"]
        with pytest.raises(AdapterTensorError, match=r"has no lora_magnitude_vector, but use_dora is true"):
            load(write_adapter(tmp_path, factory.tensors, use_dora=True))

    def test_saved_parameters_take_the_dtype_of_the_base(self, tmp_path: Path) -> None:
        tensors = {
            f"{PREFIX}lm_head.weight": torch.full((33, HIDDEN), 3.0),
            f"{PREFIX}model.layers.0.mlp.gate.modules_to_save.weight": torch.ones(EXPERTS, HIDDEN),
            f"{PREFIX}model.embed_tokens.modules_to_save.default.weight": torch.ones(33, HIDDEN),
        }
        weights, report = load(write_adapter(tmp_path, tensors), dtype=torch.float16)
        assert weights.saved["lm_head"]["weight"].dtype is torch.bfloat16
        assert weights.saved["model.layers.0.mlp.gate"]["weight"].equal(torch.ones(EXPERTS, HIDDEN))
        assert report.saved.keys() == {"lm_head", "model.layers.0.mlp.gate", "model.embed_tokens"}

    def test_an_integer_buffer_is_not_replaced(self, tmp_path: Path) -> None:
        name = f"{PREFIX}model.layers.0.mlp.gate.calls"
        with pytest.raises(AdapterTensorError, match="calls"):
            load(write_adapter(tmp_path, {name: torch.ones(1)}))

    def test_the_scale_is_folded_in_before_the_cast(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        weights, report = load(write_adapter(tmp_path, factory.tensors, lora_alpha=2 / 3), dtype=torch.bfloat16)
        b = factory.tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"]
        assert weights.linears[Q_PROJ].b.equal((b.T * (2 / 3 / 2)).bfloat16())
        assert "tensors stored as float32 were cast to bfloat16" in report.notes

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("layout", ["fused", "single", "stacked"])
    def test_a_file_in_the_dtype_of_the_model_is_scaled_in_float32(
        self, layout: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        factory, scale = TensorFactory(), 1 / 3
        if layout == "fused":
            factory.fused(MODULE, EXPERTS, INTER, HIDDEN)
        elif layout == "single":
            for expert in range(EXPERTS):
                factory.linear(f"{MODULE}.{expert}.{DOWN}", INTER, HIDDEN)
        else:
            factory.tensors[f"{PREFIX}{MODULE}.{DOWN}.lora_A.weight"] = factory.draw(EXPERTS, 2, INTER)
            factory.tensors[f"{PREFIX}{MODULE}.{DOWN}.lora_B.weight"] = factory.draw(EXPERTS, HIDDEN, 2)
        stored = {name: tensor.to(dtype) for name, tensor in factory.tensors.items()}
        named = {"target_parameters": BOTH_PARAMETERS[1:]} if layout == "fused" else {}
        folder = write_adapter(tmp_path / "stored", stored, lora_alpha=2 * scale, **named)
        same = load(folder, dtype=dtype)[0].experts[MODULE]
        wide = load(folder, dtype=torch.float32)[0].experts[MODULE]
        assert torch.equal(same.a2, wide.a2.to(dtype))
        assert torch.equal(same.b2, wide.b2.to(dtype))
        assert not torch.equal(same.b2, wide.b2)
        stored = {name: tensor * (torch.finfo(dtype).max / 100) for name, tensor in stored.items()}
        large = write_adapter(tmp_path / "large", stored, lora_alpha=1e6, **named)
        with pytest.raises(AdapterTensorError, match=r"b2 of .*outside the range of"):
            load(large, dtype=dtype)

    def test_float64_is_served_and_overflow_refused(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        wide = {name: tensor.double() for name, tensor in factory.tensors.items()}
        weights, _ = load(write_adapter(tmp_path / "wide", wide))
        torch.testing.assert_close(linear_delta(weights, Q_PROJ), 2 * factory.deltas[Q_PROJ])
        folder = write_adapter(tmp_path / "large", factory.tensors, lora_alpha=1e6)
        with pytest.raises(AdapterTensorError, match=r"lora_B.*outside the range of torch.float16"):
            load_peft_adapter(folder, small_targets(), dtype=torch.float16)

    def test_shards(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0, 1], (GATE, UP, DOWN))
        folder = write_adapter(tmp_path, factory.tensors)
        (folder / "adapter_model.safetensors").unlink()
        names = sorted(factory.tensors)
        shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, held in shards.items():
            save_file({name: factory.tensors[name] for name in held}, folder / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        weights, report = load(folder)
        assert report.tensors_in_file == 12
        assert report.bytes_in_file == sum((folder / file).stat().st_size for file in shards)
        torch.testing.assert_close(
            expert_delta(weights.experts[MODULE], 1)["down"], 2 * factory.deltas[f"{MODULE}.1.{DOWN}"]
        )

    def test_the_links_of_a_hub_cache_are_followed(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        snapshot = write_adapter(tmp_path / "models--org--name" / "snapshots" / "main", factory.tensors)
        blobs = tmp_path / "models--org--name" / "blobs"
        blobs.mkdir()
        for file in list(snapshot.iterdir()):
            file.rename(blobs / file.name)
            file.symlink_to(Path("..") / ".." / "blobs" / file.name)
        assert load(snapshot)[1].linears == {Q_PROJ: 2}

    def test_report_and_inspection(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        per_expert(factory, [0], (GATE,))
        factory.linear(Q_PROJ, HIDDEN, 20)
        factory.tensors[f"{PREFIX}lm_head.weight"] = torch.full((33, HIDDEN), 3.0)
        folder = write_adapter(tmp_path / "mine", factory.tensors, future_field=7)
        _, report = load(folder)
        assert (report.name, report.path, report.peft_version) == ("mine", str(folder), "0.19.1")
        assert report.tensors_in_file == 5
        assert report.notes == ("adapter_config.json: unknown field 'future_field' was not read",)
        assert load_peft_adapter(folder, small_targets(), dtype=torch.float32, name="other")[1].name == "other"
        found = {module.name: module for module in inspect_peft_adapter(folder).modules}
        assert found[Q_PROJ].ranks == {"lora": 2}
        assert found[Q_PROJ].nbytes == 4 * 2 * (HIDDEN + 20)
        assert found["lm_head"].kind == "saved"
        planned = {module.target: module.kind for module in inspect_peft_adapter(folder, small_targets()).modules}
        assert planned == {MODULE: "experts", Q_PROJ: "linear", "lm_head": "saved"}

    @pytest.mark.parametrize("with_targets", [False, True])
    def test_inspection_collects_what_is_wrong(self, with_targets: bool, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        factory.tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"][0, 0] = math.nan
        factory.linear("model.layers.7.nowhere", HIDDEN, 20)
        folder = write_adapter(tmp_path, factory.tensors)
        inspection = inspect_peft_adapter(folder, small_targets() if with_targets else None)
        assert not inspection.ok
        assert any("AdapterTensorError" in text and "NaN" in text for text in inspection.problems)
        assert any("nowhere" in text for text in inspection.problems) == with_targets
        assert inspect_peft_adapter(tmp_path / "absent").problems[0].startswith("AdapterFileError")
        (folder / "adapter_config.json").unlink()
        assert any("AdapterConfigError" in text for text in inspect_peft_adapter(folder).problems)

    def test_a_file_that_shrinks_while_it_is_read(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear(Q_PROJ, HIDDEN, 20)
        file = write_adapter(tmp_path, factory.tensors) / "adapter_model.safetensors"
        with SafetensorsFile(file.name, FileIO(file)) as opened:
            file.write_bytes(file.read_bytes()[:-8])
            with pytest.raises(FileError, match=r"adapter_model.safetensors: ends at byte"):
                for name in opened.tensors:
                    opened.read(name)

    def test_thousands_of_strays_are_not_compared_with_every_name(self, tmp_path: Path) -> None:
        tensors = {f"{PREFIX}model.layers.{layer}.nowhere.lora_A.weight": torch.ones(1, 1) for layer in range(5000)}
        problems = inspect_peft_adapter(write_adapter(tmp_path, tensors), small_targets()).problems
        assert len(problems) == 100
        assert sum("the nearest are" in problem for problem in problems) <= 10

    def test_a_load_says_how_much_more_is_wrong(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        factory.linear("model.layers.7.nowhere", HIDDEN, 20)
        folder = write_adapter(tmp_path, factory.tensors)
        with pytest.raises(AdapterMismatchError) as caught:
            load_peft_adapter(folder, small_targets(), dtype=torch.float32)
        assert caught.value.__notes__ == ["and 1 more problems; inspect_peft_adapter lists them"]

    @pytest.mark.parametrize("name", ["", 7])
    def test_a_name_that_is_none(self, name: Any, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path, {})
        with pytest.raises(AdapterNameError, match=repr(name)):
            load_peft_adapter(folder, small_targets(), dtype=torch.float32, name=name)

    def test_a_hub_id_is_explained(self) -> None:
        with pytest.raises(AdapterFileError, match="hub repositories are not supported"):
            load_peft_adapter("some-org/some-adapter", small_targets(), dtype=torch.float32)


MODULE_NAMES = [
    "q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.3.w1",
    "model.layers.1.mlp.experts.13.w1",
    "model.layers.1.mlp.experts.gate_up_proj",
]


class TestPatterns:
    @pytest.mark.parametrize(
        "keys",
        [
            ["q_proj"],
            ["proj", "self_attn.q_proj", "q_proj"],
            ["layers.1.self_attn.q_proj"],
            ["1.self_attn.q_proj", "q_proj"],
            [r"model\.layers\.1\.self_attn\.q_proj", "q_proj"],
            ["^q_proj"],
            ["^model.layers.1.self_attn.q_proj"],
            [r"layers\.\d\..*"],
            [r"layers\.(1|12)\.self_attn\.(q|k)_proj", "w1"],
            [r".*\.gate_up_proj", "experts.3.w1"],
            [r"experts\.[0-9]+\.w[13]"],
            ["q_proj|w1"],
            [".*"],
        ],
    )
    def test_the_rule_is_that_of_peft(self, keys: list[str]) -> None:
        patterns = ModulePatterns("rank_pattern", {key: index for index, key in enumerate(keys)})
        for name in MODULE_NAMES:
            found = patterns.find(name)
            expected = get_pattern_key(keys, name)
            assert (found[0] if found else name) == expected

    @pytest.mark.parametrize(
        "pattern",
        [
            r"(a)\1",
            "(?=a)b",
            "(?i)a",
            "(?P<x>a)",
            "(?>a)b",
            r"\bq_proj",
            "a*+",
            "(a",
            "[a",
            "*a",
            "a)",
            "a**",
            "[b-a]",
            "^*",
            "a{3,1}",
            "a\\",
            "x" * 2000 + ".*",
            "a{1,50}{1,50}b",
            "((a{64}){64}){64}",
            "(?:){999999999}{2}",
        ],
    )
    def test_what_is_not_supported_is_refused(self, pattern: str) -> None:
        with pytest.raises(AdapterConfigError, match="rank_pattern"):
            ModulePatterns("rank_pattern", {pattern: 1})

    @pytest.mark.parametrize(
        "pattern",
        [
            "(a+)+$",
            "(a*)*",
            "(.*a){20}",
            "(a|a)*b",
            "a?" * 20 + "a" * 20,
            ".*.*.*.*[!?]",
            "(a|b)" * 5,
            "(?:){999999999}",
            r"(.*\.)*(.*\.)*(.*\.)*x",
            "(a{0,30}){0,30}b",
        ],
    )
    def test_what_keeps_re_busy_takes_linear_time(self, pattern: str) -> None:
        """``re`` would need up to 2^300 steps; here the name times the pattern bounds them."""
        budget = Budget()
        before = budget.left
        patterns = ModulePatterns("rank_pattern", {pattern: 1}, budget)
        for name in ("a" * 300, "model." * 50 + "x", "q_proj"):
            patterns.find(name)
        assert before - budget.left < 700 * 2000

    def test_all_expressions_of_a_config_have_one_budget(self) -> None:
        budget = Budget(100_000)
        first = ModulePatterns("rank_pattern", {".*a.*b.*c": 1}, budget)
        second = ModulePatterns("alpha_pattern", {".*a.*b.*": 1}, budget)
        with pytest.raises(AdapterConfigError, match=r"alpha_pattern: matching .* steps"):
            for i in range(10_000):
                first.find(f"model.layers.{i}.q_proj")
                second.find(f"model.layers.{i}.q_proj")

    @settings(max_examples=400)
    @given(
        pattern=st.lists(
            st.sampled_from(
                [
                    *"ab.19-_|()[]^$*+?{}",
                    "(?:",
                    "[ab]",
                    "[^a.]",
                    "[0-9]",
                    r"\d",
                    r"\.",
                    r"\w",
                    r"\S",
                    "{2}",
                    "{1,}",
                    "{,2}",
                    "(a|b)",
                    ".*",
                    "ab",
                    r"\A",
                    r"\Z",
                    "*?",
                    "[]a]",
                    "[a-]",
                    r"[\w.]",
                ]
            ),
            max_size=9,
        ).map("".join),
        names=st.lists(st.text(alphabet="ab.1", max_size=7), min_size=1, max_size=5),
    )
    def test_matching_is_that_of_re(self, pattern: str, names: list[str]) -> None:
        try:
            expression = Expression(pattern)
        except ValueError as error:
            if "is not a regular expression" in str(error):
                with pytest.raises(re.error):
                    re.compile(pattern)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            truth = re.compile(rf"(.*\.)?({pattern})$")
        for name in names:
            assert expression.matches_end(name, Budget()) == bool(truth.match(name)), (pattern, name)

    def test_many_plain_names_are_looked_up(self) -> None:
        names = {f"model.layers.{layer}.experts.{e}.w1": layer + e for layer in range(60) for e in range(128)}
        patterns = ModulePatterns("rank_pattern", names)
        assert all(patterns.find(name) == (name, value) for name, value in names.items())

    def test_too_many_expressions(self) -> None:
        with pytest.raises(AdapterConfigError, match="300 regular expressions"):
            ModulePatterns("rank_pattern", {f"layers\\.{i}": 1 for i in range(300)})

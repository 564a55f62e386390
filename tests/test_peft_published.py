"""Adapters in the forms that tools write them in, against PEFT's own logits or weights merged by hand in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hostile
from support.adapters import (
    PREFIX,
    TensorFactory,
    expert_delta,
    linear_delta,
    random_ids,
    save_with_peft,
    write_adapter,
)
from support.families import VOCAB_SIZE, build
from support.zoo import tiny_model
from transformers import PreTrainedModel

import moegraft
from moegraft.core.errors import AdapterError, AdapterMismatchError, AdapterTensorError, UnservedModuleError
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import inspect_peft_adapter, load_peft_adapter
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets
from moegraft.moe.experts import MarlinExperts, TorchExperts, TritonExperts, UnfusedOAITritonExperts
from moegraft.oracle import why_no_dora
from moegraft.parallel.slices import ExpertsSlice, LinearSlice, RankSlice

ATOL = 1e-4
EXPERTS = "model.layers.1.mlp.experts"


def served_logits(model: PreTrainedModel, folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """The effect on the first row, through attach; the second has no adapter and stays as it was."""
    with moegraft.attach(copy.deepcopy(model), adapter_memory="8MiB") as graft:
        base = graft(input_ids=input_ids).logits
        report = graft.load_adapter(folder, "a")
        assert report.tensors_applied == report.tensors_in_file
        found = graft(input_ids=input_ids, adapters=["a", None]).logits
    assert torch.equal(found[1], base[1])
    assert (found[0] - base[0]).abs().max() > 100 * ATOL
    return found[0]


class TestTrainedTokens:
    @pytest.mark.parametrize("is_tied", [False, True])
    @pytest.mark.parametrize("rows", [[1, 5, 90], {"embed_tokens": [2, 7], "lm_head": [3]}], ids=["list", "both"])
    def test_against_peft(self, is_tied: bool, rows: Any, tmp_path: Path) -> None:
        model = build("qwen3_moe", tie_word_embeddings=is_tied)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=rows)
        input_ids = torch.tensor([[1, 5, 90, 2, 7, 3, 11]] * 2)
        expected = save_with_peft(model, config, tmp_path, input_ids)
        torch.testing.assert_close(served_logits(model, tmp_path, input_ids), expected[0], atol=ATOL, rtol=0)
        inspection = inspect_peft_adapter(tmp_path, discover_targets(model))
        assert inspection.ok, inspection.problems
        assert "tokens" in {module.kind for module in inspection.modules}

    def test_no_copy_of_the_vocabulary_is_held(self, tmp_path: Path) -> None:
        targets = discover_targets(build("qwen3_moe"))
        tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}
        folder = write_adapter(tmp_path, tensors, trainable_token_indices={"embed_tokens": [4]})
        weights, report = load_peft_adapter(folder, targets, dtype=torch.float32)
        assert report.tokens == {"model.embed_tokens": (4,)}
        assert weights.num_bytes == 4 * (VOCAB_SIZE + 32)

    def test_a_rank_holds_its_part(self, tmp_path: Path) -> None:
        """A vocabulary that ranks share out, and a head whose columns they share."""
        targets = discover_targets(build("qwen3_moe"))
        name = f"{PREFIX}{{}}.token_adapter.trainable_tokens_delta"
        tensors = {name.format("model.embed_tokens"): torch.ones(2, 32), name.format("lm_head"): torch.ones(1, 32)}
        rows = {"embed_tokens": [4, 70], "lm_head": [60]}
        folder = write_adapter(tmp_path, tensors, trainable_token_indices=rows)
        whole, _ = load_peft_adapter(folder, targets, dtype=torch.float32)
        mine = LinearSlice(inputs=((48, VOCAB_SIZE),)), LinearSlice(outputs=((48, VOCAB_SIZE),))
        rank_slice = RankSlice(linears=dict(zip(("model.embed_tokens", "lm_head"), mine, strict=True)))
        part, _ = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=rank_slice)
        embedding, head = part.embeddings["model.embed_tokens"], part.linears["lm_head"]
        assert embedding.a.equal(whole.embeddings["model.embed_tokens"].a[:, 48:])
        assert embedding.b.equal(whole.embeddings["model.embed_tokens"].b)
        assert head.a.equal(whole.linears["lm_head"].a)
        assert head.b.equal(whole.linears["lm_head"].b[:, 48:])
        assert head.b.count_nonzero() == 1

    @pytest.mark.parametrize("rows", [[4, 5], [VOCAB_SIZE], {"lm_head": [4]}])
    def test_rows_that_do_not_fit(self, rows: Any, tmp_path: Path) -> None:
        targets = discover_targets(build("qwen3_moe"))
        tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}
        folder = write_adapter(tmp_path, tensors, trainable_token_indices=rows)
        with pytest.raises(AdapterTensorError, match=r"trainable_tokens_delta.*trainable_token_indices"):
            load_peft_adapter(folder, targets, dtype=torch.float32)


class TestFusedNamesInThreeDimensions:
    @pytest.mark.parametrize(("a_experts", "b_experts"), [(7, 7), (1, 7), (7, 1), (1, 1)])
    def test_gate_and_up_in_one(self, a_experts: int, b_experts: int, tmp_path: Path) -> None:
        model = build("qwen3_moe")
        merged, factory = copy.deepcopy(model), TensorFactory()
        experts = merged.get_submodule(EXPERTS)
        for param in ("gate_up_proj", "down_proj"):
            weight = experts.get_parameter(param)
            size_out, size_in = weight.shape[1:]
            a, b = factory.draw(a_experts, 2, size_in), factory.draw(b_experts, size_out, 2)
            factory.tensors |= {
                f"{PREFIX}{EXPERTS}.{param}.lora_A.weight": a,
                f"{PREFIX}{EXPERTS}.{param}.lora_B.weight": b,
            }
            weight.data += 2 * b @ a
        ids = random_ids()
        truth = merged(input_ids=ids).logits[0]
        served = served_logits(model, write_adapter(tmp_path, factory.tensors), ids)
        torch.testing.assert_close(served, truth, atol=ATOL, rtol=0)

    def test_beside_a_gate_of_its_own_is_refused(self, tmp_path: Path) -> None:
        target = discover_targets(build("qwen3_moe")).experts[EXPERTS]
        factory = TensorFactory()
        for name, size_out in (("gate_up_proj", 2 * target.intermediate_size), ("gate_proj", target.intermediate_size)):
            factory.tensors[f"{PREFIX}{EXPERTS}.{name}.lora_A.weight"] = factory.draw(1, 2, target.hidden_size)
            factory.tensors[f"{PREFIX}{EXPERTS}.{name}.lora_B.weight"] = factory.draw(1, size_out, 2)
        with pytest.raises(AdapterTensorError, match="as is"):
            load_peft_adapter(
                write_adapter(tmp_path, factory.tensors), discover_targets(build("qwen3_moe")), dtype=torch.float32
            )


def test_experts_of_gpt_oss_as_lists_of_linear_maps(tmp_path: Path) -> None:
    """Some experts only, gate and up alternating as the model stores them."""
    model = build("gpt_oss")
    merged, factory = copy.deepcopy(model), TensorFactory()
    for param in ("gate_up_proj", "down_proj"):
        weight = merged.get_submodule(EXPERTS).get_parameter(param)  # [E, in, out]
        for expert in (0, 2):
            factory.linear(f"{EXPERTS}.{param}s.{expert}", *weight.shape[1:])
            weight.data[expert] += 2 * factory.deltas[f"{EXPERTS}.{param}s.{expert}"].T
    ids = random_ids()
    truth = merged(input_ids=ids).logits[0]
    served = served_logits(model, write_adapter(tmp_path, factory.tensors), ids)
    torch.testing.assert_close(served, truth, atol=ATOL, rtol=0)


class TestVocabularyThatWasResized:
    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": ["q_proj"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        ],
        ids=["saved because it was resized", "modules_to_save", "LoRA on both"],
    )
    def test_new_rows_come_from_the_file(self, fields: dict[str, Any], tmp_path: Path) -> None:
        """They are drawn anew by each resize, so that those of the served base are others."""
        build("qwen3_moe").save_pretrained(tmp_path / "base")

        def resized(seed: int) -> PreTrainedModel:
            model = build("qwen3_moe")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
            model.name_or_path = str(tmp_path / "base")  # PEFT compares vocabularies
            return model.eval().requires_grad_(False)

        input_ids = random_ids(vocab_size=VOCAB_SIZE + 5)
        input_ids[:, 3] = VOCAB_SIZE + 4
        folder = tmp_path / "adapter"
        expected = save_with_peft(resized(1), peft.LoraConfig(r=2, lora_alpha=4, **fields), folder, input_ids)
        served = served_logits(resized(2), folder, input_ids)
        torch.testing.assert_close(served, expected[0], atol=ATOL, rtol=0)
        with pytest.raises(AdapterTensorError, match="resize the base model"):
            load_peft_adapter(folder, discover_targets(build("qwen3_moe")), dtype=torch.float32)

    def test_a_copy_of_the_base_that_was_rounded(self, tmp_path: Path) -> None:
        """Saved in bfloat16, served in float32: no other base, and no copy of the vocabulary."""
        model = build("qwen3_moe")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head"])
        expected = save_with_peft(model, config, tmp_path, ids := random_ids())
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        rounded = {name: t.bfloat16() if "base_layer" in name else t for name, t in tensors.items()}
        save_file(rounded, tmp_path / "adapter_model.safetensors")
        weights, _ = load_peft_adapter(tmp_path, discover_targets(model), dtype=torch.float32)
        assert not weights.saved
        torch.testing.assert_close(served_logits(model, tmp_path, ids), expected[0], atol=ATOL, rtol=0)


WRAPPED = {
    "torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile of the whole": lambda name: f"_orig_mod.{name}",
    "torch.compile of layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "data parallel": lambda name: f"module.{name}",
    "data parallel inside": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "FSDP": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."),
    "the adapter's name": lambda name: (
        name.replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight")
        .replace("lora_embedding_A", "lora_embedding_A.default")
    ),
    "no prefix": lambda name: name.removeprefix(PREFIX),
}


class TestNames:
    @pytest.mark.parametrize("wrapper", WRAPPED)
    def test_what_wrappers_leave(self, wrapper: str, tmp_path: Path) -> None:
        targets = discover_targets(build(hostile.FAMILY))
        plain, _ = load_peft_adapter(hostile.good_adapter(tmp_path / "plain"), targets, dtype=torch.float32)
        tensors = {WRAPPED[wrapper](name): tensor for name, tensor in hostile.good_tensors().items()}
        assert tensors.keys() != hostile.good_tensors().keys()
        folder = write_adapter(tmp_path / "wrapped", tensors, **hostile.CONFIG_FIELDS)
        found, report = load_peft_adapter(folder, targets, dtype=torch.float32)
        assert report.tensors_applied == len(tensors)
        assert found.linears[hostile.Q_PROJ].b.equal(plain.linears[hostile.Q_PROJ].b)
        for name, lora in plain.experts.items():
            for expert in lora.expert_ids:
                for part, delta in expert_delta(lora, expert).items():
                    assert expert_delta(found.experts[name], expert)[part].equal(delta)

    def test_the_name_of_another_adapter_is_named(self, tmp_path: Path) -> None:
        targets = discover_targets(build(hostile.FAMILY))
        factory = TensorFactory()
        factory.linear(hostile.Q_PROJ, 32, 32)
        tensors = {name.replace(".weight", ".math.weight"): t for name, t in factory.tensors.items()}
        with pytest.raises(AdapterMismatchError, match=r"'math', the name of an adapter.*save_pretrained"):
            load_peft_adapter(write_adapter(tmp_path, tensors), targets, dtype=torch.float32)

    @pytest.mark.parametrize(
        ("model_type", "today", "then"),
        [
            ("qwen3_moe", "lm_head", "model.unembed_tokens"),
            ("qwen3_moe", "lm_head", "unembed_tokens"),
            ("gpt_oss", "model.layers.0.self_attn.q_proj", "model.layers.0.attn.q_proj"),
            ("qwen3_omni_moe_thinker", "model.layers.0.self_attn.q_proj", "thinker.model.layers.0.self_attn.q_proj"),
            ("qwen3_omni_moe", "thinker.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ],
    )
    def test_other_tools(self, model_type: str, today: str, then: str, tmp_path: Path) -> None:
        targets = ModelTargets(
            model_type=model_type, linears={today: LinearTarget(name=today, in_features=6, out_features=4)}
        )
        factory = TensorFactory()
        factory.linear(then, 6, 4)
        weights, _ = load_peft_adapter(write_adapter(tmp_path, factory.tensors), targets, dtype=torch.float32)
        torch.testing.assert_close(linear_delta(weights, today), 2 * factory.deltas[then])

    def test_tinker_calls_the_only_first_projection_w1(self, tmp_path: Path) -> None:
        """Experts without a gate; w3 is there, and empty."""
        name = "model.layers.0.mixer.experts"
        target = ExpertsTarget(
            name=name, num_experts=3, hidden_size=6, intermediate_size=4, has_gate=False, w13_param="up_proj"
        )
        targets = ModelTargets(model_type="nemotron_h", experts={name: target})
        factory = TensorFactory()
        sizes = {"w1": (6, 4), "w2": (4, 6), "w3": (0, 0)}
        for proj, (size_in, size_out) in sizes.items():
            count = 0 if proj == "w3" else 3
            factory.tensors[f"{PREFIX}{name}.{proj}.lora_A.weight"] = factory.draw(count, 2, size_in)
            factory.tensors[f"{PREFIX}{name}.{proj}.lora_B.weight"] = factory.draw(count, size_out, 2)
        weights, report = load_peft_adapter(write_adapter(tmp_path, factory.tensors), targets, dtype=torch.float32)
        assert report.tensors_applied == 6
        assert any("2 tensors change nothing" in note for note in report.notes)
        a, b = (factory.tensors[f"{PREFIX}{name}.w1.lora_{side}.weight"] for side in "AB")
        for expert in range(3):
            found = expert_delta(weights.experts[name], expert)
            assert found.keys() == {"up", "down"}
            torch.testing.assert_close(found["up"], 2 * b[expert] @ a[expert])


def test_an_embedding_is_scaled_with_its_trained_rows(tmp_path: Path) -> None:
    """Models that multiply their embeddings multiply what replaces them, too."""
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    target = EmbeddingTarget(name="model.embed_tokens", num_embeddings=9, embedding_dim=4, scale=3.0)
    targets = ModelTargets(
        model_type="gemma4_text",
        embeddings={"model.embed_tokens": target},
        saveable={"model.embed_tokens": {"weight": weight}},
    )
    tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}
    folder = write_adapter(tmp_path, tensors, trainable_token_indices=[4])
    lora = load_peft_adapter(folder, targets, dtype=torch.float32)[0].embeddings["model.embed_tokens"]
    torch.testing.assert_close(3 * weight[4] + lora.b.T @ lora.a[:, 4], 3 * torch.ones(4))
    assert not lora.a[:, [0, 1, 2, 3, 5, 6, 7, 8]].any()


class TestModulesThatAreNotServed:
    """An adapter of a vision-language model that was trained on its tower too: text meets no part of it."""

    def test_the_rest_is_loaded_where_that_is_asked_for(self, tmp_path: Path) -> None:
        model = tiny_model("internvl")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
        input_ids = torch.tensor([[1, 5, 9, 2, 7, 3, 11]] * 2)
        expected = save_with_peft(model, config, tmp_path, input_ids)
        with moegraft.attach(model, adapter_memory="8MiB") as graft:
            base = graft(input_ids=input_ids).logits
            with pytest.raises(
                UnservedModuleError, match=r"vision_tower.*exists in the base model.*skip_unserved=True"
            ):
                graft.load_adapter(tmp_path, "a")
            report = graft.load_adapter(tmp_path, "a", skip_unserved=True)
            found = graft(input_ids=input_ids, adapters=["a", None]).logits
        assert all(name.startswith("model.vision_tower.") and "rows" in why for name, why in report.left_out.items())
        assert report.tensors_left_out == 2 * len(report.left_out) > 0
        assert report.tensors_applied + report.tensors_left_out == report.tensors_in_file
        torch.testing.assert_close(found[0], expected[0], atol=ATOL, rtol=0)
        assert (found[0] - base[0]).abs().max() > 100 * ATOL

    def test_nothing_else_is_skipped(self, tmp_path: Path) -> None:
        targets = discover_targets(tiny_model("internvl"))
        tower = {
            f"{PREFIX}model.vision_tower.encoder.layer.0.attention.q_proj.lora_{ab}.weight": torch.ones(2, 2)
            for ab in "AB"
        }
        unknown = {
            f"{PREFIX}model.vision_tower.encoder.layer.9.attention.q_proj.lora_{ab}.weight": torch.ones(2, 2)
            for ab in "AB"
        }
        with pytest.raises(AdapterMismatchError, match="has no module"):
            load_peft_adapter(
                write_adapter(tmp_path / "a", tower | unknown), targets, dtype=torch.float32, skip_unserved=True
            )
        with pytest.raises(AdapterMismatchError, match="all of its modules are unserved"):
            load_peft_adapter(write_adapter(tmp_path / "b", tower), targets, dtype=torch.float32, skip_unserved=True)


class TestBiases:
    """Trained biases of linear maps, and a bias on lora_B: both are constants that an adapter adds."""

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("qwen2_moe", {"bias": "all"}),
            ("qwen2_moe", {"bias": "lora_only", "lora_bias": True}),
            ("qwen3_moe", {"lora_bias": True, "use_rslora": True}),
        ],
        ids=lambda value: value if isinstance(value, str) else "+".join(value),
    )
    def test_against_peft(self, family: str, options: dict[str, Any], tmp_path: Path) -> None:
        model = build(family)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj"], **options)
        input_ids = random_ids()
        expected = save_with_peft(model, config, tmp_path, input_ids)
        assert any(name.endswith("bias") for name in load_file(tmp_path / "adapter_model.safetensors"))
        torch.testing.assert_close(served_logits(model, tmp_path, input_ids), expected[0], atol=ATOL, rtol=0)
        without = {k: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "bias" not in k}
        folder = write_adapter(tmp_path / "without", without, use_rslora="use_rslora" in options)
        with moegraft.attach(model, adapter_memory="8MiB") as graft:  # maps that share their input part, and join again
            graft.load_adapter(folder, "without")
            alone = graft(input_ids=input_ids, adapters=["without", None]).logits
            graft.load_adapter(tmp_path, "with")
            found = graft(input_ids=input_ids, adapters=["with", "without"]).logits
            graft.unload_adapter("with")
            again = graft(input_ids=input_ids, adapters=["without", None]).logits
        assert (alone[0] - expected[0]).abs().max() > 100 * ATOL
        torch.testing.assert_close(found[0], expected[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(again, alone, atol=0, rtol=0)
        inspection = inspect_peft_adapter(tmp_path, discover_targets(model))
        assert inspection.ok, inspection.problems

    @pytest.mark.parametrize(
        ("tensors", "config", "words"),
        [
            ({"self_attn.q_proj.lora_B.bias": 32}, {}, "lora_bias is false"),
            ({}, {"lora_bias": True}, "lora_bias is true"),
            ({"self_attn.q_proj.lora_B.bias": 31}, {"lora_bias": True}, r"shape \[31\], expected \[32\]"),
            ({"self_attn.q_proj.bias": 32}, {"bias": "all"}, "q_proj of the base model has no bias"),
            ({"mlp.experts.down_proj_bias": 32}, {"bias": "all"}, "bias 'all': .*down_proj_bias"),
        ],
    )
    def test_refused_by_the_field(
        self, tensors: dict[str, int], config: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        layer, factory = "model.layers.1", TensorFactory()
        factory.linear(f"{layer}.self_attn.q_proj", 32, 32)
        factory.tensors |= {f"{PREFIX}{layer}.{name}": torch.ones(size) for name, size in tensors.items()}
        with pytest.raises(AdapterError, match=words):
            load_peft_adapter(
                write_adapter(tmp_path, factory.tensors, **config),
                discover_targets(build("qwen3_moe")),
                dtype=torch.float32,
            )


class TestDoraOnExperts:
    """Per expert, as PEFT wrote it where experts were linear maps: m (W + sBA) / ||W + sBA||, merged by hand."""

    @staticmethod
    def save(model: PreTrainedModel, folder: Path, names: tuple[str, ...]) -> PreTrainedModel:
        """DoRA on some projections of some experts; gives the model with it merged."""
        merged, factory = copy.deepcopy(model), TensorFactory()
        target = discover_targets(model).experts[EXPERTS]
        experts = merged.get_submodule(EXPERTS)
        D, F = target.hidden_size, target.intermediate_size
        for expert in (0, 2, target.num_experts - 1):
            for name in names:
                is_down, is_fused = name.startswith("down"), name.startswith("gate_up")
                size_in, size_out = (F, D) if is_down else (D, 2 * F if is_fused else F)
                module = f"{EXPERTS}.{name}.{expert}" if name.endswith("s") else f"{EXPERTS}.{expert}.{name}"
                factory.linear(module, size_in, size_out)
                magnitude = 1 + factory.draw(size_out).abs()
                factory.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
                param = experts.down_proj if is_down else experts.gate_up_proj
                stored = param.data[expert].T if target.is_transposed else param.data[expert]
                rows = slice(None) if is_down or is_fused else slice(F, None) if name == "up_proj" else slice(0, F)
                weight = stored[rows] + 2 * factory.deltas[module]
                stored[rows] = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        write_adapter(folder, factory.tensors, use_dora=True)
        return merged

    @pytest.mark.parametrize(
        ("family", "names"),
        [
            ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
            ("qwen3_moe", ("up_proj",)),
            ("gpt_oss", ("gate_up_projs", "down_projs")),  # interleaved, transposed, with biases
        ],
    )
    def test_equals_merged_weights(self, family: str, names: tuple[str, ...], tmp_path: Path) -> None:
        model, input_ids = build(family), random_ids()
        merged = self.save(model, tmp_path, names)
        with torch.no_grad():
            expected = merged(input_ids=input_ids).logits
        torch.testing.assert_close(served_logits(model, tmp_path, input_ids), expected[0], atol=2 * ATOL, rtol=0)
        inspection = inspect_peft_adapter(tmp_path, discover_targets(model))
        assert inspection.ok, inspection.problems

    def test_beside_other_adapters(self, tmp_path: Path) -> None:
        """Plain LoRA and the base in the same batch keep their bits; a bound of the rank serves DoRA too."""
        model, input_ids = build("gpt_oss"), random_ids()
        merged = self.save(model, tmp_path / "dora", ("gate_up_projs", "down_projs"))
        target, factory = discover_targets(model).experts[EXPERTS], TensorFactory(3)
        factory.linear(f"{EXPERTS}.down_projs.1", target.intermediate_size, target.hidden_size)
        write_adapter(tmp_path / "plain", factory.tensors)
        with moegraft.attach(model, adapter_memory="8MiB") as graft:
            base = graft(input_ids=input_ids).logits
            for name in ("dora", "plain"):
                graft.load_adapter(tmp_path / name)
            alone = graft(input_ids=input_ids, adapters=["plain", None]).logits
            found = graft(input_ids=input_ids, adapters=["plain", "dora"]).logits
            with graft.batch(["plain", "dora"], 2, rank_bound=4), torch.no_grad():
                bounded = model(input_ids=input_ids).logits
        with torch.no_grad():
            expected = merged(input_ids=input_ids).logits
        assert torch.equal(alone[1], base[1])
        torch.testing.assert_close(found[0], alone[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(found[1], expected[1], atol=2 * ATOL, rtol=0)
        torch.testing.assert_close(bounded, found, atol=2 * ATOL, rtol=0)

    def test_other_backends_refuse_by_name(self) -> None:
        assert why_no_dora(TorchExperts) is None
        for other in (TritonExperts, MarlinExperts, UnfusedOAITritonExperts):
            assert "attach with backend='TorchExperts'" in str(why_no_dora(other))

    def test_ranks_that_share_experts_refuse(self, tmp_path: Path) -> None:
        model = build("qwen3_moe")
        self.save(model, tmp_path, ("down_proj",))
        mine = RankSlice(experts={EXPERTS: ExpertsSlice(experts=(0, 1, 2))})
        with pytest.raises(AdapterError, match=r"use_dora: .*experts that ranks share out"):
            load_peft_adapter(tmp_path, discover_targets(model), dtype=torch.float32, rank_slice=mine)

    def test_a_fused_parameter_refuses(self, tmp_path: Path) -> None:
        factory = TensorFactory()
        target = discover_targets(build("qwen3_moe")).experts[EXPERTS]
        factory.fused(EXPERTS, target.num_experts, target.intermediate_size, target.hidden_size)
        folder = write_adapter(tmp_path, factory.tensors, use_dora=True)
        with pytest.raises(AdapterError, match=r"use_dora: .*single experts only, not on .*experts as a whole"):
            load_peft_adapter(folder, discover_targets(build("qwen3_moe")), dtype=torch.float32)


class TestPartsOfALinearMap:
    """Tinker's pairs for q, k and v of what Qwen3.5 keeps as one map."""

    MAP = "linear_attn.in_proj_qkv"

    @pytest.mark.parametrize("parts", ["qkv", "qv", "k", "v"])
    def test_each_adds_to_its_block_of_outputs(self, parts: str, tmp_path: Path) -> None:
        model = build("qwen3_5_moe_text")
        targets = discover_targets(model)
        target = next(linear for name, linear in targets.linears.items() if name.endswith(self.MAP))
        mixer = model.get_submodule(target.name.rpartition(".")[0])
        starts = dict(zip("qkv", (0, mixer.key_dim, 2 * mixer.key_dim), strict=True))
        sizes = dict(zip("qkv", (mixer.key_dim, mixer.key_dim, mixer.value_dim), strict=True))
        factory, expected = TensorFactory(), torch.zeros(target.out_features, target.in_features)
        for part in parts:
            module = f"{target.name.removesuffix('qkv')}{part}"
            factory.linear(module, target.in_features, sizes[part], r=3 if part == "v" else 2)
            scale = 4 / 3 if part == "v" else 2
            expected[starts[part] : starts[part] + sizes[part]] = scale * factory.deltas[module]
        folder = write_adapter(tmp_path, factory.tensors, rank_pattern={"in_proj_v": 3})
        weights, report = load_peft_adapter(folder, targets, dtype=torch.float32)
        torch.testing.assert_close(linear_delta(weights, target.name), expected)
        assert report.linears == {target.name: sum(3 if part == "v" else 2 for part in parts)}
        half = target.out_features // 2
        mine = RankSlice(linears={target.name: LinearSlice(outputs=((half, target.out_features),))})
        part_of, _ = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
        torch.testing.assert_close(linear_delta(part_of, target.name), expected[half:])

    def test_parts_that_do_not_fit(self, tmp_path: Path) -> None:
        targets = discover_targets(build("qwen3_5_moe_text"))
        target = next(linear for name, linear in targets.linears.items() if name.endswith(self.MAP))
        factory = TensorFactory()
        factory.linear(f"{target.name.removesuffix('qkv')}q", target.in_features, target.out_features)
        with pytest.raises(AdapterTensorError, match="expected two of one size and a third"):
            load_peft_adapter(write_adapter(tmp_path, factory.tensors), targets, dtype=torch.float32)


def test_a_folder_of_adapters_lists_them(tmp_path: Path) -> None:
    for name in ("style", "checkpoint-10"):
        write_adapter(tmp_path / name, {f"{PREFIX}x.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"is missing; adapters lie in its folders 'checkpoint-10', 'style'"):
        load_peft_adapter(tmp_path, ModelTargets(model_type="x"), dtype=torch.float32)

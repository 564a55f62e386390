"""What is found in a model, and which models are refused before anything was changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import write_adapter
from support.families import FAMILIES, build
from support.zoo import tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    JetMoeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import moegraft
from moegraft.core.config import Activation, ActivationKind
from moegraft.core.errors import AdapterMismatchError, UnsupportedModelError
from moegraft.integrations.transformers.host.storage import HostExperts
from moegraft.integrations.transformers.host.targets import discover_targets, find_unsupported

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def _causal(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def _with_experts_in_its_tower_alone() -> PreTrainedModel:
    text = tiny_config("dots3_note").text_config.to_dict()
    return tiny_model("dots3_note", text_config={**text, "mlp_layer_types": ["dense", "dense"]})


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "dbrx": (
        lambda: _causal(
            DbrxConfig(
                d_model=32,
                n_heads=4,
                n_layers=2,
                max_seq_len=64,
                vocab_size=96,
                attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
                ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            )
        ),
        ("DbrxForCausalLM", "DbrxExperts", "three two-dimensional parameters", "no part for a single expert"),
    ),
    "jetmoe": (
        lambda: _causal(JetMoeConfig(**TINY, kv_channels=8, num_local_experts=4)),
        ("JetMoeForCausalLM", "JetMoeParallelExperts", "does not dispatch"),
    ),
    "switch_transformers": (
        lambda: SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(vocab_size=96, d_model=32, d_ff=24, d_kv=8, num_layers=2, num_experts=4)
        ),
        ("SwitchTransformersForConditionalGeneration", "SwitchTransformersExperts", "does not dispatch"),
    ),
    "longcat_flash": (
        lambda: tiny_model("longcat_flash"),
        ("LongcatFlashForCausalLM", "LongcatFlashExperts", "routes tokens to identities too (zero_expert_num)"),
    ),
    "experts in embeddings": (
        lambda: tiny_model("doge"),
        ("DogeForCausalLM", "'model.layers.0.mlp' (DogeCDMoE) keeps its experts in modules of its own"),
    ),
    "experts of a backbone": (
        lambda: tiny_model("vitpose_backbone"),
        ("VitPoseBackbone", "(VitPoseBackboneMoeMLP) keeps its experts in modules of its own"),
    ),
    "experts of one modality": (
        lambda: tiny_model("ernie4_5_vl_moe"),
        ("'model.language_model.layers.0.mlp.text_moe.experts'", "vision_moe.experts': each of them sees a part"),
    ),
    "experts in a tower alone": (
        _with_experts_in_its_tower_alone,
        ("model.vision_tower.blocks.0.mlp.experts", "belongs to 'model.vision_tower' (Dots3NoteVisionModel)"),
    ),
    "no forward pass of its own": (
        lambda: tiny_model("qwen3_omni_moe"),
        ("Qwen3OmniMoeForConditionalGeneration has no forward pass of its own", "model.thinker or model.talker"),
    ),
    "dense model of a family with experts": (
        lambda: tiny_model("qwen3_moe", mlp_only_layers=[0, 1]),
        ("Qwen3MoeForCausalLM (qwen3_moe) has no mixture-of-experts layer",),
    ),
    "dense": (lambda: _causal(LlamaConfig(**TINY)), ("LlamaForCausalLM", "no mixture-of-experts layer")),
    "peft": (
        lambda: get_peft_model(build("mixtral"), LoraConfig(target_modules=["q_proj"])),
        ("PeftModel", "base model itself"),
    ),
    "peft inside": (
        lambda: get_peft_model(build("mixtral"), LoraConfig(target_modules=["q_proj"])).get_base_model(),
        ("MixtralForCausalLM", "q_proj", "PEFT Linear"),
    ),
    "fp8": (lambda: _with_experts(_quantise), ("MixtralExperts", "is quantised", "float8_e4m3fn")),
    "not loaded": (lambda: _with_experts(lambda experts: experts.to("meta")), ("MixtralExperts", "meta device")),
    "norm behind each expert": (
        lambda: _with_experts(lambda experts: setattr(experts, "has_post_expert_norm", True)),
        ("MixtralExperts", "has_post_expert_norm"),
    ),
    "expert parallel": (
        lambda: _with_experts(lambda experts: setattr(experts, "_is_expert_parallel", True)),
        ("MixtralExperts", "expert parallel"),
    ),
}


def _with_experts(change: Callable[[nn.Module], object]) -> PreTrainedModel:
    """A Mixtral whose second experts module was changed."""
    model = build("mixtral")
    change(model.model.layers[1].mlp.experts)
    return model


def _quantise(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_are_named_and_left_alone(case: str) -> None:
    make, fragments = REFUSED[case]
    model = make()
    before = _fingerprint(model)
    with pytest.raises(UnsupportedModelError) as caught:
        moegraft.attach(model)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert _fingerprint(model) == before


def _fingerprint(model: nn.Module) -> dict[str, object]:
    modules = {
        name: (type(module), tuple(module.__dict__), len(module._forward_hooks), id(module.forward.__func__))
        for name, module in model.named_modules()
    }
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {"modules": modules, "tensors": tensors, "experts": getattr(model.config, "_experts_implementation", None)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_the_stack_is_a_target(family: str) -> None:
    model = build(family)
    targets = discover_targets(model)
    assert find_unsupported(model) is None
    assert len(targets.experts) >= 2
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    read_directly = {name for name in linears if name.endswith("dt_proj")}
    by_weight = {name for name, target in targets.linears.items() if target.router}
    assert targets.linears.keys() - by_weight == linears - read_directly
    assert read_directly <= by_weight
    for name, target in targets.linears.items():
        assert target.weight is not None
        weight = target.weight()
        assert weight is model.get_submodule(name).weight
        assert weight.shape == (target.out_features, target.in_features)
    router_scores = [t for t in targets.linears.values() if t.name.split(".")[-1] in ("gate", "router", "wg", "proj")]
    num_experts = next(iter(targets.experts.values())).num_experts
    assert sum(target.out_features == num_experts for target in router_scores) == len(targets.experts)
    assert not any(".experts" in name for name in targets.saveable)
    assert {t.name for t in router_scores if t.out_features == num_experts} <= targets.saveable.keys()
    assert "lm_head" in targets.saveable


def test_sizes_come_from_the_weights() -> None:
    oss = discover_targets(build("gpt_oss")).experts["model.layers.1.mlp.experts"]
    assert (oss.num_experts, oss.hidden_size, oss.intermediate_size) == (4, 40, 24)
    assert (oss.has_gate, oss.is_transposed, oss.is_interleaved) == (True, True, True)
    latent = discover_targets(build("nemotron_h")).experts["model.layers.3.mixer.experts"]
    assert (latent.hidden_size, latent.intermediate_size) == (16, 24)
    assert (latent.has_gate, latent.w13_param, latent.is_interleaved) == (False, "up_proj", False)


def test_a_linear_router_with_a_forward_of_its_own_is_a_router() -> None:
    targets = discover_targets(build("phimoe"))
    assert not targets.left_out
    target = targets.linears["model.layers.0.mlp.router"]
    assert target.router
    assert (target.in_features, target.out_features) == (32, 5)


def test_an_embedding_that_scales_its_rows_scales_the_delta() -> None:
    embeddings = discover_targets(build("gemma4_text")).embeddings
    assert {name: target.scale for name, target in embeddings.items()} == {
        "model.embed_tokens": pytest.approx(32**0.5),
        "model.embed_tokens_per_layer": pytest.approx(8**0.5),
    }
    assert {target.scale for target in discover_targets(build("mixtral")).embeddings.values()} == {1.0}


# Model type -> modules that exist, that no adapter may touch, and a word of the reason.
LEFT_OUT = {
    "dots3_note": {
        "model.vision_tower.blocks.0.mlp.experts": "belongs to 'model.vision_tower' (Dots3NoteVisionModel)",
        "model.vision_tower.blocks.0.mlp.gate": "belongs to 'model.vision_tower'",
        "model.audio_tower.layers.0.self_attn.q_proj": "belongs to 'model.audio_tower'",
    },
    "nemotron_h_omni": {"multi_modal_projector.linear_1": "stands outside of the text stack 'language_model.model'"},
    "qwen4_exp": {
        "model.language_model.layers.1.self_attn.indexer.k_layernorm": "pooled",
        "model.visual.blocks.0.norm1": "belongs to 'model.visual'",
    },
    "deepseek_v4": {
        "model.layers.0.self_attn.compressor.kv_norm": "pooled",
        "model.layers.1.self_attn.compressor.indexer.kv_norm": "pooled",
        "model.layers.0.self_attn.o_a_proj": "DeepseekV4GroupedLinear, which computes more than a linear map",
    },
    "zaya": {"model.layers.0.self_attn.qkv_proj.v_proj_delayed": "the state before the first token"},
    "diffusion_gemma": {
        "model.decoder.layers.0.experts": "belongs to 'model.decoder'",
        "lm_head": "stands on 'model.decoder', whose rows are no tokens of the batch",
    },
    "aria": {"model.multi_modal_projector.cross_attn.q_proj": "stands outside of the text stack"},
    "qwen3_omni_moe_thinker": {"model.audio_tower.proj1": "belongs to 'model.audio_tower'"},
}


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_modules_whose_rows_are_not_the_tokens_are_left_out_with_the_reason(model_type: str) -> None:
    model = tiny_model(model_type)
    targets = discover_targets(model)
    described = {*targets.experts, *targets.linears, *targets.embeddings, *targets.saveable}
    for name, reason in LEFT_OUT[model_type].items():
        model.get_submodule(name)
        assert reason in targets.left_out[name]
    assert not described & targets.left_out.keys()


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_an_adapter_for_a_module_that_is_left_out_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        for i, (name, reason) in enumerate(LEFT_OUT[model_type].items()):
            norm = {f"base_model.model.{name}.weight": torch.ones(8)}
            factors = {f"base_model.model.{name}.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
            folder = write_adapter(tmp_path / str(i), norm if name.endswith("norm") else factors)
            with pytest.raises(AdapterMismatchError) as caught:
                graft.load_adapter(folder)
            assert f"'{name}' exists in the base model, but adapters on it are not served: it " in str(caught.value)
            assert reason in str(caught.value)
            assert not graft.adapters


@pytest.mark.parametrize(
    ("model_type", "head"),
    [("nemotron_h_omni", "language_model.lm_head"), ("dots3_note", "lm_head"), ("qwen3_5_moe", "lm_head")],
)
def test_the_head_of_a_text_stack_is_served_wherever_it_stands(model_type: str, head: str) -> None:
    targets = discover_targets(tiny_model(model_type))
    assert head in targets.linears
    assert head in targets.saveable


def test_of_a_vision_tower_linear_maps_alone_are_described() -> None:
    text = {**TINY, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    targets = discover_targets(Qwen3VLMoeForConditionalGeneration(config))
    assert list(targets.experts) == [f"model.language_model.layers.{i}.mlp.experts" for i in range(2)]
    names = {*targets.linears, *targets.embeddings, *targets.saveable}
    assert "model.language_model.layers.0.self_attn.q_proj" in names
    assert "lm_head" in names
    visual = {name for name in names if "visual" in name}
    assert {name for name, target in targets.linears.items() if target.tower == "model.visual"} == visual
    assert {name.rpartition(".")[2] for name in visual} == {"qkv", "proj", "linear_fc1", "linear_fc2"}
    assert targets.towers == ("model.visual",)
    assert "model.visual.patch_embed.proj" in targets.left_out


@pytest.mark.parametrize(
    ("act_fn", "kind"),
    [
        (nn.SiLU(), ActivationKind.SILU),
        (nn.GELU(), ActivationKind.GELU),
        (nn.GELU(approximate="tanh"), ActivationKind.GELU_TANH),
        (lambda x: x.relu() ** 2, ActivationKind.RELU2),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_activation_is_recognised_by_what_it_computes(family: str, act_fn: object, kind: ActivationKind) -> None:
    model = build(family)
    experts = model.get_submodule(next(iter(discover_targets(model).experts)))
    del experts.act_fn
    experts.act_fn = act_fn
    assert HostExperts.of(experts).activation == Activation(kind=kind, gated=family == "mixtral")


def test_alpha_and_limit_are_read_and_checked() -> None:
    experts = build("gpt_oss").model.layers[0].mlp.experts
    experts.alpha, experts.limit = 1.5, 3.0
    assert HostExperts.of(experts).activation == Activation(kind=ActivationKind.SWIGLU_OAI, alpha=1.5, limit=3.0)
    experts.is_concatenated = True  # a lie about where gate and up stand
    with pytest.raises(UnsupportedModelError, match="GptOssExperts computes an activation"):
        _ = HostExperts.of(experts).activation


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [
        ("deepseek_v4", Activation(kind=ActivationKind.SILU_CLAMPED, limit=0.5)),
        ("hy_v4", Activation(kind=ActivationKind.SILU_CLAMPED, limit=0.5)),
        ("glm5_next", Activation(kind=ActivationKind.SILU_CLAMPED, limit=0.5)),
        ("step3p7", Activation(kind=ActivationKind.CLAMPED_SILU, limit=0.5)),
        ("inkling2", Activation(kind=ActivationKind.SILU_SOFTCAPPED, alpha=0.75, limit=0.5)),
    ],
)
def test_clamped_and_soft_capped_activations(model_type: str, activation: Activation) -> None:
    model = tiny_model(model_type)
    for name in discover_targets(model).experts:
        assert HostExperts.of(model.get_submodule(name)).activation == activation


def test_an_unknown_gate_is_named_as_such() -> None:
    experts = build("mixtral").model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(UnsupportedModelError, match=r"not know \(MixtralExperts\._apply_gate, with act_fn SiLU"):
        _ = HostExperts.of(experts).activation


@pytest.mark.parametrize("act_fn", [nn.Tanh(), nn.ReLU(), lambda x: torch.sigmoid(1.702 * x) * x])
def test_an_unknown_activation_is_refused(act_fn: object) -> None:
    model = build("mixtral")
    del model.model.layers[1].mlp.experts.act_fn
    model.model.layers[1].mlp.experts.act_fn = act_fn
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.1.mlp.experts' \(MixtralExperts\)"):
        discover_targets(model)

"""Quantised checkpoints in every layout: loaded, grafted, and compared with the float32 weights that they stand for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.adapters import TensorFactory, save_with_peft, write_adapter
from support.checkpoints import (
    LAYOUTS,
    QuantisedCheckpoint,
    edit_config,
    fp8_by_tensor,
    write_checkpoint,
    write_turned_checkpoint,
    write_vision_checkpoint,
)
from support.families import FAMILIES, build
from support.fp8_truth import Rows, fp8_logits
from support.mixed import random_ids
from support.oracle import merge, merged_logits
from support.thinned import thinned
from support.zoo import image_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    Mxfp4Config,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)

import moegraft
from moegraft.core.errors import CheckpointError, NoBackendError, UnsupportedModelError
from moegraft.integrations.transformers.checkpoint import auto_class
from moegraft.integrations.transformers.host.storage import packed_experts
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import load_peft_adapter
from moegraft.lora.targets import ModelTargets
from moegraft.testing import assert_close_delta, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("everything", None, "experts", "dora", "part", "everything")
# Relative: float32 sums in another order.
TOL = 1e-5
# A sum in another order now and then rounds one activation to the next of 8 bits, which is 1/16 away from it.
TOL_FP8 = 2e-2


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantisedCheckpoint:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))


def test_one_mixed_batch(checkpoint: QuantisedCheckpoint, tmp_path: Path) -> None:
    """Base and every kind of adapter, each made by PEFT (or by hand) for the unquantised model, in one batch."""
    ids = random_ids(len(NAMES), 6)
    truths = _save_adapters(checkpoint, tmp_path, ids)
    base = _base_logits(checkpoint, ids)
    model = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    before = model(input_ids=ids).logits
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        assert {choice.format_name for choice in graft.explain()} == {checkpoint.layout.format_name}
        for name in truths:
            report = graft.load_adapter(tmp_path / name)
            assert report.tensors_applied == report.tensors_in_file > 0
        mixed = graft(input_ids=ids, adapters=NAMES).logits
        plain = graft(input_ids=ids, adapters=[None] * len(NAMES)).logits
        for name in truths:
            graft.unload_adapter(name)
        assert torch.equal(graft(input_ids=ids).logits, plain)
        assert graft.detach() is model
    assert torch.equal(model(input_ids=ids).logits, before)

    tol = TOL if checkpoint.layout.fp8_group is None else TOL_FP8
    assert relative_error(plain, base) <= tol
    for i, name in enumerate(NAMES):
        if name is None:
            assert torch.equal(mixed[i], plain[i])
        else:
            assert_close_delta(mixed[i], plain[i], truths[name][i], base[i], tol)


@pytest.mark.parametrize("checkpoint", thinned(LAYOUTS, keep_one_in=3), indirect=True, scope="module")
def test_mixed_generation_equals_merged_models(checkpoint: QuantisedCheckpoint, tmp_path: Path) -> None:
    ids = random_ids(3, 5)
    _save_adapters(checkpoint, tmp_path, ids)
    names, options = [None, "everything", "part"], {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        for name in ("everything", "part"):
            graft.load_adapter(tmp_path / name)
        mixed = graft.generate(**options, adapters=names)
        if checkpoint.layout.fp8_group is not None:
            # Merged weights would read quantised activations altogether: the truth here is each adapter by itself.
            alone = [graft.generate(**options, adapters=[name] * len(names))[i] for i, name in enumerate(names)]
            assert mixed.tolist() == [row.tolist() for row in alone]
            return
    for i, name in enumerate(names):
        weights = (
            None if name is None else load_peft_adapter(tmp_path / name, _targets(checkpoint), dtype=torch.float32)[0]
        )
        expected = merge(checkpoint.dense, _targets(checkpoint), weights).generate(**options)
        assert mixed[i].tolist() == expected[i].tolist(), name


def test_bfloat16_by_default_and_never_dequantised(checkpoint: QuantisedCheckpoint) -> None:
    model = moegraft.load_quantised(checkpoint.path)
    assert model.dtype is torch.bfloat16
    stored = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    for name, target in _targets(checkpoint).experts.items():
        module = model.get_submodule(name)
        packed = packed_experts(module)
        assert packed is not None
        assert not list(module.parameters())
        count = target.num_experts * target.hidden_size * target.intermediate_size * 3
        # Tiny matrices are padded to whole granules of 128 inputs; scales come on top.
        assert packed.weights.num_bytes < min(2 * count, stored)
    ids = random_ids(2)
    found = model(input_ids=ids).logits
    assert found.dtype is torch.bfloat16
    # Two layers in bfloat16, with routers that may choose another expert: only a wrong weight is this far off.
    assert relative_error(found[:, :1].float(), _base_logits(checkpoint, ids)[:, :1]) < 0.3


@pytest.mark.parametrize("checkpoint", thinned(LAYOUTS, keep_one_in=3), indirect=True, scope="module")
def test_experts_are_never_dequantised_while_they_are_read(checkpoint: QuantisedCheckpoint) -> None:
    """No tensor of 16 or 32 bits a number that is made on the way holds the experts of one layer."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype.itemsize > 1 and tensor.device.type != "meta":
                    sizes.append(tensor.numel())
            return result

    with Watch():
        model = moegraft.load_quantised(checkpoint.path)
    target = next(iter(_targets(checkpoint).experts.values()))
    packed = packed_experts(model.get_submodule(target.name))
    assert packed is not None
    stored = max(tensor.numel() for tensor in packed.weights.tensors if tensor.dtype.itemsize > 1)
    rest = max(parameter.numel() for parameter in model.parameters())
    one = 2 * target.hidden_size * target.intermediate_size
    # Groups of 4 bits are padded to 128 inputs on the way, in several pieces of one expert.
    assert max(sizes) <= max(stored, rest, one * 128 // min(128, target.intermediate_size))


def test_what_the_model_can_and_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """gpt-oss, whose experts have biases: it says who read it, moves, and refuses to lose its experts or gradients."""
    checkpoint, ids = write_checkpoint("mxfp4", tmp_path), random_ids()
    with caplog.at_level("INFO", "moegraft"):
        model = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    assert "experts of 2 layers read by moegraft and kept packed (mxfp4)" in caplog.text
    expected = model(input_ids=ids).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    with pytest.raises(
        UnsupportedModelError, match="GptOssExperts holds packed mxfp4 weights, which have no gradients"
    ):
        model(inputs_embeds=embeddings)
    model.set_experts_implementation("eager")
    for broken in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedModelError, match=r"GptOssExperts holds packed mxfp4 .* 'eager'"):
            broken(input_ids=ids)
    model.set_experts_implementation("moegraft")
    assert torch.equal(model(input_ids=ids).logits, expected)
    halved = model.to(torch.bfloat16)(input_ids=ids).logits
    assert halved.dtype is torch.bfloat16
    assert torch.equal(halved, moegraft.load_quantised(checkpoint.path)(input_ids=ids).logits)


def test_a_backend_that_cannot_serve_leaves_the_model_where_it_is(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gptq", tmp_path)
    model, ids = moegraft.load_quantised(checkpoint.path), random_ids()
    expected = model(input_ids=ids).logits
    for device in (None, "cpu"):
        with pytest.raises(NoBackendError, match=r"^MarlinExperts cannot serve int4 experts on cpu: it runs on CUDA"):
            moegraft.attach(model, adapter_memory="1MiB", backend="MarlinExperts", device=device)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert moegraft.attach(model, adapter_memory="1MiB").detach() is model


@pytest.mark.parametrize("layout", ["compressed-tensors int4", "mxfp4"])
def test_transformers_reads_the_same_weights(layout: str, tmp_path: Path) -> None:
    """Where transformers dequantises a layout by itself, on a CPU and for a model with experts."""
    checkpoint, ids = write_checkpoint(layout, tmp_path), random_ids()
    config = (
        CompressedTensorsConfig(dequantize=True) if layout.startswith("compressed") else Mxfp4Config(dequantize=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, quantization_config=config)
    ours = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    # transformers 5.17 goes through bfloat16.
    assert relative_error(ours(input_ids=ids).logits, theirs(input_ids=ids).logits.detach()) < 1e-2


def test_experts_and_attention_in_layouts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 experts beside fp8 attention, each by a config group of its own; one layer's experts are in fp8 too."""
    int4, fp8 = LAYOUTS["compressed-tensors int4"], LAYOUTS["compressed-tensors fp8"]
    monkeypatch.setitem(LAYOUTS, "fp8 of the same model", replace(fp8, sizes=int4.sizes))
    first = write_checkpoint("compressed-tensors int4", tmp_path / "int4")
    second = write_checkpoint("fp8 of the same model", tmp_path / "fp8")
    is_fp8 = re.compile(r"self_attn\.|model\.layers\.1\.mlp\.experts\.")
    tensors, others = (load_file(one.path / "model.safetensors") for one in (first, second))
    mixed = {name: tensor for name, tensor in tensors.items() if not is_fp8.search(name)}
    mixed |= {name: tensor for name, tensor in others.items() if is_fp8.search(name)}
    save_file(mixed, first.path / "model.safetensors")
    groups = [
        {**layout.config["config_groups"]["group_0"], "format": layout.config["format"]} for layout in (int4, fp8)
    ]
    config = {**int4.config, "format": "mixed-precision", "config_groups": dict(zip("ab", groups, strict=True))}
    edit_config(first.path, quantization_config=config)
    dense, ids = first.dense, random_ids()
    meant = {name: tensor for name, tensor in second.dense.state_dict().items() if is_fp8.search(f"{name}.")}
    dense.load_state_dict(meant, strict=False)

    model = moegraft.load_quantised(first.path, dtype=torch.float32)
    with moegraft.attach(model, adapter_memory="1MiB") as graft:
        assert [choice.format_name for choice in graft.explain()] == ["int4", "fp8"]
        found = graft(input_ids=ids).logits
    targets = discover_targets(dense)
    assert len(meant) == 14
    # Only the second layer reads 8-bit activations: between both truths, and nearer to the one without.
    assert relative_error(found, merged_logits(dense, targets, None, input_ids=ids)) < 0.1
    packed = packed_experts(model.get_submodule("model.layers.1.mlp.experts"))
    assert packed is not None
    torch.testing.assert_close(
        packed.weights.dequantise(torch.float32)[0], dense.model.layers[1].mlp.experts.gate_up_proj.detach()
    )


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe_thinker"])
def test_a_model_with_a_vision_tower(model_type: str, tmp_path: Path) -> None:
    """Experts that transformers fuses in memory and libraries write one by one; the tower is plain, and there: under
    the config of Qwen3.5-MoE, transformers also knows a model that has none."""
    dense = write_vision_checkpoint(tmp_path, model_type)
    model = moegraft.load_quantised(tmp_path, dtype=torch.float32)
    assert type(model) is type(dense)
    experts = discover_targets(model).experts
    assert len(experts) == 2
    assert all(packed_experts(model.get_submodule(name)) is not None for name in experts)
    inputs = image_inputs(dense)
    assert inputs is not None
    with torch.no_grad():
        found, expected = model(**inputs).logits, dense(**inputs).logits
        dark = dense(**{**inputs, "pixel_values": 0 * inputs["pixel_values"]}).logits
    assert relative_error(found, expected) < TOL
    assert relative_error(dark, expected) > 0.01


def test_a_text_model_that_the_config_names_is_loaded_as_such(tmp_path: Path) -> None:
    write_vision_checkpoint(tmp_path, "qwen3_5_moe")
    config = AutoConfig.from_pretrained(tmp_path)
    assert auto_class(config)._model_mapping[type(config)] is Qwen3_5MoeForConditionalGeneration
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert auto_class(config)._model_mapping[type(config)] is Qwen3_5MoeForCausalLM
    config.architectures = None
    assert auto_class(config)._model_mapping[type(config)] is Qwen3_5MoeForConditionalGeneration
    assert auto_class(build("mixtral").config) is AutoModelForCausalLM


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.legacy is not None])
def test_every_family_that_stores_experts_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, shapes and activations of all of them: shared experts, dense layers, Mamba, no gate, expert groups."""
    monkeypatch.setitem(LAYOUTS, family, replace(LAYOUTS["compressed-tensors int8"], family=family, sizes={}))
    checkpoint, ids = write_checkpoint(family, tmp_path), random_ids()
    model = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    assert relative_error(model(input_ids=ids).logits, _base_logits(checkpoint, ids)) < TOL
    found, expected = discover_targets(model), _targets(checkpoint)
    assert (found.experts, found.embeddings) == (expected.experts, expected.embeddings)
    assert list(found.linears) == list(expected.linears)
    assert all(packed_experts(model.get_submodule(name)) is not None for name in found.experts)


def _targets(checkpoint: QuantisedCheckpoint) -> ModelTargets:
    return discover_targets(checkpoint.dense)


def _base_logits(checkpoint: QuantisedCheckpoint, ids: torch.Tensor) -> torch.Tensor:
    rows = _rows(checkpoint)
    if rows is None:
        return merged_logits(checkpoint.dense, _targets(checkpoint), None, input_ids=ids)
    return fp8_logits(checkpoint.dense, _targets(checkpoint), None, rows, input_ids=ids)


def _rows(checkpoint: QuantisedCheckpoint) -> Rows | None:
    """How the experts' activations are quantised; None where they are not."""
    layout = checkpoint.layout
    return None if layout.fp8_group is None else Rows(layout.fp8_group, layout.static_scale)


def _save_adapters(checkpoint: QuantisedCheckpoint, folder: Path, ids: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Four adapters for the unquantised model, and the logits with each on every row."""
    targets = _targets(checkpoint)
    experts = [f"{name}.{param}" for name, t in targets.experts.items() for param in (t.w13_param, t.w2_param)]
    routers = [f"{name}.{linear.param}" for name, linear in targets.linears.items() if linear.router]
    attention = [name for name in targets.linears if name.endswith(("q_proj", "q_a_proj", "o_proj"))]
    configs = {
        "everything": LoraConfig(r=4, lora_alpha=6, target_modules=attention, target_parameters=[*experts, *routers]),
        "experts": LoraConfig(r=3, use_rslora=True, target_modules=[], target_parameters=experts),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=attention, modules_to_save=["norm"]),
    }
    truths = {name: save_with_peft(checkpoint.dense, c, folder / name, ids) for name, c in configs.items()}
    _save_part(checkpoint, targets, folder / "part")
    rows = _rows(checkpoint)
    for name in (*configs, "part"):
        weights, _ = load_peft_adapter(folder / name, targets, dtype=torch.float32)
        if rows is not None:
            truths[name] = fp8_logits(checkpoint.dense, targets, weights, rows, input_ids=ids)
        elif name == "part":
            truths[name] = merged_logits(checkpoint.dense, targets, weights, input_ids=ids)
    return truths


def _save_part(checkpoint: QuantisedCheckpoint, targets: ModelTargets, folder: Path) -> None:
    """One expert of the last layer under its transformers-4 names; all of one parameter where there were none."""
    legacy, (name, target) = FAMILIES[checkpoint.layout.family].legacy, list(targets.experts.items())[-1]
    factory = TensorFactory(seed=7)
    if legacy is None:
        factory.fused(name, target.num_experts, target.hidden_size, target.intermediate_size)
        write_adapter(folder, factory.tensors, target_modules=[], target_parameters=[f"{name}.{target.w2_param}"])
    else:
        factory.expert(name.replace("mlp", legacy.block), target.num_experts - 1, target, legacy)
        write_adapter(folder, factory.tensors, target_modules=[legacy.gate, legacy.up, legacy.down])


@pytest.mark.parametrize(
    ("family", "config"),
    [("nemotron_h", LAYOUTS["fp8 of modelopt"].config), ("deepseek_v3", LAYOUTS["fp8 of AutoFP8"].config)],
    ids=["nemotron_h of modelopt", "kimi_k2"],
)
def test_published_families(family: str, config: Mapping[str, Any], tmp_path: Path) -> None:
    """Experts without a gate; a type that is another one's, in a repository with code of its own."""
    dense = build(family).requires_grad_(False)
    dense.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and name.endswith("_proj.weight")]:
        parts, _ = fp8_by_tensor(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    more = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "x.Y"}} if family == "deepseek_v3" else {}
    edit_config(tmp_path, quantization_config=dict(config), **more)
    model = moegraft.load_quantised(tmp_path, dtype=torch.float32)
    for name in discover_targets(dense).experts:
        packed, experts = packed_experts(model.get_submodule(name)), dense.get_submodule(name)
        assert packed is not None
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        for found, weight in zip(packed.weights.dequantise(torch.float32), (first, experts.down_proj), strict=True):
            assert relative_error(found, weight) < 0.1
    assert model(input_ids=random_ids(1, 4)).logits.isfinite().all()


def test_fused_experts_that_are_stored_turned_round(tmp_path: Path) -> None:
    dense = write_turned_checkpoint(tmp_path)
    model = moegraft.load_quantised(tmp_path, dtype=torch.float32)
    for name in discover_targets(dense).experts:
        packed, experts = packed_experts(model.get_submodule(name)), dense.get_submodule(name)
        assert packed is not None
        w13, w2 = packed.weights.dequantise(torch.float32)
        torch.testing.assert_close(w13, experts.gate_up_proj.data, rtol=1e-6, atol=0)
        torch.testing.assert_close(w2, experts.down_proj.data, rtol=1e-6, atol=0)


def test_what_modelopt_says_in_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint("nvfp4 of modelopt", tmp_path)
    edit_config(checkpoint.path, quantization_config=None)
    said = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (checkpoint.path / "hf_quant_config.json").write_text(json.dumps(said))
    with caplog.at_level("INFO", logger="moegraft"):
        model = moegraft.load_quantised(checkpoint.path, dtype=torch.float32)
    assert "kv_cache_quant_algo is not used" in caplog.text
    assert {packed.weights.format_name for module in model.modules() if (packed := packed_experts(module))} == {"nvfp4"}


@pytest.mark.parametrize("rules", [{"lm_head": {"bits": 8}}, {"+:.*down.*": {"group_size": 128}}, ["x"]])
def test_gptq_rules_of_other_options_are_refused(rules: Any, tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gptq", tmp_path)
    edit_config(checkpoint.path, quantization_config={**LAYOUTS["gptq"].config, "dynamic": rules})
    with pytest.raises(CheckpointError, match=r"quantization_config.dynamic is .*repeat what holds for all"):
        moegraft.load_quantised(checkpoint.path)


def test_fused_experts_with_static_scales(tmp_path: Path) -> None:
    """Mistral-Small-4 in fp8: a scale for gate, up and down of each expert, and one for the inputs of each."""
    dense = tiny_model("mistral4").requires_grad_(False)
    dense.save_pretrained(tmp_path)
    tensors = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if ".experts" not in key}
    for module in discover_targets(dense).experts:
        for param, weight in dense.get_submodule(module).named_parameters():
            halves = weight.unflatten(1, (2 if param == "gate_up_proj" else 1, -1))
            scale = halves.abs().amax((2, 3)) / 448
            stored = (halves / scale[..., None, None]).to(torch.float8_e4m3fn)
            weight.copy_((stored.float() * scale[..., None, None]).flatten(1, 2))
            tensors[f"{module}.{param}"] = stored.flatten(1, 2)
            tensors[f"{module}.{param}_scale_inv"] = scale[..., None]
            tensors[f"{module}.{param}_activation_scale"] = torch.full((len(weight),), 0.1)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=dict(LAYOUTS["fp8, static"].config))
    model = moegraft.load_quantised(tmp_path, dtype=torch.float32)
    for name in discover_targets(dense).experts:
        packed, experts = packed_experts(model.get_submodule(name)), dense.get_submodule(name)
        assert packed is not None
        assert (packed.weights.x_scale.item(), packed.weights.h_scale.item()) == (pytest.approx(0.1),) * 2
        w13, w2 = packed.weights.dequantise(torch.float32)
        torch.testing.assert_close(w13, experts.gate_up_proj.data, rtol=1e-6, atol=0)
        torch.testing.assert_close(w2, experts.down_proj.data, rtol=1e-6, atol=0)
    ids = random_ids(1, 4)
    with torch.no_grad():
        assert relative_error(model(input_ids=ids).logits, dense(input_ids=ids).logits) < 0.2  # activations in fp8

"""Damaged, hostile and unserved quantised checkpoints: one error that names the file, tensor or field."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import AWQ_ORDER, LAYOUTS, edit_config, is_quantised_matrix, write_checkpoint
from support.mixed import random_ids

import moegraft
from moegraft.core.errors import CheckpointError, UnsupportedModelError
from moegraft.integrations.transformers.host.storage import packed_experts
from moegraft.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ, CT_INT4, CT_FP8, FP8, MXFP4 = "gptq", "compressed-tensors int4", "compressed-tensors fp8", "fp8 blocks", "mxfp4"
NVFP4 = "compressed-tensors nvfp4"
CT_INT8 = "compressed-tensors int8"
EXPERTS_0 = "model.layers.0.mlp.experts"
EXPERTS_1, Q_PROJ = "model.layers.1.mlp.experts", "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Sound checkpoints by layout, written on first use; each test works on a copy."""
    written: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in written:
            written[layout] = write_checkpoint(layout, tmp_path_factory.mktemp("sound")).path
        copy = tmp_path_factory.mktemp("damaged") / "base"
        return Path(shutil.copytree(written[layout], copy))

    return folder


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        moegraft.load_quantised(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def quantisation(layout: str, **fields: Any) -> dict[str, Any]:
    return {**LAYOUTS[layout].config, **fields}


def group(layout: str, part: str, **fields: Any) -> dict[str, Any]:
    """The config group of a compressed-tensors layout with other fields in one of its parts."""
    (found,) = LAYOUTS[layout].config["config_groups"].values()
    return {"config_groups": {"group_0": {**found, part: {**(found[part] or {}), **fields}}}}


FIELDS: Any = [
    (GPTQ, {"bits": 8}, ("quantization_config.bits is 8", "expected 4")),
    (GPTQ, {"bits": "4"}, ("quantization_config.bits",)),
    (GPTQ, {"group_size": 16}, ("quantization_config.group_size is 16", "32 or 64 or 128 or -1")),
    (GPTQ, {"dynamic": {"-:.*gate$": {}, "+:.*": {"bits": 8}}}, ("quantization_config.dynamic",)),
    (GPTQ, {"checkpoint_format": "marlin"}, ("quantization_config.checkpoint_format", "gptq_v2")),
    (GPTQ, {"quant_method": "bitsandbytes"}, ("quant_method is 'bitsandbytes'", "gptq")),
    ("awq", {"version": "gemv"}, ("quantization_config.version is 'gemv'", "gemm")),
    (FP8, {"weight_block_size": [64, 64]}, ("weight_block_size is [64, 64]",)),
    (FP8, {"expert_dtype": "fp4"}, ("expert_dtype is 'fp4'",)),
    (FP8, {"activation_scheme": "static"}, ("experts", "static scales")),
    (CT_INT4, {"format": "mxfp4-pack-quantized"}, ("format is 'mxfp4-pack-quantized'", "nvfp4-pack-quantized")),
    (NVFP4, group(NVFP4, "weights", group_size=32), ("group_0.weights.group_size is 32", "expected 16")),
    (GPTQ, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, ("quant_algo is 'W4A8_AWQ'", "NVFP4")),
    (CT_INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparsity_config",)),
    (CT_INT4, {"config_groups": {}}, ("config_groups",)),
    (CT_INT4, group(CT_INT4, "weights", num_bits=8), ("group_0.weights.num_bits is 8",)),
    (GPTQ, {"desc_act": "yes"}, ("quantization_config.desc_act is 'yes'",)),
    (FP8, {"modules_to_convert": ["model.embed_tokens"]}, ("modules_to_convert", "tables in fp8")),
    (CT_INT4, {"transform_config": {"config_groups": {"u": {}}}}, ("transform_config", "rotations")),
    (CT_INT4, {"quantization_status": "frozen"}, ("quantization_status is 'frozen'", "compressed")),
    (CT_INT4, group(CT_INT4, "input_activations", num_bits=8), ("group_0.input_activations", "null beside int4")),
    (CT_INT4, group(CT_INT4, "weights", actorder="random"), ("group_0.weights.actorder is 'random'",)),
    (CT_INT4, group(CT_INT4, "weights", actorder="group"), ("model.layers.0.", "has no weight_g_idx")),
    (CT_INT4, group(CT_INT4, "weights", actorder="dynamic"), ("model.layers.0.", "has no weight_g_idx")),
    (CT_INT4, group(CT_INT4, "weights", actorder=True), ("model.layers.0.", "has no weight_g_idx")),
    (CT_INT4, group(CT_INT4, "weights", symmetric=False), ("model.layers.0.", "has no weight_zero_point")),
    (CT_INT8, group(CT_INT8, "weights", symmetric=False), ("group_0.weights.symmetric is False",)),
    (CT_INT8, group(CT_INT8, "input_activations", num_bits=8), ("input_activations", "static", "dynamic ones")),
    (CT_FP8, group(CT_FP8, "weights", strategy="block", block_structure=[64, 64]), ("block_structure is [64, 64]",)),
    (CT_FP8, group(CT_FP8, "weights", strategy="block"), ("block_structure is None",)),
    (CT_FP8, group(CT_FP8, "weights", strategy="group"), ("group_0.weights.strategy is 'group'",)),
    (CT_FP8, group(CT_FP8, "input_activations", dynamic=False), ("static scales",)),
]


@pytest.mark.parametrize(
    ("layout", "fields", "words"), FIELDS, ids=lambda case: str(case) if isinstance(case, dict) else ""
)
def test_config_fields(folders: Any, layout: str, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = folders(layout)
    edit_config(folder, quantization_config=quantisation(layout, **fields))
    assert_refused(folder, *words)


@pytest.mark.parametrize("holder", ["compression_config", "text_config"])
def test_where_else_a_config_may_lie(folders: Any, holder: str) -> None:
    """Under the name of older compressed-tensors, or in the text stack of a model with several."""
    folder, wrong = folders(CT_INT4), quantisation(CT_INT4, transform_config={"config_groups": {"u": {}}})
    fields = wrong if holder == "compression_config" else {"quantization_config": wrong}
    edit_config(folder, quantization_config=None, **{holder: fields})
    assert is_quantised_or_why(folder) == "transform_config"
    if holder == "compression_config":
        edit_config(folder, compression_config=quantisation(CT_INT4))
        expected = moegraft.load_quantised(folders(CT_INT4))(input_ids=random_ids()).logits
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)


def is_quantised_or_why(folder: Path) -> bool | str:
    try:
        return moegraft.integrations.transformers.is_quantised(folder)
    except CheckpointError as error:
        return str(error).partition("quantization_config.")[2].partition(" ")[0]


def test_act_order_that_is_none(folders: Any) -> None:
    """One group of all inputs has no order, and static groups are in order: the config alone refuses nothing."""
    for layout in (GPTQ, "gptq v2, zero points, whole channels"):
        folder = folders(layout)
        expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits
        edit_config(folder, quantization_config=quantisation(layout, desc_act=True))
        if layout != GPTQ:
            edit_tensors(folder, without("g_idx"))
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)
    edit_config(folder := folders(CT_INT4), quantization_config=quantisation(CT_INT4, **UNSORTED))
    moegraft.load_quantised(folder)


UNSORTED = group(CT_INT4, "weights", actorder="weight")


def test_act_order_without_its_groups(folders: Any) -> None:
    for part, refused in ((".experts.", EXPERTS_0), ("o_proj.", "model.layers.0.self_attn.o_proj")):
        folder = folders(GPTQ)
        edit_config(folder, quantization_config=quantisation(GPTQ, desc_act=True))
        edit_tensors(folder, without("g_idx", part))
        assert_refused(folder, refused, "has no g_idx")


def test_groups_that_differ(folders: Any) -> None:
    (first,) = LAYOUTS[CT_INT4].config["config_groups"].values()
    second = {**first, "weights": {**first["weights"], "group_size": 64}}
    folder = folders(CT_INT4)
    config = quantisation(CT_INT4, config_groups={"group_0": first, "group_1": second})
    edit_config(folder, quantization_config=config)
    assert_refused(folder, "config_groups", "group_1")


def remove(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def every(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    """The change is one of all experts, so that none differs from its neighbours."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith(suffix)]:
            tensors[name] = change(tensors[name]).contiguous()

    return edit


def without(suffix: str, part: str = "") -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name and name.endswith(suffix)]


def every_beside(suffix: str, other: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    """A tensor beside each of the experts' of a name, made of it."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith(suffix)]:
            tensors[name.removesuffix(suffix) + other] = make(tensors[name]).contiguous()

    return edit


def first_axis(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()


def bytes_of(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value, dtype=torch.uint8)


def scrambled(tensor: torch.Tensor) -> torch.Tensor:
    """Group indices of the inputs of packed words or of such indices, out of order but for a first that is negative."""
    return torch.cat([torch.tensor([-1], dtype=torch.int32), torch.arange(tensor.shape[-1] - 1).int().flip(0) // 32])


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def not_finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


def expert_becomes_plain(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]
    tensors[f"{EXPERT}.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)


def expert_disappears(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


CHANGES: Any = [
    (GPTQ, remove(f"{EXPERT}.scales"), (EXPERT, "has no scales")),
    (GPTQ, expert_disappears, ("model.layers.1.mlp.experts", "up projection of expert 2 is missing")),
    (GPTQ, expert_becomes_plain, (f"{EXPERT}.weight", "is not quantised")),
    (GPTQ, add(f"{EXPERT}.perm", torch.zeros(4)), (f"{EXPERT}.perm", "not known beside qweight")),
    (GPTQ, put(f"{EXPERT}.scales", not_finite), (f"{EXPERT}.scales", "NaN")),
    (GPTQ, put(f"{EXPERT}.scales", lambda t: t[:1]), (f"{EXPERT}.scales", "as experts before it")),
    (GPTQ, put(f"{EXPERT}.g_idx", lambda t: t.flip(0)), (f"{EXPERT}.qweight", "act-order")),
    (GPTQ, every(".g_idx", scrambled), (f"{EXPERTS_0}.0.", "act-order")),
    (GPTQ, every(".g_idx", lambda t: t[:0]), (f"{EXPERTS_0}.0.", "g_idx [0]", "expected 64 entries")),
    (GPTQ, every(".scales", first_axis), (f"{EXPERTS_0}.0.", "found scales of shape", "expected 2 axes")),
    (GPTQ, every(".scales", torch.Tensor.int), (f"{EXPERTS_0}.0.", "found scales of torch.int32")),
    (GPTQ, every(".qweight", first_axis), (f"{EXPERTS_0}.0.", "found qweight of shape", "expected 2 axes")),
    (GPTQ, every(".qzeros", first_axis), (f"{EXPERTS_0}.0.", "found qzeros of shape", "expected 2 axes")),
    (GPTQ, every(".qweight", lambda t: t[None]), (f"{EXPERTS_0}.0.", "found qweight of shape (1, ")),
    (CT_INT4, every(".weight_shape", lambda t: t[:0]), (f"{EXPERTS_0}.0.", "weight_shape (0,)", "two integers")),
    (CT_INT4, every(".weight_shape", torch.Tensor.float), (f"{EXPERTS_0}.0.", "weight_shape (2,) of torch.float32")),
    (CT_INT4, every(".weight_shape", lambda t: t * torch.tensor([5, 1])), (f"{EXPERTS_0}.0.", "weight_shape [")),
    (CT_INT4, every(".weight_scale", first_axis), (f"{EXPERTS_0}.0.", "weight_scale of shape", "expected 2 axes")),
    (
        CT_INT4,
        every_beside("weight_scale", "weight_zero_point", lambda t: torch.zeros(3, dtype=torch.int32)),
        (f"{EXPERTS_0}.0.", "weight_zero_point of shape (3,)", "expected 2 axes"),
    ),
    (
        CT_INT4,
        every_beside("weight_packed", "weight_g_idx", lambda t: scrambled(t.repeat(1, 8))),
        (f"{EXPERTS_0}.0.", "weight_g_idx out of order", "act-order"),
    ),
    (FP8, every(".weight", lambda t: t.view(torch.uint8).flatten().view(t.dtype)), (EXPERTS_0, "expected 3 axes")),
    (FP8, every(".weight_scale_inv", bytes_of(255)), (f"{EXPERTS_0}.0.", "weight_scale_inv", "NaN")),
    (
        FP8,
        put("model.layers.0.self_attn.q_proj.weight_scale_inv", bytes_of(255)),
        ("model.layers.0.self_attn.q_proj", "NaN"),
    ),
    (
        FP8,
        put("model.layers.0.self_attn.q_proj.weight", lambda t: t.bfloat16()),
        ("model.layers.0.self_attn.q_proj", "found weight of torch.bfloat16", "torch.float8_e4m3fn"),
    ),
    (CT_FP8, every(".weight_scale", lambda t: t[:5]), (EXPERTS_0, "found scales of shape")),
    (CT_INT8, every(".weight", first_axis), ("mlp.experts", "expected 3 axes")),
    (GPTQ, put(f"{EXPERT}.qweight", torch.Tensor.long), (f"{EXPERT}.qweight", "torch.int64")),
    (GPTQ, add("model.layers.1.mlp.experts.9.up_proj.qweight", torch.zeros(1)), ("expert 9", "has 7")),
    (GPTQ, add("model.layers.0.mlp.extra.weight", torch.zeros(2)), ("model.layers.0.mlp.extra.weight", "no place")),
    (GPTQ, add("model.layers.0.self_attn.q_proj.lora", torch.zeros(2)), ("q_proj.lora", "not known")),
    (GPTQ, remove("model.norm.weight"), ("model.norm.weight", "missing")),
    (GPTQ, put("model.norm.weight", lambda t: t[:3]), ("model.norm.weight", "shape")),
    (GPTQ, put("lm_head.weight", not_finite), ("lm_head.weight", "NaN")),
    (GPTQ, put("model.layers.0.self_attn.q_proj.qzeros", lambda t: t[:1]), ("q_proj", "zero points")),
    (CT_INT4, put(f"{EXPERT}.weight_shape", lambda t: t + 9), (f"{EXPERT}.weight_packed", "weight_shape [41, 73]")),
    (
        FP8,
        put(f"{EXPERT}.weight_scale_inv", lambda t: t[:, :1]),
        (f"{EXPERT}.weight_scale_inv", "found [1, 1]", "expected [1, 2]"),
    ),
    (FP8, put(f"{EXPERT}.weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)), (EXPERT, "NaN")),
    (FP8, put(f"{EXPERT}.weight_scale_inv", torch.Tensor.int), (f"{EXPERT}.weight_scale_inv", "torch.int32")),
    (FP8, add(f"{EXPERT}.bias", torch.zeros(128)), (f"{EXPERT}.bias", "not known")),
    (MXFP4, remove("model.layers.0.mlp.experts.down_proj_bias"), ("down_proj_bias",)),
    (MXFP4, remove("model.layers.0.mlp.experts.down_proj_scales"), ("down_proj_scales", "is missing")),
    (MXFP4, add("model.layers.0.mlp.experts.extra", torch.zeros(1)), ("mlp.experts.extra",)),
    (
        MXFP4,
        put("model.layers.0.mlp.experts.gate_up_proj_scales", lambda t: t.fill_(255)),
        ("model.layers.0.mlp.experts", "255"),
    ),
    (
        MXFP4,
        put("model.layers.0.mlp.experts.gate_up_proj_blocks", lambda t: t[:, :-2]),
        ("model.layers.0.mlp.experts", "gate_up_proj_blocks (4, 190, 2, 16)", "(4, 192, 2, 16)"),
    ),
]


@pytest.mark.parametrize(("layout", "change", "words"), CHANGES, ids=range(len(CHANGES)))
def test_tensors(folders: Any, layout: str, change: Callable[[Tensors], object], words: tuple[str, ...]) -> None:
    folder = folders(layout)
    edit_tensors(folder, change)
    assert_refused(folder, *words)


def every_in(
    start: str, end: str, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> Callable[[Tensors], object]:
    """Every tensor of such a name changed, or taken out."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(start) and name.endswith(end)]:
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors[name])

    return edit


UNSCALED: Any = [
    (CT_INT8, every_in(EXPERTS_1, ".weight_scale", None), f"{EXPERTS_1}.0.down_proj.weight"),
    (CT_INT8, every_in("", ".weight_scale", None), ".weight"),
    (CT_INT8, every_in("model.layers.0.mlp.up_proj", ".weight_scale", None), "model.layers.0.mlp.up_proj.weight"),
    (CT_FP8, every_in(EXPERTS_0, ".weight_scale", None), f"{EXPERTS_0}.0.down_proj.weight"),
    (FP8, every_in(EXPERTS_0, ".weight_scale_inv", None), f"{EXPERTS_0}.0.down_proj.weight"),
    (FP8, every_in(Q_PROJ, ".weight_scale_inv", None), f"{Q_PROJ}.weight"),
    (GPTQ, every_in("model.norm", ".weight", torch.Tensor.long), "model.norm.weight"),
    (GPTQ, every_in("model.norm", ".weight", torch.Tensor.char), "model.norm.weight"),
    (GPTQ, every_in("lm_head", ".weight", lambda t: t.to(torch.float8_e4m3fn)), "lm_head.weight"),
    (GPTQ, every_in("model.layers.0.mlp.gate", ".weight", lambda t: t.to(torch.uint8)), "mlp.gate.weight"),
]


@pytest.mark.parametrize(("layout", "change", "name"), UNSCALED, ids=range(len(UNSCALED)))
def test_numbers_without_scales(folders: Any, layout: str, change: Callable[[Tensors], object], name: str) -> None:
    """Loaded as weights they would be wrong by factors of hundreds."""
    folder = folders(layout)
    edit_tensors(folder, change)
    assert_refused(folder, name, "without the scales")


ODD: list[Any] = [None, True, "x", -1, 0, 3, 1.5, 10**7, 2**63, 1e300, [], [1], {}, {"a": 1}, "\0", -(2**40)]


@pytest.mark.parametrize("layout", [GPTQ, MXFP4])
def test_odd_fields(folders: Any, layout: str) -> None:
    """Whatever a field of the config is: the model loads, or the error is ours and names the file or a tensor."""
    folder, rng = folders(layout), random.Random(7)
    fields = json.loads((folder / "config.json").read_text())
    refused = 0
    for _ in range(40):
        name, odd = rng.choice(sorted(fields)), rng.choice(ODD)
        (folder / "config.json").write_text(json.dumps(fields | {name: odd}))
        try:
            moegraft.load_quantised(folder)
        except (CheckpointError, UnsupportedModelError) as error:
            refused += 1
            assert any(word in str(error) for word in ("config.json", "tensor", "experts", "dtype")), (name, odd)
    assert refused > 15


@pytest.mark.parametrize(
    ("name", "odd", "words"),
    [
        ("num_experts", 10**7, "num_experts is 10000000, expected at most 4096"),
        ("num_hidden_layers", 2000, "num_hidden_layers is 2000, expected at most 512"),
        ("vocab_size", 20_000_000, "vocab_size is 20000000, expected at most 4194304"),
        ("vocab_size", 4_000_000, "but the weight files hold"),
        ("hidden_size", 2**40, "hidden_size is 1099511627776"),
        ("hidden_act", "eval", "hidden_act is 'eval'"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, "rope_parameters.rope_theta is 'x'"),
        ("model_type", "no_such_model", "model_type is 'no_such_model'"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
    ],
)
def test_fields_that_are_named(folders: Any, name: str, odd: Any, words: str) -> None:
    folder = folders(GPTQ)
    edit_config(folder, **{name: odd})
    assert_refused(folder, "config.json", words)


def nested(depth: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"vocab_size": 10**9}
    for _ in range(depth):
        fields = {"text_config": fields}
    return fields


def test_sizes_in_objects_of_the_config(folders: Any) -> None:
    folder = folders(GPTQ)
    edit_config(folder, **nested(1))
    assert_refused(folder, "text_config.vocab_size is 1000000000")
    edit_config(folder, **nested(900))
    assert_refused(folder, "config.json")


class TestGenerationConfig:
    def test_six_gigabytes(self, folders: Any) -> None:
        folder = folders(GPTQ)
        with (folder / "generation_config.json").open("wb") as file:
            file.truncate(6 * 2**30)
        assert_refused(folder, "generation_config.json", "larger than")

    @pytest.mark.parametrize("fields", [{"max_new_tokens": "x"}, {"cache_implementation": 3}, {"do_sample": [[]]}, [1]])
    def test_odd_fields(self, folders: Any, fields: Any) -> None:
        folder = folders(GPTQ)
        (folder / "generation_config.json").write_text(json.dumps(fields))
        assert_loads_or_refused(folder, "generation_config.json")

    def test_links_out_of_the_folder_and_pipes(self, folders: Any, tmp_path: Path) -> None:
        folder = folders(GPTQ)
        (tmp_path / "outside.json").write_text('{"max_new_tokens": 3}')
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "generation_config.json").symlink_to(tmp_path / "outside.json")
        assert_refused(folder, "generation_config.json", "leaves the folder")
        (folder / "generation_config.json").unlink()
        os.mkfifo(folder / "generation_config.json")
        assert_refused(folder, "generation_config.json", "not a regular file")


def assert_loads_or_refused(folder: Path, word: str) -> None:
    try:
        assert moegraft.load_quantised(folder) is not None
    except CheckpointError as error:
        assert word in str(error)


def test_code_in_the_folder_never_runs(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on stdin whether it may."""
    folder = folders(GPTQ)
    expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits
    for module in ("configuration_x", "modeling_x"):
        (folder / f"{module}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass X: pass\n")
    edit_config(folder, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)
    edit_config(folder, model_type="x")
    assert_refused(folder, "model_type is 'x'")
    assert not (folder / "ran").exists()


class TestFiles:
    def test_plain_checkpoints_are_sent_to_transformers(self, folders: Any) -> None:
        folder = folders(GPTQ)
        edit_config(folder, quantization_config=None)
        assert_refused(folder, "not quantised", "transformers")

    def test_no_folder_no_config_no_weights(self, folders: Any, tmp_path: Path) -> None:
        assert_refused(tmp_path / "absent", "absent", "does not exist")
        assert_refused(tmp_path, "config.json", "missing")
        folder = folders(GPTQ)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert_refused(folder, "pytorch_model.bin", "pickles")

    def test_truncated(self, folders: Any) -> None:
        folder = folders(GPTQ)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
        assert_refused(folder, "model.safetensors", "but the file has")

    def test_json_that_is_none(self, folders: Any) -> None:
        folder = folders(GPTQ)
        (folder / "config.json").write_text("{" * 10)
        assert_refused(folder, "config.json", "JSON")

    @pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/tmp/x.safetensors", "pytorch_model.bin"])
    def test_index_that_leaves_the_folder(self, folders: Any, shard: str) -> None:
        folder = folders(GPTQ)
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_refused(folder, shard.rpartition("/")[2])

    def test_link_that_leaves_the_folder(self, folders: Any, tmp_path: Path) -> None:
        folder = folders(GPTQ)
        (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
        (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
        assert_refused(folder, "link that leaves the folder")

    def test_dense_model(self, folders: Any) -> None:
        folder = folders(GPTQ)
        config = {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "quantization_config": quantisation(GPTQ),
        }
        (folder / "config.json").write_text(json.dumps(config))
        assert_refused(folder, "Qwen3ForCausalLM", "no experts")


class TestSound:
    def test_shards(self, folders: Any) -> None:
        """Experts of one layer over two files."""
        folder = folders(GPTQ)
        expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for i in range(2):
            shard = f"model-{i + 1:05}-of-00002.safetensors"
            names = sorted(tensors)[i::2]
            save_file({name: tensors[name] for name in names}, folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)

    def test_fused_experts(self, folders: Any) -> None:
        """fp8 as transformers 5 names it in memory: one tensor for all experts, with its scales beside it."""
        folder = folders(FP8)
        expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits

        def fuse(tensors: Tensors) -> None:
            for layer in range(2):
                experts = f"model.layers.{layer}.mlp.experts"
                for part, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
                    gate, up, down = (
                        [tensors.pop(f"{experts}.{e}.{name}_proj.{part}") for e in range(5)]
                        for name in ("gate", "up", "down")
                    )
                    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
                    tensors[f"{experts}.gate_up_proj{suffix}"] = torch.stack(both)
                    tensors[f"{experts}.down_proj{suffix}"] = torch.stack(down)

        edit_tensors(folder, fuse)
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)

    def test_fused_scales_are_finite(self, folders: Any) -> None:
        folder, experts = folders(FP8), "model.layers.0.mlp.experts"

        def fuse(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.startswith(experts)]:
                del tensors[name]
            for param, rows, columns in (("gate_up_proj", 256, 256), ("down_proj", 256, 128)):
                tensors[f"{experts}.{param}"] = torch.zeros(5, rows, columns, dtype=torch.uint8).view(
                    torch.float8_e4m3fn
                )
                scales = torch.full((5, rows // 128, columns // 128), 127, dtype=torch.uint8)
                tensors[f"{experts}.{param}_scale_inv"] = scales

        edit_tensors(folder, fuse)
        moegraft.load_quantised(folder)
        edit_tensors(folder, put(f"{experts}.down_proj_scale_inv", bytes_of(255)))
        assert_refused(folder, f"{experts}.down_proj_scale_inv", "NaN")

    def test_layers_that_transformers_leaves_out(self, folders: Any) -> None:
        """DeepSeek-V3 publishes a layer for drafting behind its last one."""
        folder = folders("compressed-tensors int8")
        expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits
        edit_tensors(folder, add("model.layers.61.mlp.experts.0.up_proj.weight_scale", torch.ones(24, 1)))
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)

    def test_zero_points_that_only_some_experts_have(self, folders: Any) -> None:
        """Zero points that are all 8 are left out when a matrix is packed; its neighbours may need theirs."""
        folder = folders("awq")

        def centre_one(tensors: Tensors) -> None:
            for name in ("gate_proj", "down_proj"):
                tensors[f"model.layers.0.mlp.experts.1.{name}.qzeros"].fill_(0x88888888 - (1 << 32))

        edit_tensors(folder, centre_one)
        model = moegraft.load_quantised(folder, dtype=torch.float32)
        packed = packed_experts(model.get_submodule("model.layers.0.mlp.experts"))
        assert packed is not None
        w13, w2 = packed.weights.dequantise(torch.float32)
        tensors = load_file(folder / "model.safetensors")
        for expert in range(2):
            for half, found in (("gate", w13[expert, :32]), ("up", w13[expert, 32:]), ("down", w2[expert])):
                torch.testing.assert_close(
                    found, _unpack_awq(tensors, f"model.layers.0.mlp.experts.{expert}.{half}_proj")
                )

    def test_tied_embeddings_and_generation_config(self, folders: Any) -> None:
        folder = folders(GPTQ)
        edit_config(folder, tie_word_embeddings=True)
        edit_tensors(folder, remove("lm_head.weight"))
        (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 7}))
        model = moegraft.load_quantised(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (3, 7)
        (folder / "generation_config.json").write_text("{")
        assert_refused(folder, "generation_config.json")

    @pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
    def test_scales_that_are_powers_of_two(self, folders: Any, dtype: torch.dtype) -> None:
        """DeepSeek-V3.1 stores them in E8M0, some tools the bytes of it."""
        folder = folders(FP8)

        def round_scales(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.endswith("_scale_inv")]:
                tensors[name] = tensors[name].log2().round().exp2()

        edit_tensors(folder, round_scales)
        expected = moegraft.load_quantised(folder)(input_ids=random_ids()).logits

        def store(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.endswith("_scale_inv")]:
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu).view(dtype)

        edit_tensors(folder, store)
        assert torch.equal(moegraft.load_quantised(folder)(input_ids=random_ids()).logits, expected)

    def test_a_layer_that_was_left_out(self, folders: Any) -> None:
        """Libraries skip layers on request: those stay plain, through transformers, beside packed ones."""
        folder = folders(FP8)
        expected = moegraft.load_quantised(folder, dtype=torch.float32)(input_ids=random_ids()).logits

        def dequantise_first_layer(tensors: Tensors) -> None:
            for name in [name for name in tensors if name.startswith("model.layers.0.mlp.experts")]:
                if is_quantised_matrix(name, tensors[name]):
                    scale = tensors.pop(f"{name}_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
                    tensors[name] = tensors[name].float() * scale

        edit_tensors(folder, dequantise_first_layer)
        model = moegraft.load_quantised(folder, dtype=torch.float32)
        assert packed_experts(model.get_submodule("model.layers.0.mlp.experts")) is None
        with moegraft.attach(model, adapter_memory="1MiB") as graft:
            assert [(c.format_name, c.kept_by) for c in graft.explain()] == [
                ("dense", "transformers"),
                ("fp8", "moegraft"),
            ]
            # Activations of the first layer are not quantised any more.
            assert 0 < relative_error(graft(input_ids=random_ids()).logits, expected) < 0.2


def _unpack_awq(tensors: Tensors, module: str) -> torch.Tensor:
    """[out, in], number by number."""

    def numbers(words: torch.Tensor) -> torch.Tensor:
        found = torch.empty(words.shape[0], 8 * words.shape[1])
        for nibble, column in enumerate(AWQ_ORDER):
            found[:, column::8] = (words >> 4 * nibble & 15).float()
        return found

    codes, zeros = numbers(tensors[f"{module}.qweight"]), numbers(tensors[f"{module}.qzeros"])
    return ((codes - zeros.repeat_interleave(32, 0)) * tensors[f"{module}.scales"].float().repeat_interleave(32, 0)).T

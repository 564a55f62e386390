"""The commands on quantised checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.adapters import random_ids, save_with_peft
from support.checkpoints import edit_config, write_checkpoint, write_vision_checkpoint
from support.families import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import moegraft
from moegraft.cli.app import app
from moegraft.integrations.transformers.host.targets import discover_targets

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run_json(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("layout", ["gptq", "mxfp4"])
def test_commands_take_quantised_checkpoints(layout: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(layout, tmp_path)
    with moegraft.attach(moegraft.load_quantised(checkpoint.path), adapter_memory="4MiB") as graft:
        expected = graft.explain()
    found = run_json("explain", checkpoint.path, "--device", "cpu")
    assert found["choices"] == json.loads(json.dumps([dataclasses.asdict(choice) for choice in expected]))
    shown = run("explain", checkpoint.path, "--device", "cpu")
    for words in (found["stored"], checkpoint.layout.format_name, "TorchExperts", "not TritonExperts"):
        assert words in " ".join(shown.stdout.split())

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    save_with_peft(checkpoint.dense, config, tmp_path / "a", random_ids())
    inspected = run_json("inspect", tmp_path / "a", "--base", checkpoint.path)
    assert inspected["ok"], inspected["problems"]

    save_tokenizer(checkpoint.path)
    options = ["--prompt", "one two", "--adapter", f"a={tmp_path / 'a'}", "--max-new-tokens", "2", "--device", "cpu"]
    answers = run_json("generate", checkpoint.path, *options)
    assert [row["adapter"] for row in answers["rows"]] == [None, "a"]


def save_tokenizer(folder: Path) -> None:
    words = ["<pad>", "<s>", "</s>", "one", "two", "three"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def test_a_layout_that_is_not_served_is_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 3})
    result = run("explain", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "quantization_config.bits is 3, expected 4" in result.stderr


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quark", "fbgemm_fp8"])
def test_a_method_that_nothing_here_loads_is_not_explained(method: str, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method, "load_in_4bit": True})
    result = run("explain", tmp_path, "--device", "cpu")
    assert result.exit_code == 2 and not result.stdout
    assert f"quantization_config.quant_method is '{method}', expected one of fp8" in " ".join(result.stderr.split())


def test_a_method_whose_library_is_missing(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    result = run("generate", tmp_path, "--prompt", "one", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and "holds no model that transformers can load" in result.stderr


def test_act_order_is_seen_before_weights_are_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gptq", tmp_path)
    tensors = load_file(checkpoint.path / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.gate_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, checkpoint.path / "model.safetensors")
    result = run("explain", checkpoint.path, "--device", "cpu")
    assert (result.exit_code, name in result.stderr, "act-order" in result.stderr) == (2, True, True)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_model_with_a_vision_tower(is_packed: bool, tmp_path: Path) -> None:
    dense, folder = write_vision_checkpoint(tmp_path / "base"), tmp_path / "base"
    if not is_packed:
        dense.save_pretrained(folder)
    found = run_json("explain", folder, "--device", "cpu")
    format_name = "int8" if is_packed else "dense"
    layers = [(choice["layer"], choice["format_name"]) for choice in found["choices"]]
    assert layers == [(name, format_name) for name in discover_targets(dense).experts] != []
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    save_with_peft(dense, config, tmp_path / "a", random_ids())
    inspected = run_json("inspect", tmp_path / "a", "--base", folder)
    assert inspected["ok"], inspected["problems"]
    save_tokenizer(folder)
    options = ["--prompt", "one two", "--adapter", f"a={tmp_path / 'a'}", "--max-new-tokens", "2", "--device", "cpu"]
    answers = run_json("generate", folder, *options)
    assert [row["adapter"] for row in answers["rows"]] == [None, "a"]

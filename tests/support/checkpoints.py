"""Tiny quantised MoE checkpoints on disk in every layout that is read, each with the plain weights that it stands for.

compressed-tensors writes and reads its own layouts here, transformers dequantises fp8 and mxfp4 by itself, and GPTQ and
AWQ, whose libraries are no dependency, are packed number by number as their documents say:
https://github.com/AutoGPTQ/AutoGPTQ (qlinear_cuda: eight inputs a word, zero points less one, which
GPTQModel, its successor, takes off whole words: https://github.com/ModelCloud/GPTQModel),
https://github.com/casper-hansen/AutoAWQ (WQLinear_GEMM: eight outputs a word, in the order 0 2 4 6 1 3 5 7).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from moegraft.integrations.transformers.host.targets import discover_targets
from support.families import build
from support.zoo import tiny_config, tiny_model

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STATIC_SCALE = 0.01
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``matrix``: from a weight [out, in] to its tensors (by their last names) and the weight that they stand for.

    ``format_name`` is moegraft's. ``fp8_group``: GEMMs read activations in fp8 too, by groups of this many columns
    (0: a whole row), or with ``static_scale``.
    """

    family: str
    format_name: str
    config: Mapping[str, Any]
    matrix: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]] | None
    sizes: Mapping[str, Any]
    fp8_group: int | None = None
    static_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class QuantisedCheckpoint:
    """``dense``: the float32 model of the weights that the checkpoint in ``path`` stands for."""

    path: Path
    layout: Layout
    dense: PreTrainedModel


def write_checkpoint(name: str, folder: Path) -> QuantisedCheckpoint:
    """The checkpoint of ``LAYOUTS[name]`` in ``folder / "base"``, in bfloat16 where it is not quantised."""
    layout = LAYOUTS[name]
    build(layout.family, **layout.sizes).to(torch.bfloat16).save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "dense")
    state = load_file(folder / "base" / "model.safetensors")
    if layout.matrix is None:
        stored, meant = mxfp4(state)
    else:
        stored, meant = each_matrix(state, layout.matrix)
    save_file(stored, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder / "base", quantization_config=dict(layout.config))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    return QuantisedCheckpoint(path=folder / "base", layout=layout, dense=dense)


def write_vision_checkpoint(folder: Path, model_type: str = "qwen3_vl_moe") -> PreTrainedModel:
    """A model with a vision tower in ``folder``: int8 experts, one by one, the rest plain; and what it stands for."""
    dense = tiny_model(model_type).requires_grad_(False)
    dense.save_pretrained(folder)
    layout = LAYOUTS["compressed-tensors int8"]
    assert layout.matrix is not None
    tensors = load_file(folder / "model.safetensors")
    for module in (name for name in discover_targets(dense).experts):
        experts = dense.get_submodule(module)
        layer = module.partition("layers.")[2]
        prefix = next(key[: key.index(layer)] + layer for key in tensors if f"layers.{layer}." in key)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        for e in range(experts.num_experts):
            gate, up = experts.gate_up_proj[e].chunk(2)
            for projection, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[e])):
                parts, meant = layout.matrix(weight)
                weight.copy_(meant)
                tensors |= {f"{prefix}.{e}.{projection}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=dict(layout.config))
    return dense


def edit_config(folder: Path, **fields: Any) -> None:
    """Fields over those of the folder's config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def is_quantised_matrix(name: str, tensor: torch.Tensor) -> bool:
    """What quantisation libraries take: linear maps, not routers, heads, embeddings or norms."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return tensor.dim() == 2 and name.endswith(".weight") and module.endswith(("_proj", "w1", "w2", "w3"))


def each_matrix(
    state: Tensors, matrix: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
) -> tuple[Tensors, Tensors]:
    stored: Tensors = {}
    meant = {name: tensor.float() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not is_quantised_matrix(name, tensor):
            stored[name] = tensor
            continue
        parts, meant[name] = matrix(tensor.float())
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        meant[name] = meant[name].contiguous()
    return stored, meant


def _groups(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], zero points and scales [out, groups]: code = round(w / scale) + zero, in 0..15."""
    size = weight.shape[1] if group == -1 else group
    rows = weight.unflatten(1, (-1, size))
    if symmetric:
        scale, zero = rows.abs().amax(2) / 7, torch.full(rows.shape[:2], 8.0)
    else:
        low, high = rows.amin(2).clamp(max=0), rows.amax(2).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
    scale = scale.half().float()
    codes = (rows / scale[..., None]).round() + zero[..., None]
    return codes.clamp(0, 15).flatten(1).int(), zero.int(), scale


def _meant(codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(size, 1)).float() * scale.repeat_interleave(size, 1)


def pack_rows(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[n, m] numbers below 16 as int32 [n, m / 8]; nibble i of a word is column ``order[i]`` of its eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= codes[:, column::8].long() << 4 * nibble
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(weight: torch.Tensor, *, group: int, symmetric: bool, zero_offset: int = 1) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = _groups(weight, group, symmetric)
    size = weight.shape[1] if group == -1 else group
    parts = {
        "qweight": pack_rows(codes).T,
        "qzeros": pack_rows(zero.T) - zero_offset * 0x11111111,
        "scales": scale.T.half(),
        "g_idx": (torch.arange(weight.shape[1]) // size).int(),
    }
    return parts, _meant(codes, zero, scale)


def awq(weight: torch.Tensor, *, group: int) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = _groups(weight, group, symmetric=False)
    parts = {
        "qweight": pack_rows(codes.T, AWQ_ORDER),
        "qzeros": pack_rows(zero.T, AWQ_ORDER),
        "scales": scale.T.half(),
    }
    return parts, _meant(codes, zero, scale)


def compressed(weight: torch.Tensor, *, form: str, args: Mapping[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """The library's own compressor, and its own inverse."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    strategy = args["strategy"]
    if strategy == "block":
        rows, columns = args["block_structure"]
        tiles = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    elif strategy == "tensor":
        tiles = weight.flatten()[None]
    else:
        tiles = weight.unflatten(1, (-1, args.get("group_size") or weight.shape[1]))
    scale, zero = calculate_qparams(tiles.amin(-1), tiles.amax(-1), weights)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"].float()


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's: e4m3 in blocks of 128 x 128, with what multiplies them called ``weight_scale_inv``."""
    tiles = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = tiles.abs().amax((1, 3)) / 448
    stored = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (stored.float() * scale[:, None, :, None]).reshape(weight.shape)
    return {"weight": stored.reshape(weight.shape), "weight_scale_inv": scale}, meant


def fp8_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale a matrix and one for its inputs, in transformers' names."""
    scale = weight.abs().amax() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": stored, "weight_scale_inv": scale, "activation_scale": torch.tensor(STATIC_SCALE)}
    return parts, stored.float() * scale


def compressed_static(weight: torch.Tensor, *, form: str, args: Mapping[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """The library's fp8 with a scale of the inputs, which calibration finds."""
    parts, meant = compressed(weight, form=form, args=args)
    return {**parts, "input_scale": torch.tensor([STATIC_SCALE])}, meant


def nvfp4(weight: torch.Tensor, *, by_modelopt: bool) -> tuple[Tensors, torch.Tensor]:
    """The library's numbers, under its names or under modelopt's, which multiplies by what the library divides by."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    of_all = 6 * 448 / weight.abs().amax()
    scale = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * of_all).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": of_all[None]}
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    parts = compressor.compress(state, scheme)
    # Its own inverse rounds to bfloat16.
    packed = parts["weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    numbers = torch.tensor(_E2M1)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    meant = numbers * parts["weight_scale"].float().repeat_interleave(16, 1) / of_all
    assert torch.allclose(compressor.decompress(dict(parts), scheme)["weight"].float(), meant, rtol=1e-2)
    if not by_modelopt:
        return {**parts, "input_global_scale": torch.ones(1)}, meant
    named = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
    return named | {"weight_scale_2": 1 / of_all, "input_scale": torch.tensor(1.0)}, meant


def fp8_by_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoFP8's and modelopt's: one scale a matrix and one for its inputs, and one for a cache."""
    parts, meant = fp8_static(weight)
    names = {"weight": "weight", "weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
    return {names[part]: tensor for part, tensor in parts.items()} | {"k_scale": torch.tensor(1.0)}, meant


def write_turned_checkpoint(folder: Path) -> PreTrainedModel:
    """Qwen3-VL in fp8 as published: fused experts as [E, in, out], blocks of 128 x 128; and what it stands for."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128}  # w13 has one size on both sides: w2 tells
    config = tiny_config("qwen3_vl_moe")
    parts = {"text_config": config.text_config.to_dict() | sizes}
    parts["vision_config"] = config.vision_config.to_dict() | {"out_hidden_size": 256}
    dense = tiny_model("qwen3_vl_moe", **parts).requires_grad_(False)
    dense.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for module in discover_targets(dense).experts:
        for param, weight in dense.get_submodule(module).named_parameters():
            name = f"{module}.{param}"
            del tensors[name]
            stored = [fp8_blocks(matrix) for matrix in weight]
            weight.copy_(torch.stack([meant for _, meant in stored]))
            for part, end in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
                whole = torch.stack([parts[part].float() for parts, _ in stored]).mT.contiguous()
                tensors[name + end] = whole.to(stored[0][0][part].dtype)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=dict(LAYOUTS["fp8 blocks"].config))
    return dense


def mxfp4(state: Tensors) -> tuple[Tensors, Tensors]:
    """gpt-oss: experts as blocks of 32 inputs along the last axis, two numbers a byte, and an E8M0 byte for each."""
    stored = dict(state)
    meant = {name: tensor.float() for name, tensor in state.items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks = stored.pop(name).float().mT.unflatten(-1, (-1, 32))
        exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=1e-30))) - 2
        table = torch.tensor(_E2M1)
        scaled = blocks / exponent.exp2()[..., None]
        code = (scaled.abs()[..., None] - table).abs().argmin(-1)
        values = table[code] * scaled.sign() * exponent.exp2()[..., None]
        code = code + 8 * (scaled < 0)
        stored[f"{name}_blocks"] = (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8).contiguous()
        stored[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
        meant[name] = values.flatten(-2).mT.contiguous()
    return stored, meant


def _compressed(family: str, format_name: str, form: str, args: Mapping[str, Any], **more: Any) -> Layout:
    """``more``: fields of the config group, ``sizes``, ``fp8_group`` and ``static_scale``."""
    sizes, fp8_group, static_scale = (more.pop(name, None) for name in ("sizes", "fp8_group", "static_scale"))
    matrix = compressed if static_scale is None else compressed_static
    group = {
        "targets": ["Linear"],
        "weights": dict(args),
        "input_activations": None,
        "output_activations": None,
        **more,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return Layout(
        family=family,
        format_name=format_name,
        config=config,
        matrix=partial(matrix, form=form, args=args),
        sizes=sizes or {},
        fp8_group=fp8_group,
        static_scale=static_scale,
    )


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
_CHANNEL = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_PER_TOKEN_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_TENSOR = {**_FP8, "strategy": "tensor"}
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4}
_WIDE = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "num_experts": 4}
_BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
_GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "pack_dtype": "int32",
    # As published: what is left out, and names that repeat what holds for all.
    "dynamic": {"lm_head": {}, "model.embed_tokens": {"bits": 4}, "-:.*mlp.gate$": {}},
}

LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(
        family="qwen3_moe",
        format_name="int4",
        config={**_GPTQ, "group_size": 32, "sym": True},
        matrix=partial(gptq, group=32, symmetric=True),
        sizes={**_SIZES, "head_dim": 16},
    ),
    "gptq v2, zero points, whole channels": Layout(
        family="mixtral",
        format_name="int4",
        config={**_GPTQ, "checkpoint_format": "gptq_v2", "group_size": -1, "sym": False},
        matrix=partial(gptq, group=-1, symmetric=False, zero_offset=0),
        sizes=_SIZES,
    ),
    "gptq, groups of 64, zero points": Layout(
        family="qwen3_moe",
        format_name="int4",
        config={**_GPTQ, "group_size": 64, "sym": False},
        matrix=partial(gptq, group=64, symmetric=False),
        sizes=_WIDE,
    ),
    "awq": Layout(
        family="qwen2_moe",
        format_name="int4",
        config={"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        matrix=partial(awq, group=32),
        sizes={**_SIZES, "shared_expert_intermediate_size": 32},
    ),
    "awq, groups of 128, old names": Layout(
        family="qwen3_moe",
        format_name="int4",
        config={"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
        matrix=partial(awq, group=128),
        sizes=_WIDE,
    ),
    "awq, whole channels": Layout(
        family="mixtral",
        format_name="int4",
        config={"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"},
        matrix=partial(awq, group=-1),
        sizes=_SIZES,
    ),
    "compressed-tensors int4": _compressed(
        "qwen3_moe", "int4", "pack-quantized", INT4, sizes={**_SIZES, "head_dim": 16}
    ),
    "compressed-tensors int4, zero points": _compressed(
        "olmoe", "int4", "pack-quantized", {**INT4, "symmetric": False}, sizes={**_SIZES, "intermediate_size": 64}
    ),
    "compressed-tensors int4, groups of 128": _compressed(
        "qwen3_moe", "int4", "pack-quantized", {**INT4, "group_size": 128}, sizes=_WIDE
    ),
    "compressed-tensors int4, whole channels": _compressed("mixtral", "int4", "pack-quantized", _CHANNEL, sizes=_SIZES),
    "compressed-tensors int4, whole channels, zero points": _compressed(
        "olmoe", "int4", "pack-quantized", {**_CHANNEL, "symmetric": False}, sizes={**_SIZES, "intermediate_size": 64}
    ),
    "compressed-tensors int8": _compressed("deepseek_v3", "int8", "int-quantized", _INT8),
    "compressed-tensors int8, tensor": _compressed(
        "qwen3_moe", "int8", "int-quantized", {**_INT8, "strategy": "tensor"}, input_activations=_PER_TOKEN_INT8
    ),
    "compressed-tensors fp8": _compressed(
        "qwen3_moe", "fp8", "float-quantized", _FP8, input_activations=_PER_TOKEN, fp8_group=0
    ),
    "compressed-tensors fp8, tensor": _compressed(
        "mixtral", "fp8", "float-quantized", _TENSOR, input_activations=_PER_TOKEN, fp8_group=0
    ),
    "compressed-tensors fp8, tensor, static": _compressed(
        "qwen3_moe",
        "fp8",
        "float-quantized",
        _TENSOR,
        input_activations={**_TENSOR, "dynamic": False},
        fp8_group=0,
        static_scale=STATIC_SCALE,
    ),
    "compressed-tensors fp8, blocks": _compressed(
        "qwen3_moe",
        "fp8",
        "float-quantized",
        {**_FP8, "strategy": "block", "block_structure": [128, 128]},
        input_activations={**_PER_TOKEN, "strategy": "group", "group_size": 128},
        sizes={**_BLOCKS, "num_experts": 4, "num_key_value_heads": 4},
        fp8_group=128,
    ),
    "fp8, static": Layout(
        family="qwen3_moe",
        format_name="fp8",
        config={"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        matrix=fp8_static,
        sizes={},
        fp8_group=0,
        static_scale=STATIC_SCALE,
    ),
    "fp8 of AutoFP8": Layout(
        family="mixtral",
        format_name="fp8",
        config={"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        matrix=fp8_by_tensor,
        sizes={},
        fp8_group=0,
        static_scale=STATIC_SCALE,
    ),
    "fp8 of modelopt": Layout(
        family="qwen3_moe",
        format_name="fp8",
        config={"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        matrix=fp8_by_tensor,
        sizes={},
        fp8_group=0,
        static_scale=STATIC_SCALE,
    ),
    "nvfp4 of modelopt": Layout(
        family="qwen3_moe",
        format_name="nvfp4",
        config={"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"},
        matrix=partial(nvfp4, by_modelopt=True),
        sizes={**_SIZES, "head_dim": 16},
    ),
    "compressed-tensors nvfp4": Layout(
        family="olmoe",
        format_name="nvfp4",
        config={
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _NVFP4, "input_activations": _NVFP4}},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        },
        matrix=partial(nvfp4, by_modelopt=False),
        sizes={**_SIZES, "intermediate_size": 64},
    ),
    "fp8 blocks": Layout(
        family="qwen3_moe",
        format_name="fp8",
        config={"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        matrix=fp8_blocks,
        sizes={**_BLOCKS, "num_experts": 5, "num_key_value_heads": 4},
        fp8_group=128,
    ),
    "mxfp4": Layout(
        family="gpt_oss",
        format_name="mxfp4",
        config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        matrix=None,
        sizes={"hidden_size": 64, "intermediate_size": 96},
    ),
}

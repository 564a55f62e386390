"""Every Mixture-of-Experts model type of the installed transformers, tiny: by itself and inside its wrappers.

``moe_model_types`` looks for them, so that those of a new release come by themselves; ``tiny_config`` gives all the
sizes of ``_TEXT``, ``_VISION`` and ``_AUDIO`` to whatever config asks for them, and ``_MORE`` what a family needs
besides.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from support.families import COMMON, EXPERT_SIZE, FAMILIES, HIDDEN_SIZE, MLA, VOCAB_SIZE, randomise

IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN, VISION_START, VISION_END = 90, 91, 92, 93, 94
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
# fmt: off
_TEXT: Mapping[str, Any] = {
    **COMMON,
    **{key: value for key, value in MLA.items() if key != "num_key_value_heads"},
    "head_dim": 8,
    "global_head_dim": 8,
    "rotary_dim": 4,
    "sliding_window": 8,
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_topk", "moe_k", "top_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "decoder_sparse_step"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers"), 0),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 20),
    "shared_intermediate_size": 20,
    "dense_intermediate_size": EXPERT_SIZE,
    "enable_moe_block": True,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "chunk_size": 8, "block_size": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    "moe_latent_size": 16,
}
_VISION: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "text_hidden_size"), HIDDEN_SIZE),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "patch_size"), 4),
    **dict.fromkeys(("num_hidden_layers", "depth", "spatial_merge_size", "temporal_patch_size"), 2),
    **dict.fromkeys(("in_channels", "num_channels"), 3),
    "intermediate_size": EXPERT_SIZE,
    "image_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "head_dim": 8,
}
_AUDIO: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "output_dim", "out_hidden_size"), HIDDEN_SIZE),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_mel_bins", "downsample_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), EXPERT_SIZE),
}
_ALL_HEADS = {"num_key_value_heads": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "audio_token_id": AUDIO_TOKEN,
    "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
    "image_start_token_id": VISION_START, "image_end_token_id": VISION_END,
}
_MORE: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4_text"), _ALL_HEADS),
    "aria": {"projector_patch_to_query_dict": {1: 1, 16: 4}},
    "bailing_hybrid": {**_ALL_HEADS, "layer_types": ["linear_attention", "full_attention"]},
    "beam": _SPARSE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "d_model": 32, "n_heads": 4, "n_layers": 2,
    },
    "deepseek_ocr2_encoder": {"num_key_value_heads": 2},
    "deepseek_ocr2_text": {**_ALL_HEADS, **_SPARSE},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe"],
        "o_groups": 2, "o_lora_rank": 8, "swiglu_limit": 0.5,
    },
    "doge": {"is_moe": True},
    "dots3_note_audio_encoder": {
        "adapter_input_size": 32, "adapter_out_dim": 32, "num_key_value_heads": 4, "head_dim": 8,
        "downsample_hidden_size": 8, "feature_size": 16,
    },
    "dots3_note_text": _ALL_HEADS,
    "dots3_note_vision_encoder": {
        **_SPARSE,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "per_layer_config": {},
        "adapter_in_dim": 32, "adapter_out_dim": 32,
    },
    "ernie4_5_vl_moe_text": {
        **_SPARSE,
        "moe_intermediate_size": [24, 16], "moe_num_experts": 4,
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {
        **_ALL_HEADS,
        **_SPARSE,
        "index_kpool": 2, "qk_rope_head_dim": 0, "swiglu_limit": 0.5, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hy_v4": {**_SPARSE, "swiglu_limit": 0.5},
    "inkling2_text": {"mlp_gate_softcap": 0.75, "mlp_up_softcap": 0.5},
    "internvl": {"text_config": {"model_type": "qwen3_moe"}},
    "kimi_k25": {"projection_hidden_size": 32},
    "kimi_linear": {
        **_ALL_HEADS,
        **_SPARSE,
        "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral4": {
        **_ALL_HEADS,
        "qk_head_dim": 16, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5,
        },
    },
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 95},
    "nemotron3_5_transcribe_asr_audio": {"hidden_size": 32, "num_attention_heads": 4},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {
        "audio_config": None,
        "vision_config": {"model_type": "radio", "num_hidden_layers": 1, "video_temporal_patch_size": 2},
        "text_config": {"model_type": "nemotron_h"},
        "vision_hidden_size": 32, "projector_hidden_size": 24,
    },
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_vl_moe_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 97, "ple_embed_dim": 16, "ple_layer_ids": [1],
        "heads_per_ngram": 2, "ngram_size": 2,
    },
    "step3p5": {"mlp_layer_types": ["dense", "sparse"], "swiglu_limits": [0.5, 0.5]},
    "vitpose_backbone": {"image_size": [16, 16], "patch_size": [4, 4], "part_features": 8, "num_experts": 2},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on
# A class of experts, by its source.
_EXPERTS = re.compile(r"use_experts_implementation|class \w*(Experts?|MoE|Moe|MOE|SparseMLP|SparseMoeBlock)\w*\(nn\.")
# Wrappers that take any text model, with one that has experts inside: InternVL 3.5 of Qwen3-30B-A3B.
_WRAPPERS = ("internvl",)
# Part of another model: it has no keys and values of its own.
_NOT_ALONE = ("gemma4_assistant",)
# Their vision encoders are built for images of 768 pixels and more.
NO_IMAGES = ("deepseek_ocr2", "unlimited_ocr", "llama4")


@functools.cache
def moe_model_types() -> tuple[str, ...]:
    """Those with a model class of their own, in alphabetical order."""
    folder = Path(transformers.__file__).parent / "models"
    found = set(_WRAPPERS)
    for name in CONFIG_MAPPING:
        sources = (folder / model_type_to_module_name(name)).glob("modeling_*.py")
        if any(_EXPERTS.search(path.read_text(encoding="utf-8")) for path in sources):
            found.add(name)
    for name in CONFIG_MAPPING:
        parts = {getattr(spec, "model_type", None) for spec in _parts(CONFIG_MAPPING[name]).values()}
        if parts & found:
            found.add(name)
    alone = found.difference(_NOT_ALONE)
    return tuple(sorted(name for name in alone if _model_class(CONFIG_MAPPING[name]) is not None))


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A config of a few thousand parameters. ``fields``: over those of this module."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_fields(config_class), **fields})


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A float32 model in eval mode, of the class with the most kinds of input that transformers has for the config."""
    config = tiny_config(model_type, **fields)
    model_class = _model_class(type(config))
    assert model_class is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).eval()
    randomise(model, seed)
    return model


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    name = config_class.model_type
    if re.search("vision|visual|sam|radio", name):
        fields = dict(_VISION)
    elif "audio" in name:
        fields = {} if _parts(config_class) else dict(_AUDIO)
    else:
        fields = {**_TEXT, **_TOKENS, **(FAMILIES[name].config if name in FAMILIES else {})}
    fields |= _MORE.get(name, {})
    for part, spec in _parts(config_class).items():
        given = fields.get(part, {})
        if given is None:
            continue
        model_type = given.get("model_type") or getattr(spec, "model_type", "")
        if model_type not in CONFIG_MAPPING and not issubclass(_class_of(spec), PreTrainedConfig):
            continue
        inner = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else _class_of(spec)
        sizes = {} if _parts(inner) else _VISION if "vision" in part else _AUDIO if "audio" in part else {}
        fields[part] = {**_fields(inner), **sizes, **_MORE.get(model_type, {}), **given, "model_type": model_type}
    return fields


def _parts(config_class: type[PreTrainedConfig]) -> Mapping[str, Any]:
    """Configs inside a config, by field: a class, or transformers' record of a class and a model type."""
    parts = {**(getattr(config_class, "sub_configs", None) or {})}
    return {**parts, **(getattr(config_class, "sub_configs_defaults", None) or {})}


def _class_of(spec: Any) -> type:
    found = spec if inspect.isclass(spec) else getattr(spec, "config_class", object)
    return found if inspect.isclass(found) else object


def _model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    kinds = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")
    for mapping in (*(f"MODEL_FOR_{kind}_MAPPING" for kind in kinds), "MODEL_MAPPING", "MODEL_FOR_BACKBONE_MAPPING"):
        try:
            found: Any = getattr(modeling_auto, mapping)[config_class]
        except (AttributeError, KeyError):
            continue
        return found[0] if isinstance(found, tuple) else found
    return None


def text_inputs(model: PreTrainedModel, rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """``rows`` sequences, of which the second is shorter and padded on the left; a canvas where the model draws on one
    (which would be random)."""
    ids = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :4] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    canvas = getattr(model.config, "canvas_length", None)
    return inputs if canvas is None else inputs | {"decoder_input_ids": torch.arange(rows * canvas).view(rows, -1) % 90}


def image_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """``text_inputs`` with one image in the first row and one in the last; None for a model that takes none.

    Which shape pixels have and how many tokens an image takes is found out by trying: the model's own errors tell.
    """
    accepted = inspect.signature(type(model).forward).parameters
    if "pixel_values" not in accepted:
        return None
    errors = []
    for pixels in _pixels(model):
        num_tokens = 4
        for _ in range(3):
            inputs = _with_images(model, num_tokens) | pixels
            inputs = {key: value for key, value in inputs.items() if key in accepted}
            try:
                with torch.no_grad():
                    model(**inputs)
                return inputs
            except (KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                counts = _COUNTS.search(str(error))
                if counts is None:
                    break
                num_tokens = max(int(counts["features"]) * num_tokens * 2 // max(int(counts["tokens"]), 1) // 2, 1)
    raise AssertionError(f"{type(model).__name__} took no image: {errors}")


# transformers: "Image features and image tokens do not match, tokens: 8, features: 32".
_COUNTS = re.compile(r"tokens:? (?P<tokens>\d+), features:? (?P<features>\d+)")


def _with_images(model: PreTrainedModel, num_tokens: int) -> dict[str, torch.Tensor]:
    inputs = text_inputs(model, length=num_tokens + 9)
    ids = inputs["input_ids"]
    for row, start in ((0, 2), (2, 4)):
        ids[row, start] = VISION_START
        ids[row, start + 1 : start + 1 + num_tokens] = IMAGE_TOKEN
        ids[row, start + 1 + num_tokens] = VISION_END
    return inputs | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}


def _pixels(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Two images of 16 x 16, in every form that some model takes."""
    vision = getattr(model.config, "vision_config", None)
    patch = getattr(vision, "patch_size", 4)
    side = patch if isinstance(patch, int) else patch[0]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2))
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "image_grid_hw": torch.tensor([[4, 4]] * 2)}
    size = 4 * side
    columns = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    placed = {"image_position_ids": columns.expand(2, 16, 2)}
    sizes = {"image_sizes": torch.tensor([[size, size]] * 2)}
    return [
        {"pixel_values": draw(32, 3 * 2 * side * side), **grid},
        {"pixel_values": draw(32, 3 * side * side), **grid},
        {"pixel_values": draw(32, 3, side, side), **grid},
        {"pixel_values": draw(2, 16, 3 * side * side), **placed},
        {"pixel_values": draw(32, 2 * side, 2 * side, 3), **grid},
        {"pixel_values": draw(8, 2, side, side, 3)},
        {"pixel_values": draw(2, 3, size, size), **sizes},
        {"pixel_values": draw(2, 3, 16, 16), **sizes},
    ]

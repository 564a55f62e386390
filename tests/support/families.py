"""Tiny, randomly initialised models of many transformers MoE families, for tests.

Sizes are odd on purpose (an expert width that is no power of two, expert counts that differ from the head counts),
and weights are large enough that a missing expert, a swapped gate or a lost delta shows in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

VOCAB_SIZE = 96
HIDDEN_SIZE = 32
EXPERT_SIZE = 24


@dataclass(frozen=True, kw_only=True)
class LegacyNames:
    """How a transformers-4 checkpoint names one expert: ``<stack>.<layer>.<block>.experts.<e>.<gate|up|down>``."""

    stack: str = "model.layers"
    block: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: what its config adds to the common sizes, and how transformers 4 named its experts.

    ``legacy`` is None where the experts were fused in transformers 4 already.
    """

    model_type: str
    config: Mapping[str, Any]
    legacy: LegacyNames | None


# Every name that some family uses for a size; a config keeps what it does not know as a plain attribute.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": EXPERT_SIZE,
    "moe_intermediate_size": EXPERT_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MLA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ONE_DENSE_LAYER: Mapping[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_ONE_GROUP: Mapping[str, Any] = {"n_group": 1, "topk_group": 1}
_TWO_GROUPS: Mapping[str, Any] = {"n_group": 2, "topk_group": 1}
_DELTA_NET: Mapping[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SLIDING: Mapping[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_QWEN = LegacyNames()
_MIXTRAL = LegacyNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")

_ALL = (
    Family(model_type="mixtral", config={"num_local_experts": 5}, legacy=_MIXTRAL),
    Family(
        model_type="qwen2_moe",
        config={"num_experts": 6, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1},
        legacy=_QWEN,
    ),
    Family(model_type="qwen3_moe", config={"num_experts": 7, "head_dim": 8, "norm_topk_prob": True}, legacy=_QWEN),
    Family(
        model_type="qwen3_next",
        config={**_DELTA_NET, "num_experts": 4, "shared_expert_intermediate_size": 20},
        legacy=_QWEN,
    ),
    Family(
        model_type="qwen3_5_moe_text",
        config={**_DELTA_NET, "num_experts": 4, "shared_expert_intermediate_size": 20},
        legacy=None,
    ),
    Family(model_type="olmoe", config={"num_experts": 8, "num_key_value_heads": 4}, legacy=_QWEN),
    Family(model_type="flex_olmo", config={"num_experts": 5}, legacy=_QWEN),
    Family(
        model_type="gpt_oss",
        config={
            "num_local_experts": 4,
            "head_dim": 8,
            "hidden_size": 40,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        legacy=None,
    ),
    Family(
        model_type="deepseek_v2",
        config={
            **MLA,
            **_ONE_DENSE_LAYER,
            **_TWO_GROUPS,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
        },
        legacy=_QWEN,
    ),
    Family(
        model_type="deepseek_v3",
        config={**MLA, **_ONE_DENSE_LAYER, **_TWO_GROUPS, "n_routed_experts": 8, "n_shared_experts": 1},
        legacy=_QWEN,
    ),
    Family(
        model_type="glm4_moe",
        config={**_ONE_DENSE_LAYER, **_ONE_GROUP, "n_routed_experts": 6, "head_dim": 8, "use_qk_norm": True},
        legacy=_QWEN,
    ),
    Family(
        model_type="glm4_moe_lite",
        config={
            **MLA,
            **_ONE_GROUP,
            "n_routed_experts": 6,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        legacy=_QWEN,
    ),
    Family(model_type="granitemoe", config={"num_local_experts": 5}, legacy=None),
    Family(
        model_type="granitemoehybrid",
        config={
            "num_local_experts": 5,
            "shared_intermediate_size": 20,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
        legacy=None,
    ),
    Family(
        model_type="minimax",
        config={
            "num_local_experts": 6,
            "head_dim": 8,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        legacy=_MIXTRAL,
    ),
    Family(
        model_type="minimax_m2",
        config={"num_local_experts": 6, "head_dim": 8, "rotary_dim": 4},
        legacy=_MIXTRAL,
    ),
    Family(
        model_type="nemotron_h",
        config={
            **_ONE_GROUP,
            "n_routed_experts": 6,
            "moe_shared_expert_intermediate_size": 20,
            "moe_latent_size": 16,
            "head_dim": 8,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        legacy=LegacyNames(stack="backbone.layers", block="mixer", gate=None),
    ),
    Family(model_type="phimoe", config={"num_local_experts": 5}, legacy=_MIXTRAL),
    Family(
        model_type="ernie4_5_moe",
        config={
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
        },
        legacy=_QWEN,
    ),
    Family(
        model_type="hunyuan_v1_moe",
        config={"num_experts": 5, "moe_topk": 2, "head_dim": 8},
        legacy=_QWEN,
    ),
    Family(
        model_type="lfm2_moe",
        config={
            "num_experts": 6,
            "num_dense_layers": 1,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        legacy=LegacyNames(block="feed_forward", gate="w1", up="w3", down="w2"),
    ),
    Family(
        model_type="dots1",
        config={**_ONE_DENSE_LAYER, **_ONE_GROUP, "n_routed_experts": 6, "n_shared_experts": 1, "head_dim": 8},
        legacy=_QWEN,
    ),
    Family(
        model_type="jamba",
        config={
            "num_experts": 4,
            "num_hidden_layers": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        legacy=LegacyNames(block="feed_forward"),
    ),
    Family(
        model_type="afmoe",
        config={**_SLIDING, "num_experts": 6, "num_dense_layers": 1, "num_hidden_layers": 3, "head_dim": 8},
        legacy=_QWEN,
    ),
    Family(
        model_type="exaone_moe",
        config={
            **_ONE_DENSE_LAYER,
            **_ONE_GROUP,
            **_SLIDING,
            "num_experts": 6,
            "head_dim": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        legacy=_QWEN,
    ),
    Family(model_type="solar_open", config={**_ONE_GROUP, "n_routed_experts": 6, "head_dim": 8}, legacy=_QWEN),
    Family(model_type="hy_v3", config={"num_experts": 6, "head_dim": 8, "num_hidden_layers": 3}, legacy=_QWEN),
    Family(
        model_type="minimax_m3_vl_text",
        config={
            "num_local_experts": 6,
            "head_dim": 8,
            "dense_intermediate_size": 24,
            "shared_intermediate_size": 20,
        },
        legacy=None,
    ),
    Family(
        model_type="gemma4_text",
        config={
            "num_experts": 6,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "head_dim": 8,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
        },
        legacy=None,
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

# Decay rates and step sizes of state-space layers are only stable near their own initialisation.
_KEEP = ("A_log", "dt_bias", "dt_proj.bias", ".D", "slope_rate")
# Balancing biases are zero in a fresh model, where they would hide a router that forgets to add them.
_BALANCING = ("e_score_correction_bias", "expert_bias")


def build(name: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A float32 model of family ``name`` in eval mode; the same seed, the same weights. ``sizes``: config fields."""
    config = CONFIG_MAPPING[name](**{**COMMON, **FAMILIES[name].config, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what keeps its own initialisation
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill parameters and balancing biases with random values of the size that training would give them."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, tensor in (parameters | dict(model.named_buffers())).items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(_BALANCING):
            tensor.copy_(0.2 * noise)
        elif name in parameters and not name.endswith(_KEEP):
            tensor.copy_(_initial(name, tensor, noise))


def _initial(name: str, tensor: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if "embed" in name and tensor.dim() == 2:
        return noise
    if tensor.dim() >= 2:
        gain = 2.0 if ".experts." in name or "router" in name or "gate.w" in name else 1.0
        return gain * noise / tensor.shape[-1] ** 0.5
    if "bias" in name or "sinks" in name:
        return 0.3 * noise
    return tensor + 0.2 * noise

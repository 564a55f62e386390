"""The essential check: one mixed batch on a whole model, every row against a truth that moegraft had no part in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

import moegraft
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.testing import assert_close_delta
from support.adapters import TensorFactory, save_with_peft, write_adapter
from support.families import FAMILIES, VOCAB_SIZE, build

ROWS = ("fused", None, "per_expert", "fused", "dora", "per_expert")
# Relative, in the Frobenius norm. float32 sums through two layers in another order give about 1e-6.
TOL = 1e-5


@dataclass(frozen=True, kw_only=True)
class MixedBatch:
    """``truths``: logits [6, S, V] with one adapter on every row; ``base``: without any."""

    model: PreTrainedModel
    input_ids: torch.Tensor
    adapters: dict[str, Path]
    truths: dict[str, torch.Tensor]
    base: torch.Tensor


def make_mixed_batch(folder: Path) -> MixedBatch:
    """A tiny Qwen3-MoE; an adapter on fused experts, attention and router (PEFT's logits), one on every expert by
    itself, gate and up with an A each (merged by hand), and one with DoRA on attention (PEFT's logits)."""
    model = build("qwen3_moe")
    ids = random_ids(len(ROWS), seed=3)
    fused = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.gate.weight", *EXPERTS],
    )
    dora = LoraConfig(r=2, lora_alpha=3, use_rslora=True, use_dora=True, target_modules=["k_proj", "o_proj"])
    truths = {
        "fused": save_with_peft(model, fused, folder / "fused", ids),
        "dora": save_with_peft(model, dora, folder / "dora", ids),
        "per_expert": _save_per_expert(model, folder / "per_expert", ids),
    }
    with torch.no_grad():
        base = model(input_ids=ids).logits
    return MixedBatch(
        model=model, input_ids=ids, adapters={name: folder / name for name in truths}, truths=truths, base=base
    )


@torch.no_grad()
def _save_per_expert(model: PreTrainedModel, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Rank 2 and alpha 1 on every expert's gate, up and down, under the names of transformers 4."""
    factory, merged, scale = TensorFactory(seed=5), copy.deepcopy(model), 0.5
    legacy = FAMILIES["qwen3_moe"].legacy
    assert legacy is not None
    for name, target in discover_targets(model).experts.items():
        experts, width = merged.get_submodule(name), target.intermediate_size
        for e in range(target.num_experts):
            factory.expert(name, e, target, legacy)
            delta = {part: factory.deltas[f"{name}.{e}.{part}"] for part in ("gate_proj", "up_proj", "down_proj")}
            experts.gate_up_proj[e, :width] += scale * delta["gate_proj"]
            experts.gate_up_proj[e, width:] += scale * delta["up_proj"]
            experts.down_proj[e] += scale * delta["down_proj"]
    write_adapter(folder, factory.tensors, r=2, lora_alpha=1, target_modules=["gate_proj", "up_proj", "down_proj"])
    return merged(input_ids=ids).logits


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What an adapter may touch, one kind each, then nearly all at once: arguments of PEFT's LoraConfig.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "router": {"r": 2, "target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "embeddings": {"r": 3, "target_modules": ["embed_tokens"]},
    "lm_head": {"r": 3, "target_modules": ["lm_head"]},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj", "lm_head"]},
    "save norms": {"r": 1, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    "save router": {"r": 1, "target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    "save embeddings": {"r": 1, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "save lm_head": {"r": 1, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "experts": {"r": 2, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS},
    "everything": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
        "modules_to_save": ["lm_head", "post_attention_layernorm"],
    },
}


def save_kinds(model: PreTrainedModel, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """An adapter of every kind, saved by PEFT under its name, and PEFT's logits with it on every row."""
    return {name: save_with_peft(model, LoraConfig(**config), folder / name, ids) for name, config in KINDS.items()}


def random_ids(rows: int = 2, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def check_mixed_batch(batch: MixedBatch) -> None:
    """Raises AssertionError unless every row of the mixed batch moves as its own adapter moves it."""
    with moegraft.attach(batch.model, adapter_memory="4MiB") as graft:
        for name, path in batch.adapters.items():
            graft.load_adapter(path, name=name)
        mixed = graft(input_ids=batch.input_ids, adapters=ROWS).logits
        plain = graft(input_ids=batch.input_ids, adapters=[None] * len(ROWS)).logits
    for i, name in enumerate(ROWS):
        if name is None:
            assert torch.equal(mixed[i], plain[i]), f"row {i} has no adapter and changed"
        else:
            assert_close_delta(mixed[i], plain[i], batch.truths[name][i], batch.base[i], TOL)
    assert (plain - batch.base).abs().max() <= TOL * batch.base.abs().max(), "the base model changed"

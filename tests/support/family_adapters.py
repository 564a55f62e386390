"""Four adapters on disk for any family, each with a truth that moegraft's loader had no part in."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, LinearLoRA, ModelTargets
from support.families import FAMILIES, LegacyNames, build
from support.oracle import merged_logits

# PEFT refuses Nemotron-H's, and its LoRA on Jamba's has no effect: there, code reads the weight past the module.
NOT_FOR_PEFT = {"nemotron_h": ("out_proj",), "jamba": ("dt_proj",)}
# PEFT takes these for experts in families whose experts had such names, whatever module they are in.
PEFT_MISTAKES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class FamilyAdapter:
    """A PEFT folder and ``truth``: model inputs -> logits [B, S, V] with this adapter on every row."""

    path: Path
    truth: Callable[..., torch.Tensor]


def save_everything(family: str, path: Path) -> FamilyAdapter:
    """Every linear map but the head, the embedding, the routers and all experts, saved by PEFT: rank 4, alpha 6."""
    return save_all_of(build(family), path, left_out=_left_out(family))


def save_all_of(model: PreTrainedModel, path: Path, *, left_out: Collection[str] = (), seed: int = 11) -> FamilyAdapter:
    """As ``save_everything``, of any model. ``left_out``: linear maps by the last part of their name."""
    targets = discover_targets(model)
    wanted = {
        name: linear
        for name, linear in targets.linears.items()
        if name.rpartition(".")[2] not in (*left_out, "lm_head")
    }
    routers = [f"{name}.{linear.param}" for name, linear in wanted.items() if linear.router]
    modules = [*(name for name, linear in wanted.items() if not linear.router), *targets.embeddings]
    parameters = [*routers, *_experts_parameters(targets)]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters)
    return _save_with_peft(get_peft_model(model, config), path, seed=seed)


def save_with_config(model: PreTrainedModel, config: LoraConfig, path: Path) -> FamilyAdapter:
    """What a config of PEFT says, of any model, saved by PEFT."""
    return _save_with_peft(get_peft_model(model, config), path, seed=16)


def save_vocabulary(family: str, path: Path, *, rank: int = 4, use_dora: bool = False) -> FamilyAdapter:
    """The head and the embedding, saved by PEFT; with DoRA the head alone."""
    model = build(family)
    modules = ["lm_head"] if use_dora else ["lm_head", *discover_targets(model).embeddings]
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=modules, use_dora=use_dora)
    return _save_with_peft(get_peft_model(model, config), path, seed=15 + rank)


def save_experts(family: str, path: Path) -> FamilyAdapter:
    """All experts and nothing else, saved by PEFT: rank 3 with rank-stabilised scale."""
    model = build(family)
    parameters = list(_experts_parameters(discover_targets(model)))
    config = LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=[], target_parameters=parameters)
    return _save_with_peft(get_peft_model(model, config), path, seed=12)


def save_part(family: str, path: Path) -> FamilyAdapter:
    """Part of the last experts layer: two experts under transformers-4 names, or one parameter where there are none."""
    model = build(family)
    targets = discover_targets(model)
    last = list(targets.experts.values())[-1]
    legacy = FAMILIES[family].legacy
    if legacy is not None:
        return _save_per_expert(family, targets, last, legacy, path)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=[f"{last.name}.{last.w2_param}"])
    return _save_with_peft(get_peft_model(model, config), path, seed=13)


def save_replacements(family: str, path: Path) -> FamilyAdapter:
    """No experts: DoRA on the linear maps, and every norm, router and head replaced.

    PEFT saves a module with all that is in it: Ernie's router, which holds a module of its own, is left out.
    """
    model = build(family)
    targets = discover_targets(model)
    replaced = [
        name
        for name, params in targets.saveable.items()
        if name not in targets.embeddings and set(params) != {"bias"} and not any(model.get_submodule(name).children())
    ]
    linears = [name for name in _linears_for_peft(family, targets) if name not in replaced]
    config = LoraConfig(r=2, target_modules=linears, use_dora=True, modules_to_save=replaced)
    return _save_with_peft(get_peft_model(model, config), path, seed=15)


def _linears_for_peft(family: str, targets: ModelTargets) -> Iterator[str]:
    """Linear maps that PEFT serves as such; ``save_part`` has those that it mistakes for experts."""
    left_out = _left_out(family)
    for name, linear in targets.linears.items():
        if not linear.router and name.rpartition(".")[2] not in left_out:
            yield name


def _left_out(family: str) -> tuple[str, ...]:
    return (*NOT_FOR_PEFT.get(family, ()), *(PEFT_MISTAKES if FAMILIES[family].legacy is not None else ()))


def _experts_parameters(targets: ModelTargets) -> Iterator[str]:
    for name, experts in targets.experts.items():
        yield f"{name}.{experts.w13_param}"
        yield f"{name}.{experts.w2_param}"


def _save_with_peft(model: PeftModel, path: Path, *, seed: int) -> FamilyAdapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                tensor.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            elif "modules_to_save" in name:
                tensor.add_(0.2 * noise)
    model.eval().save_pretrained(path)

    def truth(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return output_of(model(**inputs))

    return FamilyAdapter(path=path, truth=truth)


def output_of(outputs: Any) -> torch.Tensor:
    """Logits [B, S, V], or the last hidden states of a model without a head."""
    found: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    return found


def _save_per_expert(
    family: str, targets: ModelTargets, target: ExpertsTarget, legacy: LegacyNames, path: Path
) -> FamilyAdapter:
    """Rank 2, alpha 3: the first expert has gate (up, without a gate) and down, the last one down only; and every
    linear map that is named like a projection of an expert."""
    generator = torch.Generator().manual_seed(14)
    hidden, width = target.hidden_size, target.intermediate_size
    a13, b13 = _random_pair(hidden, width, generator)
    a2_first, b2_first = _random_pair(width, hidden, generator)
    a2_last, b2_last = _random_pair(width, hidden, generator)

    layer = next(part for part in target.name.split(".") if part.isdigit())
    experts = f"{legacy.stack}.{layer}.{legacy.block}.experts"
    w13_name = legacy.gate or legacy.up
    pairs = {
        f"{experts}.0.{w13_name}": (a13, b13),
        f"{experts}.0.{legacy.down}": (a2_first, b2_first),
        f"{experts}.{target.num_experts - 1}.{legacy.down}": (a2_last, b2_last),
    }
    linears = {
        name: _random_pair(linear.in_features, linear.out_features, generator)
        for name, linear in targets.linears.items()
        if name.endswith(PEFT_MISTAKES)
    }
    pairs |= {name.replace("model.layers", legacy.stack, 1): pair for name, pair in linears.items()}
    _write(path, pairs, target_modules=sorted({w13_name, legacy.down, *PEFT_MISTAKES}))

    b13_hrF = torch.stack([1.5 * b13.T, torch.zeros_like(b13.T)])
    lora = ExpertsLoRA(
        expert_ids=(0, target.num_experts - 1),
        a13=torch.stack([a13, torch.zeros_like(a13)]),
        b_gate=b13_hrF if target.has_gate else None,
        b_up=None if target.has_gate else b13_hrF,
        a2=torch.stack([a2_first, a2_last]),
        b2=1.5 * torch.stack([b2_first.T, b2_last.T]),
    )
    weights = AdapterWeights(
        experts={target.name: lora}, linears={name: LinearLoRA(a=a, b=1.5 * b.T) for name, (a, b) in linears.items()}
    )

    def truth(**inputs: torch.Tensor) -> torch.Tensor:
        return merged_logits(build(family), targets, weights, **inputs)

    return FamilyAdapter(path=path, truth=truth)


def _random_pair(in_features: int, out_features: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [2, in] and lora_B [out, 2]."""
    a, b = torch.randn(2, in_features, generator=generator), torch.randn(out_features, 2, generator=generator)
    return a / in_features**0.5, b / 2**0.5


def _write(path: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], *, target_modules: list[str]) -> None:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": target_modules}
    (path / "adapter_config.json").write_text(json.dumps(config))

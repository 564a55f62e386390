"""Adapters for tests: written tensor by tensor in any naming, trained-like ones made by PEFT itself, and fixtures."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget
from support.families import VOCAB_SIZE, LegacyNames

FIXTURES = Path(__file__).parent.parent / "fixtures" / "peft"
FIXTURE_NAMES = tuple(sorted(folder.name for folder in FIXTURES.iterdir()))
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """An adapter with the logits that the PEFT and transformers of its time gave, with it and without."""

    model: PreTrainedModel
    adapter: Path
    input_ids: torch.Tensor
    logits_base: torch.Tensor
    logits_adapter: torch.Tensor


def load_fixture(name: str) -> Fixture:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base", dtype=torch.float32).eval()
    return Fixture(model=model, adapter=FIXTURES / name / "adapter", **expected)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it: ``tensors`` by full name, ``config`` over the fields of a plain LoRA adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "peft_version": "0.19.1", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@dataclass
class TensorFactory:
    """Random factors under PEFT's names. ``deltas``: what each pair must add, by module name, unscaled [out, in]."""

    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def linear(self, module: str, size_in: int, size_out: int, *, r: int = 2) -> None:
        a, b = self.draw(r, size_in), self.draw(size_out, r)
        self.tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        self.tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        self.deltas[module] = b @ a

    def expert(self, experts: str, index: int, target: ExpertsTarget, names: LegacyNames, *, r: int = 2) -> None:
        """All projections of one expert, as transformers 4 named them."""
        hidden, inter = target.hidden_size, target.intermediate_size
        for name, size_in, size_out in (
            (names.gate, hidden, inter),
            (names.up, hidden, inter),
            (names.down, inter, hidden),
        ):
            if name is not None:
                self.linear(f"{experts}.{index}.{name}", size_in, size_out, r=r)

    def fused(self, module: str, num_experts: int, size_a: int, size_b: int, *, r: int = 2) -> torch.Tensor:
        """PEFT's packing of all experts; returns P [E, size_b, size_a] with P_e = B_e A_e."""
        a, b = self.draw(num_experts * r, size_a), self.draw(size_b, num_experts * r)
        self.tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        self.tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        return torch.stack([b[:, e::num_experts] @ a[e * r : (e + 1) * r] for e in range(num_experts)])


def expert_delta(lora: ExpertsLoRA, expert: int) -> dict[str, torch.Tensor]:
    """What an adapter adds to gate [F, D], up [F, D] and down [D, F] of one expert; absent where it adds nothing."""
    position = lora.expert_ids.index(expert)

    def rows(factor: torch.Tensor) -> torch.Tensor:
        return factor[0 if factor.shape[0] == 1 else position]

    deltas = {}
    if lora.b_gate is not None:
        deltas["gate"] = rows(lora.b_gate).T @ rows(lora.a13)[: lora.b_gate.shape[1]]
    if lora.b_up is not None:
        deltas["up"] = rows(lora.b_up).T @ rows(lora.a13)[lora.up_lane : lora.up_lane + lora.b_up.shape[1]]
    if lora.b2 is not None:
        deltas["down"] = rows(lora.b2).T @ rows(lora.a2)
    return deltas


def linear_delta(weights: AdapterWeights, module: str) -> torch.Tensor:
    """What an adapter adds to the weight [out, in] of a linear map."""
    return weights.linears[module].b.T @ weights.linears[module].a


def random_ids(seed: int = 0, *, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def save_with_peft(
    model: PreTrainedModel, config: peft.LoraConfig, folder: Path, input_ids: torch.Tensor, *, seed: int = 11
) -> torch.Tensor:
    """Lets the installed PEFT make an adapter for a copy of ``model``, fills it with noise as training would, saves it
    to ``folder``, and returns the logits that PEFT computes with it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A itself
        trained = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 * parameter.abs().mean() if "magnitude" in name or "modules_to_save" in name else 0.2
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(folder)
    trained.eval()
    return trained(input_ids=input_ids).logits.float()

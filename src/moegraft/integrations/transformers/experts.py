"""Experts modules: what transformers' experts interface calls once a model is grafted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moegraft.build import build_fused_moe, build_fused_moe_with_lora
from moegraft.core.config import MoEConfig
from moegraft.formats.dense import DenseExperts
from moegraft.integrations.transformers.call import CallState
from moegraft.integrations.transformers.targets import HookedExperts, experts_activation
from moegraft.lora.bank import AdapterBank
from moegraft.lora.targets import ExpertsTarget
from moegraft.moe.layer import FusedMoE, FusedMoEWithLoRA
from moegraft.oracle import Decision

IMPLEMENTATION = "moegraft"
_SITE = "_moegraft_site"


@dataclass(frozen=True, kw_only=True)
class ExpertsSite:
    """What stands behind one experts module of a grafted model."""

    name: str
    base: FusedMoE
    with_lora: FusedMoEWithLoRA
    decision: Decision
    state: CallState
    previous_implementation: str | None

    def forward(self, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> torch.Tensor:
        call = self.state.current()
        ranks = (0, 0) if call is None else call.experts_ranks(self.name, self.base.config.activation.num_halves)
        if call is None or not any(ranks):
            return self.base.apply_experts(x_TD, topk_weights_TK, topk_ids_TK)
        mapping = call.mapping(x_TD.shape[0])
        return self.with_lora.apply_experts(x_TD, topk_weights_TK, topk_ids_TK, mapping, max(ranks), ranks[1])


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Registered with transformers as ``moegraft``: hidden [T, D], ids and weights [T, K] -> [T, D].

    Where gradients are wanted and no batch of adapters runs, or the module was never grafted, transformers' own
    implementation runs. A batch of adapters is inference: it must never lose them to a caller who forgot no_grad.
    """
    site: ExpertsSite | None = module.__dict__.get(_SITE)
    if site is None or (site.state.current() is None and _wants_grad(module, hidden_states)):
        return _original_forward(module, site)(module, hidden_states, top_k_index, top_k_weights)
    with torch.no_grad():
        return site.forward(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _wants_grad(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(param.requires_grad for param in module.parameters(recurse=False))
    )


def _original_forward(module: nn.Module, site: ExpertsSite | None) -> Any:
    name = "eager" if site is None else site.previous_implementation
    # The hook's decorator wraps the class's own loop with functools.wraps, which keeps it here.
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS.get(name, eager) if name else eager


def experts_weights(module: nn.Module, target: ExpertsTarget) -> DenseExperts:
    """The module's own Parameters, not copies: what is loaded into them later is served."""
    has_bias = bool(module.has_bias)
    return DenseExperts(
        w13=getattr(module, target.w13_param),
        w2=getattr(module, target.w2_param),
        b13=getattr(module, f"{target.w13_param}_bias") if has_bias else None,
        b2=getattr(module, f"{target.w2_param}_bias") if has_bias else None,
        num_halves=2 if target.has_gate else 1,
        is_transposed=target.is_transposed,
        is_interleaved=target.is_interleaved,
    )


def build_site(
    module: nn.Module, target: ExpertsTarget, bank: AdapterBank, state: CallState, *, top_k: int, backend: str | None
) -> ExpertsSite:
    """The layers of one experts module; changes nothing. Raises NoBackendError."""
    weights = experts_weights(module, target)
    config = MoEConfig(
        num_experts=target.num_experts,
        top_k=top_k,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        activation=experts_activation(cast("HookedExperts", module)),
        has_bias=weights.b13 is not None,
        dtype=weights.w13.dtype,
    )
    base, decision = build_fused_moe(config, weights, backend=backend)
    return ExpertsSite(
        name=target.name,
        base=base,
        with_lora=build_fused_moe_with_lora(base, bank.experts_tables(target.name)),
        decision=decision,
        state=state,
        previous_implementation=cast("PreTrainedConfig", module.config)._experts_implementation,
    )


def install_sites(model: PreTrainedModel, sites: Mapping[str, ExpertsSite]) -> dict[str, str | None]:
    """Puts the sites behind their modules; gives back what ``remove_sites`` needs."""
    previous = model.get_experts_implementation()
    for name, site in sites.items():
        # Not a submodule: its parameters are the module's own and must not be listed twice.
        object.__setattr__(model.get_submodule(name), _SITE, site)
    model.set_experts_implementation(IMPLEMENTATION)
    return previous


def experts_configs(model: PreTrainedModel, sites: Mapping[str, ExpertsSite]) -> list[PreTrainedConfig]:
    """The distinct configs that say which implementation the experts modules run; most models have one."""
    configs = {id(config): config for config in (model.get_submodule(name).config for name in sites)}
    return list(configs.values())


def remove_sites(model: PreTrainedModel, sites: Mapping[str, ExpertsSite], previous: dict[str, str | None]) -> None:
    """The inverse of ``install_sites``."""
    model.set_experts_implementation(previous)
    for name in sites:
        object.__delattr__(model.get_submodule(name), _SITE)

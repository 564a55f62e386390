"""Experts modules: what transformers' experts interface calls once a model is grafted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moegraft.build import build_fused_moe, build_fused_moe_with_lora, build_parallel_moe
from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.host.storage import (
    HostExperts,
    PackedExperts,
    is_adopted,
    packed_experts,
)
from moegraft.integrations.transformers.parallel.layout import RankLayout
from moegraft.integrations.transformers.sites.call import CallState, register
from moegraft.lora.bank import AdapterBank
from moegraft.lora.call import AdapterCall
from moegraft.moe.layer import FusedMoE, FusedMoEWithLoRA
from moegraft.oracle import Decision, select_experts

IMPLEMENTATION = "moegraft"
_SITE = "_moegraft_site"
_SPENT = "_moegraft_spent"


@dataclass(frozen=True, kw_only=True)
class ExpertsSite:
    """What stands behind one experts module of a grafted model."""

    name: str
    base: FusedMoE
    with_lora: FusedMoEWithLoRA | None  # None where no adapter may touch experts
    decision: Decision
    state: CallState
    previous_implementation: str | None
    is_cut: bool = False  # to this rank's slice: the module has no parameters any more
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", register(self))

    def run(self, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """As ``forward``, under the call that runs now."""
        with torch.no_grad():
            return self.forward(self.state.current(), x_TD, topk_weights_TK, topk_ids_TK).contiguous()

    def forward(
        self,
        call: AdapterCall | None,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
    ) -> torch.Tensor:
        """out [T, D]; T are all tokens of the forward pass. Raises BatchError for other rows."""
        if call is None or self.with_lora is None:
            return self.base.apply_experts(x_TD, topk_weights_TK, topk_ids_TK)
        bounds = call.experts_bounds(self.name, self.base.method.experts.num_halves)
        if bounds.are_zero and not call.rows_travel:
            return self.base.apply_experts(x_TD, topk_weights_TK, topk_ids_TK)
        rows = call.rows(self.name, x_TD.shape[:-1])
        return self.with_lora.apply_experts(x_TD, topk_weights_TK, topk_ids_TK, rows, bounds, group=call.group)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Registered with transformers as ``moegraft``: hidden [T, D], ids and weights [T, K] -> [T, D].

    Where gradients are wanted and no batch of adapters runs, or the module was never grafted, transformers' own
    implementation runs. A batch of adapters is inference: it must never lose them to a caller who forgot no_grad.
    Packed weights are always run by moegraft. Raises UnsupportedModelError where gradients are wanted through them.
    """
    site: ExpertsSite | None = module.__dict__.get(_SITE)
    if _SPENT in module.__dict__ or (site is not None and site.is_cut and _wants_grad(module, hidden_states)):
        raise UnsupportedModelError(
            f"{type(module).__name__} was cut to a rank's slice by attach(parallel=...): it runs while the model is "
            "grafted, under torch.no_grad(), and cannot be given back; load the model again"
        )
    if torch.compiler.is_compiling() and site is not None:
        return _traced_forward(module, site, hidden_states, top_k_weights, top_k_index)
    call = None if site is None else site.state.current()
    if site is None or (call is None and _wants_grad(module, hidden_states)):
        packed = packed_experts(module)
        if packed is not None:
            return _packed_forward(module, packed, hidden_states, top_k_weights, top_k_index)
        return _original_forward(module, site)(module, hidden_states, top_k_index, top_k_weights)
    with torch.no_grad():
        return site.forward(call, hidden_states, top_k_weights, top_k_index)


def _traced_forward(
    module: nn.Module, site: ExpertsSite, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
) -> torch.Tensor:
    """What a graph has of the module. One that computes gradients runs transformers' own code, and no batch."""
    state = site.state
    if state.fixed is not None:
        return site.forward(state.fixed, x_TD, topk_weights_TK, topk_ids_TK)
    if _wants_grad(module, x_TD) and packed_experts(module) is None:
        torch.ops.moegraft.graft_no_batch(state.order, state.number)
        return cast("torch.Tensor", _original_forward(module, site)(module, x_TD, topk_ids_TK, topk_weights_TK))
    return torch.ops.moegraft.graft_experts(x_TD, topk_weights_TK, topk_ids_TK, state.order, site.number, state.version)


def unrouted_forward(module: nn.Module, routed_in: torch.Tensor) -> torch.Tensor:
    """In the place of Llama 4's: every token for each expert, weighted, or zero where it does not go there.

    routed_in [E * T, D], expert-major -> the same of the outputs. What is zero is not computed.
    """
    site: ExpertsSite | None = module.__dict__.get(_SITE)
    is_traced = torch.compiler.is_compiling()
    call = None if site is None or is_traced else site.state.current()
    if site is None or (call is None and _wants_grad(module, routed_in)):
        return cast("torch.Tensor", type(module).forward(module, routed_in))
    E, D = cast("torch.Tensor", module.gate_up_proj).shape[:2]
    x_ETD = routed_in.view(E, -1, D)
    token_T = torch.arange(x_ETD.shape[1], device=routed_in.device)
    is_chosen_TE = (x_ETD != 0).any(-1).T
    out_ETD = torch.zeros_like(x_ETD)
    for expert_T in is_chosen_TE.int().topk(site.base.method.experts.config.top_k, dim=1).indices.unbind(1):
        x_TD = x_ETD[expert_T, token_T]
        weights_T1 = x_TD.new_ones(len(token_T), 1)
        out_ETD[expert_T, token_T] = experts_forward(module, x_TD, expert_T[:, None], weights_T1)
    return out_ETD.view(-1, D)


def guard_implementation(module: nn.Module) -> None:
    """Packed weights under another implementation: an error that says so, where its code would miss parameters."""
    module.register_forward_pre_hook(_check_implementation)


def _check_implementation(module: nn.Module, _: Any) -> None:
    packed, found = packed_experts(module), cast("PreTrainedConfig", module.config)._experts_implementation
    if packed is not None and found != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(module).__name__} holds packed {packed.weights.format_name} weights, which the experts "
            f"implementation {found!r} cannot run; call model.set_experts_implementation({IMPLEMENTATION!r})"
        )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _wants_grad(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(param.requires_grad for param in module.parameters(recurse=False))
    )


def _packed_forward(
    module: nn.Module,
    packed: PackedExperts,
    x_TD: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
) -> torch.Tensor:
    if _wants_grad(module, x_TD):
        raise UnsupportedModelError(
            f"{type(module).__name__} holds packed {packed.weights.format_name} weights, which have no gradients; run "
            "the model under torch.no_grad()"
        )
    if packed.base_layer is None:
        config = HostExperts.of(module).config(topk_ids_TK.shape[1], packed.dtype)
        layer, _ = build_fused_moe(config, packed.weights, lora_experts=False)
        packed.keep_layer(layer)
    assert packed.base_layer is not None
    with torch.no_grad():
        return packed.base_layer.apply_experts(x_TD, topk_weights_TK, topk_ids_TK)


def _original_forward(module: nn.Module, site: ExpertsSite | None) -> Any:
    name = "eager" if site is None else site.previous_implementation
    # The hook's decorator wraps the class's own loop with functools.wraps; FP8Experts is wrapped once for each layer.
    eager = inspect.unwrap(type(module).forward)
    functions = ALL_FP8_EXPERTS_FUNCTIONS if isinstance(module, FP8Experts) else ALL_EXPERTS_FUNCTIONS
    return functions.get(name, eager) if name else eager


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """What is the same for all sites of a model. ``device``: where their layers lie, once all of them are built.

    ``experts``, ``configs``: of the experts modules, by name. ``lora_experts``: whether adapters may touch experts.
    """

    bank: AdapterBank
    state: CallState
    layout: RankLayout
    device: torch.device
    experts: Mapping[str, HostExperts]
    configs: Mapping[str, MoEConfig]
    backend: str | None
    lora_experts: bool = True


def decide_backends(options: SiteOptions) -> dict[str, Decision]:
    """What would serve whole layers on ``options.device``, where they may not lie yet. Raises NoBackendError."""
    decisions = {}
    for name, host in options.experts.items():
        request = BackendRequest(
            config=options.configs[name],
            device=DeviceTarget.of(options.device),
            format_name=host.weights().format_name,
            adapters_touch_experts=options.lora_experts,
        )
        decisions[name] = select_experts(request, backend=options.backend)
    return decisions


def build_site(name: str, options: SiteOptions) -> ExpertsSite:
    """The layers of one experts module; changes nothing. Raises NoBackendError."""
    host, config = options.experts[name], options.configs[name]
    layout, backend = options.layout, options.backend
    expert_map = layout.expert_maps.get(name)
    adopted = is_adopted(host.module)
    if adopted and expert_map is not None:
        raise UnsupportedModelError(f"{type(host.module).__name__} ({name}) cannot be shared out over ranks")
    if expert_map is None:
        weights = host.weights()
        local = replace(config, num_experts=weights.num_experts, intermediate_size=weights.intermediate_size)
        base, decision = build_fused_moe(local, weights, backend=backend, lora_experts=options.lora_experts)
    else:
        kept = host.take(layout.mine.experts[name], options.device, adds_bias=layout.groups.tp.rank == 0)
        base, decision = build_parallel_moe(
            config, kept, layout.groups, expert_map, backend=backend, lora_experts=options.lora_experts
        )
    tables = options.bank.experts_tables(name)
    return ExpertsSite(
        name=name,
        base=base,
        with_lora=build_fused_moe_with_lora(base, tables, layout.groups) if options.lora_experts else None,
        decision=decision,
        state=options.state,
        previous_implementation=None
        if adopted
        else cast("PreTrainedConfig", host.module.config)._experts_implementation,
        is_cut=expert_map is not None,
    )


def install_sites(model: PreTrainedModel, sites: Mapping[str, ExpertsSite]) -> None:
    """Puts the sites behind their modules, then gives up the weights of those that are cut."""
    for name, site in sites.items():
        # Not a submodule: its parameters are the module's own and must not be listed twice.
        module = model.get_submodule(name)
        object.__setattr__(module, _SITE, site)
        if is_adopted(module):
            takes_routing = "top_k_index" in inspect.signature(type(module).forward).parameters
            forward = experts_forward if takes_routing else unrouted_forward
            object.__setattr__(module, "forward", MethodType(forward, module))
    if experts_configs(model, sites):
        model.set_experts_implementation(IMPLEMENTATION)
    for name, site in sites.items():
        if site.is_cut:
            HostExperts.of(model.get_submodule(name)).give_up()


def _config_of(module: nn.Module) -> PreTrainedConfig:
    return cast("PreTrainedConfig", module.config)


def experts_configs(model: PreTrainedModel, sites: Mapping[str, ExpertsSite]) -> list[PreTrainedConfig]:
    """The distinct configs that say which implementation the experts modules run; most models have one."""
    modules = [module for module in map(model.get_submodule, sites) if not is_adopted(module)]
    configs = {id(module.config): _config_of(module) for module in modules}
    return list(configs.values())


def remove_sites(
    model: PreTrainedModel, sites: Mapping[nn.Module, ExpertsSite], previous: dict[str, str | None]
) -> None:
    """The inverse of ``install_sites``, as far as that went; modules that were cut are of no use any more, and say so.

    ``previous``: the experts implementations of the model before.
    """
    for module, site in sites.items():
        if site.is_cut and module._parameters.get("down_proj") is None and "packed" not in module._modules:
            object.__setattr__(module, _SPENT, True)
        vars(module).pop(_SITE, None)
        if is_adopted(module):
            vars(module).pop("forward", None)
    if not all(map(is_adopted, sites)) and not any(_SPENT in vars(module) for module in sites):
        model.set_experts_implementation(previous)


def is_grafted(module: nn.Module) -> bool:
    """Whether a graft of some model has its site behind this experts module."""
    return _SITE in vars(module)


def is_spent(model: nn.Module) -> bool:
    """Whether experts of the model were cut to a slice that has been given up."""
    return any(_SPENT in module.__dict__ for module in model.modules())

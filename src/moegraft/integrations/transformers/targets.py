"""What adapters may touch in a transformers model, found by looking at the model: no list of model classes.

``discover_targets`` either describes the whole model or raises before anything was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.activation import apply_activation
from moegraft.core.config import Activation, ActivationKind
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.dtensors import is_sharded
from moegraft.integrations.transformers.storage import (
    experts_device,
    experts_sizes,
    linear_weight,
    packed_experts,
    unsupported_storage,
    w13_param,
)
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets

# Set on every instance by transformers' ``use_experts_implementation``; its other attributes came with later versions.
_HOOK_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Jamba's mixer multiplies with this weight and never calls the module, so LoRA on it would be lost in silence.
_NEVER_CALLED = ("dt_proj",)
# Both sides of every clamp and the bend of every curve: a limit beyond the last scale has no practical effect.
_PROBE_SCALES = (1.0, 4.0, 16.0, 1000.0)


class HookedExperts(nn.Module):
    """What transformers' ``use_experts_implementation`` makes of an experts class. For annotations only: it declares
    the attributes that are read here, and no model has an instance of it."""

    down_proj: torch.Tensor
    act_fn: nn.Module
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


def discover_targets(model: PreTrainedModel) -> ModelTargets:
    """Describe every module of ``model`` that an adapter may touch.

    Vision and audio towers are left out: their rows are not tokens of the batch. An adapter that touches a module
    which is not described here is refused by name when it is loaded.

    Raises:
        UnsupportedModelError: no experts layer, or one that cannot be served; names the model, the module and why.
    """
    reason = find_unsupported(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    scope = _Scope.of(model)
    routers = dict(_parameter_routers(scope))
    return ModelTargets(
        model_type=model.config.model_type,
        experts=experts_targets(model),
        linears=_linear_targets(scope, routers),
        embeddings={
            name: EmbeddingTarget(name=name, num_embeddings=m.num_embeddings, embedding_dim=m.embedding_dim)
            for name, m in scope.modules.items()
            if type(m) is nn.Embedding  # a subclass may scale its rows, and the LoRA with them or not
        },
        saveable=_saveable(scope, routers),
    )


def find_unsupported(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served, in words that name the class and the module; None where it can."""
    model_class = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"{model_class} is not a transformers.PreTrainedModel; pass the base model itself, not a wrapper of it"
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            return (
                f"{model_class}: '{name}' is a PEFT {type(module).__name__}; unload PEFT and attach to the base model"
            )
    hooked = hooked_experts(model)
    if not hooked:
        return _why_no_experts(model)
    for name, module in hooked.items():
        reason = _unsupported_experts(module)
        if reason is not None:
            return f"{model_class}: experts module '{name}' ({type(module).__name__}) {reason}"
    return None


def experts_targets(model: PreTrainedModel) -> dict[str, ExpertsTarget]:
    """The experts modules alone; their weights may lie on the meta device."""
    return {name: _experts_target(name, module) for name, module in hooked_experts(model).items()}


def experts_per_token(model: PreTrainedModel) -> int:
    """K of the model's configuration, for descriptions and tuning; 1 under a name that no known family uses.

    The layers themselves read K off the routing that each call brings.
    """
    config = model.config.get_text_config()
    for key in ("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "num_experts_per_token", "top_k_experts"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    return 1


def hooked_experts(model: nn.Module) -> dict[str, HookedExperts]:
    """Experts modules that dispatch through transformers' experts interface, by name, in the order of the model."""
    return {
        name: cast("HookedExperts", module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in _HOOK_ATTRIBUTES)
        and (hasattr(module, "down_proj") or packed_experts(module) is not None)
    }


def experts_activation(module: HookedExperts) -> Activation:
    """The activation of an experts module, recognised by what it computes and not by its name.

    The module's own ``_apply_gate`` (or ``act_fn``, without a gate) runs on a few float32 rows and must agree with
    one of our formulas to 1e-5; the rows reach far enough to tell a clamp from none.

    Raises:
        UnsupportedModelError: no formula agrees; the message names the module's class.
    """
    _, _, width = experts_sizes(module)
    rows = _probe_rows(2 * width if module.has_gate else width, device=experts_device(module))
    with torch.no_grad():
        expected = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    for activation in _candidates(module):
        found = apply_activation(rows, activation, is_interleaved=not module.is_concatenated)
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return activation
    act_fn = getattr(module, "act_fn", None)
    raise UnsupportedModelError(
        f"{type(module).__name__} computes an activation that moegraft does not know "
        f"(act_fn {type(act_fn).__name__}); expected one of {', '.join(ActivationKind)}"
    )


def _candidates(module: HookedExperts) -> Iterator[Activation]:
    for kind in (ActivationKind.SILU, ActivationKind.GELU, ActivationKind.GELU_TANH, ActivationKind.RELU2):
        yield Activation(kind=kind, gated=module.has_gate)
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    if module.has_gate and alpha is not None and limit is not None:
        yield Activation(kind=ActivationKind.SWIGLU_OAI, alpha=float(alpha), limit=float(limit))


def _probe_rows(width: int, *, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(_PROBE_SCALES), width, generator=generator) * torch.tensor(_PROBE_SCALES)[:, None]
    return rows.to(device)


def _why_no_experts(model: PreTrainedModel) -> str:
    model_class = type(model).__name__
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            found = f"{model_class}: experts module '{name}' ({type(module).__name__})"
            if type(module).__module__.startswith("transformers.integrations."):
                return (
                    f"{found} holds quantised weights in an order of its own kernels; load the checkpoint with "
                    f"moegraft.load_quantised({model.name_or_path or 'PATH'!r}), which keeps them packed as well"
                )
            return (
                f"{found} does not dispatch through transformers' experts interface (use_experts_implementation), "
                "so moegraft cannot reach its experts"
            )
    return f"{model_class} ({model.config.model_type}) has no mixture-of-experts layer"


def _unsupported_experts(module: HookedExperts) -> str | None:
    reason = unsupported_storage(module)
    if reason is not None:
        return reason
    if getattr(module, "has_post_expert_norm", False):
        return "normalises the output of each expert (has_post_expert_norm), which moegraft does not serve"
    if getattr(module, "_is_expert_parallel", False) and not any(map(is_sharded, module.parameters(recurse=False))):
        return "is shared out over ranks (expert parallel), but not by a plan of transformers; load the model whole"
    try:
        experts_activation(module)
    except UnsupportedModelError as error:
        return f"cannot be served: {error}"
    return None


def _experts_target(name: str, module: HookedExperts) -> ExpertsTarget:
    num_experts, hidden, intermediate = experts_sizes(module)
    return ExpertsTarget(
        name=name,
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate=module.has_gate,
        is_transposed=module.is_transposed,
        is_interleaved=module.has_gate and not module.is_concatenated,
        w13_param=w13_param(module),
    )


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """The modules whose rows are tokens of the batch, without what lies inside experts modules."""

    experts: Mapping[str, HookedExperts]
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Scope:
        """Modules whose innermost PreTrainedModel holds experts (the text stack) or is ``model`` (the heads)."""
        owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
        experts = hooked_experts(model)
        served = {_innermost(owners, name) for name in experts} | {""}
        modules = {
            name: module
            for name, module in model.named_modules()
            if _innermost(owners, name) in served and _innermost(experts, name) is None
        }
        return cls(experts=experts, modules=modules)


def _innermost(prefixes: Container[str], name: str) -> str | None:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name not in prefixes:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _beside_experts(scope: _Scope) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, number of experts) of all that shares its parent with an experts module."""
    for experts_name, experts in scope.experts.items():
        prefix = experts_name.rpartition(".")[0] + "."
        for name, module in scope.modules.items():
            if name.startswith(prefix):
                yield name, module, experts_sizes(experts)[0]


def _parameter_routers(scope: _Scope) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are no plain linear map but own a parameter ``weight`` [>= E, in] and stand beside experts.

    Some routers score more choices than there are routed experts (shared or null ones), none fewer.
    """
    for name, module, num_experts in _beside_experts(scope):
        weight = module._parameters.get("weight")
        if weight is None or _is_linear_map(module) or isinstance(module, nn.Embedding):
            continue
        if weight.dim() == 2 and weight.shape[0] >= num_experts:
            yield name, module


def _is_linear_map(module: nn.Module) -> bool:
    """An nn.Linear whose output is its matrix product: subclasses of a model file (PhiMoE's router, DeepSeek-V4's
    grouped map) compute something of their own, those of quantisation libraries do not.
    """
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or not type(module).__module__.startswith("transformers.models.")


def _linear_targets(scope: _Scope, routers: Mapping[str, nn.Module]) -> dict[str, LinearTarget]:
    targets = {}
    for name, module in scope.modules.items():
        weight = module._parameters.get("weight")
        if name in routers and weight is not None:
            out_features, in_features = weight.shape
        elif isinstance(module, nn.Linear) and _is_linear_map(module) and not name.endswith(_NEVER_CALLED):
            out_features, in_features = module.out_features, module.in_features
        else:
            continue
        targets[name] = LinearTarget(
            name=name,
            in_features=in_features,
            out_features=out_features,
            router=name in routers,
            weight=partial(getattr, module, "weight") if name in routers else linear_weight(module),
        )
    return targets


def _saveable(scope: _Scope, routers: Mapping[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    linear_routers = {
        name
        for name, module, num_experts in _beside_experts(scope)
        if isinstance(module, nn.Linear) and module.out_features >= num_experts and _is_router_name(name)
    }
    heads = {name for name, module in scope.modules.items() if _is_linear_map(module) and "." not in name}
    saveable = {}
    for name, module in scope.modules.items():
        is_norm = type(module).__name__.endswith(("Norm", "NormGated"))
        if name in routers or name in linear_routers or name in heads or is_norm or type(module) is nn.Embedding:
            tensors = {**module._parameters, **module._buffers}
            saveable[name] = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    return {name: tensors for name, tensors in saveable.items() if tensors}


def _is_router_name(name: str) -> bool:
    return any(part in ("gate", "router") for part in name.split("."))

"""What adapters may touch in a transformers model, found by looking at the model: no list of model classes.

``discover_targets`` either describes the whole model or raises before anything was changed.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import UnsupportedModelError
from moegraft.formats.scaled import spread_blocks
from moegraft.integrations.transformers.host.dtensors import is_sharded, local
from moegraft.integrations.transformers.host.storage import WEIGHT_DTYPES, HostExperts, host_experts
from moegraft.lora.targets import EmbeddingTarget, ExpertsTarget, LinearTarget, ModelTargets

# Modules of a text stack that see other rows than the tokens', by the end of their names: why adapters may not touch
# them. tests/test_families.py looks for them in every family that transformers has.
_OTHER_ROWS: Mapping[str, str] = {
    ".compressor.kv_norm": "runs on states pooled over blocks of tokens",  # DeepSeek-V4
    ".compressor.indexer.kv_norm": "runs on keys pooled over blocks of tokens",  # DeepSeek-V4
    ".indexer.k_layernorm": "runs on keys pooled over blocks of tokens",  # Qwen4-Exp
    ".qkv_proj.v_proj_delayed": "runs once more on the state before the first token",  # Zaya
}
# What stands on a model beside its stack of layers and sees the rows that leave it.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")


@dataclass(frozen=True, kw_only=True)
class TextScope:
    """The modules whose rows are tokens of the batch, without what lies inside experts modules.

    ``stack``: the name of the PreTrainedModel that holds the token embedding. ``decoder``: of the one whose rows the
    heads see. ``owners``: every PreTrainedModel by name. ``experts``: those of the stack. ``tower_maps``: linear maps
    of vision towers that tell which rows are whose, and the tower.
    """

    stack: str
    decoder: str
    owners: Mapping[str, PreTrainedModel]
    experts: Mapping[str, HostExperts]
    modules: Mapping[str, nn.Module]
    tower_maps: Mapping[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, hooked: Mapping[str, HostExperts]) -> TextScope:
        """What belongs to the text stack itself, and the heads of the models around it. ``hooked``: all experts."""
        names = {id(module): name for name, module in model.named_modules()}
        owners = {names[id(part)]: part for part in model.modules() if isinstance(part, PreTrainedModel)}
        stack = innermost(owners, names.get(id(_token_embedding(model)), "")) or ""
        decoder = names.get(id(model.get_decoder()), "")
        scope = cls(
            stack=stack,
            decoder=decoder,
            owners=owners,
            experts={name: module for name, module in hooked.items() if innermost(owners, name) == stack},
            modules={},
            tower_maps={},
        )
        modules = {
            name: module
            for name, module in model.named_modules()
            if scope.why_not(name) is None and innermost(hooked, name) is None
        }
        towers = [name for name, part in owners.items() if name not in ("", stack) and _is_image_tower(model, part)]
        tower_maps = {
            name: tower
            for tower in towers
            for name, module in model.named_modules()
            if innermost(owners, name) == tower and _is_linear_map(module) and innermost(hooked, name) is None
        }
        return replace(scope, modules=modules, tower_maps=tower_maps)

    def why_not(self, name: str) -> str | None:
        """Why the rows of a module are not known to be the tokens'; None where they are."""
        owner = innermost(self.owners, name) or ""
        if owner == self.stack:
            return next((reason for end, reason in _OTHER_ROWS.items() if f".{name}".endswith(end)), None)
        if owner and not _is_within(self.stack, owner):
            return f"belongs to '{owner}' ({type(self.owners[owner]).__name__}), whose rows are no tokens of the batch"
        if name == owner:
            return None
        if name.removeprefix(f"{owner}.") not in HEADS:
            return f"stands outside of the text stack '{self.stack}', where rows are not known to be the tokens'"
        if not _is_within(self.stack, self.decoder):
            return f"stands on '{self.decoder}', whose rows are no tokens of the batch"
        return None

    def why_shared(self, name: str) -> str | None:
        """Why the rows of an experts module are not known to be all tokens: others stand in the same layer."""
        layer = _layer_of(name)
        others = [other for other in self.experts if other != name and _layer_of(other) == layer]
        if not layer or not others:
            return None
        return (
            f"shares its layer with '{others[0]}': each of them sees a part of the tokens (those of one modality, "
            "say), and moegraft does not follow which tokens those are"
        )


def _is_image_tower(model: PreTrainedModel, tower: PreTrainedModel) -> bool:
    """Whether the rows of a tower are patches of images, image after image, and the model's own inputs tell which
    image is whose: each stands for so many image tokens of a sequence (Qwen-VL's convention)."""
    takes, given = (inspect.signature(inspect.unwrap(type(part).forward)).parameters for part in (model, tower))
    has_tokens = isinstance(getattr(model.config, "image_token_id", None), int)
    return has_tokens and "image_grid_thw" in takes and "grid_thw" in given and merge_area(tower) is not None


def merge_area(tower: nn.Module) -> int | None:
    """Patches that become one image token; None where the tower's config does not say."""
    side = getattr(tower.config, "spatial_merge_size", None)
    return side * side if isinstance(side, int) else None


def _token_embedding(model: PreTrainedModel) -> nn.Module | None:
    """None where the model does not tell."""
    try:
        embedding: nn.Module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embedding


def _is_within(name: str, ancestor: str) -> bool:
    return not ancestor or f"{name}.".startswith(f"{ancestor}.")


def _layer_of(name: str) -> str:
    """The part of a module's name up to its last number: the layer that it stands in."""
    return name[: max((match.end() for match in re.finditer(r"(^|\.)\d+(?=\.)", name)), default=0)]


def innermost(prefixes: Container[str], name: str) -> str | None:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name not in prefixes:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


# Linear maps whose weight is read without calling the module (Jamba's mixer): the weight itself gets the delta.
_READ_DIRECTLY = ("dt_proj",)
# A class that is a mixture of experts by its name, after the name of the model.
_MIXTURE = re.compile(r"(MoE|Moe|MOE|Experts?)(?![a-z])")


# Experts that transformers calls without its interface and that attach cannot stand in for either.
_ODD_EXPERTS: Mapping[str, str] = {
    "DbrxExperts": (
        "keeps the weights of all experts in three two-dimensional parameters [E * F, D] of a module inside it "
        "(mlp.w1, v1, w2), of which PEFT takes each for one matrix: an adapter on them has no part for a single expert"
    ),
    "LongcatFlashExperts": (
        "routes tokens to identities too (zero_expert_num), which no experts layer of moegraft has: gate_up_proj, and "
        "PEFT's adapters on it, count them among the experts, down_proj does not"
    ),
}


def discover_targets(model: PreTrainedModel, hosts: Mapping[str, HostExperts] | None = None) -> ModelTargets:
    """Describe every module of ``model`` that an adapter may touch.

    A module is described only where its rows are known to be those of the tokens: those of the text stack, and the
    heads on it. ``left_out`` says of others why an adapter that touches them is refused when it is loaded. ``hosts``:
    of ``host_experts``, where the caller has them.

    Raises:
        UnsupportedModelError: no experts layer, or one that cannot be served; names the model, the module and why.
    """
    hosts = host_experts(model) if hosts is None else hosts
    scope = _served_scope(model, hosts)
    if isinstance(scope, str):
        raise UnsupportedModelError(scope)
    routers = dict(_parameter_routers(scope))
    return ModelTargets(
        model_type=model.config.model_type,
        experts={name: host.target(name) for name, host in scope.experts.items()},
        linears=_linear_targets(scope, routers),
        embeddings={
            name: _embedding_target(name, m) for name, m in scope.modules.items() if isinstance(m, nn.Embedding)
        },
        saveable=_saveable(scope, routers),
        left_out=_left_out(model, scope, routers, hosts),
    )


def find_unsupported(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served, in words that name the class and the module; None where it can."""
    found = _served_scope(model, host_experts(model))
    return found if isinstance(found, str) else None


def _served_scope(model: nn.Module, hooked: Mapping[str, HostExperts]) -> TextScope | str:
    """The text stack of a model that can be served, or why it cannot."""
    model_class = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"{model_class} is not a transformers.PreTrainedModel; pass the base model itself, not a wrapper of it"
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            return (
                f"{model_class}: '{name}' is a PEFT {type(module).__name__}; unload PEFT and attach to the base model"
            )
    if type(model).forward is nn.Module.forward:
        parts = [name for name, part in model.named_children() if host_experts(part)]
        return (
            f"{model_class} has no forward pass of its own, it generates by calling its parts; attach to the one whose "
            f"adapters you have: {' or '.join(f'model.{name}' for name in parts) or 'none of them has experts'}"
        )
    if not hooked:
        return _why_no_experts(model)
    scope = TextScope.of(model, hooked)
    if not scope.experts:
        name, host = next(iter(hooked.items()))
        return f"{model_class}: experts module '{name}' ({type(host.module).__name__}) {scope.why_not(name)}"
    for name, host in scope.experts.items():
        reason = _unsupported_experts(host) or scope.why_shared(name)
        if reason is not None:
            return f"{model_class}: experts module '{name}' ({type(host.module).__name__}) {reason}"
    return scope


def experts_targets(model: PreTrainedModel) -> dict[str, ExpertsTarget]:
    """All experts modules, those of towers too; their weights may lie on the meta device."""
    return {name: host.target(name) for name, host in host_experts(model, adopts=False).items()}


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
            reason = _ODD_EXPERTS.get(type(module).__name__)
            return (
                f"{found} {reason}"
                if reason is not None
                else (
                    f"{found} does not dispatch through transformers' experts interface (use_experts_implementation), "
                    "so moegraft cannot reach its experts"
                )
            )
    for name, module in model.named_modules():
        family = os.path.commonprefix((type(module).__name__, type(model.config).__name__))  # noqa: RUF071  # no path
        if module is not model and _MIXTURE.search(type(module).__name__.removeprefix(family)):
            return (
                f"{model_class}: '{name}' ({type(module).__name__}) keeps its experts in modules of its own, none of "
                "which dispatches through transformers' experts interface (use_experts_implementation), so moegraft "
                "cannot reach them"
            )
    return f"{model_class} ({model.config.model_type}) has no mixture-of-experts layer"


def _unsupported_experts(host: HostExperts) -> str | None:
    module, reason = host.module, host.unsupported()
    if reason is not None:
        return reason
    if getattr(module, "has_post_expert_norm", False):
        return "normalises the output of each expert (has_post_expert_norm), which moegraft does not serve"
    if getattr(module, "_is_expert_parallel", False) and not any(map(is_sharded, module.parameters(recurse=False))):
        return "is shared out over ranks (expert parallel), but not by a plan of transformers; load the model whole"
    try:
        _ = host.activation
    except UnsupportedModelError as error:
        return f"cannot be served: {error}"
    return None


def _beside_experts(scope: TextScope) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, number of experts) of all that shares its parent with an experts module."""
    for experts_name, experts in scope.experts.items():
        prefix, num_experts = experts_name.rpartition(".")[0] + ".", experts.sizes[0]
        for name, module in scope.modules.items():
            if name.startswith(prefix):
                yield name, module, num_experts


def _parameter_routers(scope: TextScope) -> Iterator[tuple[str, nn.Module]]:
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


def _linear_targets(scope: TextScope, routers: Mapping[str, nn.Module]) -> dict[str, LinearTarget]:
    targets = {
        name: LinearTarget(
            name=name,
            in_features=module.in_features,
            out_features=module.out_features,
            weight=_linear_weight(module),
            has_bias=module._parameters.get("bias") is not None,
            tower=tower,
        )
        for name, tower in scope.tower_maps.items()
        for module in [cast("nn.Linear", scope.owners[""].get_submodule(name))]
    }
    for name, module in scope.modules.items():
        weight = module._parameters.get("weight")
        by_weight = weight is not None and (name in routers or (_is_linear_map(module) and _is_read_directly(name)))
        if by_weight and weight is not None:
            out_features, in_features = weight.shape
        elif isinstance(module, nn.Linear) and _is_linear_map(module):
            out_features, in_features = module.out_features, module.in_features
        else:
            continue
        targets[name] = LinearTarget(
            name=name,
            in_features=in_features,
            out_features=out_features,
            router=by_weight,
            weight=partial(getattr, module, "weight") if by_weight else _linear_weight(module),
            has_bias=module._parameters.get("bias") is not None,
        )
    return targets


def _linear_weight(module: nn.Module) -> Callable[[], torch.Tensor] | None:
    """What gives the weight [out, in] of a linear map as it multiplies; None where that cannot be told.

    A weight that some library has quantised still takes LoRA beside it, but no DoRA: its row norms are not at hand.
    """
    weight = module._parameters.get("weight")
    if weight is None or list(weight.shape) != [module.out_features, module.in_features]:
        return None
    if weight.dtype in WEIGHT_DTYPES:
        return lambda: local(cast("torch.Tensor", module.weight))
    if weight.dtype is torch.float8_e4m3fn and hasattr(module, "weight_scale_inv"):
        return partial(_fp8_linear_weight, module)
    return None


def _fp8_linear_weight(module: nn.Module) -> torch.Tensor:
    """transformers' FP8Linear: one scale, or one for each block that is cut short at the borders."""
    weight, scale = cast("torch.Tensor", module.weight).float(), cast("torch.Tensor", module.weight_scale_inv).float()
    if scale.dim() < 2:
        return weight * scale
    block_size = cast("tuple[int, int]", module.block_size)
    return weight * spread_blocks(scale, *weight.shape, block_size=block_size)


def _is_read_directly(name: str) -> bool:
    return name.rpartition(".")[2] in _READ_DIRECTLY


def _embedding_target(name: str, module: nn.Embedding) -> EmbeddingTarget:
    """PEFT scales the delta as an embedding with ``embed_scale`` (Gemma's) scales its rows.

    A delta comes behind whatever else a subclass does to the rows that it has looked up (Inkling's norm), as in PEFT.
    """
    scale: Any = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        scale = 1.0 if scale.is_meta else scale.to(module.weight.dtype)
    return EmbeddingTarget(
        name=name, num_embeddings=module.num_embeddings, embedding_dim=module.embedding_dim, scale=float(scale)
    )


def _saveable(scope: TextScope, routers: Mapping[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    linear_routers = {
        name
        for name, module, num_experts in _beside_experts(scope)
        if isinstance(module, nn.Linear) and module.out_features >= num_experts and _is_router_name(name)
    }
    heads = {
        name
        for name, module in scope.modules.items()
        if _is_linear_map(module) and (name.rpartition(".")[2] in HEADS or "." not in name)
    }
    saveable = {}
    for name, module in scope.modules.items():
        is_norm = type(module).__name__.endswith(("Norm", "NormGated"))
        if name in routers or name in linear_routers or name in heads or is_norm or isinstance(module, nn.Embedding):
            tensors = {**module._parameters, **module._buffers}
            saveable[name] = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        if name not in routers and _is_linear_map(module) and not _is_read_directly(name):
            bias = _bias(module)
            saveable[name] = saveable.get(name, {}) | ({} if bias is None else {"bias": bias})
    return {name: tensors for name, tensors in saveable.items() if tensors}


def _bias(module: nn.Module) -> torch.Tensor | None:
    """The bias [out] of a linear map, zeros where it has none; None where it can have none."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if bias is not None or weight is None or weight.dtype not in WEIGHT_DTYPES or "bias" not in module._parameters:
        return bias
    return torch.zeros(cast("nn.Linear", module).out_features, dtype=weight.dtype)


def _is_router_name(name: str) -> bool:
    return any(part in ("gate", "router") for part in name.split("."))


def _left_out(
    model: PreTrainedModel, scope: TextScope, routers: Mapping[str, nn.Module], hooked: Mapping[str, HostExperts]
) -> dict[str, str]:
    """Why adapters may not touch what they could touch elsewhere: linear maps, embeddings, experts, norms."""
    reasons = {}
    for name, module in model.named_modules():
        is_inside = innermost(hooked, name) not in (None, name)
        if (
            is_inside
            or name in scope.tower_maps
            or not (name in hooked or module._parameters.get("weight") is not None)
        ):
            continue
        reason = scope.why_not(name)
        if reason is None and isinstance(module, nn.Linear) and not (_is_linear_map(module) or name in routers):
            reason = f"is a {type(module).__name__}, which computes more than a linear map"
        if reason is not None:
            reasons[name] = reason
    return reasons

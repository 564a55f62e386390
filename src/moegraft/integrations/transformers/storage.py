"""How the weights of an experts module are stored: as plain parameters, as transformers' fp8 parameters, or packed.

A packed module is one of transformers' own experts modules without its parameters; a child ``packed`` holds the
weights in a format of moegraft's, and the experts interface of transformers is what runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import UnsupportedModelError
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.dense import DenseExperts
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.scaled import spread_blocks
from moegraft.integrations.transformers.dtensors import local
from moegraft.lora.targets import ExpertsTarget
from moegraft.moe.layer import FusedMoE

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKED = "packed"


class PackedExperts(nn.Module):
    """The weights of one experts module. ``dtype``: of the activations, and so of the biases.

    ``base_layer`` runs them where nothing is grafted; the first call builds it.
    """

    base_layer: FusedMoE | None

    def __init__(self, weights: ExpertsWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = weights
        self.dtype = dtype
        self.keep_layer(None)

    def keep_layer(self, layer: FusedMoE | None) -> None:
        """Not as a submodule: the layer has no parameters, and adapters have no business with its modules."""
        object.__setattr__(self, "base_layer", layer)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``Module.to``: the device of all tensors changes, the dtype of the biases only."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weights.device))
        weights = moved(self.weights, probe.device)
        biases = {name: None if b is None else b.to(probe.dtype) for name, b in _biases(weights).items()}
        self.weights = cast("ExpertsWeights", replace(cast("Any", weights), **biases))
        self.dtype = probe.dtype
        self.keep_layer(None)
        return self


def _biases(weights: ExpertsWeights) -> dict[str, torch.Tensor | None]:
    return {"b13": weights.b13, "b2": weights.b2}


def moved(value: Any, device: torch.device) -> Any:
    """A record with every tensor on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    on_device = {item.name: moved(getattr(value, item.name), device) for item in fields(value) if item.init}
    return replace(value, **on_device)


def packed_experts(module: nn.Module) -> PackedExperts | None:
    """What stands behind a packed module; None where the module has its own parameters."""
    child = module._modules.get(_PACKED)
    return child if isinstance(child, PackedExperts) else None


def empty_experts(module: nn.Module) -> None:
    """Takes the parameters out of an experts module, so that nothing is loaded into them or initialised."""
    for name in list(module._parameters):
        del module._parameters[name]
    setattr(module, "_is_hf_initialized", True)  # noqa: B010  # no attribute that nn.Module declares


def give_up_experts(module: nn.Module) -> None:
    """Takes the weights out of an experts module, however they are stored: others hold what is still needed."""
    empty_experts(module)
    module._modules.pop(_PACKED, None)


def pack_experts(module: nn.Module, weights: ExpertsWeights, dtype: torch.dtype) -> None:
    """Puts weights behind an emptied experts module."""
    module.add_module(_PACKED, PackedExperts(weights, dtype))


def w13_param(module: nn.Module) -> str:
    """The name of the first parameter of an experts module."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def experts_sizes(module: nn.Module) -> tuple[int, int, int]:
    """E, D and F."""
    packed = packed_experts(module)
    if packed is not None:
        return packed.weights.num_experts, packed.weights.hidden_size, packed.weights.intermediate_size
    num_experts, dim_1, dim_2 = cast("torch.Tensor", module.down_proj).shape
    return (num_experts, dim_2, dim_1) if module.is_transposed else (num_experts, dim_1, dim_2)


def experts_device(module: nn.Module) -> torch.device:
    """Where the weights of an experts module lie."""
    packed = packed_experts(module)
    return cast("torch.Tensor", module.down_proj).device if packed is None else packed.weights.device


def experts_placement(model: PreTrainedModel, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the weights, and dtype of the activations."""
    packed = packed_experts(module)
    if packed is not None:
        dtype = packed.dtype
    elif _is_fp8(module):
        dtype = model.get_input_embeddings().weight.dtype
    else:
        dtype = cast("torch.Tensor", module.down_proj).dtype
    return experts_device(module), dtype


def unsupported_storage(module: nn.Module) -> str | None:
    """Why the weights of an experts module cannot be served; None where they can."""
    if packed_experts(module) is not None:
        return None
    for param in (w13_param(module), "down_proj"):
        weight = getattr(module, param, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"has no three-dimensional parameter '{param}'"
        if weight.is_meta:
            return f"is not loaded: '{param}' is on the meta device"
        if weight.dtype not in WEIGHT_DTYPES and not _is_scaled_fp8(module, param):
            expected = "float32, bfloat16, float16, or float8_e4m3fn with scales"
            return f"is quantised: '{param}' is {weight.dtype}; expected {expected}"
    if _is_fp8(module):
        try:
            _fp8_weights(module)
        except ValueError as error:
            return f"cannot be served: {error}"
    return None


def experts_weights(module: nn.Module, target: ExpertsTarget) -> ExpertsWeights:
    """The module's own tensors, not copies: what is loaded into its Parameters later is served.

    Of parameters that a parallel plan of transformers has shared out, this rank's part.
    """
    packed = packed_experts(module)
    if packed is not None:
        return packed.weights
    if _is_fp8(module):
        return _fp8_weights(module)
    has_bias = bool(module.has_bias)
    return DenseExperts(
        w13=local(getattr(module, target.w13_param)),
        w2=local(getattr(module, target.w2_param)),
        b13=local(getattr(module, f"{target.w13_param}_bias")) if has_bias else None,
        b2=local(getattr(module, f"{target.w2_param}_bias")) if has_bias else None,
        num_halves=2 if target.has_gate else 1,
        is_transposed=target.is_transposed,
        is_interleaved=target.is_interleaved,
    )


def _is_fp8(module: nn.Module) -> bool:
    """transformers' FP8Experts, whichever fields its version has."""
    return _is_scaled_fp8(module, w13_param(module)) and _is_scaled_fp8(module, "down_proj")


def _is_scaled_fp8(module: nn.Module, param: str) -> bool:
    weight = getattr(module, param, None)
    is_fp8 = isinstance(weight, torch.Tensor) and weight.dtype is torch.float8_e4m3fn
    return is_fp8 and hasattr(module, f"{param}_scale_inv")


def _fp8_weights(module: nn.Module) -> ExpertsWeights:
    """Raises ValueError where the blocks are not 128 x 128, or cut across gate and up."""
    first, second = w13_param(module), "down_proj"
    block_size = getattr(module, "block_size", None)
    weights = Fp8Experts.from_checkpoint(
        w13=getattr(module, first).detach(),
        w2=getattr(module, second).detach(),
        w13_scale=getattr(module, f"{first}_scale_inv").detach(),
        w2_scale=getattr(module, f"{second}_scale_inv").detach(),
        block_size=None if block_size is None else tuple(block_size),
        num_halves=2 if module.has_gate else 1,
    )
    if getattr(module, "activation_scheme", "dynamic") == "static":
        scales = (getattr(module, f"{name}_activation_scale").detach() for name in (first, second))
        return weights.with_static_scales(*scales)
    return weights


def linear_weight(module: nn.Module) -> Callable[[], torch.Tensor] | None:
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


def check_uniform(model: PreTrainedModel, modules: list[nn.Module]) -> tuple[torch.device, torch.dtype]:
    """The one device and dtype of all experts. Raises UnsupportedModelError."""
    found = {experts_placement(model, module) for module in modules}
    if len(found) > 1:
        kinds = ", ".join(f"{device}/{dtype}" for device, dtype in sorted(found, key=str))
        raise UnsupportedModelError(
            f"{type(model).__name__}: the experts lie on several devices or have several dtypes ({kinds}); expected one"
        )
    return next(iter(found))

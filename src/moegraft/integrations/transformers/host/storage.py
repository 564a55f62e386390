"""The host's experts modules: what transformers' experts interface dispatches, however the weights are stored.

Three storages: plain parameters, transformers' fp8 parameters with scales, and packed. A packed module is one of
transformers' own without its parameters; a child ``packed`` holds the weights in a format of moegraft's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.build import take_slice
from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.core.errors import UnsupportedModelError
from moegraft.core.halves import apply_activation
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.integrations.transformers.host.dtensors import local
from moegraft.lora.targets import ExpertsTarget
from moegraft.moe.layer import FusedMoE
from moegraft.parallel import ExpertsSlice

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKED = "packed"
# Set on every instance by transformers' ``use_experts_implementation``; its other attributes came with later versions.
_HOOK_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Experts that transformers does not dispatch, and what they do not say of their layout.
_ADOPTED: Mapping[str, Mapping[str, bool]] = {
    "Llama4TextExperts": {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True},
    "Step3p7Experts": {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True},
}
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


class HostExperts(ABC):
    """One experts module of a model. ``HostExperts.of`` chooses the class by what stands in the module.

    What may be loaded into the module or moved later (weights, device, dtype) is looked up when asked for; sizes and
    activation are not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = cast("HookedExperts", module)

    @staticmethod
    def of(module: nn.Module) -> HostExperts:
        """The storage of an experts module."""
        if packed_experts(module) is not None:
            return PackedHostExperts(module)
        if all(_is_scaled_fp8(module, param) for param in (_w13_param(module), "down_proj")):
            return Fp8HostExperts(module)
        return PlainHostExperts(module)

    # What each storage knows

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int]:
        """E, D and F of the whole module."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights lie."""

    @abstractmethod
    def dtype(self, model: PreTrainedModel) -> torch.dtype:
        """Dtype of the activations."""

    @abstractmethod
    def unsupported(self) -> str | None:
        """Why the weights cannot be served; None where they can."""

    @abstractmethod
    def weights(self) -> ExpertsWeights:
        """The module's own tensors, not copies: what is loaded into its Parameters later is served.

        Of parameters that a parallel plan of transformers has shared out, this rank's part.
        """

    # What all share

    @property
    def w13_param(self) -> str:
        """The name of the first parameter."""
        return _w13_param(self.module)

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up alternate in the parameter."""
        return self.module.has_gate and not self.module.is_concatenated

    @cached_property
    def activation(self) -> Activation:
        """Raises UnsupportedModelError where no formula agrees with what the module computes."""
        return _recognise_activation(self.module, self.sizes[2], self.device)

    def target(self, name: str) -> ExpertsTarget:
        """The module as adapters see it."""
        num_experts, hidden, intermediate = self.sizes
        return ExpertsTarget(
            name=name,
            num_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            has_gate=self.module.has_gate,
            is_transposed=self.module.is_transposed,
            is_interleaved=self.is_interleaved,
            w13_param=self.w13_param,
            weights=self.weights,
        )

    def config(self, top_k: int, dtype: torch.dtype, *, batch_invariant: bool = False) -> MoEConfig:
        """Sizes and options of the layer. ``dtype``: of its activations."""
        num_experts, hidden, intermediate = self.sizes
        return MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=self.activation,
            has_bias=bool(self.module.has_bias),
            dtype=dtype,
            batch_invariant=batch_invariant,
        )

    def take(self, mine: ExpertsSlice, device: torch.device, *, adds_bias: bool) -> ExpertsWeights:
        """A rank's slice of the weights, in memory of its own on a device; ``adds_bias`` as of ``take_slice``."""
        return cast("ExpertsWeights", _moved(take_slice(self.weights(), mine, adds_bias=adds_bias), device))

    def give_up(self) -> None:
        """Takes the weights out of the module: others hold what is still needed."""
        empty_experts(self.module)
        self.module._modules.pop(_PACKED, None)


class PlainHostExperts(HostExperts):
    """Parameters in a floating dtype."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        num_experts, dim_1, dim_2 = self.module.down_proj.shape
        return (num_experts, dim_2, dim_1) if self.module.is_transposed else (num_experts, dim_1, dim_2)

    @property
    def device(self) -> torch.device:
        return self.module.down_proj.device

    def dtype(self, model: PreTrainedModel) -> torch.dtype:
        return self.module.down_proj.dtype

    def unsupported(self) -> str | None:
        return self._unsupported_parameter() or self._unsupported_dtype()

    def weights(self) -> ExpertsWeights:
        module, w13 = self.module, self.w13_param
        return DenseExperts(
            w13=local(getattr(module, w13)),
            w2=local(module.down_proj),
            b13=local(getattr(module, f"{w13}_bias")) if module.has_bias else None,
            b2=local(getattr(module, "down_proj_bias")) if module.has_bias else None,
            num_halves=2 if module.has_gate else 1,
            is_transposed=module.is_transposed,
            is_interleaved=self.is_interleaved,
        )

    def _unsupported_parameter(self) -> str | None:
        for param in (self.w13_param, "down_proj"):
            weight = getattr(self.module, param, None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
                return f"has no three-dimensional parameter '{param}'"
            if weight.is_meta:
                return f"is not loaded: '{param}' is on the meta device"
        return None

    def _unsupported_dtype(self) -> str | None:
        dtypes = {param: getattr(self.module, param).dtype for param in (self.w13_param, "down_proj")}
        odd = [param for param, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES]
        if not odd:
            return None
        # One parameter in fp8 beside another that is not: the other is what is wrong.
        param = next((param for param in odd if not _is_scaled_fp8(self.module, param)), odd[0])
        expected = "float32, bfloat16, float16, or float8_e4m3fn with scales, both"
        return f"is quantised: '{param}' is {dtypes[param]}; expected {expected}"


class Fp8HostExperts(PlainHostExperts):
    """transformers' FP8Experts, whichever fields its version has: e4m3 parameters beside ``*_scale_inv``."""

    def dtype(self, model: PreTrainedModel) -> torch.dtype:
        return cast("torch.dtype", model.get_input_embeddings().weight.dtype)

    def weights(self) -> ExpertsWeights:
        """Raises ValueError where the blocks are not 128 x 128, or cut across gate and up."""
        module, first, second = self.module, self.w13_param, "down_proj"
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

    def _unsupported_dtype(self) -> str | None:
        try:
            self.weights()
        except ValueError as error:
            return f"cannot be served: {error}"
        return None


class PackedHostExperts(HostExperts):
    """Weights of ``load_quantised`` in the child ``packed``."""

    @property
    def packed(self) -> PackedExperts:
        """What holds them."""
        return cast("PackedExperts", self.module._modules[_PACKED])

    @property
    def sizes(self) -> tuple[int, int, int]:
        weights = self.packed.weights
        return weights.num_experts, weights.hidden_size, weights.intermediate_size

    @property
    def device(self) -> torch.device:
        return self.packed.weights.device

    def dtype(self, model: PreTrainedModel) -> torch.dtype:
        return self.packed.dtype

    def unsupported(self) -> str | None:
        return None

    def weights(self) -> ExpertsWeights:
        return self.packed.weights


def is_adopted(module: nn.Module) -> bool:
    """Whether transformers calls the module without its interface: ``attach`` then stands in for its forward."""
    return type(module).__name__ in _ADOPTED and type(module).__module__.startswith("transformers.models.")


def _adopt(module: nn.Module) -> None:
    """Says of the module what transformers' interface would."""
    for name, value in _ADOPTED[type(module).__name__].items():
        vars(module).setdefault(name, value)
    if not hasattr(module, "_apply_gate"):
        vars(module).setdefault("_apply_gate", partial(_gated, cast("nn.Module", module.act_fn)))


def _gated(act_fn: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up


def host_experts(model: nn.Module, *, adopts: bool = True) -> dict[str, HostExperts]:
    """Experts modules that dispatch through transformers' experts interface, by name, in the order of the model.

    ``adopts``: and those that ``attach`` can reach without it.
    """
    for module in model.modules() if adopts else ():
        if is_adopted(module):
            _adopt(module)
    return {
        name: HostExperts.of(module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in _HOOK_ATTRIBUTES)
        and (hasattr(module, "down_proj") or packed_experts(module) is not None)
    }


def check_uniform(model: PreTrainedModel, experts: Iterable[HostExperts]) -> tuple[torch.device, torch.dtype]:
    """The one device and dtype (of activations) of all experts. Raises UnsupportedModelError."""
    found = {(host.device, host.dtype(model)) for host in experts}
    if len(found) > 1:
        kinds = ", ".join(f"{device}/{dtype}" for device, dtype in sorted(found, key=str))
        raise UnsupportedModelError(
            f"{type(model).__name__}: the experts lie on several devices or have several dtypes ({kinds}); expected one"
        )
    return next(iter(found))


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
        weights = _moved(self.weights, probe.device)
        biases = {name: None if b is None else b.to(probe.dtype) for name, b in _biases(weights).items()}
        self.weights = cast("ExpertsWeights", replace(cast("Any", weights), **biases))
        self.dtype = probe.dtype
        self.keep_layer(None)
        return self


def packed_experts(module: nn.Module) -> PackedExperts | None:
    """What stands behind a packed module; None where the module has its own parameters."""
    child = module._modules.get(_PACKED)
    return child if isinstance(child, PackedExperts) else None


def empty_experts(module: nn.Module) -> None:
    """Takes the parameters out of an experts module, so that nothing is loaded into them or initialised.

    Until weights are packed, empty tensors stand in their places: parents reach for them to initialise them.
    """
    for name in list(module._parameters):
        del module._parameters[name]
        place = torch.empty(0)
        setattr(place, "_is_hf_initialized", True)  # noqa: B010  # what transformers asks before it fills a tensor
        module.__dict__[name] = place
    setattr(module, "_is_hf_initialized", True)  # noqa: B010  # no attribute that nn.Module declares


def pack_experts(module: nn.Module, weights: ExpertsWeights, dtype: torch.dtype) -> None:
    """Puts weights behind an emptied experts module."""
    for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
        del module.__dict__[name]
    module.add_module(_PACKED, PackedExperts(weights, dtype))


def _biases(weights: ExpertsWeights) -> dict[str, torch.Tensor | None]:
    return {"b13": weights.b13, "b2": weights.b2}


def _moved(value: Any, device: torch.device) -> Any:
    """A record with every tensor on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    on_device = {item.name: _moved(getattr(value, item.name), device) for item in fields(value) if item.init}
    return replace(value, **on_device)


def _w13_param(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _is_scaled_fp8(module: nn.Module, param: str) -> bool:
    weight = getattr(module, param, None)
    is_fp8 = isinstance(weight, torch.Tensor) and weight.dtype is torch.float8_e4m3fn
    return is_fp8 and hasattr(module, f"{param}_scale_inv")


def _recognise_activation(module: HookedExperts, width: int, device: torch.device) -> Activation:
    """The activation of an experts module, recognised by what it computes and not by its name.

    The module's own ``_apply_gate`` (or ``act_fn``, without a gate) runs on a few float32 rows and must agree with
    one of our formulas to 1e-5; the rows reach far enough to tell a clamp from none.

    Raises:
        UnsupportedModelError: no formula agrees; the message names the module's class.
    """
    rows = _probe_rows(2 * width if module.has_gate else width, device=device)
    with torch.no_grad():
        expected = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    for activation in _candidates(module):
        found = apply_activation(rows, activation, is_interleaved=not module.is_concatenated)
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return activation
    how = f"act_fn {type(getattr(module, 'act_fn', None)).__name__}"
    if module.has_gate:
        how = f"{type(module).__name__}._apply_gate, with {how}"
    raise UnsupportedModelError(
        f"{type(module).__name__} computes an activation that moegraft does not know ({how}), from which each of "
        f"{', '.join(ActivationKind)} differs"
    )


def _candidates(module: HookedExperts) -> Iterator[Activation]:
    for kind in (ActivationKind.SILU, ActivationKind.GELU, ActivationKind.GELU_TANH, ActivationKind.RELU2):
        yield Activation(kind=kind, gated=module.has_gate)
    if not module.has_gate:
        return
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    if limit is not None:
        yield Activation(kind=ActivationKind.SILU_CLAMPED, limit=float(limit))
        yield Activation(kind=ActivationKind.CLAMPED_SILU, limit=float(limit))
        if alpha is not None:
            yield Activation(kind=ActivationKind.SWIGLU_OAI, alpha=float(alpha), limit=float(limit))
    act_fn: Any = getattr(module, "act_fn", None)
    if hasattr(act_fn, "gate_softcap") and hasattr(act_fn, "up_softcap"):
        alpha, limit = act_fn.gate_softcap.softcap, act_fn.up_softcap.softcap
        yield Activation(kind=ActivationKind.SILU_SOFTCAPPED, alpha=float(alpha), limit=float(limit))


def _probe_rows(width: int, *, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(_PROBE_SCALES), width, generator=generator) * torch.tensor(_PROBE_SCALES)[:, None]
    return rows.to(device)

"""Norms, rotary embeddings and routers of a model in few launches, where these are what its own code gives.

transformers writes each as up to a dozen operations of torch. A module or function is taken over only after a trial: on
random values, in the dtype of the model, the kernel must give what the model's own code gives. Whatever it does not
take, other shapes or gradients, still goes to that code.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moegraft.integrations.transformers import GraftedModel
from moegraft.serving.few_rows import take_linears

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_ROTARY = "apply_rotary_pos_emb"
_ALIKE = 0.98
"""Elements of half precision that must be equal; sums in another order move the rounding of the others."""


class FusedParts:
    """What was taken over in one model, until ``remove``."""

    def __init__(self, graft: GraftedModel, device: torch.device, *, takes_linears: bool = True) -> None:
        """takes_linears: also the maps that take LoRA; no other rank may have a part in them."""
        model = graft.model
        self.norms: list[nn.Module] = []
        self.routers: list[nn.Module] = []
        self.rotaries: list[_Rotary] = []
        self.linears = take_linears(graft, device) if takes_linears else []
        known: dict[Any, MethodOf | None] = {}
        for module in model.modules():
            for taken, key_of, try_kernel in (
                (self.norms, _norm_key, _norm_like),
                (self.routers, _router_key, _router_like),
            ):
                key = key_of(module, device)
                if key is None:
                    continue
                if key not in known:
                    known[key] = try_kernel(module, device)
                make = known[key]
                if make is not None:
                    module.__dict__["forward"] = make(module)
                    taken.append(module)
        files = {type(module).__module__: None for module in model.modules()}
        for name in files:
            file = sys.modules[name]
            if name.startswith("transformers.") and _is_rotary(file.__dict__.get(_ROTARY)):
                self.rotaries.append(_Rotary(file, device))

    def remove(self) -> None:
        """Gives the model its own code back."""
        for module in (*self.norms, *self.routers):
            module.__dict__.pop("forward", None)
        for rotary in self.rotaries:
            rotary.remove()
        for linears in self.linears:
            linears.remove()
        self.norms, self.routers, self.rotaries, self.linears = [], [], [], []


MethodOf = Callable[[nn.Module], Callable[..., torch.Tensor]]


def _norm_key(module: nn.Module, device: torch.device) -> Any:
    """What norms of one kind share, for a module that looks like an RMS norm over its last dimension; else None."""
    weight = _only_weight(module, "RMSNorm", device)
    eps = _eps_of(module)
    return (
        None if weight is None or weight.dim() != 1 or eps is None else (type(module), eps, weight.shape, weight.dtype)
    )


def _eps_of(module: nn.Module) -> float | None:
    return next((float(vars(module)[name]) for name in _EPS_NAMES if isinstance(vars(module).get(name), float)), None)


def _only_weight(module: nn.Module, name: str, device: torch.device) -> torch.Tensor | None:
    """The weight of a module of transformers, of a class whose name ends so, that holds nothing else but a bias."""
    kind = type(module)
    if (
        not (kind.__name__.endswith(name) and kind.__module__.startswith("transformers."))
        or "forward" in module.__dict__
    ):
        return None
    weight = module._parameters.get("weight")
    if module._modules or module._buffers or set(module._parameters) - {"weight", "bias"} or weight is None:
        return None
    return weight if weight.device == device else None


@torch.no_grad()
def _norm_like(module: nn.Module, device: torch.device) -> MethodOf | None:
    """Binds the kernel that gives what the module gives, to any module of its kind; None where none does."""
    from moegraft.kernels.rms_norm.host import rms_norm  # needs Triton

    weight, eps = module._parameters["weight"], _eps_of(module)
    assert weight is not None
    assert eps is not None
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(module)  # with a weight that tells the kinds of norms apart
    drawn = torch.randn(weight.shape, generator=generator).to(device, weight.dtype)
    trial._parameters = {"weight": nn.Parameter(drawn, requires_grad=False)}
    x = (1.7 * torch.randn(64, weight.shape[0], generator=generator)).to(device, weight.dtype)
    own = type(module).forward
    try:
        expected = own(trial, x)
    except Exception:  # it wants more than a tensor: no norm that is known here
        return None
    if not isinstance(expected, torch.Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return None
    for adds_one, rounds_first in itertools.product((False, True), (True, False)):
        if _is_alike(rms_norm(x, drawn, eps, adds_one=adds_one, rounds_first=rounds_first), expected):
            break
    else:
        return None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        weight = self._parameters["weight"]
        assert weight is not None
        if x is None or x.dtype != weight.dtype or x.device != weight.device or _wants_grad(x, weight):
            result: torch.Tensor = own(self, *args, **kwargs)
            return result
        return rms_norm(x, weight, eps, adds_one=adds_one, rounds_first=rounds_first)

    return lambda module: MethodType(forward, module)  # a copy of the module rebinds a method to itself


def _is_rotary(function: Any) -> bool:
    return callable(function) and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]


def _router_key(module: nn.Module, device: torch.device) -> Any:
    """What routers of one kind share, for a module that looks like a product and a choice of its best; else None."""
    weight = _only_weight(module, "TopKRouter", device)
    top_k = vars(module).get("top_k")
    if weight is None or weight.dim() != 2 or not isinstance(top_k, int):
        return None
    options = tuple(
        sorted((key, value) for key, value in vars(module).items() if isinstance(value, bool | int | float))
    )
    return type(module), weight.shape, weight.dtype, "bias" in module._parameters, options


@torch.no_grad()
def _router_like(module: nn.Module, device: torch.device) -> MethodOf | None:
    """As ``_norm_like``. The product stays torch's own: LoRA on the router hangs on it."""
    from moegraft.kernels.router_topk.host import router_topk  # needs Triton

    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    trial, top_k = copy.copy(module), int(vars(module)["top_k"])
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    drawn = {
        name: nn.Parameter(torch.randn(value.shape, generator=generator).to(device, value.dtype), requires_grad=False)
        for name, value in parameters.items()
    }
    trial._parameters = dict(drawn)
    x = (weight.shape[1] ** -0.5 * torch.randn(64, weight.shape[1], generator=generator)).to(device, weight.dtype)
    own = type(module).forward
    try:
        expected = own(trial, x)
    except Exception:  # it wants more than a tensor
        return None
    if not (isinstance(expected, tuple) and len(expected) == 3 and all(isinstance(t, torch.Tensor) for t in expected)):
        return None
    logits, scores, ids = expected
    mine = functional.linear(x, drawn["weight"], drawn.get("bias"))
    if ids.shape != scores.shape or ids.dtype != torch.long or not torch.equal(mine, logits):
        return None
    for of_all, is_summed in ((True, True), (True, False), (False, True)):
        found = router_topk(mine, top_k, of_all=of_all, is_summed=is_summed, dtype=scores.dtype)
        # By expert: those of equal logits may change places.
        mine_TE, own_TE = (
            torch.zeros_like(mine, dtype=scores.dtype).scatter(1, *each) for each in (found[::-1], (ids, scores))
        )
        if _is_alike(mine_TE[own_TE != 0], own_TE[own_TE != 0], equal=0.9):
            break
    else:
        return None
    dtype = scores.dtype

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        assert weight is not None
        if x is None or x.dtype != weight.dtype or _wants_grad(x, weight):
            return own(self, *args, **kwargs)
        logits_TE = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return logits_TE, *router_topk(logits_TE, top_k, of_all=of_all, is_summed=is_summed, dtype=dtype)

    return lambda module: MethodType(forward, module)


class _Rotary:
    """``apply_rotary_pos_emb`` of one file of transformers, for one token a row."""

    def __init__(self, file: ModuleType, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._own: Callable[..., Any] = file.__dict__[_ROTARY]
        self._known: dict[Any, bool | None] = {}
        setattr(file, _ROTARY, self)

    def remove(self) -> None:
        if self._file.__dict__.get(_ROTARY) is self:
            setattr(self._file, _ROTARY, self._own)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        from moegraft.kernels.rotary.host import can_turn, rotary

        if args or kwargs or q.device != self._device or _wants_grad(q, k):
            return self._own(q, k, cos, sin, *args, **kwargs)
        key = (q.dtype, cos.dtype, q.shape[1:], k.shape[1:], cos.shape[1:])
        if key not in self._known:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._own(q, k, cos, sin)
            self._known[key] = self._try(q, k, cos)
        has_half = self._known[key]
        if has_half is None or not can_turn(q, k, cos, sin, has_half=has_half):
            return self._own(q, k, cos, sin)
        return rotary(q, k, cos, sin, has_half=has_half)

    def _try(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor) -> bool | None:
        """``has_half`` of the kernel that gives what the file's own function gives; None where none does."""
        from moegraft.kernels.rotary.host import can_turn, rotary

        generator = torch.Generator().manual_seed(0)

        def like(x: torch.Tensor) -> torch.Tensor:
            return torch.randn(3, *x.shape[1:], generator=generator).to(x.device, x.dtype)

        q, k, cos, sin = like(q), like(k), like(cos), like(cos)
        for has_half in (False, True):
            if can_turn(q, k, cos, sin, has_half=has_half):
                try:
                    expected = self._own(q, k, cos, sin)
                except Exception:
                    return None
                found = rotary(q, k, cos, sin, has_half=has_half)
                if all(map(_is_alike, found, expected)):
                    return has_half
        return None


def _is_alike(found: torch.Tensor, expected: torch.Tensor, equal: float = _ALIKE) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    is_near = torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=1e-2)
    return is_near and (found == expected).float().mean().item() >= equal


def _wants_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

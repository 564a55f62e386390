"""Modules of which adapters replace parameters (``modules_to_save``): their rows run through a copy of the module."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moegraft.core.errors import BatchError, UnsupportedModelError
from moegraft.integrations.transformers.host.dtensors import is_sharded, whole
from moegraft.integrations.transformers.sites.call import CallState, register
from moegraft.integrations.transformers.sites.seams import HookSeam
from moegraft.lora.bank import AdapterBank
from moegraft.lora.bank.handle import AdapterHandle, Residency
from moegraft.lora.call import AdapterCall
from moegraft.lora.punica.cpu import segments_of


@dataclass(frozen=True, eq=False)
class _Variant:
    """A copy of the module with an adapter's tensors, and what it was made of."""

    module: nn.Module
    residency: Residency | None
    sources: tuple[object, ...]


class SavedSeam(HookSeam):
    """Rows of adapters that replace parameters of the module run through a copy of it, made once an adapter.

    ``is_planned``: a parallel plan of transformers has wrapped the module, whose copy runs whole on every rank.
    """

    def __init__(
        self, name: str, module: nn.Module, bank: AdapterBank, state: CallState, *, is_planned: bool = False
    ) -> None:
        super().__init__(name, module, bank, state)
        self.is_planned = is_planned
        self._variants: WeakKeyDictionary[AdapterHandle, _Variant] = WeakKeyDictionary()
        self._wholes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._number = register(self)

    def install(self) -> None:
        """Raises UnsupportedModelError where a copy of the module could not run what the module runs."""
        self._bare_copy()
        # Before LoRA of the module, which is added to what the copy gives.
        self.module.register_forward_hook(self._hook, with_kwargs=True, prepend=True)

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises UnsupportedModelError for modules that take or give more than tensors."""
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        if kwargs or not all(isinstance(value, torch.Tensor) for value in (*args, *outputs)):
            raise UnsupportedModelError(
                f"an adapter replaces parameters of {self.name!r} (modules_to_save), which takes or gives more than "
                "tensors: a compiled graph cannot run the replacement; call the model without torch.compile"
            )
        torch.ops.moegraft.graft_saved(outputs, list(args), self.state.order, self._number)

    def replace_in(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Under the call that runs now, if there is one."""
        call = self.state.current()
        if call is not None:
            self.apply(call, tuple(inputs), {}, outputs[0] if len(outputs) == 1 else tuple(outputs))

    def apply(self, call: AdapterCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if call.rank_bound is not None:
            raise BatchError(
                f"an adapter that is loaded replaces parameters of {self.name!r} (modules_to_save), which a batch with "
                "rank_bound= cannot follow; unload the adapter"
            )
        handles = [handle for handle in call.batch.handles if any(module == self.name for module, _ in handle.saved)]
        if not handles:
            return
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        rows, dim = call.rows_along(self.name, first.shape)
        rows_of = dict(segments_of(rows).rows_of_segments())
        for handle in handles:
            rows_L = rows_of.get(handle.slot)
            if rows_L is not None:
                mine_args, mine_kwargs = _pick((args, kwargs), rows_L, rows.num_rows, dim)
                _put(output, self._variant(handle)(*mine_args, **mine_kwargs), rows_L, rows.num_rows, dim)

    def _variant(self, handle: AdapterHandle) -> nn.Module:
        """The copy for a held adapter. Made anew where its pages or tensors of the module were replaced."""
        own = self.module.__dict__.get("forward")
        sources = (*self.module._parameters.values(), *self.module._buffers.values(), own)
        variant = self._variants.get(handle)
        if (
            variant is None
            or variant.residency is not handle.residency
            or any(one is not other for one, other in zip(variant.sources, sources, strict=True))
        ):
            tensors = {param: self.bank.saved(handle, module, param) for module, param in self._params(handle)}
            variant = _Variant(self._copy(tensors), handle.residency, sources)
            self._variants[handle] = variant
        return variant.module

    def _params(self, handle: AdapterHandle) -> list[tuple[str, str]]:
        return [(module, param) for module, param in handle.saved if module == self.name]

    def _copy(self, tensors: dict[str, torch.Tensor | None]) -> nn.Module:
        """The module with some tensors replaced and without hooks; shares everything else."""
        variant = self._bare_copy()
        for kept, own in (("_parameters", self.module._parameters), ("_buffers", self.module._buffers)):
            vars(variant)[kept] = {k: tensors[k] if k in tensors else self._whole(k, v) for k, v in own.items()}
        return variant

    def _bare_copy(self) -> nn.Module:
        variant = copy.copy(self.module)
        variant._forward_hooks = OrderedDict()
        if self.is_planned:
            variant.__dict__.pop("forward", None)  # the plan's, bound to the module and its sharded parameters
        _rebind(self.name, self.module, variant)
        return variant

    def _whole(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Put together once, when all ranks first run an adapter that does not replace it: later a rank may make its
        copy anew, after an eviction of its own, while no other takes part."""
        if tensor is None or not is_sharded(tensor):
            return tensor
        found = self._wholes.get(name)
        if found is None or found[0] is not tensor:
            found = self._wholes[name] = (tensor, whole(tensor))
        return found[1]


def _rebind(name: str, module: nn.Module, variant: nn.Module) -> None:
    """A forward that the instance has (hooks of accelerate, kernelize, a wrapper) runs on the copy, as do the methods
    that it was put in the place of. Raises UnsupportedModelError where that cannot be."""
    if "forward" not in variant.__dict__:
        return
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise UnsupportedModelError(
            f"{name!r} ({type(module).__name__}) is offloaded by accelerate, which would load the base model's "
            "parameters over those that an adapter replaces (modules_to_save); load the model without offload"
        )
    for key, value in list(variant.__dict__.items()):
        if callable(value) and not isinstance(value, nn.Module):
            variant.__dict__[key] = _rebound(value, module, variant)
    if variant.__dict__["forward"] is module.__dict__["forward"]:
        raise UnsupportedModelError(
            f"{name!r} ({type(module).__name__}) has a forward of its own, a {type(module.forward).__name__} that "
            "cannot run on a copy of the module: parameters that an adapter replaces (modules_to_save) would be lost"
        )


def _rebound(value: Any, module: nn.Module, variant: nn.Module) -> Any:
    """``value`` with ``variant`` in the place of ``module`` wherever it is bound to it; itself where it is not."""
    if value is module:
        return variant
    if isinstance(value, MethodType):
        return MethodType(value.__func__, variant) if value.__self__ is module else value
    if isinstance(value, functools.partial):
        func = _rebound(value.func, module, variant)
        args = tuple(_rebound(arg, module, variant) for arg in value.args)
        keywords = {key: _rebound(arg, module, variant) for key, arg in value.keywords.items()}
        if (
            func is value.func
            and all(map(_is, args, value.args))
            and all(map(_is, keywords.values(), value.keywords.values()))
        ):
            return value
        return functools.partial(func, *args, **keywords)
    if isinstance(value, FunctionType) and value.__closure__:
        found = [cell.cell_contents for cell in value.__closure__]
        cells = [_rebound(content, module, variant) for content in found]
        if all(map(_is, cells, found)):
            return value
        closure = tuple(map(CellType, cells))
        function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        function.__kwdefaults__ = value.__kwdefaults__
        return function
    return value


def _is(one: object, other: object) -> bool:
    return one is other


def _pick(value: Any, rows_L: torch.Tensor, num_rows: int, dim: int) -> Any:
    """What belongs to these rows of the arguments: rows stand along ``dim``."""
    if isinstance(value, torch.Tensor):
        # What has one dimension belongs to the experts (a balancing bias), not to the rows.
        has_rows = value.dim() > 1 and value.shape[dim] == num_rows and (dim == 0 or value.shape[0] == 1)
        return value.index_select(dim, rows_L) if has_rows else value
    if isinstance(value, dict):
        return {key: _pick(item, rows_L, num_rows, dim) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_pick(item, rows_L, num_rows, dim) for item in value)
    return value


def _put(output: Any, mine: Any, rows_L: torch.Tensor, num_rows: int, dim: int) -> None:
    """A module may flatten its rows on the way: an output has one or several rows for each that went in."""
    if not isinstance(output, torch.Tensor):
        for one, other in zip(output, mine, strict=True):
            _put(one, other, rows_L, num_rows, dim)
        return
    if output.dim() == 0:
        return
    if dim == 1 and output.dim() > 1 and output.shape[0] == 1:
        output, mine = output.squeeze(0), mine.squeeze(0)
    if output.shape[0] % num_rows:
        raise UnsupportedModelError(
            f"a module of which an adapter replaces parameters gives {tuple(output.shape)} for {num_rows} rows; "
            "expected a multiple of the rows"
        )
    rows = output.unflatten(0, (num_rows, -1))
    rows.index_copy_(0, rows_L, mine.to(output.dtype).unflatten(0, (rows_L.shape[0], -1)))

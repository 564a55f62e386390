"""LoRA on everything but the experts: linear maps, routers, embeddings, and parameters that an adapter replaces.

Seams are removable hooks, put in when an adapter that touches the module is loaded and taken out after the last one
left: an untouched module runs exactly as before.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moegraft.build import punica_for
from moegraft.core.errors import UnsupportedModelError
from moegraft.core.tables import LinearFactor
from moegraft.integrations.transformers.call import ActiveCall, CallState
from moegraft.integrations.transformers.dtensors import local, whole
from moegraft.integrations.transformers.router_weight import RouterWeight
from moegraft.lora.bank import AdapterBank
from moegraft.lora.mapping import AdapterMapping
from moegraft.lora.punica import PunicaWrapperBase
from moegraft.lora.targets import LinearTarget
from moegraft.parallel import LinearSlice
from moegraft.parallel.collectives import Communicator


class Seam(ABC):
    """One place of the model where adapters other than experts' take part."""

    def __init__(self, name: str, module: nn.Module, bank: AdapterBank, state: CallState) -> None:
        self.name = name
        self.module = module
        self.bank = bank
        self.state = state

    @abstractmethod
    def install(self) -> None: ...

    @abstractmethod
    def remove(self) -> None: ...


class _HookSeam(Seam):
    """A seam behind the module's forward pass."""

    _handle: RemovableHandle | None = None

    def install(self) -> None:
        self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self.state.current()
        if call is not None:
            _without_grad(self.apply, call, args, kwargs, output)

    @abstractmethod
    def apply(self, call: ActiveCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Change ``output`` in place in the rows that have an adapter."""


def _without_grad(run: Callable[..., None], *args: Any) -> None:
    """A batch with adapters is inference. GraftedModel has switched gradients off already; an engine may not have."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            run(*args)
    else:
        run(*args)


class LinearDelta:
    """y[m] += delta of row m, in place: the shared heart of the linear and the router seam.

    The host's GEMM has rounded y before the delta is added; see docs/numerics.md.
    """

    def __init__(
        self, target: LinearTarget, bank: AdapterBank, state: CallState, punica: PunicaWrapperBase | None = None
    ) -> None:
        self.target = target
        self.name = target.name
        self.tables = bank.linear_tables(target.name)
        self.punica = punica or punica_for(self.tables.pool.device)
        self.state = state

    @property
    def is_wanted(self) -> bool:
        """Whether the call in flight has LoRA on this map."""
        call = self.state.current()
        return call is not None and call.touches(self.name)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        call = self.state.current()
        if call is None or not call.touches(self.name):
            return
        x_MI = x.reshape(-1, self.target.in_features)
        mapping = call.mapping(x_MI.shape[0])
        if mapping.has_adapters:
            self.punica.add_lora_linear(
                y.view(-1, self.target.out_features),
                x_MI.to(self.tables.pool.dtype),
                mapping,
                self.tables,
                bias_O=bias_O,
                rank_bound=call.linear_rank(self.target.name),
            )


class LinearSeam(_HookSeam):
    """An nn.Linear; ``target`` has the sizes that this rank sees, and ``punica`` adds what they need."""

    def __init__(
        self,
        target: LinearTarget,
        module: nn.Module,
        bank: AdapterBank,
        state: CallState,
        punica: PunicaWrapperBase | None = None,
    ) -> None:
        super().__init__(target.name, module, bank, state)
        self.delta = LinearDelta(target, bank, state, punica)

    def apply(self, call: ActiveCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bias = getattr(self.module, "bias", None)
        self.delta(output, args[0] if args else kwargs["input"], None if bias is None else local(bias))


class EmbeddingSeam(_HookSeam):
    """An nn.Embedding: y[m] += B^T @ A[:, token m].

    ``mine``: the tokens whose columns of A this rank holds, None for all; ``ranks`` then hold the others.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        bank: AdapterBank,
        state: CallState,
        mine: LinearSlice | None,
        ranks: Communicator,
    ) -> None:
        super().__init__(name, module, bank, state)
        self.ranks = ranks
        self.pieces = None if mine is None else mine.inputs

    def apply(self, call: ActiveCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not call.touches(self.name):
            return
        ids_M = (args[0] if args else kwargs["input"]).reshape(-1)
        y_MD = output.view(-1, output.shape[-1])
        mapping = call.mapping(ids_M.shape[0])
        factors = {}
        for slot in mapping.active_slots:
            a_RV = self.bank.factor(slot, self.name, LinearFactor.A)
            b_RD = self.bank.factor(slot, self.name, LinearFactor.B)
            if a_RV is not None and b_RD is not None:
                factors[slot] = a_RV, b_RD
        low_rank = {slot: self._low_rank(a_RV, ids_M[mapping.rows_of(slot)]) for slot, (a_RV, _) in factors.items()}
        if self.pieces is not None and factors:
            low_rank = self._sum(low_rank, mapping)
        for slot, (_, b_RD) in factors.items():
            y_MD.index_add_(0, mapping.rows_of(slot), (low_rank[slot] @ b_RD).to(y_MD.dtype))

    def _low_rank(self, a_RV: torch.Tensor, ids_L: torch.Tensor) -> torch.Tensor:
        """[L, R]; zero for the tokens of other ranks."""
        if self.pieces is None:
            return a_RV[:, ids_L].transpose(0, 1)
        ((start, stop),) = self.pieces
        is_mine_L = (ids_L >= start) & (ids_L < stop)
        own_LR = a_RV[:, (ids_L - start).clamp(0, stop - start - 1)].transpose(0, 1)
        return own_LR.masked_fill(~is_mine_L[:, None], 0)

    def _sum(self, low_rank: dict[int, torch.Tensor], mapping: AdapterMapping) -> dict[int, torch.Tensor]:
        """Over the ranks, in one buffer of all rows: ranks may keep an adapter in different slots."""
        widest = max(v_LR.shape[1] for v_LR in low_rank.values())
        some = next(iter(low_rank.values()))
        all_MR = some.new_zeros(mapping.token_slots.shape[0], widest)
        for slot, v_LR in low_rank.items():
            all_MR[mapping.rows_of(slot), : v_LR.shape[1]] = v_LR
        self.ranks.all_reduce(all_MR)
        return {slot: all_MR[mapping.rows_of(slot), : v_LR.shape[1]] for slot, v_LR in low_rank.items()}


class SavedSeam(_HookSeam):
    """A module of which adapters replace parameters (``modules_to_save``): their rows run through the replacement.

    ``is_planned``: a parallel plan of transformers has wrapped the module, whose replacement runs whole on every rank.
    """

    def __init__(
        self, name: str, module: nn.Module, bank: AdapterBank, state: CallState, *, is_planned: bool = False
    ) -> None:
        super().__init__(name, module, bank, state)
        self.is_planned = is_planned

    def apply(self, call: ActiveCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        num_rows = first.shape[0]
        for handle in call.batch.handles:
            params = [param for module, param in handle.saved if module == self.name]
            if not params:
                continue
            rows_L = call.mapping(num_rows).rows_of(handle.slot)
            tensors = {param: self.bank.saved(handle, self.name, param) for param in params}
            mine = _pick((args, kwargs), rows_L, num_rows)
            _put(output, self._variant(tensors)(*mine[0], **mine[1]), rows_L, num_rows)

    def _variant(self, tensors: dict[str, torch.Tensor | None]) -> nn.Module:
        """The module with some tensors replaced and without hooks; shares everything else."""
        variant = copy.copy(self.module)
        variant._forward_hooks = OrderedDict()
        if self.is_planned:
            variant.__dict__.pop("forward", None)  # the plan's, bound to the module and its sharded parameters
        params = {k: tensors.get(k, None if v is None else whole(v)) for k, v in self.module._parameters.items()}
        variant._parameters = params  # type: ignore[assignment]
        variant._buffers = {k: tensors.get(k, v) for k, v in self.module._buffers.items()}
        return variant


def _pick(value: Any, rows_L: torch.Tensor, num_rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        # What has one dimension belongs to the experts (a balancing bias), not to the rows.
        return value[rows_L] if value.dim() > 1 and value.shape[0] == num_rows else value
    if isinstance(value, dict):
        return {key: _pick(item, rows_L, num_rows) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_pick(item, rows_L, num_rows) for item in value)
    return value


def _put(output: Any, mine: Any, rows_L: torch.Tensor, num_rows: int) -> None:
    """A module may flatten its rows on the way: an output has one or several rows for each that went in."""
    if isinstance(output, torch.Tensor):
        if output.dim() == 0:
            return
        if output.shape[0] % num_rows:
            raise UnsupportedModelError(
                f"a module of which an adapter replaces parameters gives {tuple(output.shape)} for {num_rows} rows; "
                "expected a multiple of the rows"
            )
        rows = output.unflatten(0, (num_rows, -1))
        rows.index_copy_(0, rows_L, mine.to(output.dtype).unflatten(0, (rows_L.shape[0], -1)))
        return
    for one, other in zip(output, mine, strict=True):
        _put(one, other, rows_L, num_rows)


class RouterSeam(Seam):
    """A router that keeps its weight as a Parameter: every product with it gets the delta."""

    def __init__(self, target: LinearTarget, module: nn.Module, bank: AdapterBank, state: CallState) -> None:
        super().__init__(target.name, module, bank, state)
        self.param = target.param
        self.delta = LinearDelta(target, bank, state)
        self._original: nn.Parameter | None = None

    def install(self) -> None:
        original = self.module._parameters[self.param]
        if original is None:
            raise UnsupportedModelError(f"router {self.name!r} has no parameter {self.param!r}")
        self._original = original
        self.module._parameters[self.param] = RouterWeight.over(original, self.delta)

    def remove(self) -> None:
        current = self.module._parameters[self.param]
        if self._original is not None and current is not None:
            # The model may have been moved to another device or dtype meanwhile.
            self._original.data = current.data
            self.module._parameters[self.param] = self._original

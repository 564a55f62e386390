"""LoRA on everything but the experts: linear maps, routers, embeddings, and parameters that an adapter replaces.

Seams are removable hooks, put in when an adapter that touches the module is loaded and taken out after the last one
left: an untouched module runs exactly as before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moegraft.build import punica_for
from moegraft.core.errors import UnsupportedModelError
from moegraft.core.tables import LinearFactor, LinearTables
from moegraft.integrations.transformers.host.dtensors import local
from moegraft.integrations.transformers.sites.call import CallState, register, remove_hooks
from moegraft.integrations.transformers.sites.router_weight import RouterWeight
from moegraft.lora.bank import AdapterBank
from moegraft.lora.call import AdapterCall
from moegraft.lora.punica import PunicaWrapperBase
from moegraft.lora.punica.cpu import PunicaWrapperCPU, segments_of
from moegraft.lora.punica.embedding import expand_embedding, shrink_embedding
from moegraft.lora.punica.gpu import PunicaWrapperGPU
from moegraft.lora.rows import AdapterRows
from moegraft.lora.targets import LinearTarget
from moegraft.parallel import LinearSlice
from moegraft.parallel.collectives import Communicator

if TYPE_CHECKING:
    from moegraft.integrations.transformers.sites.shared import SharedInput


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


class HookSeam(Seam):
    """A seam behind the module's forward pass."""

    def install(self) -> None:
        self.module.register_forward_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        remove_hooks(self.module, self)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if len(rest) != 2:
            # Put in or taken out while this pass runs in another thread: torch does not know for an instant that the
            # hook takes keyword arguments. No adapter of a running batch needs a seam that comes or goes.
            return
        kwargs, output = rest
        is_traced = torch.compiler.is_compiling()
        if is_traced and self.state.fixed is None:
            self.trace(args, kwargs, output)
            return
        call = self.state.fixed if is_traced else self.state.current()
        if call is not None and not self.is_done(call, output, is_traced=is_traced):
            without_grad(self.apply, call, args, kwargs, output)

    def is_done(self, call: AdapterCall, output: Any, *, is_traced: bool) -> bool:
        """Whether the output has its delta already."""
        return False

    @abstractmethod
    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Leave an op in a graph that is being traced, which does what ``apply`` does for the call of its time."""

    @abstractmethod
    def apply(self, call: AdapterCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Change ``output`` in place in the rows that have an adapter."""


def without_grad(run: Callable[..., None], *args: Any) -> None:
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
        self.shares = type(self.punica) in (PunicaWrapperCPU, PunicaWrapperGPU)  # no other rank has a part in it
        self.state = state
        self.number = register(self)

    @property
    def is_wanted(self) -> bool:
        """Whether the call in flight has LoRA on this map; a graph that is traced serves calls that may."""
        is_traced = torch.compiler.is_compiling()
        call = self.state.fixed if is_traced else self.state.current()
        return is_traced if call is None else call.linear_bound(self.name) > 0

    def __call__(self, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        if torch.compiler.is_compiling():
            if self.state.fixed is None:
                torch.ops.moegraft.graft_delta(y, x, bias_O, self.state.order, self.number)
            else:
                self.add(self.state.fixed, y, x, bias_O)
        else:
            self.add_to(y, x, bias_O)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Under the call that runs now, if there is one."""
        call = self.state.current()
        if call is not None:
            self.add(call, y, x, bias_O)

    def add(self, call: AdapterCall, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        target, rank_bound = self.target, call.linear_bound(self.target.name)
        if rank_bound == 0:
            return
        rows = self.rows(call, x.shape[:-1])
        if rows.host is None or rows.has_adapters:
            x_MI = x.reshape(-1, target.in_features).to(self.tables.pool.dtype)
            y_MO = y.view(-1, target.out_features)
            self.punica.add_lora_linear(y_MO, x_MI, rows, self.tables, rank_bound=rank_bound, bias_O=bias_O)

    def rows(self, call: AdapterCall, shape: Sequence[int]) -> AdapterRows:
        """Whose the rows of an input are. Raises BatchError where that is not known."""
        tower = self.target.tower
        return call.rows(self.name, shape) if tower is None else call.tower_rows(tower, self.name, shape)


class LinearSeam(HookSeam):
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
        self.shared: SharedInput | None = None

    def is_done(self, call: AdapterCall, output: Any, *, is_traced: bool) -> bool:
        """Eager code asks the tensor itself: maps may come to share their input while a pass runs in another thread."""
        if is_traced:
            return self.shared is not None and self.shared.serves(self, call)
        return hasattr(output, "has_delta")

    def apply(self, call: AdapterCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.delta.add(call, output, args[0] if args else kwargs["input"], self.bias())

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.delta(output, args[0] if args else kwargs["input"], self.bias())

    def bias(self) -> torch.Tensor | None:
        """The module's own, as this rank has it."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else local(bias)


class EmbeddingSeam(HookSeam):
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
        self.number = register(self)
        self.num_embeddings = bank.layout.embeddings[name].num_embeddings
        self.tables = LinearTables(
            pool=bank.pool.data,
            page_table=bank.tables.page_table,
            factors=bank.tables.factors[:, bank.layout.module_entries(name)],
            page_elems=bank.pool.page_elems,
        )

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs["input"]
        torch.ops.moegraft.graft_delta(output, ids, None, self.state.order, self.number)

    def add_to(self, y: torch.Tensor, ids: torch.Tensor, _: torch.Tensor | None) -> None:
        """Under the call that runs now, if there is one."""
        call = self.state.current()
        if call is not None:
            self.apply(call, (ids,), {}, y)

    def apply(self, call: AdapterCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rank_bound = call.linear_bound(self.name)
        if rank_bound == 0:
            return
        ids = args[0] if args else kwargs["input"]
        rows, ids_M = call.rows(self.name, ids.shape), ids.reshape(-1)
        y_MD = output.view(-1, output.shape[-1])
        if rows.host is None:
            v_MR = shrink_embedding(
                ids_M,
                rows.slots_M,
                self.tables,
                num_embeddings=self.num_embeddings,
                rank_bound=rank_bound,
                pieces=self.pieces,
            )
            if self.pieces is not None:
                self.ranks.all_reduce(v_MR)
            expand_embedding(y_MD, v_MR, rows.slots_M, self.tables)
        elif rows.has_adapters:
            self._apply_by_slot(rows, ids_M, y_MD)

    def _apply_by_slot(self, rows: AdapterRows, ids_M: torch.Tensor, y_MD: torch.Tensor) -> None:
        """One product an adapter, over views of its factors."""
        factors, low_rank = {}, {}
        rows_of = dict(segments_of(rows).rows_of_segments())
        for slot, rows_L in rows_of.items():
            a_RV = self.bank.factor(slot, self.name, LinearFactor.A)
            b_RD = self.bank.factor(slot, self.name, LinearFactor.B)
            if a_RV is not None and b_RD is not None:
                factors[slot] = b_RD
                low_rank[slot] = self._low_rank(a_RV, ids_M[rows_L])
        if self.pieces is not None and factors:
            low_rank = self._sum(low_rank, rows_of, rows.num_rows)
        for slot, b_RD in factors.items():
            y_MD.index_add_(0, rows_of[slot], (low_rank[slot] @ b_RD).to(y_MD.dtype))

    def _low_rank(self, a_RV: torch.Tensor, ids_L: torch.Tensor) -> torch.Tensor:
        """[L, R]; zero for the tokens of other ranks."""
        if self.pieces is None:
            return a_RV[:, ids_L].transpose(0, 1)
        ((start, stop),) = self.pieces
        is_mine_L = (ids_L >= start) & (ids_L < stop)
        own_LR = a_RV[:, (ids_L - start).clamp(0, stop - start - 1)].transpose(0, 1)
        return own_LR.masked_fill(~is_mine_L[:, None], 0)

    def _sum(
        self, low_rank: dict[int, torch.Tensor], rows_of: dict[int, torch.Tensor], num_rows: int
    ) -> dict[int, torch.Tensor]:
        """Over the ranks, in one buffer of all rows: ranks may keep an adapter in different slots."""
        widest = max(v_LR.shape[1] for v_LR in low_rank.values())
        some = next(iter(low_rank.values()))
        all_MR = some.new_zeros(num_rows, widest)
        for slot, v_LR in low_rank.items():
            all_MR[rows_of[slot], : v_LR.shape[1]] = v_LR
        self.ranks.all_reduce(all_MR)
        return {slot: all_MR[rows_of[slot], : v_LR.shape[1]] for slot, v_LR in low_rank.items()}


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
        # What somebody else has put there since stays.
        if self._original is not None and isinstance(current, RouterWeight):
            # The model may have been moved to another device or dtype meanwhile.
            self._original.data = current.data
            self.module._parameters[self.param] = self._original

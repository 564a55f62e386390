"""The call in flight, reachable from every layer without an argument, since transformers' hooks carry none; and the
hooks that state the rows of every forward pass of the model.

A compiled graph holds opaque ops in the place of hooks, which ask for the call when they run. A traced hook may not
look up which batch runs: the graph would keep that batch's adapters for ever. It leaves an op behind that names its
seam by number and finds the call whenever the graph runs, so that one graph serves every composition of adapters,
loads, unloads and batches without any. The ops run in the order in which they were traced, since each changes
``order``, a tensor of the model's that holds nothing. Their tag keeps them out of CUDA graphs, which would keep the
launches of one batch; a call with fixed bounds is traced as it is (``CallState.fixed``) and may be captured.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import BatchError, UnsupportedModelError
from moegraft.integrations.transformers.host.targets import HEADS
from moegraft.lora.call import AdapterCall
from moegraft.lora.targets import ModelTargets

_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(owner: object) -> int:
    """The number by which a graph knows the owner; the graph does not keep it alive."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def _owner(number: int) -> Any:
    owner = _owners.get(number)
    if owner is None:
        raise UnsupportedModelError(
            "this graph was compiled while a GraftedModel was attached that is detached now; compile the model again"
        )
    return owner


def _define(name: str, schema: str, run: Any, fake: Any) -> None:
    torch.library.define(f"moegraft::{name}", schema, tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(f"moegraft::{name}", "default", run)
    torch.library.register_fake(f"moegraft::{name}", fake)


def _nothing(*_: object) -> None:
    return None


def _begin(
    tokens: torch.Tensor | None, kept: torch.Tensor | None, count: int, _: torch.Tensor, number: int, __: str
) -> None:
    _owner(number).begin(tokens, kept if kept is not None else count or None)


def _end(_: torch.Tensor, number: int) -> None:
    _owner(number).end()


def _delta(y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, _: torch.Tensor, number: int) -> None:
    _owner(number).add_to(y, x, bias)


def _saved(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], _: torch.Tensor, number: int) -> None:
    _owner(number).replace_in(outputs, inputs)


def _experts(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, _: torch.Tensor, number: int, __: str
) -> torch.Tensor:
    out_TD: torch.Tensor = _owner(number).run(x_TD, weights_TK, ids_TK)
    return out_TD


def _no_batch(_: torch.Tensor, number: int) -> None:
    _owner(number).refuse_batch()


# ``version`` is a guard: whoever puts in or takes out a hook changes the string, and the graph is traced again.
_define(
    "graft_begin",
    "(Tensor? tokens, Tensor? kept, int count, Tensor(a!) order, int number, str version) -> ()",
    _begin,
    _nothing,
)
_define("graft_end", "(Tensor(a!) order, int number) -> ()", _end, _nothing)
_define("graft_delta", "(Tensor(a!) y, Tensor x, Tensor? bias, Tensor(b!) order, int number) -> ()", _delta, _nothing)
_define("graft_saved", "(Tensor(a!)[] y, Tensor[] x, Tensor(b!) order, int number) -> ()", _saved, _nothing)
_define(
    "graft_experts",
    "(Tensor x, Tensor weights, Tensor ids, Tensor(a!) order, int number, str version) -> Tensor",
    _experts,
    lambda x_TD, *_: torch.empty_like(x_TD, memory_format=torch.contiguous_format),
)
_define("graft_no_batch", "(Tensor(a!) order, int number) -> ()", _no_batch, _nothing)


# Inputs of a forward pass whose first two dimensions are [B, S], in the order in which models prefer them.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True, eq=False)
class _Block:
    """One ``with`` block: its call, and the block around it."""

    state: CallState
    call: AdapterCall
    outer: _Block | None
    thread: int


_CURRENT: ContextVar[_Block | None] = ContextVar("moegraft_call", default=None)


class CallState:
    """Which call a layer of one grafted model belongs to.

    A context variable, so that threads (and tasks) that call one model at once keep apart; and a binding that every
    thread sees, for engines that run the forward pass on threads of their own. A call belongs to its block: one whose
    block was left serves no layer, and blocks of one thread are left in the reverse order.
    """

    def __init__(self, device: torch.device) -> None:
        self._bound: _Block | None = None
        self._lock = threading.Lock()
        # What a traced graph reads.
        self.order = torch.zeros(1, dtype=torch.int32, device=device)
        self.version = "0"
        self.fixed: AdapterCall | None = None
        self.number = register(self)

    def refuse_batch(self) -> None:
        """What a graph that was traced to compute gradients calls. Raises BatchError inside a batch of adapters."""
        if self.current() is not None:
            raise BatchError(
                "the model was compiled where gradients were wanted, and such a graph has no adapters: call it under "
                "torch.no_grad(), which compiles another one"
            )

    def hooks_changed(self) -> None:
        """Graphs that were traced before are traced again."""
        self.version = str(int(self.version) + 1)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Sites, seams and hooks all hold this record: a copy of any of them would run without its adapters."""
        raise UnsupportedModelError(
            "a grafted model can be neither copied nor pickled: call detach() on its GraftedModel, copy the model, and "
            "attach the copy"
        )

    def current(self) -> AdapterCall | None:
        """Raises BatchError for a call whose block was left meanwhile."""
        block = _mine(_CURRENT.get(), self) or self._bound
        if block is None:
            return None
        if block.call.is_over:
            raise BatchError(
                "this batch was released while the model ran on it, or its block was left on another thread; a layer "
                "must not use its adapters any more"
            )
        return block.call

    def starting(self) -> AdapterCall | None:
        """The call of a forward pass that starts now: blocks that were left elsewhere are passed over."""
        block = _CURRENT.get()
        if block is not None and block.call.is_over:
            _CURRENT.set(_alive(block))
        return self.current()

    @contextmanager
    def running(self, call: AdapterCall) -> Iterator[None]:
        """The call of this thread or task inside the block."""
        block = _Block(self, call, _alive(_CURRENT.get()), threading.get_ident())
        is_entered = False
        try:  # around both lines: an interrupt may come between them
            _CURRENT.set(block)
            is_entered = True
            yield
        finally:
            call.is_over = True
            if _CURRENT.get() is block:
                _CURRENT.set(_alive(block.outer))
            elif is_entered:
                raise BatchError(_NOT_NESTED)

    @contextmanager
    def bound(self, call: AdapterCall) -> Iterator[None]:
        """The call of every thread that has none of its own inside the block; of one thread at a time."""
        thread = threading.get_ident()
        block: _Block | None = None
        is_entered = False
        try:
            with self._lock:
                outer = _alive(self._bound)
                if outer is not None and outer.thread != thread:
                    raise BatchError("another thread runs a batch with all_threads=True now; one such batch at a time")
                block = _Block(self, call, outer, thread)
                self._bound = block
                self.fixed = call if call.is_static else None
                is_entered = True
            yield
        finally:
            call.is_over = True
            with self._lock:
                is_last = self._bound is block or not is_entered
                self._bound = _alive(self._bound)
                around = self._bound.call if self._bound is not None else None
                self.fixed = around if around is not None and around.is_static else None
            if not is_last:
                raise BatchError(_NOT_NESTED)


_NOT_NESTED = (
    "a batch block was left out of order: batches of one thread nest, and each is left on its own thread. Its adapters "
    "are released"
)


def _mine(block: _Block | None, state: CallState) -> _Block | None:
    while block is not None and block.state is not state:
        block = block.outer
    return block


def _alive(block: _Block | None) -> _Block | None:
    while block is not None and block.call.is_over:
        block = block.outer
    return block


class ForwardHooks:
    """States the rows of every forward pass: hooks around the modules that take all tokens, the model itself first."""

    def __init__(self, state: CallState, model: PreTrainedModel, names: Collection[str]) -> None:
        """``names``: the modules inside ``model`` that are given tokens, [B, S]; the model itself is the empty name."""
        begun = _Begun()
        self._hooks = [_ForwardHook(state, begun, model.get_submodule(name), is_root=name == "") for name in names]

    def install(self) -> None:
        for hook in self._hooks:
            hook.install()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def remove_hooks(module: nn.Module, owner: object) -> None:
    """All forward hooks that are methods of ``owner``; no handle of them can be lost to an interrupt."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            hooks.pop(key, None)
            for extra in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                extra.pop(key, None)


class _Begun(threading.local):
    """By thread: the calls whose forward passes run, None for a pass that states nothing."""

    def __init__(self) -> None:
        self.calls: list[AdapterCall | None] = []


class _ForwardHook:
    """Around the forward passes of one module."""

    def __init__(self, state: CallState, begun: _Begun, module: nn.Module, *, is_root: bool) -> None:
        self._state = state
        self._begun = begun
        self._is_root = is_root
        parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
        self._positions = tuple(parameters)[1:]  # behind self
        self._number = register(self)
        self._module = module

    def install(self) -> None:
        self._module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._module.register_forward_hook(self._after, always_call=True)

    def remove(self) -> None:
        remove_hooks(self._module, self)

    def begin(self, tokens: torch.Tensor | None, kept: int | torch.Tensor | None) -> None:
        """A forward pass over tokens [B, S, ...] begins; None: one that says nothing of its rows."""
        calls = self._begun.calls
        if self._is_root:
            calls.clear()  # what an interrupt has left behind
        calls.append(None)
        call = self._state.starting()
        if call is not None and tokens is not None:
            call.begin(tokens.shape[0], tokens.shape[1], kept, is_outermost=self._is_root)
            calls[-1] = call

    def end(self) -> None:
        """The one that began last is over."""
        call = self._begun.calls.pop()
        if call is not None:
            call.end()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, kept = _tokens(self._positions, args, kwargs)
        if not torch.compiler.is_compiling():
            self.begin(tokens, kept)
        elif self._state.fixed is None:
            count = kept if isinstance(kept, int) else 0 if kept is None else -1
            which = kept if isinstance(kept, torch.Tensor) else None
            state = self._state
            torch.ops.moegraft.graft_begin(tokens, which, count, state.order, self._number, state.version)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.end()
        elif self._state.fixed is None:
            torch.ops.moegraft.graft_end(self._state.order, self._number)


def _tokens(
    positions: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor | None, int | torch.Tensor | None]:
    """(the input whose first dimensions are [B, S], which of the tokens the head is to see or None)."""
    given = {**dict(zip(positions, args, strict=False)), **kwargs}
    kept = given.get("logits_to_keep")
    if not isinstance(kept, torch.Tensor) and not (isinstance(kept, int) and kept > 0):
        kept = None
    for name in _TOKENS:
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value, kept
    return None, kept


def batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Rows of the batch, from the first tensor among the positional arguments and ``names``; None where none is."""
    first = args[0] if args else None
    for name in names:
        first = kwargs.get(name) if first is None else first
    return None if first is None else int(first.shape[0])


def token_modules(model: PreTrainedModel, targets: ModelTargets) -> list[str]:
    """The model itself (the empty name) and those inside it that are given tokens and hold what adapters may touch."""
    owners = {name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    linears = [name for name, target in targets.linears.items() if target.tower is None]
    served = {_innermost(owners, name) for name in (*targets.experts, *linears, *targets.embeddings)}
    return sorted({"", *served})


def head_modules(model: PreTrainedModel, targets: ModelTargets) -> frozenset[str]:
    """Linear maps behind the text stack: they may see the last tokens of each row only."""
    output = model.get_output_embeddings()
    return frozenset(
        name
        for name, target in targets.linears.items()
        if target.tower is None
        if "." not in name or name.rpartition(".")[2] in HEADS or model.get_submodule(name) is output
    )


def _innermost(prefixes: Collection[str], name: str) -> str:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name and name not in prefixes:
        name = name.rpartition(".")[0]
    return name

"""The call in flight, reachable from every layer without an argument, since transformers' hooks carry none; and the
hooks that state the rows of every forward pass of the model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import BatchError
from moegraft.integrations.transformers.scope import HEADS
from moegraft.lora.call import AdapterCall
from moegraft.lora.targets import ModelTargets

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

    def __init__(self) -> None:
        self._bound: _Block | None = None
        self._lock = threading.Lock()

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
        _CURRENT.set(block)
        try:
            yield
        finally:
            call.is_over = True
            if _CURRENT.get() is not block:
                raise BatchError(_NOT_NESTED)
            _CURRENT.set(_alive(block.outer))

    @contextmanager
    def bound(self, call: AdapterCall) -> Iterator[None]:
        """The call of every thread that has none of its own inside the block; of one thread at a time."""
        thread = threading.get_ident()
        with self._lock:
            outer = _alive(self._bound)
            if outer is not None and outer.thread != thread:
                raise BatchError("another thread runs a batch with all_threads=True now; one such batch at a time")
            block = self._bound = _Block(self, call, outer, thread)
        try:
            yield
        finally:
            call.is_over = True
            with self._lock:
                is_last = self._bound is block
                self._bound = _alive(self._bound)
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
        self._state = state
        self._root = model
        self._begun = _Begun()
        self._positions: dict[nn.Module, tuple[str, ...]] = {}
        for name in names:
            module = model.get_submodule(name)
            parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
            self._positions[module] = tuple(parameters)[1:]  # behind self

    def install(self) -> None:
        for module in self._positions:
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            module.register_forward_hook(self._after, always_call=True)

    def remove(self) -> None:
        for module in self._positions:
            remove_hooks(module, self)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun, is_root = self._begun.calls, module is self._root
        if is_root:
            begun.clear()  # what an interrupt has left behind
        begun.append(None)
        call = self._state.starting()
        if call is None:
            return
        given = dict(zip(self._positions[module], args, strict=False)) | kwargs
        shape = _token_shape(given)
        if shape is None:
            return
        call.begin(*shape, kept=_kept(given), is_outermost=is_root)
        begun[-1] = call

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._begun.calls.pop()
        if call is not None:
            call.end()


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


def _token_shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in _TOKENS:
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    return None


def _kept(given: Mapping[str, Any]) -> int | torch.Tensor | None:
    """transformers' ``logits_to_keep``: the last so many tokens of each row, or those of these indices; 0 means all."""
    kept = given.get("logits_to_keep")
    return kept if isinstance(kept, torch.Tensor) or (isinstance(kept, int) and kept > 0) else None


def batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Rows of the batch, from the first tensor among the positional arguments and ``names``; None where none is."""
    first = args[0] if args else None
    for name in names:
        first = kwargs.get(name) if first is None else first
    return None if first is None else int(first.shape[0])


def token_modules(model: PreTrainedModel, targets: ModelTargets) -> list[str]:
    """The model itself (the empty name) and those inside it that are given tokens and hold what adapters may touch."""
    owners = {name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    served = {_innermost(owners, name) for name in (*targets.experts, *targets.linears, *targets.embeddings)}
    return sorted({"", *served})


def head_modules(model: PreTrainedModel, targets: ModelTargets) -> frozenset[str]:
    """Linear maps behind the text stack: they may see the last tokens of each row only."""
    output = model.get_output_embeddings()
    return frozenset(
        name
        for name in targets.linears
        if "." not in name or name.rpartition(".")[2] in HEADS or model.get_submodule(name) is output
    )


def _innermost(prefixes: Collection[str], name: str) -> str:
    """The longest prefix that is ``name`` or one of its ancestors; the root is the empty name."""
    while name and name not in prefixes:
        name = name.rpartition(".")[0]
    return name

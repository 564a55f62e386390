"""What a compiled graph of a grafted model holds in the place of hooks: opaque ops that ask for the call when they run.

A traced hook may not look up which batch runs: the graph would keep that batch's adapters for ever. It leaves an op
behind that names its seam by number and finds the call whenever the graph runs, so that one graph serves every
composition of adapters, loads, unloads and batches without any. The ops run in the order in which they were traced,
since each changes ``order``, a tensor of the model's that holds nothing. Their tag keeps them out of CUDA graphs, which
would keep the launches of one batch; a call with fixed bounds is traced as it is (``CallState.fixed``) and may be
captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from moegraft.core.errors import UnsupportedModelError

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

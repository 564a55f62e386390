"""Vision towers: which image, and so which sequence, each of their rows belongs to."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import BatchError
from moegraft.integrations.transformers.host.targets import merge_area
from moegraft.integrations.transformers.sites.call import CallState, remove_hooks
from moegraft.integrations.transformers.sites.seams import Seam
from moegraft.lora.bank import AdapterBank
from moegraft.lora.call import AdapterCall

# The tokens of a kind of picture, and the grids [N, 3] of its patches, by the fields of config and forward.
_KINDS = (("image_grid_thw", "image_token_id"), ("video_grid_thw", "video_token_id"))


class _Inputs(threading.local):
    """The arguments of the model's forward pass that runs on this thread; what the tower's pass has entered."""

    given: Mapping[str, Any] = {}
    stack: ExitStack | None = None


class TowerSeam(Seam):
    """Around the forward passes of a model and of its vision tower.

    The tower's rows are the patches of one image after the other, and the model puts what comes out where the image
    tokens stand, sequence after sequence: the k-th image is that of the k-th run of its tokens.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        bank: AdapterBank,
        state: CallState,
        model: PreTrainedModel,
        maps: Sequence[str],
    ) -> None:
        """``maps``: the linear maps of the tower that take adapters."""
        super().__init__(name, module, bank, state)
        self.model = model
        self._maps = maps
        self._inputs = _Inputs()
        self._parameters = {part: _parameters(part) for part in (model, module)}

    def install(self) -> None:
        self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.model.register_forward_hook(self._end, always_call=True)
        self.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.module.register_forward_hook(self._leave, always_call=True)

    def remove(self) -> None:
        remove_hooks(self.model, self)
        remove_hooks(self.module, self)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.given = {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inputs.given = {}

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave(module, args, None)  # what an interrupt has left behind
        call = None if torch.compiler.is_compiling() else self.state.current()
        if call is None or not any(call.linear_bound(name) for name in self._maps):
            return
        if len(set(call.batch.row_slots)) <= 1 and call.slots_M is None and call.rank_bound is None:
            return  # it does not matter whose the images are
        given = {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}
        stack = ExitStack()
        stack.enter_context(call.images(self.name, *self._places(call, given["grid_thw"])))
        self._inputs.stack = stack

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack, self._inputs.stack = self._inputs.stack, None
        if stack is not None:
            stack.close()

    def _places(self, call: AdapterCall, grid: torch.Tensor) -> tuple[Sequence[int], Sequence[int], int]:
        """See ``AdapterCall.images``. Raises BatchError where it is not certain whose the images are."""
        area = merge_area(self.module)
        ids, kind = self._inputs.given.get("input_ids"), self._kind(grid)
        if not isinstance(ids, torch.Tensor) or kind is None or area is None:
            raise BatchError(f"{self._refusal}: input_ids and one grid of images or videos, found {self._found()}")
        if call.slots_M is not None or call.rank_bound is not None:
            raise BatchError(f"{self._refusal}: adapters= of one entry a sequence, found slots= or rank_bound=")
        places = (ids.flatten() == kind).nonzero().flatten().tolist()
        patches = grid.long().prod(dim=-1).tolist()
        tokens = [count // area for count in patches]
        if sum(tokens) != len(places):
            raise BatchError(
                f"{self._refusal}: images of {sum(tokens)} tokens, input_ids have {len(places)} of the id {kind}"
            )
        first, at = [], 0
        slots = call.token_rows(*ids.shape[:2]).host
        assert slots is not None
        for count in tokens:
            if len({slots[place] for place in places[at : at + count]}) > 1:
                raise BatchError(f"{self._refusal}: images of one sequence each, found one across sequences")
            first.append(places[at])
            at += count
        return first, patches, area

    def _kind(self, grid: torch.Tensor) -> int | None:
        """The token of what the tower was given."""
        given = [(self._inputs.given.get(field), token) for field, token in _KINDS]
        found = [(value, token) for value, token in given if value is not None]
        if len(found) > 1:
            found = [(value, token) for value, token in found if value is grid]
        token = getattr(self.model.config, found[0][1], None) if len(found) == 1 else None
        return token if isinstance(token, int) else None

    @property
    def _refusal(self) -> str:
        return f"adapters on {self.name!r}, several in a batch, need"

    def _found(self) -> str:
        return ", ".join(name for name, value in self._inputs.given.items() if value is not None) or "no inputs"


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]

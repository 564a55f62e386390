"""State slots: what recurrent layers (linear attention, state spaces, short convolutions) carry from token to token.

Every running sequence has a slot in fixed tensors; slot 0 is scratch, for rows of padding. The model runs once over all
rows of a step, [T, 1], as for attention; only inside a recurrent mixer are rows put together by sequence: rows that
stand alone as [B, 1] over their gathered states, each chunk of a prompt as [1, S].

Shape letters: T rows of a step · B sequences · S tokens of a chunk · D hidden size · N slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from moegraft.core.errors import UnsupportedModelError
from moegraft.lora.call import AdapterCall
from moegraft.serving.scheduler import Chunk


@dataclass(frozen=True, kw_only=True)
class StatePiece:
    """Rows [row, row + B * S) of a step, sequence-major, as a mixer sees them; slots int64 [B]. is_new: the sequences
    begin with these tokens, and their slots hold nothing yet."""

    row: int
    num_tokens: int
    slots_B: torch.Tensor
    is_new: bool = False


def pieces_of(chunks: Sequence[Chunk], device: torch.device, *, padded_to: int) -> tuple[StatePiece, ...]:
    """A step's chunks, those of one token first. Where all are, padding counts as rows of the scratch slot."""
    alone = [chunk.sequence.slot for chunk in chunks if chunk.count == 1]
    pieces = []
    row = len(alone)
    for chunk in chunks[len(alone) :]:
        slots_B = torch.tensor([chunk.sequence.slot], device=device)
        pieces.append(StatePiece(row=row, num_tokens=chunk.count, slots_B=slots_B, is_new=chunk.start == 0))
        row += chunk.count
    if not pieces:
        alone += [0] * (padded_to - len(alone))
    if alone:
        pieces.insert(0, StatePiece(row=0, num_tokens=1, slots_B=torch.tensor(alone, device=device)))
    return tuple(pieces)


class _Layer(LinearAttentionLayer):
    """The state of a piece's sequences in one mixer. What a mixer replaces is kept as it is, without a copy."""

    def __init__(self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None) -> None:
        super().__init__()
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.is_conv_states_initialized[0] = conv is not None
        self.is_recurrent_states_initialized[0] = recurrent is not None
        self.has_previous_state[0] = conv is not None or recurrent is not None
        if conv is not None:
            self.conv_kernel_size[0], self.dtype, self.device = conv.shape[-1], conv.dtype, conv.device

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    @property
    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.conv_states[0], self.recurrent_states[0]


class _View(Cache):
    """What one mixer is given as its cache; it asks for its own layer only."""

    def __init__(self, layer: _Layer, layer_idx: int) -> None:
        super().__init__(layers=[layer] * (layer_idx + 1))
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention keeps its keys and values in pages."""
        return key_states, value_states

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """MiniMax asks so."""
        return self.layer.recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.layer.update_recurrent_state(linear_cache)


class _Mixer:
    """Stands in for the forward of a recurrent mixer while an engine has its model.

    states: its pool tensors [N, ...], convolution and recurrence, None for what it does not have. by_token: it starts
    anew wherever it meets several tokens at once, so that chunks that continue a sequence go token by token.
    """

    def __init__(self, module: nn.Module, argument: str, given: dict[str, Any], shown: _Layer) -> None:
        """given, shown: keyword arguments that it was once called with, and the state that it left behind."""
        self.module = module
        self.states: list[torch.Tensor | None] = [None, None]
        self.step: Callable[[], tuple[StatePiece, ...] | None] = lambda: None
        self.call: Callable[[], AdapterCall | None] = lambda: None
        self.shapes = [None if state is None else (state.shape[1:], state.dtype) for state in shown.tensors]
        self._argument = argument
        self._forward = module.forward
        self._layer_idx: int = module.layer_idx  # type: ignore[assignment]
        self.by_token = self._forgets(given, shown)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pieces = self.step()
        if pieces is None:
            return self._forward(*args, **kwargs)
        if kwargs.get("attention_mask") is not None:
            raise UnsupportedModelError(f"{type(self.module).__name__} was given a mask, which an engine never gives")
        if args:
            kwargs["hidden_states"] = args[0]
        x_T1D = kwargs["hidden_states"]
        if len(pieces) == 1 and pieces[0].slots_B.shape[0] == x_T1D.shape[0]:
            return self._run(pieces[0], kwargs)
        out: torch.Tensor | None = None
        found: Any = None
        for piece in pieces:
            B, S = piece.slots_B.shape[0], piece.num_tokens
            rows = slice(piece.row, piece.row + B * S)
            x_BSD = x_T1D[rows].reshape(B, S, -1)
            if self.by_token and S > 1 and not piece.is_new:
                y_BSD = self._token_by_token(piece, {**kwargs, "hidden_states": x_BSD})
            else:
                with self._rows(piece.row, B, S):
                    found = self._run(piece, {**kwargs, "hidden_states": x_BSD})
                y_BSD = found[0] if isinstance(found, tuple) else found
            if out is None:
                out = y_BSD.new_zeros(x_T1D.shape[0], 1, y_BSD.shape[-1])
            out[rows] = y_BSD.reshape(B * S, 1, -1)
        return (out, None) if isinstance(found, tuple) else out

    def _rows(self, first: int, num_sequences: int, num_tokens: int) -> AbstractContextManager[None]:
        call = self.call()
        return nullcontext() if call is None else call.part(first, num_sequences, num_tokens)

    def _token_by_token(self, piece: StatePiece, kwargs: dict[str, Any]) -> torch.Tensor:
        """[1, S, D] of a chunk that continues a sequence."""
        found = []
        for at in range(piece.num_tokens):
            with self._rows(piece.row + at, 1, 1):
                out = self._run(piece, {**kwargs, "hidden_states": kwargs["hidden_states"][:, at : at + 1]})
            found.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(found, dim=1)

    def _run(self, piece: StatePiece, kwargs: dict[str, Any]) -> Any:
        layer = _Layer()
        if not piece.is_new:
            layer = _Layer(*(None if state is None else state[piece.slots_B] for state in self.states))
        out = self._call(layer, kwargs)
        for state, new in zip(self.states, layer.tensors, strict=True):
            if state is not None and new is not None:
                state.index_copy_(0, piece.slots_B, new.to(state.dtype))
        return out

    def _call(self, layer: _Layer, kwargs: dict[str, Any]) -> Any:
        return self._forward(**{**kwargs, self._argument: _View(layer, self._layer_idx)})

    def _forgets(self, given: dict[str, Any], shown: _Layer) -> bool:
        """Whether a part of the state does not change what becomes of two further tokens."""
        x_12D = given["hidden_states"].new_ones(1, 2, given["hidden_states"].shape[-1])
        zeros = [None if state is None else torch.zeros_like(state[:1]) for state in shown.tensors]

        def run(states: Sequence[torch.Tensor | None]) -> torch.Tensor:
            out = self._call(_Layer(*states), {**given, "hidden_states": x_12D.clone()})
            found: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return found

        plain = run([None if state is None else state.clone() for state in zeros])
        for at, state in enumerate(zeros):
            if state is not None:
                other = [None if each is None else each.clone() for each in zeros]
                other[at] = torch.ones_like(state)
                if torch.equal(run(other), plain):
                    return True
        return False


class StateSlots:
    """The recurrent mixers of one model, and the slots of what they carry; ``close`` gives the model its own back."""

    def __init__(self, mixers: Sequence[_Mixer], call: Callable[[], AdapterCall | None]) -> None:
        """call: the one in flight."""
        self.num_slots = 0
        self._mixers = mixers
        self._pieces: tuple[StatePiece, ...] | None = None
        for mixer in mixers:
            mixer.step, mixer.call = (lambda: self._pieces), call
            mixer.module.forward = mixer

    @property
    def bytes_per_slot(self) -> int:
        shapes = [shape for mixer in self._mixers for shape in mixer.shapes if shape is not None]
        return sum(size.numel() * dtype.itemsize for size, dtype in shapes)

    def open(self, num_slots: int, device: torch.device) -> None:
        """Allocates the slots, scratch besides."""
        self.num_slots = num_slots
        for mixer in self._mixers:
            mixer.states = [
                None if shape is None else torch.zeros(num_slots + 1, *shape[0], dtype=shape[1], device=device)
                for shape in mixer.shapes
            ]

    def clear(self, slots: Sequence[int]) -> None:
        """Sequences begin in these slots."""
        for mixer in self._mixers:
            for state in mixer.states:
                if state is not None:
                    state[list(slots)] = 0

    @contextmanager
    def step(self, pieces: tuple[StatePiece, ...]) -> Iterator[None]:
        """Inside the block the model runs over these."""
        self._pieces = pieces
        try:
            yield
        finally:
            self._pieces = None

    def close(self) -> None:
        for mixer in self._mixers:
            del mixer.module.forward
            mixer.states = [None, None]


@torch.no_grad()
def find_states(
    model: PreTrainedModel,
    run: Callable[[], object],
    attention_layers: Collection[int],
    call: Callable[[], AdapterCall | None],
) -> StateSlots | None:
    """The recurrent mixers of a model, found by what they keep in transformers' cache; None where there are none.

    run: runs one token through the model · attention_layers: their ``layer_idx``.
    """
    met: dict[nn.Module, tuple[str, dict[str, Any], _Layer]] = {}

    def give_a_cache(argument: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        layer, layer_idx = _Layer(), module.layer_idx
        assert isinstance(layer_idx, int)
        met[module] = (argument, given, layer)
        return (), {**given, argument: _View(layer, layer_idx)}

    hooks = []
    for module in model.modules():
        argument = _cache_argument(module, attention_layers)
        if argument is not None:
            hook = partial(give_a_cache, argument)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    if not hooks:
        return None
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    mixers = [
        _Mixer(module, argument, {key: value for key, value in given.items() if key != argument}, layer)
        for module, (argument, given, layer) in met.items()
        if any(state is not None for state in layer.tensors)
    ]
    return StateSlots(mixers, call) if mixers else None


def _cache_argument(module: nn.Module, attention_layers: Collection[int]) -> str | None:
    """The argument by which a module that may be a recurrent mixer is given its cache."""
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        return None
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    if "cache_params" in names:
        return "cache_params"
    return "past_key_values" if "past_key_values" in names and layer_idx not in attention_layers else None

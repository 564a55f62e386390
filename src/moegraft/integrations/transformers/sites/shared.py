"""Linear maps that read the same input, such as q, k and v: LoRA on them is one shrink and one expand.

The base products stay the host's own, each by its module's forward. The first map that is called runs those behind it
as well, adds all deltas at once, and keeps the others' results until their modules are called with the very same input.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from moegraft.integrations.transformers.sites.seams import LinearSeam, without_grad
from moegraft.lora.call import AdapterCall

ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("w1", "w3"),
)
"""Names of neighbours that models call one after the other on one input. Where one turns out not to, it goes alone."""

_MAX_MISSES = 8

_Kept = tuple[torch.Tensor, int, dict[int, torch.Tensor]]
"""An input, its version when it was read, and what the maps that were not called yet made of it."""


class _PerThread(threading.local):
    kept: _Kept | None = None


class Results:
    """What the first of some maps made of its input for those behind it, until they are called with the very same."""

    def __init__(self) -> None:
        self._misses = 0  # in a row: the parent does not call these maps on one input
        self._eager = _PerThread()
        self._traced: _Kept | None = None

    @property
    def are_wanted(self) -> bool:
        """Whether the parent has come for them so far."""
        return self._misses < _MAX_MISSES

    def take(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """A map's result, once; None where there is none of this input, or where it was changed in place since."""
        is_traced = torch.compiler.is_compiling()
        kept = self._traced if is_traced else self._eager.kept
        if kept is None or kept[0] is not x or not (is_traced or kept[1] == _version(x)) or place not in kept[2]:
            return None
        y = kept[2].pop(place)
        if not kept[2]:
            self._set(None)
            self._misses = 0
        return y

    def keep(self, x: torch.Tensor, found: dict[int, torch.Tensor]) -> None:
        is_traced = torch.compiler.is_compiling()
        if not is_traced and self._eager.kept is not None:
            self._misses += 1  # what was kept the last time was never asked for
        self._set((x, 0 if is_traced else _version(x), found))

    def _set(self, kept: _Kept | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = kept
        else:
            self._eager.kept = kept


class SharedInput:
    """Maps of one parent, in the order in which it calls them. Stands in for their forwards while it is installed."""

    def __init__(self, seams: Sequence[LinearSeam]) -> None:
        self.seams = tuple(seams)
        self.state = seams[0].state
        self._results = Results()
        self._forwards = [seam.module.forward for seam in seams]

    @staticmethod
    def fits(seam: LinearSeam) -> bool:
        """Whether a map's forward may be run by another's: nobody else has a hand in how it is called."""
        module = seam.module
        has_own = "forward" in vars(module) or hasattr(module, "_hf_hook") or module._forward_pre_hooks
        return not has_own and isinstance(module, nn.Module) and seam.delta.shares

    def install(self) -> None:
        for place, seam in enumerate(self.seams):
            vars(seam.module)["forward"] = partial(self._run, place)
            seam.shared = self

    def remove(self) -> None:
        for seam in self.seams:
            seam.shared = None
            own = vars(seam.module).get("forward")
            if isinstance(own, partial) and own.func == self._run:
                del vars(seam.module)["forward"]

    def serves(self, seam: LinearSeam, call: AdapterCall) -> bool:
        """Whether what a map gives under a call that is traced has its delta already."""
        return self.seams.index(seam) in self._members(call)

    def _members(self, call: AdapterCall) -> list[int]:
        """The maps that a call has LoRA on, where they are several."""
        if not self._results.are_wanted:
            return []
        found = [place for place, seam in enumerate(self.seams) if call.linear_bound(seam.name) > 0]
        return found if len(found) > 1 else []

    def _run(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """The forward of one map."""
        is_traced = torch.compiler.is_compiling()
        call = self.state.fixed if is_traced else self.state.current()
        members = [] if call is None else self._members(call)
        if call is None or place not in members:
            return self._forward(place, x)
        if place == members[0]:
            return self._lead(call, members, x, is_traced=is_traced)
        kept = self._results.take(place, x)
        if kept is not None:
            return kept
        y = self._forward(place, x)
        if is_traced:
            self.seams[place].delta.add(call, y, x, self.seams[place].bias())
        return y

    def _lead(self, call: AdapterCall, members: Sequence[int], x: torch.Tensor, *, is_traced: bool) -> torch.Tensor:
        found = {place: self._forward(place, x) for place in members}
        without_grad(self._add, call, found, x)
        if not is_traced:
            for y in found.values():
                y.has_delta = True  # type: ignore[attr-defined]
        y = found.pop(members[0])
        self._results.keep(x, found)
        return y

    def _add(self, call: AdapterCall, found: Mapping[int, torch.Tensor], x: torch.Tensor) -> None:
        deltas = [self.seams[place].delta for place in found]
        rows = deltas[0].rows(call, x.shape[:-1])
        if rows.host is not None and not rows.has_adapters:
            return
        target, tables = deltas[0].target, [delta.tables for delta in deltas]
        x_MI = x.reshape(-1, target.in_features).to(tables[0].pool.dtype)
        deltas[0].punica.add_lora_linears(
            [y.view(-1, delta.target.out_features) for y, delta in zip(found.values(), deltas, strict=True)],
            x_MI,
            rows,
            tables,
            rank_bound=max(call.linear_bound(delta.name) for delta in deltas),
            biases=[self.seams[place].bias() for place in found],
        )

    def _forward(self, place: int, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._forwards[place](x)
        return y


def _version(x: torch.Tensor) -> int:
    """Counts changes in place; nothing counts those of inference tensors."""
    return 0 if x.is_inference() else x._version


def shared_inputs(seams: Mapping[str, LinearSeam]) -> list[tuple[str, ...]]:
    """The names of maps, among these, that read the same input."""
    found = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in seams):
        for alike in ALIKE:
            names = [f"{parent}.{child}" for child in alike if f"{parent}.{child}" in seams]
            if len(names) > 1 and len({seams[name].delta.target.in_features for name in names}) == 1:
                found.append(tuple(names))
    return found

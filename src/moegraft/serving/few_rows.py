"""Linear maps of decode steps: those that read one input are one product, with LoRA inside it.

A product of many rows stays the module's own, and LoRA is added behind it. As in ``sites/shared.py``, the first map of
a group that is called runs the others too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from moegraft.build import punica_for
from moegraft.core.tables import LinearTables
from moegraft.integrations.transformers import GraftedModel
from moegraft.integrations.transformers.sites.shared import ALIKE, Results
from moegraft.lora.call import AdapterCall

_FEWEST_COLUMNS = 512
"""Narrower maps, such as routers, would be too few programs for a device."""


@dataclass(frozen=True)
class _Map:
    """One nn.Linear that takes LoRA."""

    name: str
    module: nn.Linear
    tables: LinearTables


class FewRows:
    """The maps of one input, in the order in which their parent calls them; stands in for their forwards."""

    def __init__(self, graft: GraftedModel, maps: Sequence[_Map]) -> None:
        self.maps = tuple(maps)
        self._names = frozenset(each.name for each in self.maps)
        self._graft = graft
        self._punica = punica_for(graft.bank.pool.data.device)
        self._results = Results()
        for place, each in enumerate(self.maps):
            each.module.__dict__["forward"] = self._forward_of(place)

    def remove(self) -> None:
        for each in self.maps:
            each.module.__dict__.pop("forward", None)

    def _forward_of(self, place: int) -> MethodType:
        mine = self.maps[place].module

        def forward(module: nn.Linear, *args: Any, **kwargs: Any) -> torch.Tensor:
            x = args[0] if len(args) == 1 and not kwargs else None
            # A copy of the module, which an adapter's own parameters run through, rebinds this to itself.
            if module is not mine or x is None or not self._takes(x):
                return nn.Linear.forward(module, *args, **kwargs)
            return self._run(place, x)

        return MethodType(forward, mine)  # a copy of the module rebinds a method to itself

    def _takes(self, x: torch.Tensor) -> bool:
        weight = self.maps[0].module.weight
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return x.dtype == weight.dtype and not wants_grad and not torch.compiler.is_compiling()

    def _run(self, place: int, x: torch.Tensor) -> torch.Tensor:
        kept = self._results.take(place, x)
        if kept is not None:
            return kept
        call = self._graft.current_call()
        if call is not None and self._replaces(call):
            return self._own(place, x)
        places = range(len(self.maps)) if place == 0 and self._results.are_wanted else range(place, place + 1)
        found = self._product(places, x, call)
        y = found.pop(place)
        if found:
            self._results.keep(x, found)
        return y

    def _replaces(self, call: AdapterCall) -> bool:
        """Whether an adapter has parameters of its own in place of a map's: its rows' LoRA comes behind those."""
        return any(name in self._names for handle in call.batch.handles for name, _ in handle.saved)

    def _product(self, places: range, x: torch.Tensor, call: AdapterCall | None) -> dict[int, torch.Tensor]:
        """The results of some maps, or of the first alone, with LoRA or without: a tensor that has it says so."""
        from moegraft.kernels.linear_few_rows.host import MAX_ROWS, linear_few_rows  # needs Triton

        maps = [self.maps[place] for place in places]
        bounds = [0 if call is None else call.linear_bound(each.name) for each in maps]
        rows = call.rows(maps[0].name, x.shape[:-1]) if call is not None and any(bounds) else None
        if rows is not None and not rows.has_adapters:
            rows = None
        x_MI = x.reshape(-1, x.shape[-1])
        if x_MI.shape[0] <= MAX_ROWS:
            ys = linear_few_rows(
                x_MI,
                [each.module.weight for each in maps],
                [each.module.bias for each in maps],
                token_slots_M=None if rows is None else rows.slots_M,
                tables=[each.tables for each in maps] if rows is not None else (),
                rank_bound=max(bounds),
            )
            found = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
        elif rows is None or len(maps) == 1:
            return {places[0]: self._own(places[0], x)}
        else:
            found = [self._own(place, x) for place in places]
            self._punica.add_lora_linears(
                [y.view(-1, y.shape[-1]) for y in found],
                x_MI,
                rows,
                [each.tables for each in maps],
                rank_bound=max(bounds),
                biases=[each.module.bias for each in maps],
            )
        if rows is not None:
            for y in found:
                y.has_delta = True  # type: ignore[attr-defined]  # the seam behind the map adds nothing
        return dict(zip(places, found, strict=True))

    def _own(self, place: int, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self.maps[place].module, x)


def take_linears(graft: GraftedModel, device: torch.device) -> list[FewRows]:
    """Every nn.Linear that takes LoRA and that nobody else has a hand in, in groups that read the same input."""
    linears = graft.bank.layout.linears
    head = graft.model.get_output_embeddings()
    maps = {}
    for name, module in graft.model.named_modules():
        if name in linears and module is not head and _fits(module, device, graft.bank.pool.data.dtype):
            maps[name] = _Map(name, module, graft.bank.linear_tables(name))
    found = []
    for name in list(maps):
        if name not in maps:
            continue
        parent, _, child = name.rpartition(".")
        alike = next((names for names in ALIKE if child in names), (child,))
        group = [maps[each] for each in (f"{parent}.{other}" for other in alike) if each in maps]
        group = [each for each in group if each.module.in_features == maps[name].module.in_features]
        for each in group:
            del maps[each.name]
        if sum(each.module.out_features for each in group) >= _FEWEST_COLUMNS:
            found.append(FewRows(graft, group))
    return found


def _fits(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return False
    weight = module.weight
    is_plain = type(weight.data) is torch.Tensor and weight.is_contiguous() and not module._forward_pre_hooks
    return is_plain and weight.dtype == dtype and weight.device == device

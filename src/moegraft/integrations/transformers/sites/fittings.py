"""What stands at the modules of a grafted model: a site behind every experts module, seams where adapters need them.

It also notices where the model was changed behind their back: a module or parameter that was replaced after ``attach``
would run without its adapters, or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.build import linear_punica_for, punica_for
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.parallel.layout import RankLayout
from moegraft.integrations.transformers.sites.call import CallState, ForwardHooks, token_modules
from moegraft.integrations.transformers.sites.experts import (
    IMPLEMENTATION,
    ExpertsSite,
    experts_configs,
    install_sites,
    remove_sites,
)
from moegraft.integrations.transformers.sites.saved import SavedSeam
from moegraft.integrations.transformers.sites.seams import EmbeddingSeam, LinearSeam, RouterSeam, Seam
from moegraft.integrations.transformers.sites.shared import SharedInput, shared_inputs
from moegraft.integrations.transformers.sites.towers import TowerSeam
from moegraft.lora.bank import AdapterBank
from moegraft.lora.targets import ModelTargets

_AGAIN = "adapters would be lost: call detach() and attach the model again"
Key = tuple[str, type[Seam]]


@dataclass(frozen=True)
class _Spot:
    """An entry of a module's dictionary of modules or parameters, which must stay the object that it was."""

    entries: Mapping[str, Any]
    key: str
    expected: object
    name: str

    @property
    def is_intact(self) -> bool:
        return self.entries.get(self.key) is self.expected


class Fittings:
    """Sites and seams of one model. ``targets``: of the whole model; ``local_targets``: of this rank."""

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank,
        state: CallState,
        layout: RankLayout,
        targets: ModelTargets,
        local_targets: ModelTargets,
        *,
        compiled: bool = False,
    ) -> None:
        """``compiled``: seams of every module that takes LoRA stand there from the beginning."""
        self._compiled = compiled
        self.model = model
        self.bank = bank
        self.state = state
        self.layout = layout
        self.targets = targets
        self.local_targets = local_targets
        self.sites: Mapping[str, ExpertsSite] = {}
        self._modules = {name: module for name, module in model.named_modules() if name in _names(targets)}
        self._shapes = {name: _weight_shape(module) for name, module in self._modules.items()}
        vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
        self._vocabulary = [name for name, module in self._modules.items() if module in vocabulary]
        self._hooks = ForwardHooks(state, model, token_modules(model, targets))
        self._seams: dict[Key, Seam] = {}
        self._shared: dict[tuple[str, ...], SharedInput] = {}
        self._punica = punica_for(bank.pool.data.device)
        self._watched: dict[object, list[_Spot]] = {}  # replaced, never changed: other threads read it
        self._distinct: tuple[dict[object, list[_Spot]], tuple[_Spot, ...]] = (self._watched, ())
        self._weights: list[tuple[str, torch.Tensor, torch.dtype, torch.device]] = []
        self._previous: dict[str, str | None] = {}
        self._experts_configs: list[Any] = []
        self._lock = threading.RLock()

    def install(self, sites: Mapping[str, ExpertsSite]) -> None:
        """Puts the sites behind their modules, and remembers what must stay as it is."""
        self.sites = sites
        self._previous = self.model.get_experts_implementation()
        self._experts_configs = experts_configs(self.model, sites)
        install_sites(self.model, sites)
        self._hooks.install()
        if self._compiled:
            self.fit()

    def watch(self) -> None:
        """From now on the experts must stay what and where they are."""
        for name in self.sites:
            module = self._modules[name]
            spots = [*self._path(name), *_parameters(name, module)]
            packed = module._modules.get("packed")
            if packed is not None:
                spots.append(_Spot(vars(packed), "weights", vars(packed)["weights"], f"{name}.packed"))
            self._watched = {**self._watched, name: spots}
            # One is enough: they move together.
            first = next((param for param in module._parameters.values() if param is not None), None)
            if first is not None:
                self._weights.append((name, first, first.dtype, first.device))

    def modules(self) -> frozenset[str]:
        """The modules at which something stands now."""
        return frozenset({name for name, _ in self._seams.copy()} | self.sites.keys())

    def check(self) -> None:
        """Raises UnsupportedModelError where the model is no longer what was attached."""
        for config in self._experts_configs:
            if config._experts_implementation != IMPLEMENTATION:
                raise UnsupportedModelError(
                    f"the experts implementation of the grafted model was set to {config._experts_implementation!r}, "
                    f"under which adapters would be lost; call model.set_experts_implementation({IMPLEMENTATION!r})"
                )
        for spot in self._spots():
            if spot.entries.get(spot.key) is not spot.expected:
                raise UnsupportedModelError(f"{spot.name!r} was replaced after attach; {_AGAIN}")
        for name, weight, dtype, device in self._weights:
            if weight.dtype is not dtype or weight.device != device:
                raise UnsupportedModelError(
                    f"the experts of {name!r} were {dtype} on {device} when they were attached and are now "
                    f"{weight.dtype} on {weight.device}; {_AGAIN}"
                )
        for name in self._vocabulary:
            if any((name, kind) in self._seams for kind in (EmbeddingSeam, LinearSeam, SavedSeam)):
                self._check_shape(name)

    def _spots(self) -> tuple[_Spot, ...]:
        """All that is watched, each once: modules share most of the way that leads to them, and every batch asks."""
        watched, spots = self._distinct
        if watched is not self._watched:
            watched = self._watched
            spots = tuple({(id(spot.entries), spot.key): spot for each in watched.values() for spot in each}.values())
            self._distinct = watched, spots
        return spots

    def fit(self) -> None:
        """Exactly the seams are installed that the bank's adapters need, those among them that have no name yet.

        May be called from any thread and at any time: what an interrupt left half done is done the next time.
        """
        with self._lock:
            wanted = dict.fromkeys(self._wanted())
            if self._seams.keys() != wanted.keys():
                self.state.hooks_changed()  # before they do: an interrupt may come
            for key in [key for key in self._seams if key not in wanted]:
                self._watched = {other: spots for other, spots in self._watched.items() if other != key}
                self._seams[key].remove()
                del self._seams[key]
            self._part({name for name, kind in wanted if kind is SavedSeam})
            for key in wanted:
                if key not in self._watched:
                    seam = self._seams[key] = self._seams.get(key) or self._make_seam(*key)
                    seam.remove()  # what an interrupt has left of it
                    seam.install()
                    spots = [*self._path(key[0]), *self._seam_parameters(key, seam)]
                    self._watched = {**self._watched, key: spots}
            self._share()

    def _share(self) -> None:
        """Maps that read the same input add their deltas together."""
        seams = {name: seam for (name, _), seam in self._seams.items() if isinstance(seam, LinearSeam)}
        # What an adapter replaces a parameter of (its bias) runs through a copy, by itself.
        seams = {name: seam for name, seam in seams.items() if (name, SavedSeam) not in self._seams}
        wanted = {names: tuple(seams[name] for name in names) for names in shared_inputs(seams)}
        for names in [names for names, shared in self._shared.items() if wanted.get(names) != shared.seams]:
            self._shared.pop(names).remove()
        for names, members in wanted.items():
            if names not in self._shared and all(map(SharedInput.fits, members)):
                shared = self._shared[names] = SharedInput(members)
                shared.install()

    def _part(self, names: set[str]) -> None:
        """Maps that add their deltas together with one of these add them by themselves again."""
        for together in [together for together in self._shared if not names.isdisjoint(together)]:
            self._shared.pop(together).remove()

    def remove(self) -> None:
        """Takes everything out again, whatever of it is there."""
        with self._lock:
            self._watched, self._weights = {}, []
            self._hooks.remove()
            for shared in self._shared.values():
                shared.remove()
            self._shared = {}
            for key in list(self._seams):
                self._seams[key].remove()
                del self._seams[key]
            sites = {self._modules[name]: site for name, site in self.sites.items()}
            remove_sites(self.model, sites, self._previous)
            self.sites = {name: site for name, site in self.sites.items() if not site.is_cut}
            self._experts_configs = []

    def _wanted(self) -> Iterator[Key]:
        handles = self.bank.handles(coming=True)
        touched = [module for handle in handles for module in handle.ranks]
        if self._compiled:
            touched += [*self.targets.linears, *self.targets.embeddings]
        towers = [self.targets.linears[module].tower for module in touched if module in self.targets.linears]
        for tower in dict.fromkeys(tower for tower in towers if tower is not None):
            yield tower, TowerSeam
        for module in dict.fromkeys(touched):
            if module in self.targets.linears:
                yield module, RouterSeam if self.targets.linears[module].router else LinearSeam
            elif module in self.targets.embeddings:
                yield module, EmbeddingSeam
        for module in dict.fromkeys(module for handle in handles for module, _ in sorted(handle.saved)):
            yield module, SavedSeam

    def _make_seam(self, name: str, kind: type[Seam]) -> Seam:
        module = self._modules[name]
        for spot in self._path(name):
            if not spot.is_intact:
                raise UnsupportedModelError(f"{spot.name!r} was replaced after attach; {_AGAIN}")
        self._check_shape(name)
        mine, ranks = self.layout.mine.linears.get(name), self.layout.groups.world
        if kind is LinearSeam:
            gathers = self.layout.plan is not None and name in self.layout.plan.whole_rows
            target = (self.targets if gathers else self.local_targets).linears[name]
            device = self.bank.pool.data.device
            punica = self._punica if mine is None else linear_punica_for(device, mine, ranks, gathers=gathers)
            return LinearSeam(target, module, self.bank, self.state, punica)
        if kind is EmbeddingSeam:
            return EmbeddingSeam(name, module, self.bank, self.state, mine, ranks)
        if kind is RouterSeam:
            return RouterSeam(self.local_targets.linears[name], module, self.bank, self.state)
        if kind is TowerSeam:
            maps = [linear for linear, target in self.targets.linears.items() if target.tower == name]
            return TowerSeam(name, module, self.bank, self.state, self.model, maps)
        if kind is SavedSeam:
            return SavedSeam(name, module, self.bank, self.state, is_planned=self.layout.plan is not None)
        return kind(name, module, self.bank, self.state)

    def _check_shape(self, name: str) -> None:
        """The vocabulary may be resized in place."""
        found = _weight_shape(self._modules[name])
        if found != self._shapes[name]:
            raise UnsupportedModelError(
                f"{name!r} had a weight of shape {self._shapes[name]} when it was attached, now {found}; {_AGAIN}"
            )

    def _path(self, name: str) -> Iterator[_Spot]:
        """The modules that lead to a module."""
        parent: nn.Module = self.model
        parts = name.split(".")
        for depth, part in enumerate(parts):
            child = parent._modules[part]
            yield _Spot(parent._modules, part, child, ".".join(parts[: depth + 1]))
            assert child is not None
            parent = child

    def _seam_parameters(self, key: Key, seam: Seam) -> Iterator[_Spot]:
        """What must stay; of a router, the weight that the seam has put there. What accelerate moves is left alone."""
        name, kind = key
        target = self.targets.linears.get(name)
        router_param = target.param if target is not None and target.router else None
        if hasattr(seam.module, "_hf_hook"):
            return
        for spot in _parameters(name, seam.module):
            if (spot.key == router_param) == (kind is RouterSeam):
                yield spot


def _parameters(name: str, module: nn.Module) -> Iterator[_Spot]:
    for key, param in module._parameters.items():
        yield _Spot(module._parameters, key, param, f"{name}.{key}")


def _names(targets: ModelTargets) -> set[str]:
    return {*targets.experts, *targets.linears, *targets.embeddings, *targets.saveable, *targets.towers}


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)

"""Where a tensor belongs: from its module's name in the file to a target of the base model."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moegraft.core.errors import AdapterMismatchError
from moegraft.lora.peft.keys import Factor, TensorKey
from moegraft.lora.peft.renames import DOWN_NAMES, FUSED_MODULES, GATE_NAMES, UP_NAMES, Renamer
from moegraft.lora.peft.strict_json import shorten
from moegraft.lora.targets import ExpertsTarget, ModelTargets

MAX_SUGGESTIONS = 3
MAX_SUGGESTED = 10  # tensors; comparing names is slow, and the first ones tell what is wrong
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<proj>\w+)", re.ASCII)
_PROJECTION = re.compile(r"(?P<parent>.+)\.(?P<proj>\w+)", re.ASCII)


class Kind(enum.StrEnum):
    """The kinds of target."""

    EXPERTS = "experts"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    SAVED = "saved"


class Projection(enum.StrEnum):
    """A part of an experts module. GATE_UP: gate and up behind one A."""

    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"


def first_projection(target: ExpertsTarget) -> Projection:
    """What the first parameter of an experts module is: gate and up in one, or up alone."""
    return Projection.GATE_UP if target.has_gate else Projection.UP


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """``module``: the target's name in the base model. For experts:

    ``projection`` None: a fused parameter whose role the shapes and the config tell. ``expert`` None: a tensor for all
    experts at once; ``is_fused``: in PEFT's two-dimensional packing. ``param``: a saved parameter's name.
    """

    kind: Kind
    module: str
    projection: Projection | None = None
    expert: int | None = None
    is_fused: bool = False
    param: str = ""


class SiteFinder:
    """Finds the site of a tensor: the module's own name first, then its renamed forms, of which one may exist.

    Raises:
        AdapterMismatchError: no target has the name, or several might be meant; names the tensor and the nearest
            targets.
    """

    def __init__(self, targets: ModelTargets) -> None:
        self._targets = targets
        self._renamer = Renamer(targets.model_type)
        self._suggestions_left = MAX_SUGGESTED

    def find(self, key: TensorKey) -> Site:
        """The site of one tensor."""
        if key.factor is Factor.SAVED:
            return self._find_saved(key)
        site = self._exact(key.module) or self._find_projection(key)
        if site is not None:
            return site
        names = [name for name in self._renamer.candidates(key.module) if self._exact(name) is not None]
        site = self._exact(self._only(key, names))
        assert site is not None  # it is one of those that exist
        return site

    def _exact(self, name: str) -> Site | None:
        targets = self._targets
        kinds = ((Kind.EXPERTS, targets.experts), (Kind.LINEAR, targets.linears), (Kind.EMBEDDING, targets.embeddings))
        for kind, names in kinds:
            if name in names:
                return Site(kind=kind, module=name, is_fused=kind is Kind.EXPERTS)
        return None

    def _find_projection(self, key: TensorKey) -> Site | None:
        """``experts.3.w1`` (one expert), ``experts.w1`` (all of them), ``input_linear`` (a fused parameter)."""
        match = _EXPERT.fullmatch(key.module)
        if match and match["proj"] in GATE_NAMES | UP_NAMES | DOWN_NAMES:
            experts = self._experts(key, match["experts"])
            if experts is not None:
                expert = int(match["index"])
                if expert >= experts.num_experts:
                    raise AdapterMismatchError(
                        f"tensor {shorten(key.name)}: expert {expert}, but {experts.name} has {experts.num_experts}"
                    )
                return self._projection_site(key, experts, match["proj"], expert)
        match = _PROJECTION.fullmatch(key.module)
        if match is None:
            return None
        if match["proj"] in GATE_NAMES | UP_NAMES | DOWN_NAMES:
            experts = self._experts(key, match["parent"])
            return None if experts is None else self._projection_site(key, experts, match["proj"], None)
        if match["proj"] in FUSED_MODULES:
            path, is_down = FUSED_MODULES[match["proj"]]
            experts = self._experts(key, match["parent"] + path)
            if experts is not None:
                projection = Projection.DOWN if is_down else first_projection(experts)
                return Site(kind=Kind.EXPERTS, module=experts.name, projection=projection, is_fused=True)
        return None

    def _experts(self, key: TensorKey, name: str) -> ExpertsTarget | None:
        names = [renamed for renamed in self._renamer.candidates(name) if renamed in self._targets.experts]
        if not names:
            return None
        return self._targets.experts[name if name in names else self._only(key, names)]

    def _projection_site(self, key: TensorKey, experts: ExpertsTarget, proj: str, expert: int | None) -> Site:
        if proj in DOWN_NAMES:
            projection = Projection.DOWN
        elif proj in UP_NAMES:
            projection = Projection.UP
        elif experts.has_gate:
            projection = Projection.GATE
        else:
            raise AdapterMismatchError(f"tensor {shorten(key.name)}: the experts of {experts.name} have no gate")
        return Site(kind=Kind.EXPERTS, module=experts.name, projection=projection, expert=expert)

    def _find_saved(self, key: TensorKey) -> Site:
        names = [f"{module}.{key.param}" for module in self._renamer.candidates(key.module)]
        names += self._renamer.candidates(f"{key.module}.{key.param}")
        existing = [name for name in dict.fromkeys(names) if self._is_saveable(name)]
        own = f"{key.module}.{key.param}"
        module, _, param = (own if own in existing else self._only(key, existing)).rpartition(".")
        return Site(kind=Kind.SAVED, module=module, param=param)

    def _is_saveable(self, name: str) -> bool:
        module, _, param = name.rpartition(".")
        return param in self._targets.saveable.get(module, {})

    def _only(self, key: TensorKey, names: Iterable[str]) -> str:
        found = list(names)
        if len(found) == 1:
            return found[0]
        if found:
            raise AdapterMismatchError(f"tensor {shorten(key.name)}: might belong to {' or '.join(found)}")
        wanted = key.module if key.factor is not Factor.SAVED else f"{key.module}.{key.param}"
        what = "no parameter that may be replaced" if key.factor is Factor.SAVED else "no module"
        nearest = self._nearest(key, wanted)
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        raise AdapterMismatchError(
            f"tensor {shorten(key.name)}: the base model ({self._targets.model_type}) has {what} "
            f"{shorten(wanted)}{hint}"
        )

    def _nearest(self, key: TensorKey, wanted: str) -> list[str]:
        if not self._suggestions_left:
            return []
        self._suggestions_left -= 1
        return difflib.get_close_matches(wanted, list(self._names(key)), n=MAX_SUGGESTIONS, cutoff=0.5)

    def _names(self, key: TensorKey) -> Iterator[str]:
        if key.factor is Factor.SAVED:
            for module, params in self._targets.saveable.items():
                yield from (f"{module}.{param}" for param in params)
        else:
            yield from self._targets.experts
            yield from self._targets.linears
            yield from self._targets.embeddings

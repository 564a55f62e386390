"""Which tensor of a quantised checkpoint goes where. Reads headers only.

Every tensor ends in exactly one place: an experts layer that stays packed, a linear map that is dequantised, the rest
that transformers places by itself, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moegraft.core.errors import CheckpointError
from moegraft.integrations.transformers.checkpoint.scheme import PARTS, Layout, Parts, Scheme
from moegraft.lora.peft.renames import DOWN_NAMES, GATE_NAMES, UP_NAMES, Renamer
from moegraft.lora.peft.safetensors_file import TensorInfo
from moegraft.lora.peft.strict_json import shorten
from moegraft.lora.targets import ExpertsTarget

_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<proj>\w+)", re.ASCII)
# Everything that gpt-oss keeps in an experts module; fp8 checkpoints of fused experts have the scales of theirs.
_FUSED = re.compile(r"(?P<param>gate_up_proj|up_proj|down_proj)(?P<part>_blocks|_scales|_scale_inv|_bias)?")
_FUSED_MARKERS = {Layout.MXFP4: "_blocks", Layout.FP8_BLOCKS: "_scale_inv"}


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One experts layer that is stored quantised.

    ``matrices``: (expert, "gate" | "up" | "down") -> {part: tensor}; or, for fused experts, ``fused``: tensors by
    their last names. One of the two is empty.
    """

    target: ExpertsTarget
    matrices: Mapping[tuple[int, str], Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """``experts``: by module name. ``linears``: module (as the file names it) -> {part: tensor}. ``plain``: the rest.

    ``ignored``: what transformers leaves out of this model by its own rules, such as layers for drafting.
    """

    scheme: Scheme
    experts: Mapping[str, PackedLayer]
    linears: Mapping[str, Mapping[str, str]]
    plain: tuple[str, ...]
    ignored: tuple[str, ...]


def plan_checkpoint(
    infos: Mapping[str, TensorInfo],
    scheme: Scheme,
    targets: Mapping[str, ExpertsTarget],
    *,
    model_type: str,
    ignore: Iterable[str] = (),
) -> CheckpointPlan:
    """``targets``: the experts of the model, by module name. ``ignore``: expressions that name tensors to leave out.

    Raises CheckpointError for a tensor that fits nowhere, an expert that is not complete, or a layer of which only a
    part is quantised; names the file and the tensor.
    """
    left_out = re.compile("|".join(f"({pattern})" for pattern in ignore)) if ignore else None
    ignored = tuple(name for name in infos if left_out is not None and left_out.search(name))
    modules: dict[str, dict[str, str]] = {}
    for name in infos.keys() - set(ignored):
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = name
    finder = _ExpertsFinder(targets, model_type)
    plain: list[str] = []
    linears: dict[str, dict[str, str]] = {}
    matrices: dict[str, dict[tuple[int, str], dict[str, str]]] = {}
    fused: dict[str, dict[str, str]] = {}
    for module, tensors in sorted(modules.items()):
        found = finder.find(module, infos[min(tensors.values())])
        if found is None:
            _sort_linear(module, tensors, scheme, infos, linears, plain)
        elif isinstance(found, str):
            fused.setdefault(found, {}).update(tensors)
        else:
            layer_name, expert, projection = found
            matrices.setdefault(layer_name, {})[expert, projection] = tensors
    experts: dict[str, PackedLayer] = {}
    for name, target in targets.items():
        layer = _layer(target, matrices.get(name, {}), fused.get(name, {}), scheme, infos)
        if layer is not None:
            experts[name] = layer
        else:
            plain += fused.get(name, {}).values()
            plain += [tensor for parts in matrices.get(name, {}).values() for tensor in parts.values()]
    if not experts:
        raise CheckpointError(
            f"config.json says {scheme.description}, but no experts layer has quantised tensors; load the checkpoint "
            "with transformers"
        )
    return CheckpointPlan(scheme=scheme, experts=experts, linears=linears, plain=tuple(sorted(plain)), ignored=ignored)


class _ExpertsFinder:
    """From a module's name in the file to an experts module of the model, through the renames of transformers 5."""

    def __init__(self, targets: Mapping[str, ExpertsTarget], model_type: str) -> None:
        self._targets = targets
        self._renamer = Renamer(model_type)

    def find(self, module: str, info: TensorInfo) -> str | tuple[str, int, str] | None:
        """The experts module itself (fused), (experts module, expert, projection), or None for anything else."""
        fused = self._module(module)
        if fused is not None:
            return fused
        match = _EXPERT.fullmatch(module)
        if match is None or match["proj"] not in GATE_NAMES | UP_NAMES | DOWN_NAMES:
            return None
        name = self._module(match["experts"])
        if name is None:
            return None
        target, expert = self._targets[name], int(match["index"])
        if expert >= target.num_experts:
            raise CheckpointError(f"{info.where}: expert {expert}, but {name} has {target.num_experts}")
        projection = "gate" if match["proj"] in GATE_NAMES else "up" if match["proj"] in UP_NAMES else "down"
        return name, expert, projection

    def _module(self, name: str) -> str | None:
        if name in self._targets:
            return name
        found = [renamed for renamed in self._renamer.candidates(name) if renamed in self._targets]
        return found[0] if len(found) == 1 else None


def _sort_linear(
    module: str,
    tensors: Mapping[str, str],
    scheme: Scheme,
    infos: Mapping[str, TensorInfo],
    linears: dict[str, dict[str, str]],
    plain: list[str],
) -> None:
    parts = PARTS.get(scheme.layout)
    if parts is None or parts.marker not in tensors:
        plain += tensors.values()
        return
    _check_parts(parts, {part: name for part, name in tensors.items() if part != "bias"}, infos)
    linears[module] = {part: name for part, name in tensors.items() if part != "bias"}
    plain += [name for part, name in tensors.items() if part == "bias"]


def _check_parts(parts: Parts, tensors: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    missing, unknown = parts.required - tensors.keys(), tensors.keys() - parts.known
    info = infos[min(tensors.values())]
    if missing:
        raise CheckpointError(f"{info.where}: its matrix has no {', '.join(sorted(missing))}")
    if unknown:
        name = infos[tensors[min(unknown)]].where
        raise CheckpointError(f"{name}: not known beside {parts.marker}; expected {', '.join(sorted(parts.known))}")


def _layer(
    target: ExpertsTarget,
    matrices: Mapping[tuple[int, str], Mapping[str, str]],
    fused: Mapping[str, str],
    scheme: Scheme,
    infos: Mapping[str, TensorInfo],
) -> PackedLayer | None:
    """The packed layer; None where all of it is stored unquantised."""
    if fused and matrices:
        where = infos[min(fused.values())].where
        raise CheckpointError(f"{where}: experts of {target.name} are stored fused and one by one")
    if fused:
        return _fused_layer(target, fused, scheme, infos)
    parts = PARTS.get(scheme.layout)
    quantised = [key for key, tensors in matrices.items() if parts is not None and parts.marker in tensors]
    if not quantised or parts is None:
        return None
    wanted = {(e, p) for e in range(target.num_experts) for p in _projections(target)}
    if set(matrices) != wanted:
        expert, projection = min(wanted.symmetric_difference(matrices))
        verb = "is missing" if (expert, projection) in wanted else "is not part of this model"
        raise CheckpointError(f"{target.name}: the {projection} projection of expert {expert} {verb}")
    for (expert, projection), tensors in matrices.items():
        if parts.marker not in tensors:
            where = infos[min(tensors.values())].where
            raise CheckpointError(f"{where}: {projection} of expert {expert} is not quantised, others of its layer are")
        _check_parts(parts, tensors, infos)
    return PackedLayer(target=target, matrices=matrices)


def _projections(target: ExpertsTarget) -> tuple[str, ...]:
    return ("gate", "up", "down") if target.has_gate else ("up", "down")


def _fused_layer(
    target: ExpertsTarget, fused: Mapping[str, str], scheme: Scheme, infos: Mapping[str, TensorInfo]
) -> PackedLayer | None:
    marker = _FUSED_MARKERS.get(scheme.layout)
    known = {}
    for part, name in fused.items():
        match = _FUSED.fullmatch(part)
        if match is None or match["param"] not in (target.w13_param, target.w2_param):
            raise CheckpointError(f"{infos[name].where}: no tensor that {target.name} is known to have")
        known[part] = match["part"] or ""
    if marker not in known.values():
        if any(known.values()) and set(known.values()) - {"", "_bias"}:
            raise CheckpointError(
                f"{infos[min(fused.values())].where}: fused experts that are not stored as {scheme.description}"
            )
        return None
    stored = ("_blocks", "_scales") if scheme.layout is Layout.MXFP4 else ("", "_scale_inv")
    wanted = {param + part for param in (target.w13_param, target.w2_param) for part in stored}
    if wanted - fused.keys():
        raise CheckpointError(f"{target.name}: {shorten(min(wanted - fused.keys()))} is missing")
    unknown = fused.keys() - wanted - {f"{target.w13_param}_bias", f"{target.w2_param}_bias"}
    if unknown:
        raise CheckpointError(f"{infos[fused[min(unknown)]].where}: not known beside {marker}")
    return PackedLayer(target=target, fused=fused)

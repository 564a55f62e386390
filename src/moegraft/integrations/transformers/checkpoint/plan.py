"""Which tensor of a quantised checkpoint goes where. Reads headers only.

Every tensor ends in exactly one place: an experts layer that stays packed, a linear map that is dequantised, the rest
that transformers places by itself, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moegraft.core.errors import CheckpointError
from moegraft.files import TensorInfo
from moegraft.files.renames import DOWN_NAMES, GATE_NAMES, UP_NAMES, Renamer
from moegraft.integrations.transformers.checkpoint.scheme import CACHE_SCALES, PARTS, Layout, Parts, Scheme
from moegraft.lora.targets import ExpertsTarget

_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<proj>\w+)", re.ASCII)
# Everything that gpt-oss keeps in an experts module; fp8 checkpoints of fused experts have the scales of theirs.
_FUSED = re.compile(
    r"(?P<param>gate_up_proj|up_proj|down_proj)(?P<part>_blocks|_scales|_scale_inv|_bias|_activation_scale)?"
)
# Families whose fused experts are stored as [E, in, out] and turned round when transformers loads them.
_TURNED_ROUND = ("qwen3_vl_moe", "qwen3_vl_moe_text")
_FUSED_MARKERS = {Layout.MXFP4: "_blocks", Layout.FP8_BLOCKS: "_scale_inv"}


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One experts layer that is stored quantised.

    ``matrices``: (expert, "gate" | "up" | "down") -> {part: tensor}; or, for fused experts, ``fused``: tensors by
    their last names. One of the two is empty. ``is_turned``: fused matrices are stored as [in, out].
    """

    target: ExpertsTarget
    scheme: Scheme
    matrices: Mapping[tuple[int, str], Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    is_turned: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantisedLinear:
    """A linear map that is stored quantised: {part: tensor}."""

    scheme: Scheme
    parts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """``experts``: by module name. ``linears``: by the name that the file has for the module. ``plain``: the rest.

    ``ignored``: what transformers leaves out of this model by its own rules, such as layers for drafting.
    """

    experts: Mapping[str, PackedLayer]
    linears: Mapping[str, QuantisedLinear]
    plain: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def formats(self) -> dict[str, str]:
        """Experts module -> ``ExpertsWeights.format_name``."""
        return {name: layer.scheme.format_name for name, layer in self.experts.items()}

    @property
    def description(self) -> str:
        """How the experts are stored, in words."""
        return "; ".join(dict.fromkeys(layer.scheme.description for layer in self.experts.values()))


def plan_checkpoint(
    infos: Mapping[str, TensorInfo],
    schemes: Sequence[Scheme],
    targets: Mapping[str, ExpertsTarget],
    *,
    model_type: str,
    ignore: Iterable[str] = (),
    integers: Collection[str] = (),
) -> CheckpointPlan:
    """``targets``: the experts of the model, by module name. ``ignore``: expressions that name tensors to leave out.
    ``integers``: last names of what the model itself stores as integers.

    Raises CheckpointError for a tensor that fits nowhere, an expert that is not complete, or a layer of which only a
    part is quantised; names the file and the tensor.
    """
    left_out = re.compile("|".join(f"({pattern})" for pattern in ignore)) if ignore else None
    ignored = tuple(
        name
        for name in infos
        if (left_out is not None and left_out.search(name)) or name.rpartition(".")[2] in CACHE_SCALES
    )
    modules: dict[str, dict[str, str]] = {}
    for name in infos.keys() - set(ignored):
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = name
    finder, planner = _ExpertsFinder(targets, model_type), _Planner(infos, schemes, model_type)
    plain: list[str] = []
    linears: dict[str, QuantisedLinear] = {}
    matrices: dict[str, dict[tuple[int, str], dict[str, str]]] = {}
    fused: dict[str, dict[str, str]] = {}
    for module, tensors in sorted(modules.items()):
        found = finder.find(module, infos[min(tensors.values())])
        if isinstance(found, str):
            fused.setdefault(found, {}).update(tensors)
        elif found is not None:
            layer_name, expert, projection = found
            matrices.setdefault(layer_name, {})[expert, projection] = tensors
        elif (linear := planner.linear(tensors)) is not None:
            linears[module] = linear
            plain += [name for name in tensors.values() if name not in linear.parts.values()]
        else:
            plain += tensors.values()
    experts: dict[str, PackedLayer] = {}
    for name, target in targets.items():
        layer = planner.layer(target, matrices.get(name, {}), fused.get(name, {}))
        if layer is not None:
            experts[name] = layer
        else:
            plain += fused.get(name, {}).values()
            plain += [tensor for parts in matrices.get(name, {}).values() for tensor in parts.values()]
    _refuse_unscaled([infos[name] for name in plain], integers)
    if not experts:
        words = "; ".join(scheme.description for scheme in schemes)
        raise CheckpointError(
            f"config.json says {words}, but no experts layer has quantised tensors; load the checkpoint with "
            "transformers"
        )
    return CheckpointPlan(experts=experts, linears=linears, plain=tuple(sorted(plain)), ignored=ignored)


def _refuse_unscaled(plain: Iterable[TensorInfo], integers: Collection[str]) -> None:
    """A weight in integers or 8-bit floats means nothing without its scales, and no model has such norms or biases."""
    for info in sorted(plain, key=lambda info: info.name):
        if info.dtype.itemsize > 1 and info.dtype.is_floating_point:
            continue
        if info.dtype.is_floating_point or info.name.rpartition(".")[2] not in integers:
            raise CheckpointError(
                f"{info.where}: is stored as {info.dtype}, without the scales that say what its numbers stand for; "
                "expected a floating point dtype of 16 bits or more, or the scales beside it"
            )


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


class _Planner:
    """Tells quantised matrices from plain ones, and checks that they are complete."""

    def __init__(self, infos: Mapping[str, TensorInfo], schemes: Sequence[Scheme], model_type: str) -> None:
        self._model_type = model_type
        self._infos = infos
        self._schemes = schemes

    def linear(self, tensors: Mapping[str, str]) -> QuantisedLinear | None:
        """The tensors of a module without its bias, where they are those of a quantised matrix."""
        scheme = self._scheme(tensors)
        if scheme is None:
            return None
        parts = {part: name for part, name in tensors.items() if part != "bias"}
        self._check_parts(scheme.parts, parts)
        return QuantisedLinear(scheme=scheme, parts=parts)

    def layer(
        self,
        target: ExpertsTarget,
        matrices: Mapping[tuple[int, str], Mapping[str, str]],
        fused: Mapping[str, str],
    ) -> PackedLayer | None:
        """The packed layer; None where all of it is stored unquantised."""
        if fused and matrices:
            raise CheckpointError(f"{self._where(fused)}: experts of {target.name} are stored fused and one by one")
        if fused:
            return self._fused_layer(target, fused)
        scheme = next((found for tensors in matrices.values() if (found := self._scheme(tensors)) is not None), None)
        if scheme is None:
            return None
        projections = ("gate", "up", "down") if target.has_gate else ("up", "down")
        wanted = {(expert, projection) for expert in range(target.num_experts) for projection in projections}
        if set(matrices) != wanted:
            expert, projection = min(wanted.symmetric_difference(matrices))
            verb = "is missing" if (expert, projection) in wanted else "is not part of this model"
            raise CheckpointError(f"{target.name}: the {projection} projection of expert {expert} {verb}")
        for (expert, projection), tensors in matrices.items():
            found = self._scheme(tensors)
            if found != scheme:
                how = "not quantised" if found is None else f"stored as {found.description}"
                raise CheckpointError(
                    f"{self._where(tensors)}: {projection} of expert {expert} is {how}, others of its layer are stored "
                    f"as {scheme.description}"
                )
            self._check_parts(scheme.parts, tensors)
        return PackedLayer(target=target, scheme=scheme, matrices=matrices)

    def _scheme(self, tensors: Mapping[str, str]) -> Scheme | None:
        """The scheme of which a matrix has the marker; where two share it, the dtype of the weight tells."""
        found = [s for s in self._schemes if s.layout in PARTS and PARTS[s.layout].marker in tensors]
        found.sort(key=lambda scheme: -len(PARTS[scheme.layout].required & tensors.keys()))
        if len(found) > 1 and "weight" in tensors:
            dtype = self._infos[tensors["weight"]].dtype
            found = [scheme for scheme in found if scheme.weight_dtype is dtype] or found
        return found[0] if found else None

    def _where(self, tensors: Mapping[str, str]) -> str:
        return self._infos[min(tensors.values())].where

    def _check_parts(self, parts: Parts, tensors: Mapping[str, str]) -> None:
        missing, unknown = parts.required - tensors.keys(), tensors.keys() - parts.known
        if missing:
            raise CheckpointError(f"{self._where(tensors)}: its matrix has no {', '.join(sorted(missing))}")
        if unknown:
            where = self._infos[tensors[min(unknown)]].where
            raise CheckpointError(
                f"{where}: not known beside {parts.marker}; expected {', '.join(sorted(parts.known))}"
            )

    def _fused_layer(self, target: ExpertsTarget, fused: Mapping[str, str]) -> PackedLayer | None:
        found = set()
        for part, name in fused.items():
            match = _FUSED.fullmatch(part)
            if match is None or match["param"] not in (target.w13_param, target.w2_param):
                raise CheckpointError(f"{self._infos[name].where}: no tensor that {target.name} is known to have")
            found.add(match["part"] or "")
        scheme = next((s for s in self._schemes if _FUSED_MARKERS.get(s.layout) in found), None)
        if scheme is None:
            if found <= {"", "_bias"}:
                return None
            words = "; ".join(scheme.description for scheme in self._schemes)
            raise CheckpointError(f"{self._where(fused)}: fused experts that are not stored as {words}")
        stored: tuple[str, ...] = ("_blocks", "_scales") if scheme.layout is Layout.MXFP4 else ("", "_scale_inv")
        stored += ("_activation_scale",) if scheme.is_static else ()
        wanted = {param + part for param in (target.w13_param, target.w2_param) for part in stored}
        if wanted - fused.keys():
            raise CheckpointError(f"{target.name}: {min(wanted - fused.keys())} is missing")
        unknown = fused.keys() - wanted - {f"{target.w13_param}_bias", f"{target.w2_param}_bias"}
        if unknown:
            where = self._infos[fused[min(unknown)]].where
            raise CheckpointError(f"{where}: not known beside {_FUSED_MARKERS[scheme.layout]}")
        return PackedLayer(target=target, scheme=scheme, fused=fused, is_turned=self._is_turned(target, scheme, fused))

    def _is_turned(self, target: ExpertsTarget, scheme: Scheme, fused: Mapping[str, str]) -> bool:
        """Whether matrices are stored as [in, out], where the model has [out, in]; shapes tell, or the family."""
        if scheme.layout is Layout.MXFP4:
            return False
        D, F = target.hidden_size, target.intermediate_size
        for param, sizes in ((target.w13_param, ((1 + target.has_gate) * F, D)), (target.w2_param, (D, F))):
            if sizes[0] != sizes[1]:
                return tuple(self._infos[fused[param]].shape[1:]) == sizes[::-1]
        return self._model_type in _TURNED_ROUND

"""What the name of a tensor says: which factor of which module of the file, and which target of the model that is."""

from __future__ import annotations

import difflib
import enum
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moegraft.core.errors import AdapterMismatchError, UnservedModuleError
from moegraft.files import limits, shorten
from moegraft.files.renames import DOWN_NAMES, FUSED_MODULES, GATE_NAMES, UP_NAMES, Renamer
from moegraft.lora.targets import ExpertsTarget, ModelTargets

PREFIX = "base_model.model."
MAX_SUGGESTIONS = 3
MAX_SUGGESTED = 10  # tensors; comparing names is slow, and the first ones tell what is wrong
_PROJECTIONS = GATE_NAMES | UP_NAMES | DOWN_NAMES
# gpt-oss as unsloth unpacks it: lists of linear maps.
_LISTED = re.compile(r"(?P<experts>.+)\.(?P<proj>gate_up_projs|down_projs)\.(?P<index>0|[1-9][0-9]{0,5})", re.ASCII)
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<proj>\w+)", re.ASCII)
_PART = re.compile(r"(?P<joined>(?:.+\.)?in_proj_)(?P<part>[qkv])", re.ASCII)
_PROJECTION = re.compile(r"(?P<parent>.+)\.(?P<proj>\w+)", re.ASCII)


class Factor(enum.StrEnum):
    """What a tensor is to its module.

    TOKENS: rows of an embedding or head. SAVED: no LoRA factor but a whole parameter. ORIGINAL: PEFT's copy of the
    base's.
    """

    A = "lora_A"
    B = "lora_B"
    A_BIAS = "lora_A.bias"
    B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    SAVED = "saved"
    ORIGINAL = "original_module"


_SUFFIXES = {
    ".lora_A.weight": Factor.A,
    ".lora_B.weight": Factor.B,
    ".lora_A.bias": Factor.A_BIAS,
    ".lora_B.bias": Factor.B_BIAS,
    ".lora_embedding_A": Factor.EMBEDDING_A,
    ".lora_embedding_B": Factor.EMBEDDING_B,
    ".lora_magnitude_vector": Factor.MAGNITUDE,
    ".lora_magnitude_vector.weight": Factor.MAGNITUDE,  # PEFT before 0.12
    ".token_adapter.trainable_tokens_delta": Factor.TOKENS,
}
# What torch.compile, FSDP and checkpointing put between the names of modules.
_WRAPPERS = re.compile(r"(?:\A|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight\Z|bias\Z)(\w+)(?=\.|\Z)"
)
# ``modules_to_save`` and the adapter's name stand between module and parameter where a state dict was saved raw.
_SAVED_INFIX = re.compile(r"\.modules_to_save(?:\.default)?\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorKey:
    """A tensor's name, taken apart.

    ``module``: as in the model that was trained, without PEFT's prefix and without its wrappers.
    ``depth``: how many ``base_layer`` stood behind it; a fused experts module with LoRA on two parameters is wrapped
    twice. ``param``: the parameter's name, for SAVED only.
    """

    name: str
    module: str
    factor: Factor
    depth: int = 0
    param: str = ""


def parse_key(name: str) -> TensorKey:
    """Takes a tensor's name apart. Whatever is no LoRA factor is a saved parameter, to be looked up by its name.

    What wrappers leave in names, and PEFT's default name of an adapter, are no part of them.
    """
    path = _WRAPPERS.sub("", name) if "_orig_mod." in name or "_wrapped_module." in name else name
    path = path.removeprefix("module.").removeprefix(PREFIX)
    if ".default" in path:
        path = _ADAPTER_NAME.sub(lambda found: found[1] if found[2] == "default" else found[0], path)
    for suffix, factor in _SUFFIXES.items():
        if path.endswith(suffix):
            module, depth = _unwrap(path.removesuffix(suffix))
            return TensorKey(name=name, module=module, factor=factor, depth=depth)
    module, _, param = path.rpartition(".")
    factor = Factor.ORIGINAL if module.endswith(".original_module") else Factor.SAVED
    module, depth = _unwrap(_SAVED_INFIX.sub("", module.removesuffix(".original_module")))
    return TensorKey(name=name, module=module, factor=factor, depth=depth, param=param)


def _unwrap(module: str) -> tuple[str, int]:
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module, depth


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
    experts at once; ``is_fused``: in PEFT's two-dimensional packing. ``param``: a saved parameter's name. ``part``: of
    a linear map that was several where the adapter was trained: ``q``, ``k`` or ``v``.
    """

    kind: Kind
    module: str
    projection: Projection | None = None
    expert: int | None = None
    is_fused: bool = False
    param: str = ""
    part: str = ""


class SiteFinder:
    """Finds the site of a tensor: the module's own name first, then its renamed forms, of which one may exist.

    Raises:
        UnservedModuleError: the base model has the module, and no adapter may touch it.
        AdapterMismatchError: no target has the name, or several might be meant; names the tensor and the nearest
            targets.
    """

    def __init__(self, targets: ModelTargets) -> None:
        self._targets = targets
        self._renamer: Renamer | None = None
        self._renamed_experts: dict[str, str] = {}
        self._suggestions_left = MAX_SUGGESTED
        self._longest = max(map(len, self._all_names()), default=0) + limits.MAX_NAME_EXTRA

    def find(self, key: TensorKey) -> Site:
        """The site of one tensor."""
        if len(key.name) > self._longest:
            raise AdapterMismatchError(
                f"tensor {shorten(key.name)}: the base model ({self._targets.model_type}) has no name that long; the "
                f"longest may have {self._longest} characters"
            )
        if key.factor in (Factor.SAVED, Factor.ORIGINAL):
            return self._find_saved(key)
        site = self._exact(key.module) or self._find_projection(key) or self._find_part(key)
        if site is not None:
            return site
        names = [name for name in self._candidates(key.module) if self._exact(name) is not None]
        site = self._exact(self._only(key, names))
        assert site is not None  # it is one of those that exist
        return site

    def _exact(self, name: str) -> Site | None:
        if name in self._targets.experts:
            return Site(kind=Kind.EXPERTS, module=name, is_fused=True)
        if name in self._targets.linears:
            return Site(kind=Kind.LINEAR, module=name)
        return Site(kind=Kind.EMBEDDING, module=name) if name in self._targets.embeddings else None

    def _find_projection(self, key: TensorKey) -> Site | None:
        """``experts.3.w1`` (one expert), ``experts.w1`` (all of them), ``input_linear`` (a fused parameter)."""
        match = _EXPERT.fullmatch(key.module)
        if match is None or match["proj"] not in _PROJECTIONS:
            match = _LISTED.fullmatch(key.module)
        if match:
            experts = self._experts(key, match["experts"])
            if experts is not None:
                expert = int(match["index"])
                if expert >= experts.num_experts:
                    raise AdapterMismatchError(
                        f"tensor {shorten(key.name)}: expert {expert}, but {experts.name} has {experts.num_experts}"
                    )
                return self._projection_site(key, experts, match["proj"].removesuffix("s"), expert)
        match = _PROJECTION.fullmatch(key.module)
        if match is None:
            return None
        if match["proj"] in _PROJECTIONS or match["proj"] == "gate_up_proj":
            experts = self._experts(key, match["parent"])
            return None if experts is None else self._projection_site(key, experts, match["proj"], None)
        if match["proj"] in FUSED_MODULES:
            path, is_down = FUSED_MODULES[match["proj"]]
            experts = self._experts(key, match["parent"] + path)
            if experts is not None:
                projection = Projection.DOWN if is_down else first_projection(experts)
                return Site(kind=Kind.EXPERTS, module=experts.name, projection=projection, is_fused=True)
        return None

    def _find_part(self, key: TensorKey) -> Site | None:
        """``in_proj_q``, ``_k``, ``_v`` (Tinker) of what is one map of three parts in Qwen3.5."""
        match = _PART.fullmatch(key.module)
        if match is None:
            return None
        joined = f"{match['joined']}qkv"
        names = [name for name in self._candidates(joined) if name in self._targets.linears]
        return Site(kind=Kind.LINEAR, module=self._only(key, names), part=match["part"]) if names else None

    def _experts(self, key: TensorKey, name: str) -> ExpertsTarget | None:
        experts = self._targets.experts
        if name not in experts and name not in self._renamed_experts:
            names = [renamed for renamed in self._candidates(name) if renamed in experts]
            if not names:
                return None
            self._renamed_experts[name] = self._only(key, names)  # an experts module has many tensors
        return experts[self._renamed_experts.get(name, name)]

    def _candidates(self, name: str) -> tuple[str, ...]:
        self._renamer = self._renamer or Renamer(self._targets.model_type)
        return self._renamer.candidates(name)

    def _projection_site(self, key: TensorKey, experts: ExpertsTarget, proj: str, expert: int | None) -> Site:
        if proj in DOWN_NAMES:
            projection = Projection.DOWN
        elif proj in UP_NAMES or (proj == "w1" and not experts.has_gate):
            projection = Projection.UP
        elif experts.has_gate:
            projection = Projection.GATE_UP if proj == "gate_up_proj" else Projection.GATE
        else:
            raise AdapterMismatchError(f"tensor {shorten(key.name)}: the experts of {experts.name} have no gate")
        return Site(kind=Kind.EXPERTS, module=experts.name, projection=projection, expert=expert)

    def _find_saved(self, key: TensorKey) -> Site:
        own = f"{key.module}.{key.param}"
        if not self._is_saveable(own):
            names = [f"{module}.{key.param}" for module in self._candidates(key.module)] + [*self._candidates(own)]
            own = self._only(key, [name for name in dict.fromkeys(names) if self._is_saveable(name)])
        module, _, param = own.rpartition(".")
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
        other = _ADAPTER_NAME.search(key.name)
        if other is not None and other[2] != "default":
            raise AdapterMismatchError(
                f"tensor {shorten(key.name)}: holds {shorten(other[2])}, the name of an adapter, as in the state of a "
                "model in training; save the adapter with save_pretrained, which leaves it out"
            )
        for name in self._candidates(key.module):
            left_out = next((part for part in _with_parents(name) if part in self._targets.left_out), None)
            if left_out is not None:
                reason = self._targets.left_out[left_out]
                raise UnservedModuleError(
                    f"tensor {shorten(key.name)}: {shorten(left_out)} exists in the base model, but adapters on it are "
                    f"not served: it {reason}; load_adapter(..., skip_unserved=True) loads the rest without it",
                    module=left_out,
                )
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
        names = self._saved_names() if key.factor is Factor.SAVED else self._module_names()
        return difflib.get_close_matches(wanted, list(names), n=MAX_SUGGESTIONS, cutoff=0.5)

    def _module_names(self) -> Iterator[str]:
        return itertools.chain(self._targets.experts, self._targets.linears, self._targets.embeddings)

    def _saved_names(self) -> list[str]:
        return [f"{module}.{param}" for module, params in self._targets.saveable.items() for param in params]

    def _all_names(self) -> Iterator[str]:
        return itertools.chain(self._module_names(), self._saved_names(), self._targets.left_out)


def _with_parents(name: str) -> Iterator[str]:
    """A module's name, then those of the modules around it: of an expert, its experts module."""
    while name:
        yield name
        name = name.rpartition(".")[0]

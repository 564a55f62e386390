"""What transformers' own parallel plan has made of a model: which part of every module this rank holds.

A plan (``from_pretrained(tp_plan="auto")`` or ``distributed_config=``) stores sharded parameters as DTensors and wraps
the forward pass of their modules: inputs and outputs are brought into the layout that a named style asks for. LoRA
must follow the layout in which a seam sees x and y; a style whose layout is not known is refused by its name.

Shape letters: E experts · D hidden size · F expert intermediate size · G = 2 (gate and up) or 1 (no gate)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import AdapterMismatchError, UnsupportedModelError
from moegraft.integrations.transformers.host.dtensors import is_sharded, local
from moegraft.lora.targets import AdapterWeights, ExpertsTarget, LinearTarget, ModelTargets
from moegraft.parallel import (
    ExpertsSlice,
    LinearSlice,
    RankSlice,
    Share,
    column_parallel,
    half_columns,
    row_parallel,
)

# Styles under which a module takes whole rows and gives whole rows, however its weight lies.
_WHOLE = frozenset(
    {
        "colwise_gather_output",
        "colwise_rep",
        "rowwise_split_input",
        "rowwise_rep",
        "embedding_rowwise",
        "embedding_colwise",
        "replicated_with_grad_allreduce",
        "replicate",
        "mla_kv_a_proj",
        "ep_router",
        "local_params",
    }
)
# Those of them whose LoRA is shared out all the same where it is as large as the vocabulary.
_GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
_EMBEDDING_BY_ROWS = "embedding_rowwise"
# Styles that sum the partial outputs of an experts module over the ranks, and bring every rank every row.
_SUMMED = frozenset({"moe_tp_experts", "ep_dispatch_experts"})
# Styles that change what the modules inside of them see.
_REFUSED = {
    "sequence_parallel": "the ranks hold different tokens of a sequence there",
    "moe_identity_expert": "its rows are scaled by the number of ranks",
    "megamoe_experts": "rows travel inside its kernel, without their adapters",
    "megamoe_router": "rows travel inside the experts' kernel, without their adapters",
}


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A rank's view of a model that transformers has shared out.

    ``slice``: what this rank holds; modules that are not named there take and give whole rows, and LoRA on them is
    whole. ``whole_rows``: modules named there that take and give whole rows all the same (heads, embeddings), whose
    delta the ranks put together. ``refused``: modules on which LoRA cannot follow the plan, and why; ``refused_saved``:
    modules whose parameters an adapter may not replace.
    """

    rank: int
    size: int
    slice: RankSlice
    whole_rows: frozenset[str]
    refused: Mapping[str, str]
    refused_saved: Mapping[str, str]

    def check_adapter(self, weights: AdapterWeights) -> None:
        """Raises AdapterMismatchError where an adapter touches what cannot follow the plan of the model."""
        for kind, modules, refused in (
            ("LoRA on", [*weights.linears, *weights.embeddings], self.refused),
            ("a replacement of", [*weights.saved], self.refused_saved),
        ):
            for module in modules:
                if module in refused:
                    raise AdapterMismatchError(
                        f"{kind} {module!r} cannot follow the parallel plan of the model, which gives it "
                        f"{refused[module]}; load the model whole, or with a plan that leaves this module alone"
                    )


def read_plan(model: PreTrainedModel, targets: ModelTargets) -> ModelPlan:
    """The plan that the model was loaded with, as this rank sees it. ``targets``: of the whole model.

    Raises UnsupportedModelError where experts or rows are shared out in a way that LoRA cannot follow.
    """
    styles = _Styles.of(model)
    share = _place(model)
    linears: dict[str, LinearSlice] = {}
    refused: dict[str, str] = {}
    for name, target in targets.linears.items():
        found = _linear_slice(name, target, model.get_submodule(name), styles, share)
        if isinstance(found, str):
            refused[name] = found
        elif found is not None:
            linears[name] = found
    refused |= {
        name: f"style {style!r}"
        for name in {*targets.embeddings, *targets.saveable} - targets.linears.keys()
        if (style := styles.of_module(name)) not in {None, *_WHOLE}
    }
    vocabulary = _vocabulary_slices(model, targets, styles, share)
    linears |= vocabulary
    slices = {name: _experts_slice(model, name, target, styles, share) for name, target in targets.experts.items()}
    return ModelPlan(
        rank=share.rank,
        size=share.world,
        slice=RankSlice(experts={name: mine for name, mine in slices.items() if mine is not None}, linears=linears),
        whole_rows=frozenset(vocabulary),
        refused=refused,
        refused_saved=refused
        | {
            name: f"style {styles.of_module(name)!r}"
            for name in targets.saveable
            if name in linears.keys() - vocabulary.keys() or styles.of_module(name) == "ep_router"
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Styles:
    """The style of each module and parameter: names with ``*`` for numbers."""

    plan: Mapping[str, str]
    ep_implementation: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Styles:
        config: Any = getattr(model.config, "distributed_config", None)
        for size in ("pp_size", "fsdp_size", "dp_replicate_size"):
            if (getattr(config, size, None) or 1) > 1:
                raise UnsupportedModelError(
                    f"{type(model).__name__} was loaded with {size}={getattr(config, size)}; adapters are served on "
                    "models that are whole or shared out by tensor or expert parallelism alone"
                )
        plan = dict(model.tp_plan or {}) if (getattr(config, "tp_size", None) or 1) > 1 else {}
        if (getattr(config, "ep_size", None) or 1) > 1:
            experts = dict(model.ep_plan or {})
            plan = {name: style for name, style in plan.items() if not _is_inside(name, experts)} | experts
            if getattr(config, "ep_size", 1) != getattr(config, "tp_size", 1):
                raise UnsupportedModelError(
                    f"{type(model).__name__} was loaded with ep_size={config.ep_size} and tp_size={config.tp_size}: "
                    f"its rows travel without their adapters; use ep_size equal to tp_size, or load the model whole "
                    f"and attach with ParallelConfig(ep=..., data_parallel=True)"
                )
        styles = cls(plan=plan, ep_implementation=getattr(config, "ep_implementation", "auto"))
        for name, module in model.named_modules():
            style = styles.of_module(name)
            if style in _REFUSED:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: the parallel plan gives '{name}' ({type(module).__name__}) style "
                    f"{style!r}, under which adapters are not served: {_REFUSED[style]}"
                )
        return styles

    def of_module(self, name: str) -> str | None:
        return self.plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _is_inside(name: str, modules: Mapping[str, str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _place(model: PreTrainedModel) -> Share:
    """This rank's place in the tensor-parallel mesh; the other dimensions have been found to be 1."""
    mesh = cast("Any", model)._device_mesh
    if mesh is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has DTensor parameters, but transformers did not load it with a plan; load it "
            "with tp_plan='auto', or whole"
        )
    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    return Share(world=int(mesh.size()), rank=int(mesh.get_local_rank()))


def _linear_slice(
    name: str, target: LinearTarget, module: nn.Module, styles: _Styles, share: Share
) -> LinearSlice | str | None:
    """The slice, None where the map takes and gives whole rows, or why LoRA on it cannot be served."""
    style = styles.of_module(name)
    if any(styles.of_module(parent) == "all_reduce" for parent in _parents(name)):
        return "a module around it has style 'all_reduce'"
    if style is None:
        return "a sharded weight without a style" if _any_sharded(module) else None
    if style in _WHOLE:
        return None
    out, inputs = target.out_features, target.in_features
    match style:
        case "colwise":
            found = column_parallel(out, share)
        case "packed_colwise":  # gate and up in one linear map
            found = LinearSlice(outputs=half_columns(share.of(out // 2), out // 2, num_halves=2, is_interleaved=False))
        case "rowwise":
            found = row_parallel(inputs, out, share)
        case _:
            return f"style {style!r}"
    expected = (found.num_outputs(out), found.num_inputs(inputs))
    weight = module._parameters.get(target.param)
    if weight is not None and weight.dim() == 2 and tuple(local(weight).shape) != expected:
        return f"style {style!r}, which left this rank {tuple(local(weight).shape)} of its weight, not {expected}"
    return found


def _vocabulary_slices(
    model: PreTrainedModel, targets: ModelTargets, styles: _Styles, share: Share
) -> dict[str, LinearSlice]:
    """Heads and embeddings that the plan has cut along the vocabulary: B of the one and A of the other are cut too.

    A seam sees whole rows there, so that this cut need not be the plan's own.
    """
    head = model.get_output_embeddings()
    heads = {
        name: column_parallel(target.out_features, share)
        for name, target in targets.linears.items()
        if styles.of_module(name) in _GATHERED and model.get_submodule(name) is head
    }
    embeddings = {
        name: LinearSlice(inputs=share.of(target.num_embeddings).pieces)
        for name, target in targets.embeddings.items()
        if styles.of_module(name) == _EMBEDDING_BY_ROWS
    }
    return heads | embeddings


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _any_sharded(module: nn.Module) -> bool:
    return any(is_sharded(param) for param in module.parameters(recurse=False))


def _experts_slice(
    model: PreTrainedModel, name: str, target: ExpertsTarget, styles: _Styles, share: Share
) -> ExpertsSlice | None:
    """None where every rank holds all of the module."""
    module = model.get_submodule(name)
    style = styles.of_module(name)
    found: ExpertsSlice | str | None
    if not _any_sharded(module) and style in (None, "local_params"):
        return None
    if not _any_sharded(module):
        found = f"style {style!r}, but whole parameters"
    elif style not in _SUMMED:
        found = f"style {style!r}; expected one of {', '.join(sorted(_SUMMED))}"
    elif style == "ep_dispatch_experts" and styles.ep_implementation not in ("auto", "all_reduce"):
        found = (
            f"ep_implementation={styles.ep_implementation!r}, which sends rows to other ranks without their adapters; "
            "use 'all_reduce', or load the model whole and attach with ParallelConfig(ep=...)"
        )
    else:
        found = _slice_of_placements(module, target, share)
    if isinstance(found, str):
        raise UnsupportedModelError(
            f"{type(model).__name__}: adapters cannot follow the parallel plan, which gives experts module '{name}' "
            f"{found}"
        )
    return found


def _slice_of_placements(module: nn.Module, target: ExpertsTarget, share: Share) -> ExpertsSlice | str:
    """What the parameters say about themselves, or what is wrong with that."""
    E, D, F, G = target.num_experts, target.hidden_size, target.intermediate_size, 2 if target.has_gate else 1
    w13, w2 = getattr(module, target.w13_param), getattr(module, target.w2_param)
    if not w13.dtype.is_floating_point or w13.dtype.itemsize == 1:
        return f"parts of {w13.dtype} weights, whose scales it cuts too"
    f_axis, gf_axis = (1, 2) if target.is_transposed else (2, 1)
    split_halves = ("_StridedShard", gf_axis, G) if G == 2 and not target.is_interleaved else ("Shard", gf_axis, 1)
    match _placement(w13), _placement(w2):
        case ("Shard", 0, 1), ("Shard", 0, 1):
            part = share.of(E)
            found, E = ExpertsSlice(experts=tuple(range(part.start, part.stop))), part.size
        case of_w13, ("Shard", axis, 1) if axis == f_axis and of_w13 == split_halves:
            if module.has_bias:
                return "columns of experts that have biases, which every rank would add"
            part = share.of(F)
            found, F = ExpertsSlice(intermediate=replace(part, padded=part.size)), part.size
        case _:
            return f"{target.w13_param} as {w13.placements} and {target.w2_param} as {w2.placements}"
    expected = ((E, D, G * F), (E, F, D)) if target.is_transposed else ((E, G * F, D), (E, D, F))
    shapes = (tuple(local(w13).shape), tuple(local(w2).shape))
    if shapes != expected or not E or not F:
        return f"parts {shapes} of {target.w13_param} and {target.w2_param}, expected {expected}"
    return found


def _placement(param: torch.Tensor) -> tuple[str, int, int] | None:
    """(kind, axis, split factor) of the one placement of a DTensor."""
    placements: tuple[Any, ...] = getattr(param, "placements", ())
    if len(placements) != 1 or not hasattr(placements[0], "dim"):
        return None
    found = placements[0]
    return type(found).__name__, found.dim % param.dim(), getattr(found, "split_factor", 1)

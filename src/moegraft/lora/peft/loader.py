"""``load_peft_adapter``: from a folder to ``AdapterWeights``, or an error that says what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from moegraft.core.errors import AdapterError, AdapterNameError, AdapterTensorError
from moegraft.lora.dora import UnfinishedDora
from moegraft.lora.peft.build import build_embedding, build_linear, build_saved
from moegraft.lora.peft.build_experts import build_experts, tensors_elsewhere
from moegraft.lora.peft.config import read_config
from moegraft.lora.peft.factors import Read
from moegraft.lora.peft.folder import FolderTensors, open_folder
from moegraft.lora.peft.plan import AdapterPlan, plan_adapter
from moegraft.lora.peft.report import LoadReport
from moegraft.lora.peft.safetensors_file import TensorInfo
from moegraft.lora.slicing import Cuts
from moegraft.lora.targets import AdapterWeights, LinearLoRA, ModelTargets
from moegraft.parallel.rank_slice import WHOLE_EXPERTS, WHOLE_LINEAR, RankSlice

_WHOLE = RankSlice()


def load_peft_adapter(
    path: str | os.PathLike[str],
    targets: ModelTargets,
    *,
    dtype: torch.dtype,
    name: str | None = None,
    rank_slice: RankSlice = _WHOLE,
) -> tuple[AdapterWeights, LoadReport]:
    """Reads an adapter that PEFT saved and fits it to a base model.

    ``path``: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or its shards with their index.
    ``dtype``: of the LoRA factors; the scale is folded into B in float32 before the cast. Saved parameters take the
    dtype of the parameter that they replace. ``name``: for the report; the folder's name by default. ``rank_slice``:
    what this rank holds; the adapter is checked against ``targets``, the whole model, but only the slice is read and
    kept, in the sizes of ``local_targets(targets, rank_slice)``. Where a rank has only its columns of a base weight
    (row parallel), ``finish_dora`` must follow before the bank takes an adapter with DoRA on it.

    Every tensor of the checkpoint is applied, or the adapter is refused with an error that names it.

    Raises:
        AdapterFileError: a file is missing, malformed, a pickle, or outside the folder.
        AdapterConfigError: the config is malformed, or asks for something that cannot be served.
        AdapterTensorError: a tensor has the wrong shape or dtype, is not finite, or has no partner.
        AdapterMismatchError: a tensor names a module that the base model does not have.
    """
    folder = open_folder(path)
    if name is not None and (not isinstance(name, str) or not name):
        raise AdapterNameError(f"name {name!r}, expected a string that is not empty")
    config = read_config(folder)
    with FolderTensors(folder) as tensors:
        plan = plan_adapter(tensors.infos, config, targets)
        _raise_first(plan.problems)
        used: set[str] = set()

        def read(tensor: str, cuts: Cuts | None = None, /) -> torch.Tensor:
            used.add(tensor)
            return tensors.read(tensor, cuts)

        weights, notes = _build(plan, targets, read, dtype, rank_slice)
        elsewhere = _tensors_elsewhere(plan, rank_slice)
        unused = tensors.infos.keys() - used - elsewhere
        if unused:
            raise AdapterTensorError(f"{tensors.infos[min(unused)].where}: was not applied")
        notes = [*config.notes, *plan.notes, *_cast_notes(tensors.infos.values(), dtype), *notes]
        report = LoadReport(
            name=name or folder.resolve().name,
            path=str(folder),
            peft_version=config.peft_version,
            tensors_in_file=len(tensors.infos),
            tensors_applied=len(used),
            tensors_elsewhere=len(elsewhere - used),
            bytes_in_file=tensors.nbytes,
            bytes_read=tensors.bytes_read,
            bytes_held=weights.num_bytes,
            experts={module: experts.ranks() for module, experts in plan.experts.items()},
            linears={module: linear.pair.rank for module, linear in plan.linears.items()},
            embeddings={module: embedding.pair.rank for module, embedding in plan.embeddings.items()},
            saved={module: tuple(params) for module, params in weights.saved.items()},
            notes=tuple(notes),
        )
    return weights, report


def _raise_first(problems: tuple[AdapterError, ...]) -> None:
    """Raises the first problem, with a note on how many more there are."""
    if not problems:
        return
    if len(problems) > 1:
        problems[0].add_note(f"and {len(problems) - 1} more problems; inspect_peft_adapter lists them")
    raise problems[0]


def _build(
    plan: AdapterPlan, targets: ModelTargets, read: Read, dtype: torch.dtype, mine: RankSlice
) -> tuple[AdapterWeights, list[str]]:
    saved, notes = _build_saved(plan, targets, read, mine)
    experts = {
        module: build_experts(item, read, dtype, mine.experts.get(module, WHOLE_EXPERTS))
        for module, item in plan.experts.items()
    }
    linears = {
        module: build_linear(item, read, dtype, mine.linears.get(module, WHOLE_LINEAR))
        for module, item in plan.linears.items()
    }
    weights = AdapterWeights(
        experts={module: lora for module, lora in experts.items() if lora is not None},
        linears={module: lora for module, lora in linears.items() if isinstance(lora, LinearLoRA)},
        unfinished={module: part for module, part in linears.items() if isinstance(part, UnfinishedDora)},
        embeddings={
            module: build_embedding(item, read, dtype, mine.linears.get(module, WHOLE_LINEAR))
            for module, item in plan.embeddings.items()
        },
        saved=saved,
    )
    return weights, notes


def _tensors_elsewhere(plan: AdapterPlan, mine: RankSlice) -> set[str]:
    return {
        tensor
        for module, experts in plan.experts.items()
        for tensor in tensors_elsewhere(experts, mine.experts.get(module, WHOLE_EXPERTS))
    }


def _build_saved(
    plan: AdapterPlan, targets: ModelTargets, read: Read, mine: RankSlice
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    saved: dict[str, dict[str, torch.Tensor]] = {}
    notes = []
    for module, params in plan.saved.items():
        for param, info in params.items():
            base = targets.saveable[module][param]
            tensor = build_saved(plan, module, base, info, read, mine.saved.get((module, param)))
            if tensor is None:
                notes.append(f"{info.name} equals the base model's {module}.{param}")
            else:
                saved.setdefault(module, {})[param] = tensor
    return saved, notes


def _cast_notes(infos: Iterable[TensorInfo], dtype: torch.dtype) -> list[str]:
    found = sorted({str(info.dtype).removeprefix("torch.") for info in infos if info.dtype is not dtype})
    return [f"tensors stored as {name} were cast to {str(dtype).removeprefix('torch.')}" for name in found]

"""``load_quantised``: a quantised checkpoint as a transformers model whose experts stay packed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moegraft.core.errors import CheckpointError, UnsupportedModelError
from moegraft.files import TensorInfo, WeightFolder
from moegraft.formats.int4 import refuse_act_order
from moegraft.integrations.transformers.checkpoint.build import (
    PackedConfig,
    build_model,
    hollow_structure,
)
from moegraft.integrations.transformers.checkpoint.config import model_of_fields
from moegraft.integrations.transformers.checkpoint.files import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    Checkpoint,
    as_checkpoint_error,
)
from moegraft.integrations.transformers.checkpoint.plan import CheckpointPlan, PackedLayer, plan_checkpoint
from moegraft.integrations.transformers.checkpoint.scheme import (
    GROUP_ORDER,
    cache_note,
    find_schemes,
    quantisation_fields,
    read_schemes,
)
from moegraft.integrations.transformers.checkpoint.unpack import dequantise_linear, unfit
from moegraft.integrations.transformers.checkpoint.weights import read_layer
from moegraft.integrations.transformers.host.storage import WEIGHT_DTYPES, pack_experts
from moegraft.integrations.transformers.host.targets import experts_targets
from moegraft.integrations.transformers.sites.experts import IMPLEMENTATION, guard_implementation
from moegraft.lora.targets import ExpertsTarget

_LOG = logging.getLogger("moegraft")


@dataclass(frozen=True, kw_only=True)
class CheckpointStructure:
    """A quantised checkpoint without its weights: the model on the meta device, and where every tensor goes.

    ``cache_note``: what the config says of a quantised cache, in words.
    """

    folder: Path
    model: PreTrainedModel
    plan: CheckpointPlan
    cache_note: str | None = None


def is_quantised(path: str | os.PathLike[str]) -> bool:
    """Whether the checkpoint is quantised by a method of which moegraft reads layouts. Raises CheckpointError."""
    with Checkpoint(path) as folder:
        return bool(find_schemes(folder.config()))


def check_method(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where the checkpoint is quantised, and not in a layout that moegraft reads."""
    with Checkpoint(path) as folder:
        config = folder.config()
    if quantisation_fields(config) is not None:
        read_schemes(config)


def load_quantised(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A quantised Mixture-of-Experts checkpoint, its experts packed as they are stored, ready for ``attach``.

    ``path``: a folder with config.json and safetensors, in a layout of docs/formats.md. transformers builds the model
    and loads what is not quantised; moegraft reads the experts, layer by layer, into its own formats, and dequantises
    linear maps beside them. ``dtype``: of activations and of all that is not packed; the config's by default.

    The model is for inference and cannot be saved. Raises CheckpointError or UnsupportedModelError.
    """
    with as_checkpoint_error(), Checkpoint(path) as folder, folder.tensors() as tensors:
        structure = _structure(folder, tensors)
        plan, target_dtype = structure.plan, _dtype(structure.model.config, dtype)
        generation_config = _read_generation_config(folder, structure.model)
        model = _build(structure, tensors, target_dtype).to(device)
        for name, layer in plan.experts.items():
            weights = read_layer(layer, tensors.read, dtype=target_dtype, device=torch.device(device))
            pack_experts(model.get_submodule(name), weights, target_dtype)
            guard_implementation(model.get_submodule(name))
        unread = tensors.unread - set(plan.ignored)
        if unread:
            raise CheckpointError(f"{tensors.infos[min(unread)].where}: was not applied")
    model.set_experts_implementation(IMPLEMENTATION)
    model.config.name_or_path = str(folder.path)
    if generation_config is not None:
        model.generation_config = generation_config
    if structure.cache_note is not None:
        _LOG.info("%s: %s", folder.path, structure.cache_note)
    _LOG.info(
        "%s: experts of %d layers read by moegraft and kept packed (%s); %d linear maps dequantised to %s",
        folder.path,
        len(plan.experts),
        plan.description,
        len(plan.linears),
        target_dtype,
    )
    return model


def read_structure(path: str | os.PathLike[str]) -> CheckpointStructure:
    """What ``load_quantised`` would do, from the config and the headers: no weights are read.

    Raises as it does, but for what only weights tell.
    """
    with as_checkpoint_error(), Checkpoint(path) as folder, folder.tensors() as tensors:
        structure = _structure(folder, tensors)
        for layer in structure.plan.experts.values():
            _refuse_act_order(layer, tensors)
        return structure


def _refuse_act_order(layer: PackedLayer, tensors: WeightFolder) -> None:
    """From the group indices of one expert: no header says whether they are in order."""
    part = GROUP_ORDER.get(layer.scheme.layout, "")
    names = [parts[part] for (expert, _), parts in layer.matrices.items() if expert == 0 and part in parts]
    for name in names:
        with unfit(name):
            group_of = tensors.read(name)
            refuse_act_order(part, group_of, group_of.numel(), max(layer.scheme.group_size, 0))


def _structure(folder: Checkpoint, tensors: WeightFolder) -> CheckpointStructure:
    fields = folder.config()
    schemes = read_schemes(fields)
    model = model_of_fields(fields, hollow_structure)
    targets = experts_targets(model)
    if not targets:
        raise UnsupportedModelError(f"{folder.path}: {type(model).__name__} has no experts that moegraft can reach")
    stored = model.state_dict()
    # What is ignored where it is unexpected is read where the model has it (the talker of the whole Qwen3-Omni).
    patterns = sorted(model._keys_to_ignore_on_load_unexpected or ())
    plan = plan_checkpoint(
        tensors.infos,
        schemes,
        targets,
        model_type=model.config.model_type,
        ignore=[pattern for pattern in patterns if not any(re.search(pattern, name) for name in stored)],
        integers={name.rpartition(".")[2] for name, tensor in stored.items() if not tensor.is_floating_point()},
    )
    _check_size(stored.values(), targets.values(), tensors.infos.values())
    return CheckpointStructure(folder=folder.path, model=model, plan=plan, cache_note=cache_note(fields))


def _check_size(model: Iterable[torch.Tensor], experts: Iterable[ExpertsTarget], stored: Iterable[TensorInfo]) -> None:
    """Before anything is allocated. 4-bit numbers are stored two a byte, and a tied vocabulary once for two tensors."""
    wanted = sum(tensor.numel() for tensor in model)
    in_files = 2 * 2 * sum(info.nbytes for info in stored)
    if wanted > in_files:
        raise CheckpointError(
            f"{CONFIG_FILE} describes a model of {wanted} numbers, but the weight files hold {in_files // 4} bytes"
        )


def _build(structure: CheckpointStructure, tensors: WeightFolder, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its packed experts, on the CPU."""
    plan = structure.plan
    state = {name: tensors.read(name) for name in plan.plain}
    for module, linear in plan.linears.items():
        read = {part: tensors.read(name) for part, name in linear.parts.items()}
        state[f"{module}.weight"] = dequantise_linear(linear.scheme, read, module).to(dtype)
    return build_model(structure.model, PackedConfig(plan.formats), state, dtype)


def _read_generation_config(folder: Checkpoint, model: PreTrainedModel) -> GenerationConfig | None:
    """As ``from_pretrained`` of a folder does: its file, where there is one."""
    fields = folder.generation_config() if model.can_generate() else None
    if fields is None:
        return None
    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # of whatever kind a field of an odd type leads to
        raise CheckpointError(f"{GENERATION_CONFIG_FILE}: {type(error).__name__}: {error}") from error


def _dtype(config: PreTrainedConfig, wanted: torch.dtype | None) -> torch.dtype:
    dtype = wanted if wanted is not None else getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"dtype is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
    return dtype

"""Commands that need a model's structure and not its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moegraft.cli.console import CommandError
from moegraft.cli.loading import quiet_transformers, refused, resolve_device, resolve_dtype
from moegraft.integrations.transformers import LayerChoice, is_quantised
from moegraft.integrations.transformers.checkpoint import (
    check_method,
    hollow_structure,
    plain_config,
    read_structure,
)
from moegraft.integrations.transformers.checkpoint.files import Checkpoint
from moegraft.integrations.transformers.checkpoint.scheme import quantisation_fields
from moegraft.integrations.transformers.explain import explain_structure
from moegraft.integrations.transformers.host.targets import discover_targets, experts_targets
from moegraft.integrations.transformers.parallel.layout import RankShare, rank_shares
from moegraft.integrations.vllm.explain import PluginExplanation, explain_plugin
from moegraft.lora.targets import ModelTargets
from moegraft.parallel import ParallelConfig

MAX_RANKS = 1024


def base_targets(folder: Path) -> ModelTargets:
    """What an adapter may touch in the checkpoint's model. Raises UnsupportedModelError."""
    return discover_targets(hollow_model(folder))


@dataclass(frozen=True, kw_only=True)
class ModelExplanation:
    """``stored``: the layout of a quantised checkpoint, in words; empty where it is not quantised.

    ``shares``: what each of several ranks would keep.
    """

    stored: str
    choices: tuple[LayerChoice, ...]
    shares: tuple[RankShare, ...] = ()


def explain_model(
    folder: Path, *, dtype: str, device: str | None, parallel: ParallelConfig | None = None
) -> ModelExplanation:
    """What ``attach`` would choose for the checkpoint, from its config and the headers of its weights.

    Raises CheckpointError, UnsupportedModelError or NoBackendError.
    """
    if parallel is not None and parallel.world_size > MAX_RANKS:
        raise CommandError(f"found {parallel.world_size} ranks, expected at most {MAX_RANKS}")
    check_method(folder)
    model = hollow_model(folder, dtype=dtype, device=device)
    several = parallel is not None and parallel.world_size > 1
    if not is_quantised(folder):
        shares: list[RankShare] = []
        if parallel is not None and several:
            shares = rank_shares(experts_targets(model).values(), parallel, model.dtype.itemsize)
        return ModelExplanation(stored="", choices=explain_structure(model, {}).choices, shares=tuple(shares))
    if several:
        raise CommandError(f"{folder} is quantised: what ranks keep of it follows its scales, and is not shown")
    plan = read_structure(folder).plan
    return ModelExplanation(stored=plan.description, choices=explain_structure(model, plan.formats).choices)


def explain_in_vllm(folder: Path) -> PluginExplanation:
    """What the plug-in for vLLM would serve of the checkpoint. Raises UnsupportedModelError."""
    with Checkpoint(folder) as files:
        fields = quantisation_fields(files.config())
    return explain_plugin(base_targets(folder), quantisation=fields)


def hollow_model(folder: Path, *, dtype: str = "auto", device: str | None = "cpu") -> PreTrainedModel:
    """The model of a checkpoint with every parameter and buffer one number, expanded: full shapes, no memory.

    The number is 1, so that norms of weights (DoRA) stay away from zero. Their values mean nothing.
    """
    quiet_transformers()
    with refused(folder, "has no config of a model that transformers knows"):
        config = plain_config(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        wanted = resolve_dtype(dtype)
        model = hollow_structure(config, dtype=None if wanted == "auto" else wanted)
    target = resolve_device(device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_expanded(parameter, target), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _expanded(buffer, target)
    return model.eval()


def _expanded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.ones((), dtype=tensor.dtype, device=device).expand(tensor.shape)

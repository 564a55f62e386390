"""Commands that need a model's structure and not its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moegraft.cli.console import CommandError, first_line
from moegraft.cli.loading import quiet_transformers, resolve_device, resolve_dtype
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers import Explanation, attach
from moegraft.integrations.transformers.targets import discover_targets
from moegraft.lora.targets import ModelTargets


def base_targets(folder: Path) -> ModelTargets:
    """What an adapter may touch in the checkpoint's model. Raises UnsupportedModelError."""
    return discover_targets(hollow_model(folder))


def explain_model(folder: Path, *, dtype: str, device: str | None) -> Explanation:
    """What ``attach`` would choose for the checkpoint. Raises UnsupportedModelError or NoBackendError."""
    model = hollow_model(folder, dtype=dtype, device=device)
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is not None:
        raise UnsupportedModelError(f"{folder}: the checkpoint is quantised, expected float32, bfloat16 or float16")
    with attach(model, adapter_memory="64MiB") as graft:
        return graft.explain()


def hollow_model(folder: Path, *, dtype: str = "auto", device: str | None = "cpu") -> PreTrainedModel:
    """The model of a checkpoint with every parameter and buffer one number, expanded: full shapes, no memory.

    The number is 1, so that norms of weights (DoRA) stay away from zero. Their values mean nothing.
    """
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        options = {} if dtype == "auto" else {"dtype": resolve_dtype(dtype)}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder} has no config of a model that transformers knows: {first_line(error)}") from error
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

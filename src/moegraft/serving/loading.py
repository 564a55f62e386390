"""From a folder to a model and its tokenizer, for an engine."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moegraft.core.errors import CheckpointError
from moegraft.integrations.transformers import is_quantised, load_quantised
from moegraft.integrations.transformers.checkpoint import auto_class
from moegraft.parallel.processes import local_rank


def load_model(folder: str | os.PathLike[str], *, dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode; a quantised one keeps its experts packed. ``device`` None: the GPU if any.

    Of a model that generates by calling its parts (Qwen3-Omni) the thinker alone, which answers in text. Raises
    CheckpointError.
    """
    path = Path(folder)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = _dtype(dtype)
    if (path / "config.json").is_file() and is_quantised(path):
        return _in_text(load_quantised(path, dtype=wanted, device=target))
    return _in_text(_from_pretrained(path, dtype=wanted or "auto")).to(target).eval()


def _in_text(model: PreTrainedModel) -> PreTrainedModel:
    thinker = getattr(model, "thinker", None)
    if type(model).forward is not nn.Module.forward or not isinstance(thinker, PreTrainedModel):
        return model
    thinker.generation_config = model.generation_config
    return thinker


def load_planned(path: Path, *, dtype: str = "auto", size: int) -> PreTrainedModel:
    """This rank's share of a model under transformers' own plan for ``size`` ranks. Collective.

    Raises CheckpointError, also for a quantised one, whose scales the plan would cut too.
    """
    if (path / "config.json").is_file() and is_quantised(path):
        raise CheckpointError(f"{path} is quantised: transformers' plan cuts no scales; give tp or ep without the plan")
    with warnings.catch_warnings(), local_rank():
        warnings.filterwarnings("ignore", message="Passing `tp_plan` directly")
        return _from_pretrained(path, dtype=_dtype(dtype) or "auto", tp_plan="auto", tp_size=size).eval()


def _dtype(name: str) -> torch.dtype | None:
    wanted = None if name == "auto" else getattr(torch, name, None)
    if name != "auto" and not isinstance(wanted, torch.dtype):
        raise CheckpointError(f"dtype: found {name!r}, expected auto, float32, bfloat16 or float16")
    return wanted


def _from_pretrained(path: Path, **options: Any) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model: PreTrainedModel = auto_class(config).from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"{path} needs code of its own to be read (auto_map), which is never run") from error
        raise CheckpointError(f"{path} holds no model that transformers can load: {_first_line(error)}") from error
    return model


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None where it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return tokenizer


def media_ids(model: PreTrainedModel) -> dict[int, str]:
    """Tokens that stand for images, videos or sound in a prompt, and the fields of the config that say so."""
    fields = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    found = {getattr(model.config, field, None): field for field in fields}
    return {token: field for token, field in found.items() if isinstance(token, int)}


def end_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a sequence, as the checkpoint says."""
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

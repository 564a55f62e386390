"""From folders to models and tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moegraft.cli.console import CommandError, first_line
from moegraft.integrations.transformers import is_quantised, load_quantised
from moegraft.integrations.transformers.checkpoint import auto_class

_DTYPES: Mapping[str, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def quiet_transformers(*, keep_bars: bool = False) -> None:
    """Keeps warnings that users of a command cannot act on, and bars for what takes no time, off the screen."""
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\b")
    if not keep_bars:
        logging.disable_progress_bar()
    logging.set_verbosity_error()


def resolve_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """Raises CommandError for a name that is not offered."""
    if name not in _DTYPES:
        raise CommandError(f"found --dtype {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def resolve_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name the GPU if there is one. Raises CommandError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def load_model(folder: Path, *, dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode; a quantised one keeps its experts packed.

    Raises CommandError where the folder does not hold one, CheckpointError where a quantised one cannot be read.
    """
    target = resolve_device(device)
    if (folder / "config.json").is_file() and is_quantised(folder):
        wanted = resolve_dtype(dtype)
        return load_quantised(folder, dtype=None if wanted == "auto" else wanted, device=target)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = auto_class(config).from_pretrained(
            folder, dtype=resolve_dtype(dtype), local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: a quantisation method whose library is missing
        raise CommandError(f"{folder} holds no model that transformers can load: {first_line(error)}") from error
    return model.to(target).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, padding on the left. Raises CommandError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder} holds no tokenizer that transformers can load: {first_line(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, raw: bool = False
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [prompts, S], padded on the left; through the chat template if there is one."""
    if tokenizer.chat_template is None or raw:
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

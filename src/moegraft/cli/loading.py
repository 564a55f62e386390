"""From folders to models and tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moegraft.cli.console import CommandError, first_line
from moegraft.core.errors import MoegraftError
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
    if device.type == "meta":
        raise CommandError("--device meta cannot be used: it holds no numbers")
    return device


@contextmanager
def refused(folder: Path, what: str) -> Iterator[None]:
    """What transformers makes of a checkpoint's files, which may hold anything: any error is one of the checkpoint."""
    try:
        yield
    except MoegraftError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CommandError(f"{folder} needs code of its own to be read (auto_map), which is never run") from error
        said = first_line(error) if isinstance(error, OSError | ValueError | ImportError) else repr(error)
        raise CommandError(f"{folder} {what}: {first_line(said)}") from error


def load_model(folder: Path, *, dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode; a quantised one keeps its experts packed.

    Raises CommandError where the folder does not hold one, CheckpointError where a quantised one cannot be read.
    """
    target = resolve_device(device)
    if (folder / "config.json").is_file() and is_quantised(folder):
        wanted = resolve_dtype(dtype)
        return load_quantised(folder, dtype=None if wanted == "auto" else wanted, device=target)
    with refused(folder, "holds no model that transformers can load"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: PreTrainedModel = auto_class(config).from_pretrained(
            folder, dtype=resolve_dtype(dtype), local_files_only=True, trust_remote_code=False
        )
    return model.to(target).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, padding on the left. Raises CommandError where there is none."""
    with refused(folder, "holds no tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, raw: bool = False
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [prompts, S], padded on the left; through the chat template if there is one.

    Raises CommandError for a prompt that is not text or has no token, and where the template fails.
    """
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise CommandError(f"prompt {number}: found bytes that are not UTF-8") from None
    is_chat = tokenizer.chat_template is not None and not raw
    try:
        texts = _through_template(tokenizer, prompts) if is_chat else prompts
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not is_chat)
    except Exception as error:  # the template is a program of the checkpoint
        raise CommandError(f"the tokenizer or its chat template fails: {first_line(error)}") from error
    found = {"input_ids": batch["input_ids"].long(), "attention_mask": batch["attention_mask"].long()}
    empty = (found["attention_mask"].sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        why = "; the chat template makes nothing of it (--raw leaves it out)" if is_chat else ""
        raise CommandError(f"prompt {empty[0] + 1} has no token{why}")
    return found


def _through_template(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return texts

"""What of transformers' ``generate`` keeps each row with its adapter, and what cannot."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from moegraft.core.errors import BatchError

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")


def check_generation(kwargs: dict[str, Any], defaults: GenerationConfig | None) -> None:
    """Raises BatchError for options under which rows of the running batch are no longer the caller's rows.

    Assisted decoding runs candidate tokens of another model, or of a part of this one, that knows no adapters.
    """
    given = kwargs.get("generation_config") or defaults
    for option in _ASSISTED:
        if kwargs.get(option, getattr(given, option, None)) is not None:
            raise BatchError(
                f"generate({option}=...) is not served with adapters: candidates would come from a model without "
                "them; leave the option out"
            )


def batch_rows(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """Rows of the batch, from the first tensor among the positional arguments and ``names``; None where none is."""
    for value in (*args[:1], *(kwargs.get(name) for name in names)):
        if value is not None:
            return int(value.shape[0])
    return None

"""What of transformers' ``generate`` keeps each row with its adapter, and what cannot."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from moegraft.core.errors import BatchError

_CANDIDATES = "candidates would come from a model without them"
_REFUSED = {
    "assistant_model": _CANDIDATES,
    "prompt_lookup_num_tokens": _CANDIDATES,
    "assistant_early_exit": _CANDIDATES,
    "use_mtp": _CANDIDATES,
    "custom_generate": "a decoding loop of its own may reorder the rows",
    "token_healing": "prompts would be healed one at a time, and not with their own adapters",
}


def check_generation(args: tuple[Any, ...], kwargs: dict[str, Any], defaults: GenerationConfig | None) -> None:
    """Raises BatchError for options under which rows of the running batch are no longer the caller's rows.

    Assisted decoding runs candidate tokens of another model, or of a part of this one, that knows no adapters.
    """
    if len(args) > 2:
        raise BatchError(f"generate() takes at most 2 positional arguments here, found {len(args)}; name the others")
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
    for option, reason in _REFUSED.items():
        value = kwargs.get(option, getattr(given, option, None))
        if value is not None and value is not False:
            raise BatchError(f"generate({option}=...) is not served with adapters: {reason}; leave the option out")


def sequences_per_row(args: tuple[Any, ...], kwargs: dict[str, Any], defaults: GenerationConfig | None) -> int:
    """How many sequences ``generate`` makes of each row, next to each other: its beams, or what it returns."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
    counts = (kwargs.get(name, getattr(given, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(count if isinstance(count, int) else 1 for count in counts)

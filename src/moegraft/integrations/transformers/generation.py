"""What of transformers' ``generate`` keeps each row with its adapter, and what cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

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


class RowGuard(LogitsProcessor):
    """Lets a row whose logits are not finite end by itself, where sampling would fail for its neighbours too.

    Adapters are untrusted: one with huge values must not take the batch down. ``end``: the token that it then gets.
    Nothing waits for the device before ``check``.
    """

    def __init__(self, adapters: Sequence[str | None], end: int) -> None:
        self._names = list(adapters)
        self._end = end
        self._bad_R: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        adapters: Sequence[str | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        defaults: GenerationConfig | None,
    ) -> RowGuard:
        """``end``: the first of the end-of-sequence tokens of ``generate``, 0 where it has none."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
        end = kwargs.get("eos_token_id", getattr(given, "eos_token_id", None))
        first = end[0] if isinstance(end, list | tuple) and end else end
        return cls(adapters, first if isinstance(first, int) else 0)

    def added_to(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of ``generate`` with this guard before the caller's own processors."""
        return {**options, "logits_processor": LogitsProcessorList([self, *(options.get("logits_processor") or ())])}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad_R = ~scores.amax(dim=-1).isfinite()
        self._bad_R = bad_R if self._bad_R is None else self._bad_R | bad_R
        ends_V = torch.full_like(scores[0], float("-inf"))
        ends_V[self._end] = 0.0
        return torch.where(bad_R[:, None], ends_V, scores)

    def check(self, output: Any) -> None:
        """Raises BatchError, with ``output`` for the sake of the other rows, where rows had no finite logits."""
        if self._bad_R is None:
            return
        per_row = max(1, len(self._bad_R) // len(self._names))
        rows = sorted({int(row) // per_row for row in self._bad_R.nonzero()})
        if rows:
            named = ", ".join(f"{row} (adapter {self._names[row]!r})" for row in rows)
            raise BatchError(
                f"the logits of rows {named} are not finite, so that their tokens mean nothing; the other rows ran to "
                "their end, and `output` of this error has them",
                output=output,
            )


def sequences_per_row(args: tuple[Any, ...], kwargs: dict[str, Any], defaults: GenerationConfig | None) -> int:
    """How many sequences ``generate`` makes of each row, next to each other: its beams, or what it returns."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
    counts = (kwargs.get(name, getattr(given, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(count if isinstance(count, int) else 1 for count in counts)

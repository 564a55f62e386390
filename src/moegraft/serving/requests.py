"""What goes into the engine and what comes out: frozen records, and the errors of requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, cast

from moegraft.core.errors import BatchError, MoegraftError
from moegraft.files.limits import MAX_COMBINED
from moegraft.lora.bank.combination import Combination, parse_combination

MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_GRAMMAR_CHARACTERS = 1 << 18
AdapterChoice = str | Sequence[str | tuple[str, float]] | None
"""What one request names: an adapter, several that add up (names, or (name, weight)), or None for the base."""


class RequestError(MoegraftError, ValueError):
    """A field of a request that cannot be served; ``field``, ``found`` and ``expected`` say what and why."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        shown = repr(found)
        super().__init__(f"{field}: found {shown if len(shown) <= 200 else shown[:197] + '...'}, expected {expected}")
        self.field = field
        self.found = found
        self.expected = expected


class EngineBusyError(MoegraftError):
    """The queue is full: try again later."""


class EngineClosedError(MoegraftError):
    """The engine drains or was closed, and takes no requests."""


class FinishReason(StrEnum):
    """Why a sequence ended. ``STOP``: an end token, a stop string or id, or a grammar that is complete."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What the text must look like. kind: ``json_object`` takes no ``text``; the others a schema, pattern, grammar."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""

    def __post_init__(self) -> None:
        kinds = ("json_object", "json_schema", "regex", "lark")
        if self.kind not in kinds:
            raise RequestError("grammar.kind", self.kind, f"one of {', '.join(kinds)}")
        if len(self.text) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                "grammar.text", f"{len(self.text)} characters", f"at most {MAX_GRAMMAR_CHARACTERS} characters"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Defaults sample the model's own distribution; ``temperature=0`` is greedy.

    max_tokens: new tokens a sequence, None as many as fit · top_k: 0 for all · seed: the same seed, the same tokens,
    whatever else runs (None: drawn by the engine) · n: sequences of one prompt · stop: strings, not shown unless
    ``include_stop`` · stop_token_ids: ids that end a sequence, beside the model's own end tokens unless ``ignore_eos``
    · logprobs: of the token drawn and of this many of the most likely ones (None: no log-probabilities), under the
    adapter's head and before temperature, penalties and bias · logit_bias: token id -> what is added.

    presence, frequency and repetition penalties as OpenAI and CTRL have them: the first two count generated tokens, the
    third those of the prompt too. Raises RequestError.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, low=1, optional=True)
        _whole("min_tokens", self.min_tokens, low=0)
        _whole("top_k", self.top_k, low=0)
        _whole("n", self.n, low=1, high=MAX_SEQUENCES)
        _whole("seed", self.seed, low=-(2**63), high=2**64 - 1, optional=True)
        _whole("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if len(self.stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop", self.stop, f"at most {MAX_STOPS} strings of at least one character")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, low=0)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, low=0)
            _number("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _whole(name: str, value: Any, *, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"from {low} up" if high is None else f"from {low} to {high}"
        raise RequestError(name, value, f"a whole number {bound}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(name, value, f"a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise RequestError(name, value, f"a number from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt for one adapter (None: the base model), or for several that add up: ``["style", ("domain", 0.5)]``.
    ``request_id`` is unique among requests in flight. Raises RequestError."""

    request_id: str
    prompt_ids: tuple[int, ...]
    adapter: AdapterChoice = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", adapters_of(self.adapter))

    @property
    def label(self) -> str:
        """The adapter's name; of several that add up one text, and none of the base."""
        return label_of(self.wanted)

    @property
    def wanted(self) -> str | Combination | None:
        """``adapter`` as it was checked."""
        return cast("str | Combination | None", self.adapter)


def adapters_of(choice: AdapterChoice) -> str | Combination | None:
    """Checked; one name with the weight 1 is that name alone. Raises RequestError."""
    if choice is None or isinstance(choice, str):
        return choice
    if not isinstance(choice, list | tuple):
        raise RequestError("adapter", choice, "a name, several, or None")
    try:
        parts = parse_combination(choice, "")
    except BatchError:
        expected = f"1 to {MAX_COMBINED} names that differ, each alone or as (name, weight), with finite weights"
        raise RequestError("adapter", choice, expected) from None
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else parts


def label_of(adapter: str | Combination | None) -> str:
    """``Request.label`` of what ``adapters_of`` gives; a server takes it as a model's name."""
    if adapter is None or isinstance(adapter, str):
        return adapter or ""
    return "+".join(name if weight == 1 else f"{weight!r}*{name}" for name, weight in adapter)


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probabilities at one position. ``top``: (token id, log-probability), the most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one sequence. ``cached_tokens``: those of the prompt that were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """What one step added to one sequence of a request.

    index: which of the ``n`` sequences · token_ids: new ones, none where only text is let go or the sequence ends ·
    text: what may be shown now; parts of characters and of stop strings are held back · logprobs: one a token where
    asked for · finish_reason and usage: on the last event of the sequence · stop_reason: the string or id that ended it
    · error: the message where ``finish_reason`` is ERROR.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceOutput:
    """One finished sequence; ``finish_reason`` ERROR has its message in ``error``."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished request, as ``Engine.generate`` gives it. ``outputs``: its n sequences."""

    request_id: str
    adapter: AdapterChoice
    prompt_ids: tuple[int, ...]
    outputs: tuple[SequenceOutput, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """New tokens of the first sequence."""
        return self.outputs[0].token_ids

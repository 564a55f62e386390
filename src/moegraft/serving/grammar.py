"""Structured output: which tokens a grammar lets come next, by llguidance (an optional dependency)."""

from __future__ import annotations

import json
import math
import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch

from moegraft.core.errors import MoegraftError
from moegraft.serving.requests import Grammar, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_MULTIPLE = 1 << 17  # about a second of one core
_ANY_OBJECT = '{"type": "object"}'


class Matcher:
    """A grammar as far as one sequence has come."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: torch.Tensor) -> None:
        """Writes the tokens that may come next into ``mask``, int32 on the CPU: bit t of word w is token 32 w + t."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
        self._check()

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def has_ended(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MoegraftError(f"the grammar failed: {self._matcher.get_error()}")


class GrammarCompiler:
    """Makes matchers for one tokenizer, whose table is made on first use and takes about a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._table: Any = None

    def compile(self, grammar: Grammar) -> Matcher:
        """Raises RequestError for a grammar that cannot be read, and where llguidance is missing."""
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise RequestError("grammar", grammar.kind, "none: llguidance is not installed") from error
        with self._lock:
            if self._table is None:
                self._table = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._eos_ids) or None
                )
        if grammar.kind == "json_schema":
            _check_multiples(grammar.text)
        make = llguidance.LLMatcher
        try:
            if grammar.kind in ("json_object", "json_schema"):
                text = make.grammar_from_json_schema(grammar.text if grammar.kind == "json_schema" else _ANY_OBJECT)
            elif grammar.kind == "regex":
                text = make.grammar_from_regex(grammar.text)
            else:
                text = make.grammar_from_lark(grammar.text)
            matcher = make(self._table, text, log_level=0)
        except ValueError as error:
            raise RequestError(f"grammar.{grammar.kind}", grammar.text, f"a grammar: {error}") from error
        if matcher.is_error():
            raise RequestError(f"grammar.{grammar.kind}", grammar.text, f"a grammar: {matcher.get_error()}")
        try:  # what nothing matches shows at the first token
            Matcher(matcher).copy().fill(torch.zeros(-(-self._table.vocab_size // 32), dtype=torch.int32))
        except MoegraftError as error:
            why = str(error).splitlines()[0]
            raise RequestError(f"grammar.{grammar.kind}", grammar.text, f"a grammar: {why}") from None
        return Matcher(matcher)


def _check_multiples(schema: str) -> None:
    """``multipleOf`` becomes as many states as its digits say, of several together as their least common multiple."""
    try:
        left = [json.loads(schema)]
    except (ValueError, RecursionError):
        return  # llguidance says what is wrong
    states = 1
    while left:
        found = left.pop()
        if isinstance(found, dict):
            step = found.get("multipleOf")
            if isinstance(step, int | float) and step > 0 and math.isfinite(step):
                states = math.lcm(states, int("".join(map(str, Decimal(str(step)).normalize().as_tuple().digits))))
            left += found.values()
        elif isinstance(found, list):
            left += found
        if states > MAX_MULTIPLE:
            raise RequestError("grammar.json_schema", f"multipleOf up to {states}", f"at most {MAX_MULTIPLE} together")


def forbid(logits_RV: torch.Tensor, mask_RW: torch.Tensor) -> None:
    """Sets the logits of tokens without a bit in the int32 mask to minus infinity, in place."""
    vocabulary = logits_RV.shape[1]
    bits = torch.arange(32, dtype=torch.int32, device=mask_RW.device)
    allowed = ((mask_RW[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocabulary]
    logits_RV[:, : allowed.shape[1]].masked_fill_(~allowed, float("-inf"))
    logits_RV[:, allowed.shape[1] :] = float("-inf")

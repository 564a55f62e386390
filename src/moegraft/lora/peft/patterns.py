"""``rank_pattern`` and ``alpha_pattern``: PEFT's matching rule, for patterns that come with an untrusted file.

PEFT takes the first key for which ``re.match(rf"(.*\\.)?({key})$", module_name)`` holds. Python's regular expressions
backtrack, so a hostile key could keep a server busy for ever. Two kinds of key are served:

* a plain name (``q_proj``, ``layers.3.mlp.experts.7.w1``; nearly all keys): looked up, not searched. Its dots match
  dots only, while PEFT's match any character: module names of one model never differ in that alone.
* a regular expression with few places where matching may branch, so that one match costs at most about |name|^5 / 5!
  steps, and a budget of time for all of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from moegraft.core.errors import AdapterConfigError
from moegraft.lora.peft.strict_json import shorten

MAX_PATTERN_CHARS = 1024
MAX_EXPRESSIONS = 256
MAX_BRANCHES = 4
MATCH_SECONDS = 10.0

_PLAIN = re.compile(r"\w+(\.\w+)*", re.ASCII)


class ModulePatterns:
    """Pattern -> value, looked up by module name. ``field`` names the config's field in messages.

    Raises:
        AdapterConfigError: a pattern that is no regular expression, or one that may take too long to match.
    """

    def __init__(self, field: str, values: Mapping[str, float]) -> None:
        self.field = field
        self._values = dict(values)
        self._order = {pattern: position for position, pattern in enumerate(self._values)}
        expressions = [pattern for pattern in self._values if not _PLAIN.fullmatch(pattern)]
        if len(expressions) > MAX_EXPRESSIONS:
            raise AdapterConfigError(f"{field}: {len(expressions)} regular expressions, at most {MAX_EXPRESSIONS}")
        self._expressions = {pattern: _compile(field, pattern) for pattern in expressions}
        self._plain = self._values.keys() - self._expressions.keys()
        self._seconds = 0.0

    def find(self, module: str) -> tuple[str, float] | None:
        """The pattern that applies to a module, and its value; None where none does."""
        matching = [suffix for suffix in _suffixes(module) if suffix in self._plain]
        matching += [pattern for pattern, expression in self._expressions.items() if self._matches(expression, module)]
        if not matching:
            return None
        first = min(matching, key=self._order.__getitem__)
        return first, self._values[first]

    def _matches(self, expression: re.Pattern[str], module: str) -> bool:
        start = time.monotonic()
        found = expression.match(module) is not None
        self._seconds += time.monotonic() - start
        if self._seconds > MATCH_SECONDS:
            raise AdapterConfigError(f"{self.field}: matching its patterns took more than {MATCH_SECONDS} seconds")
        return found


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _compile(field: str, pattern: str) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterConfigError(f"{field}: {shorten(pattern)} is longer than {MAX_PATTERN_CHARS} characters")
    reason = _why_slow(pattern)
    if reason is not None:
        raise AdapterConfigError(f"{field}: pattern {shorten(pattern)} {reason}")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterConfigError(f"{field}: {shorten(pattern)} is not a regular expression ({error})") from None


def _why_slow(pattern: str) -> str | None:
    """Why matching might take too long: what may branch is counted, and must not repeat."""
    text = re.sub(r"\\[0-9]", "(?", pattern)  # a back reference is refused like the special groups
    text = re.sub(r"\\.", "x", text, flags=re.DOTALL)  # what is escaped stands for itself or for a class
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
    if re.search(r"\(\?(?!:)", text):
        return "uses look-around, flags, named groups or back references, which are not supported"
    if re.search(r"\)[*+{]", text):
        return "repeats a group, which is not supported"
    repeats = len(re.findall(r"[*+?{]", text.replace("(?:", "(")))
    alternations = sum("|" in group for group in re.split(r"[()]", text))
    if repeats + alternations > MAX_BRANCHES:
        return f"may branch in {repeats + alternations} places, at most {MAX_BRANCHES} are supported"
    return None

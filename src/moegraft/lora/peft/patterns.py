"""``rank_pattern`` and ``alpha_pattern``: PEFT's matching rule, for patterns that come with an untrusted file.

PEFT takes the first key for which ``re.match(rf"(.*\\.)?({key})$", module_name)`` holds. Python's regular expressions
backtrack, so that a hostile key could keep a server busy for ever, the interpreter's lock held. Two kinds of key:

* a plain name (``q_proj``, ``layers.3.mlp.experts.7.w1``; nearly all keys): looked up, not searched. Its dots match
  dots only, while PEFT's match any character: module names of one model never differ in that alone.
* a regular expression: read here into a list of steps, which are followed side by side (K. Thompson, "Regular
  Expression Search Algorithm", 1968), so that one match takes at most |name| x |steps|; from the end of the name, where
  most names part from most keys. All matches of a config together have one budget. Look-around, flags, named or atomic
  groups, back references and word boundaries are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from moegraft.core.errors import AdapterConfigError
from moegraft.files import limits, shorten

MAX_STEPS = 4096  # of one expression, {counts} written out
_PLAIN = re.compile(r"\w+(\.\w+)*", re.ASCII)
_CLASSES = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace}
_ESCAPES = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class Budget:
    """Steps that all expressions of a config may take together."""

    def __init__(self, steps: int = limits.MAX_MATCH_STEPS) -> None:
        self.left = steps


class ModulePatterns:
    """Pattern -> value, looked up by module name. ``field`` names the config's field in messages.

    Raises:
        AdapterConfigError: a pattern that is no regular expression, or one that is not supported; while matching, once
            the budget is spent.
    """

    def __init__(self, field: str, values: Mapping[str, float], budget: Budget | None = None) -> None:
        self.field = field
        self._values = dict(values)
        if len(self._values) > limits.MAX_PATTERNS:
            raise AdapterConfigError(f"{field}: {len(values)} patterns, at most {limits.MAX_PATTERNS}")
        expressions = [pattern for pattern in self._values if not _PLAIN.fullmatch(pattern)]
        if len(expressions) > limits.MAX_EXPRESSIONS:
            raise AdapterConfigError(
                f"{field}: {len(expressions)} regular expressions, at most {limits.MAX_EXPRESSIONS}"
            )
        self._expressions = {pattern: _compile(field, pattern) for pattern in expressions}
        self._order = {pattern: position for position, pattern in enumerate(self._values)}
        self._budget = budget or Budget()

    def find(self, module: str) -> tuple[str, float] | None:
        """The pattern that applies to a module, and its value; None where none does."""
        parts = module.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts))]
        matching = [suffix for suffix in suffixes if suffix in self._values and suffix not in self._expressions]
        for pattern, expression in self._expressions.items():
            if expression.matches_end(module, self._budget):
                matching.append(pattern)
            if self._budget.left < 0:
                raise AdapterConfigError(
                    f"{self.field}: matching its patterns and those before took {limits.MAX_MATCH_STEPS} steps"
                )
        if not matching:
            return None
        first = min(matching, key=self._order.__getitem__)
        return first, self._values[first]


def _compile(field: str, pattern: str) -> Expression:
    if len(pattern) > limits.MAX_PATTERN_CHARS:
        raise AdapterConfigError(f"{field}: {shorten(pattern)} is longer than {limits.MAX_PATTERN_CHARS} characters")
    try:
        return Expression(pattern)
    except ValueError as error:
        raise AdapterConfigError(f"{field}: pattern {shorten(pattern)} {error}") from None


@dataclass(frozen=True, slots=True)
class _One:
    """A node: one character for which the test holds."""

    test: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Edge:
    """A node: the beginning or the end of the name."""

    where: Literal["begin", "end"]


@dataclass(frozen=True, slots=True)
class _Sequence:
    nodes: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    nodes: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    """``most`` None: any number of times."""

    node: _Node
    least: int
    most: int | None


_Node = _One | _Edge | _Sequence | _Choice | _Repeat


class Expression:
    """A regular expression in the syntax of ``re``, less what cannot be matched in linear time.

    Raises ValueError where it is none, or not supported; the message goes on from the pattern.
    """

    def __init__(self, pattern: str) -> None:
        # Each step: (test, next) for a character, ("begin" | "end", next) for an edge, or a list of next steps.
        self._steps: list[tuple[object, int] | list[int]] = [[]]  # step 0 is the end of the match
        self._first = self._add(_Parser(pattern).parse(), 0)

    def matches_end(self, name: str, budget: Budget) -> bool:
        """Whether ``re.match(rf"(.*\\.)?({pattern})$", name)``, for a name without line breaks."""
        current = self._closure([self._first], name, len(name))
        for position in range(len(name), -1, -1):
            budget.left -= 1 + len(current)
            if 0 in current and (position == 0 or name[position - 1] == "."):
                return True
            if position == 0 or not current or budget.left < 0:
                return False
            character = name[position - 1]
            following = []
            for step in current:
                found = self._steps[step]
                if isinstance(found, tuple) and callable(found[0]) and found[0](character):
                    following.append(found[1])
            current = self._closure(following, name, position - 1)
        return False

    def _closure(self, pending: list[int], name: str, position: int) -> set[int]:
        reached: set[int] = set()
        while pending:
            step = pending.pop()
            if step in reached:
                continue
            reached.add(step)
            found = self._steps[step]
            if isinstance(found, list):
                pending += found
            elif (found[0] == "begin" and position == 0) or (found[0] == "end" and position == len(name)):
                pending.append(found[1])
        return reached

    def _new(self, step: tuple[object, int] | list[int]) -> int:
        if len(self._steps) >= MAX_STEPS:
            raise ValueError(f"is longer than {MAX_STEPS} steps once its counts are written out")
        self._steps.append(step)
        return len(self._steps) - 1

    def _add(self, node: _Node, following: int) -> int:
        """Steps that match the node, then go on to ``following``; since names are read backwards, last nodes first."""
        match node:
            case _One(test=test):
                return self._new((test, following))
            case _Edge(where=where):
                return self._new((where, following))
            case _Sequence(nodes=nodes):
                for part in nodes:
                    following = self._add(part, following)
                return following
            case _Choice(nodes=nodes):
                return self._new([self._add(part, following) for part in nodes])
            case _Repeat(node=inner, least=least, most=most):
                if most is None:
                    loop = self._new([following])
                    self._steps[loop] = [following, self._add(inner, loop)]
                    following = loop
                else:
                    for _ in range(most - least):
                        following = self._new([following, self._add(inner, following)])
                for _ in range(least):
                    before = following
                    following = self._add(inner, before)
                    if following == before:  # it matches nothing but the empty text
                        break
                return following


class _Parser:
    """Recursive descent: choice of sequences of repeated atoms."""

    MAX_DEPTH = 32

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            raise ValueError("is not a regular expression (unbalanced parenthesis)")
        return node

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise ValueError("is not a regular expression (it ends too early)")
        self._at += 1
        return character

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            if self._counts() is not None:
                raise ValueError("is not a regular expression (nothing to repeat)")
            nodes.append(self._repeated(self._atom()))
        return _Sequence(tuple(nodes))

    def _repeated(self, node: _Node) -> _Node:
        counts = self._counts()
        if counts is None:
            return node
        if isinstance(node, _Edge):
            raise ValueError("repeats an anchor, which is not supported")
        if self._peek() == "?":  # not greedy: that decides about groups only
            self._at += 1
        elif self._peek() == "+":
            raise ValueError("has a possessive repeat, which is not supported")
        before = self._at
        if self._counts() is not None:
            self._at = before
            raise ValueError("is not a regular expression (multiple repeat)")
        return _Repeat(node, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        """A repeat behind an atom; None where there is none."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple:
            return simple[self._take()]
        found = re.compile(r"\{([0-9]{0,9})(?:(,)([0-9]{0,9}))?\}").match(self._text, self._at)
        if found is None or not (found[1] or found[2]):  # then the brace stands for itself
            return None
        self._at = found.end()
        least = int(found[1] or 0)
        most = least if not found[2] else int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise ValueError("is not a regular expression (min repeat greater than max repeat)")
        return least, most

    def _atom(self) -> _Node:
        character = self._take()
        match character:
            case "(":
                return self._group()
            case "[":
                return _One(self._set())
            case ".":
                return _One(lambda c: c != "\n")
            case "^":
                return _Edge("begin")
            case "$":
                return _Edge("end")
            case "\\":
                return self._escape_outside_set()
        return _One(character.__eq__)

    def _group(self) -> _Node:
        if self._peek() == "?":
            if self._text[self._at : self._at + 2] != "?:":
                raise ValueError("uses look-around, flags, named or atomic groups, which are not supported")
            self._at += 2
        self._depth += 1
        if self._depth > self.MAX_DEPTH:
            raise ValueError(f"nests more than {self.MAX_DEPTH} groups")
        node = self._choice()
        self._depth -= 1
        if self._take() != ")":
            raise ValueError("is not a regular expression (missing parenthesis)")
        return _Sequence((node,))

    def _escape_outside_set(self) -> _Node:
        if self._peek() == "A":
            self._at += 1
            return _Edge("begin")
        if self._peek() == "Z":
            self._at += 1
            return _Edge("end")
        found = self._escape()
        return _One(found.__eq__ if isinstance(found, str) else found)

    def _escape(self) -> str | Callable[[str], bool]:
        """What stands behind a backslash: a character or a class of them."""
        character = self._take()
        if character.lower() in _CLASSES:
            test = _CLASSES[character.lower()]
            return test if character.islower() else lambda c: not test(c)
        if character in _ESCAPES:
            return _ESCAPES[character]
        if character.isalnum() and character.isascii():
            raise ValueError(f"uses \\{character}, which is not supported")
        return character

    def _set(self) -> Callable[[str], bool]:
        is_negated = self._peek() == "^"
        self._at += is_negated
        tests: list[Callable[[str], bool]] = []
        for item in self._set_items():
            tests.append(_between(*item) if isinstance(item, tuple) else item)
        return lambda c: any(test(c) for test in tests) != is_negated

    def _set_items(self) -> Iterator[tuple[str, str] | Callable[[str], bool]]:
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._set_item()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._set_item()
                if not isinstance(low, str) or not isinstance(high, str) or low > high:
                    raise ValueError("is not a regular expression (bad character range)")
                yield low, high
            else:
                yield (low, low) if isinstance(low, str) else low
        self._at += 1

    def _set_item(self) -> str | Callable[[str], bool]:
        character = self._take()
        return self._escape() if character == "\\" else character


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda c: low <= c <= high

"""JSON of untrusted files: bounded, one object, no duplicate keys, no NaN, and one error type for all that is wrong."""

from __future__ import annotations

import json
import reprlib
from typing import Any


class StrictJSONError(ValueError):
    """The text is not one well-formed JSON object; the message says why, the caller says where."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. Raises StrictJSONError."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except StrictJSONError:
        raise
    except RecursionError:
        raise StrictJSONError("nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise StrictJSONError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise StrictJSONError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJSONError(f"duplicate key {shorten(key)}")
            seen.add(key)
    return result


def _no_constant(text: str) -> float:
    raise StrictJSONError(f"{text} is not JSON")


def shorten(value: object, limit: int = 160) -> str:
    """``repr`` of something that an untrusted file chose, short enough for a message."""
    if not isinstance(value, str):
        return reprlib.repr(value)  # looks at a few items of a few levels only
    text = repr(value[: limit + 1])
    return text if len(value) <= limit else f"{text[:limit]}... ({len(value)} characters)"

"""Chat: which grammar an answer must keep to, and how tool calls are read out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moegraft.serving.http.answers import hermes_calls
from moegraft.serving.http.protocol import ApiError, ChatRequest, ToolChoice
from moegraft.serving.requests import Grammar
from moegraft.serving.text import TextCodec

Parser = Callable[[str], dict[str, Any]]
_ANY_OBJECT = {"type": "object"}


def chat_grammar(asked: ChatRequest) -> tuple[Grammar | None, str | None]:
    """(grammar, the tool that must be called or "" for any one of them; None where none must).

    ``tool_choice`` "required" or a tool by name makes the whole answer the call, as JSON.
    """
    tools = {tool.function.name: tool.function.parameters or _ANY_OBJECT for tool in asked.tools or ()}
    if asked.tool_choice in (None, "none", "auto"):
        return _format_grammar(asked), None
    if asked.response_format is not None and asked.response_format.type != "text":
        raise ApiError(400, "response_format: a tool call that is forced has its own format", param="response_format")
    if isinstance(asked.tool_choice, ToolChoice):
        name = asked.tool_choice.function.name
        return Grammar(kind="json_schema", text=json.dumps(tools[name])), name
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in tools.items()
    ]
    return Grammar(kind="json_schema", text=json.dumps({"anyOf": calls})), ""


def _format_grammar(asked: ChatRequest) -> Grammar | None:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return Grammar(kind="json_object")
    schema = wanted.json_schema.schema_
    return Grammar(kind="json_schema", text=json.dumps(_ANY_OBJECT if schema is None else schema))


def chat_parser(
    codec: TextCodec, tools: Sequence[Mapping[str, Any]] | None, forced: str | None, named: str | None
) -> Parser | None:
    """What reads tool calls out of an answer; None where there are none to be read.

    The tokenizer's own parser where it has one (``response_template``), else the one that the server was started with.
    """
    if forced is not None:
        return lambda text: _forced_call(text, forced)
    if tools is None:
        return None
    tokenizer: Any = codec.tokenizer
    if any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
        return lambda text: _tokenizer_parse(tokenizer, text, tools)
    if named == "hermes":
        return hermes_calls
    raise ApiError(
        400,
        "tools: the model's tokenizer has no response template, so calls could not be told from text; start the server "
        "with --tool-parser, force a call with tool_choice, or pass tool_choice='none'",
        param="tools",
    )


def _forced_call(text: str, name: str) -> dict[str, Any]:
    """The whole text is one call. A text that was cut short stays text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"content": text}
    call = {"name": name, "arguments": found} if name else found
    return {"content": "", "tool_calls": [call]}


def _tokenizer_parse(tokenizer: Any, text: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        found = tokenizer.parse_response(text, prefix="", tools=[dict(tool) for tool in tools])
    except Exception:  # templates of checkpoints raise what they like; the text is not lost
        return {"content": text}
    return dict(found) if isinstance(found, Mapping) else {"content": text}

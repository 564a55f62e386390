"""What clients get back: OpenAI's completions, chat completions and their streams, from the engine's events."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moegraft.serving.requests import FinishReason, TokenEvent, TokenLogprobs, Usage
from moegraft.serving.text import TextCodec

_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What all choices of one request share. prompts: as text, for ``echo`` (empty without)."""

    model: str
    codec: TextCodec
    is_chat: bool
    num_choices: int
    num_prompts: int
    top_logprobs: int | None = None
    echoed: tuple[str, ...] = ()
    parse: Callable[[str], dict[str, Any]] | None = None
    include_usage: bool = False
    answer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, streams: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.answer_id}",
            "object": f"{kind}.chunk" if streams and self.is_chat else kind,
            "created": self.created,
            "model": self.model,
        }


class RequestFailed(Exception):
    """A sequence ended with an error of the engine's."""


@dataclass
class _Choice:
    """One choice while it grows."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def add(self, event: TokenEvent) -> None:
        if event.finish_reason is FinishReason.ERROR:
            raise RequestFailed(event.error or "the request failed")
        self.text += event.text
        self.tokens += len(event.token_ids)
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.usage = event.finish_reason, event.usage


Events = AsyncIterator[tuple[int, TokenEvent]]
"""Events of all requests of an answer: (number of the choice, event)."""


async def whole(answer: Answer, events: Events) -> dict[str, Any]:
    """The body of an answer that is not streamed. Raises RequestFailed."""
    choices = [_Choice() for _ in range(answer.num_choices)]
    async for number, event in events:
        choices[number].add(event)
    return {
        **answer.head(streams=False),
        "choices": [_whole_choice(answer, number, choice) for number, choice in enumerate(choices)],
        "usage": _usage(choices, answer),
    }


def _whole_choice(answer: Answer, number: int, choice: _Choice) -> dict[str, Any]:
    finish = _finish(choice.finish_reason)
    if not answer.is_chat:
        text = (answer.echoed[number] if answer.echoed else "") + choice.text
        return {
            "index": number,
            "text": text,
            "finish_reason": finish,
            "logprobs": _logprobs(answer, choice.logprobs, offset=len(text) - len(choice.text)),
        }
    message, calls = _message(answer, choice.text)
    return {
        "index": number,
        "message": message,
        "finish_reason": "tool_calls" if calls and finish == "stop" else finish,
        "logprobs": _logprobs(answer, choice.logprobs),
    }


async def stream(answer: Answer, events: Events) -> AsyncIterator[str]:
    """Server-sent events, ``[DONE]`` last. An engine's error after the first event is an event of its own."""
    choices = [_Choice() for _ in range(answer.num_choices)]
    head = answer.head(streams=True)
    usage = {"usage": None} if answer.include_usage else {}
    offsets = [0] * answer.num_choices
    for number in range(answer.num_choices):
        first = _first_delta(answer, number)
        if first is not None:
            offsets[number] = len(first.get("text", ""))
            yield _sse({**head, "choices": [first], **usage})
    try:
        async for number, event in events:
            choice = choices[number]
            choice.add(event)
            delta = _delta(answer, number, choice, event, offsets[number])
            if delta is not None:
                yield _sse({**head, "choices": [delta], **usage})
            offsets[number] += len(event.text)
    except RequestFailed as error:
        yield _sse({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        yield "data: [DONE]\n\n"
        return
    if answer.include_usage:
        yield _sse({**head, "choices": [], "usage": _usage(choices, answer)})
    yield "data: [DONE]\n\n"


def _first_delta(answer: Answer, number: int) -> dict[str, Any] | None:
    common = {"index": number, "finish_reason": None, "logprobs": None}
    if answer.is_chat:
        return {**common, "delta": {"role": "assistant", "content": ""}}
    return {**common, "text": answer.echoed[number]} if answer.echoed else None


def _delta(answer: Answer, number: int, choice: _Choice, event: TokenEvent, offset: int) -> dict[str, Any] | None:
    """What one event adds to the stream. Where a parser must see the whole text, it comes with the last event."""
    is_held = answer.parse is not None
    finish = _finish(event.finish_reason)
    if finish is None and (is_held or not (event.text or event.logprobs)):
        return None
    logprobs = choice.logprobs if is_held else event.logprobs
    found = {"index": number, "logprobs": _logprobs(answer, logprobs, offset=offset)}
    if not answer.is_chat:
        return {**found, "text": event.text, "finish_reason": finish}
    if not is_held:
        return {**found, "delta": {"content": event.text} if event.text else {}, "finish_reason": finish}
    message, calls = _message(answer, choice.text)
    delta = {key: value for key, value in message.items() if value is not None and key != "role"}
    if calls:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    return {**found, "delta": delta, "finish_reason": "tool_calls" if calls and finish == "stop" else finish}


def _message(answer: Answer, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(OpenAI's message, its tool calls)."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if answer.parse is None:
        return message, []
    parsed = answer.parse(text)
    calls = [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": str(call.get("name", "")), "arguments": _as_json(call.get("arguments", {}))},
        }
        for call in (entry.get("function", entry) for entry in parsed.get("tool_calls") or ())
    ]
    message["content"] = parsed.get("content") or (None if calls else "")
    thinking = parsed.get("thinking") or parsed.get("reasoning_content")
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message, calls


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def hermes_calls(text: str) -> dict[str, Any]:
    """Tool calls between <tool_call> tags, as Hermes and Qwen write them; what does not parse stays text."""
    calls = []
    for found in _HERMES_CALL.finditer(text):
        try:
            call = json.loads(found[1])
        except (ValueError, RecursionError):
            return {"content": text}
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return {"content": text}
        calls.append(call)
    return {"content": _HERMES_CALL.sub("", text).strip() if calls else text, "tool_calls": calls}


def _finish(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def _usage(choices: Sequence[_Choice], answer: Answer) -> dict[str, Any]:
    """A prompt with several choices counts once."""
    counted = [choice.usage for choice in choices if choice.usage is not None]
    per_prompt = max(1, len(choices) // max(1, answer.num_prompts))
    prompts = counted[::per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    new_tokens = sum(usage.completion_tokens for usage in counted)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
    }


def _logprobs(answer: Answer, found: Sequence[TokenLogprobs], *, offset: int = 0) -> dict[str, Any] | None:
    if answer.top_logprobs is None:
        return None
    shown = [_Shown.of(answer.codec, one) for one in found]
    if answer.is_chat:
        return {"content": [{**one.entry(), "top_logprobs": [other.entry() for other in one.top]} for one in shown]}
    offsets = []
    for one in shown:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in shown],
        "token_logprobs": [one.logprob for one in shown],
        "top_logprobs": [{other.text: other.logprob for other in one.top} for one in shown],
        "text_offset": offsets,
    }


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A token as text with its log-probability; ``top``: the likeliest ones beside it."""

    text: str
    logprob: float
    top: tuple[_Shown, ...] = ()

    @classmethod
    def of(cls, codec: TextCodec, one: TokenLogprobs) -> _Shown:
        top = tuple(cls(text=_token_text(codec, token), logprob=_finite(value)) for token, value in one.top)
        return cls(text=_token_text(codec, one.token_id), logprob=_finite(one.logprob), top=top)

    def entry(self) -> Mapping[str, Any]:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.text.encode())}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for what cannot be."""
    return max(logprob, -9999.0)


def _token_text(codec: TextCodec, token: int) -> str:
    return codec.decode([token], skip_special_tokens=False) if codec.has_tokenizer else f"token_id:{token}"


def _sse(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

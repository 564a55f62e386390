"""What clients send: the OpenAI API's requests as records that say which field is wrong, and its errors.

Fields that OpenAI has and that change nothing here are accepted (``user``, ``metadata`` ...); fields that would change
an answer and are not served are refused by name, and so are fields that nobody knows: a misspelt option is an error,
never lost in silence.

Source of the shapes: the OpenAI API reference, chat completions and completions; ``min_p``, ``top_k``,
``repetition_penalty``, ``stop_token_ids``, ``ignore_eos``, ``min_tokens`` and the adapter routes are spelt as vLLM
spells them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_NAME = 512
MAX_BIASES = 1024
_BIAS_LIMIT = 100.0
_UNION_MEMBERS = ("str", "int", "bool", "dict", "list", "ToolChoice", "literal")

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
AtMostOneError = Field(fail_fast=True)
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class ApiError(Exception):
    """An answer that is an error: ``status`` and the body that OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class UnknownField(ValueError):
    """A field that no record has; its name."""


def first_problem(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found as an answer: 400 with the field, what was found and what was expected."""
    error = errors[0]
    # pydantic names the member of a union too, behind the field; a field's own name never has brackets.
    path = [str(part) for part in error["loc"] if "[" not in str(part) and part not in _UNION_MEMBERS]
    reason = error.get("ctx", {}).get("error")
    field = ".".join([*path, *(reason.args if isinstance(reason, UnknownField) else ())])
    if isinstance(reason, UnknownField) or error["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: this field is not known", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{field or 'body'}: missing", param=field or None, code="missing_required_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if error["type"] in ("value_error", "model_type") else f", found {shortened(error.get('input'))}"
    return ApiError(400, f"{field + ': ' if field else ''}{message}{found}", param=field or None, code="invalid_value")


def shortened(value: object, limit: int = 80) -> str:
    """A value as it may stand in a message. Containers are not printed: they may be of any size."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str):
        value = value[: limit + 1]
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Strict(BaseModel):
    """One problem ends the search: a body of some megabytes may have a million, and an error takes a kilobyte."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            if unknown := next((str(name) for name in data if name not in known), None):
                raise UnknownField(unknown[:MAX_NAME])
        return data


class StreamOptions(_Strict):
    """What a stream tells beside its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Strict):
    """The schema that an answer must keep to."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """``text``, ``json_object`` (any JSON) or ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type 'json_schema', and with no other")
        return self


class FunctionSpec(_Strict):
    """A tool's name, purpose and JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """One tool that the model may call."""

    type: Literal["function"]
    function: FunctionSpec


class CalledFunction(_Strict):
    """``arguments``: a JSON text."""

    name: Name
    arguments: str = ""


class ToolCall(_Strict):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(_Strict):
    """The only kind of content part that is served."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of the type {shortened(kind)} is not served: text alone is")
        return data


class Message(_Strict):
    """One message; what else a template reads (``reasoning_content``, ``name``) goes to it as it is."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], AtMostOneError] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], AtMostOneError] | None = None
    tool_call_id: str | None = None

    def as_template(self) -> dict[str, Any]:
        """As chat templates read it: absent fields are absent, text parts are joined."""
        given = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            given["content"] = "".join(part.text for part in self.content)
        given.setdefault("content", "")
        for call in given.get("tool_calls", ()):
            # Templates print arguments as an object; OpenAI's clients send its JSON.
            with suppress(ValueError, RecursionError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        return given


class ToolChoice(_Strict):
    """The one tool that must be called."""

    class _Named(_Strict):
        name: Name

    type: Literal["function"]
    function: _Named


class _Sampling(_Strict):
    """What both kinds of request have. ``model``: the base, an adapter, or ``base:adapter``."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-_BIAS_LIMIT, le=_BIAS_LIMIT)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted, since they change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_served(cls, data: Any) -> Any:
        """Options of OpenAI that would change an answer and are not served: refused unless they say the default."""
        if not isinstance(data, dict):
            return data
        refused = cls.refused()
        for field in refused.keys() & data.keys():
            if data[field] not in refused[field]:
                raise ValueError(f"{field} is not served; leave it out")
        bias = data.get("logit_bias")
        if isinstance(bias, dict) and len(bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(bias)} entries, at most {MAX_BIASES} are served")
        return {field: value for field, value in data.items() if field not in refused}

    @classmethod
    def refused(cls) -> Mapping[str, Iterable[Any]]:
        return {}

    @model_validator(mode="after")
    def _check(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f"logit_bias: keys are token ids, found {shortened(token)}")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias(self) -> dict[int, float]:
        return {int(token): value for token, value in (self.logit_bias or {}).items()}


class CompletionRequest(_Sampling):
    """``POST /v1/completions``. ``prompt``: a text, token ids, or a list of either."""

    prompt: (
        str
        | Annotated[list[str], AtMostOneError]
        | Annotated[list[TokenId], AtMostOneError]
        | Annotated[list[Annotated[list[TokenId], AtMostOneError]], AtMostOneError]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @classmethod
    def refused(cls) -> Mapping[str, Iterable[Any]]:
        return {"suffix": (None, ""), "best_of": (None, 1)}

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else list(given)


class ChatRequest(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    @classmethod
    def refused(cls) -> Mapping[str, Iterable[Any]]:
        return {
            "modalities": (None, ["text"]),
            "audio": (None,),
            "prediction": (None,),
            "functions": (None, []),
            "function_call": (None, "none"),
            "web_search_options": (None,),
            "parallel_tool_calls": (None, True),
            "reasoning_effort": (None,),
            "verbosity": (None,),
        }

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same; give one")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ToolChoice):
            wanted = self.tool_choice.function.name
            if wanted not in {tool.function.name for tool in self.tools or ()}:
                raise ValueError(f"tool_choice names {shortened(wanted)}, which tools does not have")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class LoadAdapterRequest(_Strict):
    """``POST /v1/load_lora_adapter``, as vLLM spells it."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    pin: bool = False
    skip_unserved: bool = False


class UnloadAdapterRequest(_Strict):
    """``POST /v1/unload_lora_adapter``; ``force`` ends the requests that use it."""

    lora_name: Name
    lora_int_id: int | None = None
    force: bool = False


class PinAdapterRequest(_Strict):
    """``POST /v1/pin_lora_adapter`` and ``unpin_lora_adapter``."""

    lora_name: Name


def parse(record: type[BaseModel], data: Any) -> Any:
    """A record from decoded JSON. Raises ApiError."""
    try:
        return record.model_validate(data)
    except ValidationError as error:
        raise first_problem(error.errors(include_url=False)) from None

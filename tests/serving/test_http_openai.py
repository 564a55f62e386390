"""The server as clients see it: the openai package and httpx over real HTTP, against PEFT's own greedy texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, ValidationError
from support.http_server import ADAPTERS, Running, Served, make_served, running
from transformers import Qwen3MoeForCausalLM

import moegraft
from moegraft.serving.engine import Engine
from moegraft.serving.http.guard import ServerOptions
from moegraft.serving.http.protocol import ChatRequest, CompletionRequest

PROMPT = "what is the capital of france?\n"
NEW = 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Running]:
    engine = Engine(served.model, adapters=served.adapters, kv_memory="4MiB", adapter_memory="16MiB", device="cpu")
    with running(engine, ServerOptions(served_names=("base",), tool_parser="hermes")) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def truths(served: Served) -> dict[str | None, list[int]]:
    found = {name: served.alone(PROMPT, name, max_new_tokens=NEW) for name in (None, *ADAPTERS)}
    assert len({tuple(tokens) for tokens in found.values()}) == len(found), "adapters that say the same prove nothing"
    return found


def text_of(served: Served, tokens: list[int]) -> str:
    return served.tokenizer.decode(tokens, skip_special_tokens=True)


def test_models_lists_adapters_with_their_parent(client: openai.OpenAI) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert set(cards) == {"base", "model", *ADAPTERS}
    assert cards["base"]["parent"] is None
    for name in ADAPTERS:
        assert cards[name]["parent"] == "base"
        assert cards[name]["adapter"]["residency"] in ("device", "host")
        assert cards[name]["adapter"]["state"] == "ready"
        assert cards[name]["adapter"]["max_rank"] > 0
    assert client.models.retrieve("experts").id == "experts"


@pytest.mark.parametrize("name", [None, *ADAPTERS])
@pytest.mark.parametrize("form", ["{}", "base:{}", "model:{}"])
def test_greedy_text_is_pefts(
    client: openai.OpenAI, served: Served, truths: dict[str | None, list[int]], name: str | None, form: str
) -> None:
    model = form.partition(":")[0].replace("{}", "base") if name is None else form.format(name)
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=NEW, temperature=0)
    assert found.choices[0].text == text_of(served, truths[name])
    assert found.usage is not None and found.usage.completion_tokens == len(truths[name])


def test_several_adapters_add_up(client: openai.OpenAI, served: Served) -> None:
    model = Qwen3MoeForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    ids = served.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        for name, folder in served.adapters.items():
            graft.load_adapter(folder, name=name)
        rows = [["experts", ("attention", -0.5)]]
        expected = graft.generate(input_ids=ids, adapters=rows, max_new_tokens=NEW, do_sample=False)
    text = text_of(served, expected[0, ids.shape[1] :].tolist())
    for model_name in ("experts+-0.5*attention", "base:experts+-0.5*attention"):
        found = client.completions.create(model=model_name, prompt=PROMPT, max_tokens=NEW, temperature=0)
        assert (found.choices[0].text, found.model) == (text, model_name)
    for wrong, status in (("experts+experts", 400), ("experts+nobody", 404), ("nan*experts", 404), ("experts+", 404)):
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model=wrong, prompt=PROMPT)
        assert (refused.value.status_code, refused.value.param) == (status, "model")


def test_a_stream_is_the_text_in_pieces(
    client: openai.OpenAI, served: Served, truths: dict[str | None, list[int]]
) -> None:
    events = list(
        client.completions.create(
            model="head", prompt=PROMPT, max_tokens=NEW, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(event.choices[0].text for event in events if event.choices) == text_of(served, truths["head"])
    assert sum(bool(event.choices and event.choices[0].text) for event in events) > 1
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] in ("length", "stop")
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == len(truths["head"])


def test_chat_goes_through_the_template(client: openai.OpenAI, served: Served) -> None:
    rendered = served.tokenizer.apply_chat_template([{"role": "user", "content": "a question"}], tokenize=False)
    expected = text_of(served, served.alone(rendered, "experts", max_new_tokens=NEW))
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    found = client.chat.completions.create(model="experts", messages=messages, max_tokens=NEW, temperature=0)
    assert found.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="experts", messages=messages, max_completion_tokens=NEW, temperature=0, stream=True
    )
    pieces = [event.choices[0].delta.content or "" for event in stream]
    assert "".join(pieces) == expected


def test_several_prompts_and_choices_keep_their_order(
    client: openai.OpenAI, served: Served, truths: dict[str | None, list[int]]
) -> None:
    ids = served.tokenizer(PROMPT)["input_ids"]
    other = text_of(served, served.alone("cow\n", "head", max_new_tokens=NEW))
    mine = text_of(served, truths["head"])
    common: dict[str, Any] = {"model": "head", "max_tokens": NEW, "temperature": 0}
    found = client.completions.create(prompt=[PROMPT, "cow\n"], n=2, echo=True, **common)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [PROMPT + mine] * 2 + ["cow\n" + other] * 2
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids) + len(served.tokenizer("cow\n")["input_ids"])
    assert client.completions.create(prompt=ids, **common).choices[0].text == mine
    assert [c.text for c in client.completions.create(prompt=[ids, ids], **common).choices] == [mine, mine]


def test_logprobs_are_those_of_the_adapters_head(client: openai.OpenAI) -> None:
    found = client.completions.create(model="head", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs and logprobs.token_logprobs and logprobs.tokens
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value is not None and value <= 0
        assert top[token] == max(top.values()) == value  # greedy
    base = client.completions.create(model="base", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    assert base.choices[0].logprobs is not None
    assert base.choices[0].logprobs.token_logprobs != logprobs.token_logprobs
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="head", messages=messages, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob


def test_a_stop_string_ends_a_text_and_is_not_shown(
    client: openai.OpenAI, served: Served, truths: dict[str | None, list[int]]
) -> None:
    text = text_of(served, truths["experts"])
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    found = client.completions.create(model="experts", prompt=PROMPT, max_tokens=NEW, temperature=0, stop=[stop])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "experts", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.5, "seed": 7}
    first = client.completions.create(**ask).choices[0].text
    assert client.completions.create(**ask).choices[0].text == first
    assert client.completions.create(**{**ask, "seed": 8}).choices[0].text != first


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    messages: Any = [{"role": "user", "content": "a number"}]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    found = client.chat.completions.create(
        model="experts", messages=messages, max_tokens=40, temperature=0, response_format=wanted
    )
    assert json.loads(found.choices[0].message.content or "")["n"] in (1, 2)


def test_a_forced_tool_is_called(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"w": {"enum": ["a", "b"]}}, "required": ["w"],
                  "additionalProperties": False}  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    messages: Any = [{"role": "user", "content": "look"}]
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        for streams in (False, True):
            ask: Any = {"model": "experts", "messages": messages, "max_tokens": 60, "temperature": 0, "tools": tools}
            found = client.chat.completions.create(**ask, tool_choice=choice, stream=streams)
            if streams:
                delta = [event for event in found if event.choices][-1].choices[0]
                calls, finish = delta.delta.tool_calls, delta.finish_reason
            else:
                calls, finish = found.choices[0].message.tool_calls, found.choices[0].finish_reason
            assert finish == "tool_calls" and calls is not None
            assert calls[0].function.name == "look"
            assert json.loads(calls[0].function.arguments)["w"] in ("a", "b")


GOOD = {"model": "experts", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "experts", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", {**GOOD, "model": "nobody"}, 404, "model"),
    ("/v1/completions", {**GOOD, "model": "base:nobody"}, 404, "model"),
    ("/v1/completions", {**GOOD, "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {**GOOD, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {**GOOD, "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {**GOOD, "n": 0}, 400, "n"),
    ("/v1/completions", {**GOOD, "n": 10**6}, 400, "n"),
    ("/v1/completions", {**GOOD, "max_tokens": 2.5}, 400, "max_tokens"),
    ("/v1/completions", {**GOOD, "max_tokens": 10**30}, 400, "max_tokens"),
    ("/v1/completions", {**GOOD, "logit_bias": {"word": 1}}, 400, "logit_bias"),
    ("/v1/completions", {**GOOD, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {**GOOD, "stop": [""]}, 400, "stop"),
    ("/v1/completions", {**GOOD, "stop": ["x"] * 100}, 400, "stop"),
    ("/v1/completions", {**GOOD, "temprature": 1}, 400, "temprature"),
    ("/v1/completions", {**GOOD, "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {**GOOD, "echo": True, "logprobs": 1}, 400, "echo"),
    ("/v1/completions", {**GOOD, "stream_options": {}}, 400, "stream_options"),
    ("/v1/completions", {**GOOD, "prompt": []}, 400, "prompt"),
    ("/v1/completions", {**GOOD, "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {**GOOD, "prompt": [1, -2]}, 400, "prompt"),
    ("/v1/completions", {**GOOD, "prompt": [1, 10**8]}, 400, "prompt"),
    ("/v1/completions", {**GOOD, "prompt": "word " * 5000}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x"}, 400, "model"),
    ("/v1/completions", [], 400, ""),
    ("/v1/completions", None, 400, ""),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {**CHAT, "functions": [{}]}, 400, "functions"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, "json_schema"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": "no such type"}}}}, 400, "grammar"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 1009}]}}}},
        400, "multipleOf"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"$ref": "#"}}}}, 400, "grammar"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, 400, "tokenize"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "word"), BAD)
def test_a_bad_request_is_told_what_is_wrong(server: Running, path: str, body: Any, status: int, word: str) -> None:
    answer = httpx.post(server.url + path, json=body, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        (CompletionRequest, {**GOOD, "prompt": [1.5] * 1000}),
        (CompletionRequest, {**GOOD, "prompt": [["x"] * 1000]}),
        (CompletionRequest, {**GOOD, **{f"field {i}": 1 for i in range(1000)}}),
        (CompletionRequest, {**GOOD, "logit_bias": {str(i): "x" for i in range(2000)}}),
        (ChatRequest, {**CHAT, "messages": [{}] * 1000}),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
    ids=range(6),
)
def test_a_body_full_of_problems_costs_no_more_than_one(record: type[BaseModel], wrong: Any) -> None:
    """400 KB of them once took 2.4 s and 0.3 GB, of the 16 MB that a body may have."""
    with pytest.raises(ValidationError) as caught:
        record.model_validate(wrong)
    assert caught.value.error_count() <= 8  # one a member of a union


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "experts", "prompt": NaN}',
        b"[" * 100_000,
        b'{"model": "experts", "prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "no text", "NaN", "deep", "long number"],
)
def test_a_malformed_body_is_refused(server: Running, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"] or "deep" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_answer_in_openais_shape(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_the_engine_lives_on(server: Running, client: openai.OpenAI) -> None:
    """Behind all of the above."""
    assert client.completions.create(model="experts", prompt="x", max_tokens=2).choices
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True}
    server.engine.check_integrity()

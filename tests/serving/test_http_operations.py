"""The server under operation: adapters changed at run time, keys, clients that leave, many at once, the status page."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from prometheus_client.parser import text_string_to_metric_families
from support.http_server import Running, Served, eventually, make_served, running

from moegraft.core.errors import UnknownAdapterError
from moegraft.serving.engine import Engine
from moegraft.serving.http.app import create_app
from moegraft.serving.http.guard import ServerOptions
from moegraft.serving.text import MAX_TEMPLATE_BYTES

ASK = {"model": "model", "prompt": "x", "max_tokens": 2, "temperature": 0}
LONG = {"model": "experts", "prompt": "x", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


def make_engine(served: Served, **options: Any) -> Engine:
    return Engine(served.model, device="cpu", **{"kv_memory": "4MiB", "adapter_memory": "16MiB", **options})


@pytest.fixture
def server(served: Served) -> Iterator[Running]:
    engine = make_engine(served, adapters={"experts": served.adapters["experts"]})
    with running(engine, ServerOptions(adapter_roots=(served.model.parent,))) as found:
        yield found
        eventually(lambda: engine.stats().running == engine.stats().waiting == engine.stats().pages_used == 0)
        engine.check_integrity()


def post(server: Running, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60, **options)


def text(server: Running, model: str) -> str:
    answer = post(server, "completions", {**ASK, "model": model, "max_tokens": 6})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def listed(server: Running) -> set[str]:
    return {card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}


def test_adapters_come_and_go(server: Running, served: Served) -> None:
    load = {"lora_name": "new", "lora_path": str(served.adapters["head"])}
    assert post(server, "completions", {**ASK, "model": "new"}).status_code == 404
    assert post(server, "load_lora_adapter", load).status_code == 200
    first = text(server, "new")
    assert first != text(server, "model")
    assert post(server, "load_lora_adapter", load).status_code == 409
    other = {**load, "lora_path": str(served.adapters["attention"]), "load_inplace": True}
    found = post(server, "load_lora_adapter", {**other, "skip_unserved": True}).json()
    assert found["adapter"]["version"] == 2 and found["adapter"]["left_out"] == []
    assert text(server, "new") != first
    assert post(server, "pin_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert server.engine.adapters["new"].pinned
    assert post(server, "unpin_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert post(server, "unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert post(server, "unload_lora_adapter", {"lora_name": "new"}).status_code == 404
    assert post(server, "completions", {**ASK, "model": "new"}).status_code == 404


def test_an_adapter_comes_from_tensors(server: Running, served: Served) -> None:
    folder = served.adapters["head"]
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    url = f"{server.url}/v1/load_lora_adapter_from_tensors"
    assert httpx.post(url, params={"lora_name": "sent"}, files=files, timeout=60).status_code == 200
    load = {"lora_name": "read", "lora_path": str(folder)}
    assert post(server, "load_lora_adapter", load).status_code == 200
    assert text(server, "sent") == text(server, "read") != text(server, "model")
    pickled = {**files, "adapter_model.safetensors": b"\x80\x04\x95pickle"}
    answer = httpx.post(url, params={"lora_name": "bad"}, files=pickled, timeout=60)
    assert answer.status_code == 400 and "bad" not in listed(server)
    answer = httpx.post(url, params={"lora_name": "bad"}, files={"adapter_config.json": b"{}"}, timeout=60)
    assert answer.status_code == 400 and "adapter_model.safetensors" in answer.text


def test_what_may_not_be_loaded(server: Running, served: Served, tmp_path: Path) -> None:
    outside = shutil.copytree(served.adapters["head"], tmp_path / "outside")
    inside = served.adapters["head"]
    circle = served.model.parent / "circle"
    circle.symlink_to(circle)
    for body, status, word in (
        ({"lora_name": "x", "lora_path": str(outside)}, 403, "outside"),
        ({"lora_name": "x", "lora_path": f"{inside}/../../{outside.name}"}, 403, "outside"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "NUL"),
        ({"lora_name": "x", "lora_path": f"{inside}/nothing"}, 400, "nothing"),
        ({"lora_name": "x", "lora_path": str(circle)}, 400, "circle"),
        ({"lora_name": "model", "lora_path": str(inside)}, 400, "lora_name"),
        ({"lora_name": "model:x", "lora_path": str(inside)}, 400, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": str(inside)}, 400, "lora_name"),
        ({"lora_name": "", "lora_path": str(inside)}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": str(inside), "more": 1}, 400, "more"),
    ):
        answer = post(server, "load_lora_adapter", body)
        assert answer.status_code == status and word in answer.json()["error"]["message"], answer.text
    form = httpx.post(f"{server.url}/v1/load_lora_adapter", data={"lora_name": "x"}, timeout=10)
    assert form.status_code == 415
    assert listed(server) == {"model", "experts"}


def test_a_template_that_cannot_be_read_leaves_nothing_behind(
    server: Running, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an adapter in the bank that no name leads to, nor what a link of a stranger points at."""
    before = set(server.engine._graft.adapters)
    spoil: dict[str, Any] = {
        "not text": lambda path: path.write_bytes(b"\xff\xfe"),
        "a link": lambda path: path.symlink_to("/etc/passwd"),
        "a pipe": os.mkfifo,
        "too long": lambda path: path.write_bytes(b" " * (MAX_TEMPLATE_BYTES + 1)),
    }
    for name, act in spoil.items():
        folder = shutil.copytree(served.adapters["head"], served.model.parent / name)
        act(folder / "chat_template.jinja")
        answer = post(server, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        assert answer.status_code == 400 and "chat_template.jinja" in answer.json()["error"]["message"], answer.text
    assert set(server.engine._graft.adapters) == before
    monkeypatch.setattr(server.engine._store, "folder", served.model.parent)
    with pytest.raises(UnknownAdapterError):
        server.engine._store.check("x" * 400)


def test_unloading_waits_for_requests_or_ends_them(server: Running) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = post(server, "unload_lora_adapter", {"lora_name": "experts"})
        assert busy.status_code == 409 and "1" in busy.json()["error"]["message"]
        assert post(server, "completions", {**ASK, "model": "experts"}).status_code == 404
        forced = post(server, "unload_lora_adapter", {"lora_name": "experts", "force": True})
        assert forced.status_code in (200, 404)  # 404: the request ended by itself meanwhile
        assert list(lines)[-2:][0] == "data: [DONE]"
    eventually(lambda: "experts" not in server.engine.adapters)


@pytest.mark.parametrize("streams", [False, True])
def test_pages_come_back_when_a_client_leaves(server: Running, streams: bool) -> None:
    url, body = f"{server.url}/v1/completions", {**LONG, "n": 4, "stream": streams}
    if streams:
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(30, read=0.3))
    eventually(lambda: server.engine.stats().running == 0 and server.engine.stats().pages_used == 0)


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_at_once(server: Running, count: int) -> None:
    """All requests in flight at once, base and adapter; all are answered, each with its own text."""
    expected = {name: text(server, name) for name in ("model", "experts")}

    async def ask(client: httpx.AsyncClient, name: str) -> bool:
        body = {**ASK, "model": name, "max_tokens": 6}
        answer = await client.post(f"{server.url}/v1/completions", json=body, timeout=300)
        return answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected[name]

    async def everyone() -> list[bool]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(limits=limits) as client:
            names = ["model" if i % 2 else "experts" for i in range(count)]
            return list(await asyncio.gather(*(ask(client, name) for name in names)))

    found = asyncio.run(everyone())
    assert len(found) == count and all(found)


def test_a_full_queue_says_so(served: Served) -> None:
    engine = make_engine(served, adapters={"experts": served.adapters["experts"]}, max_waiting=1, max_rows=1)
    with running(engine) as server:

        async def everyone() -> list[int]:
            async with httpx.AsyncClient() as client:
                calls = [
                    client.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 60}, timeout=300)
                    for _ in range(8)
                ]
                return [answer.status_code for answer in await asyncio.gather(*calls)]

        found = asyncio.run(everyone())
    assert set(found) == {200, 429}


def test_keys(served: Served) -> None:
    options = ServerOptions(api_keys=("one", "two"), admin_key="root")
    with running(make_engine(served), options) as server:
        load = {"lora_name": "new", "lora_path": str(served.adapters["head"])}
        assert httpx.get(f"{server.url}/health").status_code == 200
        for key, status in ((None, 401), ("three", 401), ("one", 200), ("two", 200)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            assert post(server, "completions", ASK, headers=headers).status_code == status
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == status
            assert post(server, "load_lora_adapter", load, headers=headers).status_code == 401
        assert post(server, "load_lora_adapter", load, headers={"authorization": "Bearer root"}).status_code == 200


def test_adapters_are_not_changed_beyond_loopback_without_a_key(served: Served) -> None:
    with running(make_engine(served), ServerOptions(host="0.0.0.0")) as server:
        load = {"lora_name": "new", "lora_path": str(served.adapters["head"])}
        answer = post(server, "load_lora_adapter", load)
        assert answer.status_code == 403 and "admin key" in answer.text
        assert post(server, "completions", ASK).status_code == 200


def test_pages_of_other_sites_do_not_reach_a_loopback_server(server: Running) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert post(server, "completions", ASK, headers=headers).status_code == 403
    own = {"origin": server.url}
    assert post(server, "completions", ASK, headers=own).status_code == 200


def test_a_huge_body_is_refused_before_it_is_read(served: Served) -> None:
    options = ServerOptions(max_body_bytes=10_000)
    with running(make_engine(served), options) as server:
        assert post(server, "completions", {**ASK, "prompt": "x" * 20_000}).status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 1000

        answer = httpx.post(f"{server.url}/v1/completions", content=chunks(), timeout=30)
        assert answer.status_code == 413
        assert post(server, "completions", ASK).status_code == 200


def test_metrics(server: Running, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    post(server, "completions", {**ASK, "model": "experts", "max_tokens": 3})
    post(server, "completions", {**ASK, "max_tokens": 3})

    def read() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, sample.labels.get("adapter", "")): sample.value for sample in samples}

    found = read()
    assert 0 < found["moegraft_generated_tokens_total", "experts"] <= 3
    assert 0 < found["moegraft_generated_tokens_total", "_base"] <= 3
    assert found["moegraft_first_token_seconds_count", "experts"] == 1
    assert found["moegraft_kv_pages_used", ""] == 0
    server.engine.load_adapter("second", served.adapters["experts"])
    monkeypatch.setattr("moegraft.serving.loop.MAX_NAMED", 1)
    post(server, "completions", {**ASK, "model": "second", "max_tokens": 3})
    bounded = {adapter for name, adapter in read() if name == "moegraft_generated_tokens_total"}
    assert bounded == {"_base", "_other", "experts"}
    server.engine.unload_adapter("second")


def test_the_schema_holds(served: Served) -> None:
    """Drawn requests over the whole schema: each is answered, none with an error of the server's."""
    engine = make_engine(served, adapters={"experts": served.adapters["experts"]}, max_model_len=64)
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine))
    operations = [result.ok() for result in schema.get_all_operations()]

    @hypothesis.settings(max_examples=30, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=hypothesis.strategies.data())
    def ask(data: hypothesis.strategies.DataObject) -> None:
        case = data.draw(data.draw(hypothesis.strategies.sampled_from(operations)).as_strategy())
        answer = case.call()
        assert answer.status_code < 500 or answer.status_code == 507, (case.path, answer.text)

    try:
        assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/metrics"}
        ask()
    finally:
        engine.close()


def test_a_person_sees_the_state(server: Running, served: Served) -> None:
    """In a real browser: adapters appear, hostile names stay text."""
    from playwright.sync_api import sync_playwright

    hostile = "<img src=x onerror=alert(1)>"
    load = {"lora_name": hostile, "lora_path": str(served.adapters["head"])}
    assert post(server, "load_lora_adapter", load).status_code == 200
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "no chromium is installed (apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
        )
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append("a dialog"))
        page.goto(server.url)
        page.wait_for_selector('tr[data-adapter="experts"]')
        assert page.inner_text("#state") == "ready"
        assert page.inner_text("#model") == server.engine.model_name
        names = [row.get_attribute("data-adapter") for row in page.query_selector_all("#adapters tbody tr")]
        assert sorted(names) == sorted(["experts", hostile])
        assert page.query_selector("#adapters img") is None
        post(server, "completions", {**ASK, "model": "experts", "max_tokens": 4})
        page.wait_for_function(
            "document.querySelector('tr[data-adapter=\"experts\"]').children[8].textContent !== '0'", timeout=10_000
        )
        browser.close()
    assert problems == []


def test_a_status_is_json(server: Running) -> None:
    found = json.loads(httpx.get(f"{server.url}/status.json").text)
    assert found["ready"] and [one["name"] for one in found["adapters"]] == ["experts"]

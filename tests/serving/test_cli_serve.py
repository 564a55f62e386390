"""``moegraft serve`` and ``moegraft chat`` as processes of their own."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from support.http_server import Served, make_served
from support.serving import COMMAND, serving
from typer.testing import CliRunner

from moegraft.cli.app import app


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_signal_lets_running_requests_end(served: Served, number: signal.Signals) -> None:
    with serving(served.model, "--adapter", f"a={served.adapters['experts']}", "--device", "cpu") as (process, url):
        names = [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]
        assert names == ["model", "a"]
        body = {"model": "a", "prompt": "x", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert process.wait(60) in (0, -number, 128 + number)


def test_adapters_of_a_folder_are_loaded_when_first_named(served: Served, tmp_path: Path) -> None:
    (tmp_path / "later").symlink_to(served.adapters["head"], target_is_directory=True)
    with serving(served.model, "--adapters-from", served.model.parent, "--device", "cpu", "--name", "base") as (_, url):
        names = {card["id"] for card in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]}
        assert names >= {"base", "head", "experts", "attention"}
        chat = subprocess.run(
            [*COMMAND, "chat", "--url", url, "--model", "head", "--max-tokens", "4"],
            input="what?\n/model base\nwhat?\n/models\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert len(chat.stdout.splitlines()) >= 5 and "experts" in chat.stdout
        body = {"model": "head", "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_bad_options_are_one_line(served: Served) -> None:
    for options, word in (
        ([], "MODEL"),
        ([served.model, "--demo"], "MODEL"),
        ([served.model, "--adapter", "a=/nowhere"], "nowhere"),
        ([served.model, "--kv-memory", "1KiB"], "kv_memory"),
    ):
        found = CliRunner().invoke(app, ["serve", *map(str, options)])
        assert found.exit_code == 2 and word in found.stderr and "Traceback" not in found.stderr, found.stderr

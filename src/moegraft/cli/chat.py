"""``moegraft chat``: a conversation with a running server, in the terminal."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from moegraft.cli.console import CommandError, printable, stderr

_TIMEOUT_SECONDS = 600.0


def run_chat(url: str, model: str | None, *, max_tokens: int | None, temperature: float) -> None:
    """Reads lines from stdin and prints answers as they grow; ends with the input. ``/model NAME`` changes adapters,
    ``/clear`` forgets the conversation, ``/models`` lists."""
    base = url.rstrip("/").removesuffix("/v1")
    api_key = os.environ.get("MOEGRAFT_API_KEY", "").partition(",")[0]
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    names = [card["id"] for card in _get(f"{base}/v1/models", headers)["data"]]
    model = model or names[0]
    stderr.print(f"{model}; /models lists, /model NAME changes, /clear forgets, Ctrl-D ends", markup=False)
    messages: list[dict[str, str]] = []
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/models":
            print("\n".join(printable(name) for name in names))
        elif command == "/model":
            model, messages = rest.strip() or model, []
        elif command == "/clear":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            body: dict[str, Any] = {"model": model, "messages": messages, "stream": True, "temperature": temperature}
            if max_tokens is not None:
                body["max_tokens"] = max_tokens
            try:
                text = _answer(f"{base}/v1/chat/completions", headers, body)
            except CommandError as error:
                stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": text})


def _lines() -> Iterator[str]:
    asks = sys.stdin.isatty()
    while True:
        if asks:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _answer(url: str, headers: dict[str, str], body: dict[str, Any]) -> str:
    """Prints an answer while it comes and gives it back."""
    text = ""
    with _open(url, headers, body) as answer:
        for raw in answer:
            line = raw.decode("utf-8", "replace").strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise CommandError(str(event["error"]["message"]))
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                text += piece
                sys.stdout.write(printable(piece, is_text=True))
                sys.stdout.flush()
    sys.stdout.write("\n")
    return text


def _get(url: str, headers: dict[str, str]) -> Any:
    with _open(url, headers, None) as answer:
        return json.loads(answer.read())


def _open(url: str, headers: dict[str, str], body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        try:
            message = json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = str(error)
        raise CommandError(str(message)) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{url}: {error}") from None

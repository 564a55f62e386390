"""Who may ask for what, and how much: keys, hosts and origins, sizes of bodies."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from moegraft.serving.http.protocol import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ADMIN_PATHS = frozenset(
    f"/v1/{what}"
    for what in (
        "load_lora_adapter",
        "unload_lora_adapter",
        "load_lora_adapter_from_tensors",
        "pin_lora_adapter",
        "unpin_lora_adapter",
    )
)
UPLOADS = frozenset({"/v1/load_lora_adapter_from_tensors"})
OPEN_PATHS = frozenset({"/health", "/ready"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """api_keys: one of them is asked for on every path but /health and /ready, if there are any · admin_key: asked for
    on the routes that change adapters; without one these answer on loopback only · adapter_roots: folders below which
    adapters may be loaded from, all where empty · max_body_bytes: of a request, max_upload_bytes: of an adapter that is
    sent · tool_parser: ``hermes`` where the tokenizer cannot parse its own tool calls · drain_seconds: how long running
    requests may go on after a signal to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    served_names: tuple[str, ...] = ()
    adapter_roots: tuple[Path, ...] = ()
    max_body_bytes: int = 16 << 20
    max_upload_bytes: int = 4 << 30
    tool_parser: str | None = None
    drain_seconds: float = 60.0

    @property
    def is_loopback(self) -> bool:
        return self.host in _LOOPBACK


class Guard:
    """ASGI middleware in front of all routes."""

    def __init__(self, app: Any, options: ServerOptions) -> None:
        self.app = app
        self.options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        try:
            self._check_caller(headers, path)
            limit = self.options.max_upload_bytes if path in UPLOADS else self.options.max_body_bytes
            length = headers.get("content-length", "0")
            if not (length.isascii() and length.isdigit()):
                raise ApiError(400, "content-length: found no number")
            if len(length) > 18 or int(length) > limit:
                raise ApiError(413, f"the body has {length[:20]} bytes, at most {limit} are taken")
        except ApiError as error:
            await JSONResponse(error.body, status_code=error.status)(scope, receive, send)
            return
        await self.app(scope, _limited(receive, limit), send)

    def _check_caller(self, headers: Headers, path: str) -> None:
        options = self.options
        if options.is_loopback:
            _check_host(headers)
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if path in ADMIN_PATHS:
            if options.admin_key is None and not options.is_loopback:
                raise ApiError(403, "beyond loopback adapters are changed with an admin key only; this server has none")
            if options.admin_key is not None and not _same(given, options.admin_key):
                raise ApiError(401, "this route needs the admin key: Authorization: Bearer ...")
            if options.admin_key is not None:
                return
        if options.api_keys and path not in OPEN_PATHS and not any(_same(given, key) for key in options.api_keys):
            raise ApiError(401, "this server needs an API key: Authorization: Bearer ...", code="invalid_api_key")


def _check_host(headers: Headers) -> None:
    """On loopback a web page of elsewhere may reach us through the user's browser: by its own name, or its origin."""
    host = headers.get("host", "localhost")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name not in _LOOPBACK and name != "testserver":
        raise ApiError(403, "host: this server listens on loopback and is called by that name only")
    origin = headers.get("origin")
    if origin is not None and origin.split("://")[-1] != host:
        raise ApiError(403, "origin: requests of other sites are not taken")


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


def _limited(receive: Receive, limit: int) -> Receive:
    """The body, as far as it is not longer than its sender said or the limit allows."""
    read = 0

    async def receive_limited() -> MutableMapping[str, Any]:
        nonlocal read
        message = await receive()
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            if read > limit:
                raise ApiError(413, f"the body has more than {limit} bytes")
        return message

    return receive_limited


def read_json(body: bytes) -> Any:
    """Decoded JSON. Raises ApiError for what is none, for NaN and infinity, and for nesting without end."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}") from None


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")

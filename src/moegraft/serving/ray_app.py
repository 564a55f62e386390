"""The server over a cluster, on Ray Serve: replicas that hold an engine each, behind one address.

    serve run moegraft.serving.ray_app:build model=/models/qwen adapters_from=/shared/adapters

An ingress passes requests on as they are, to a replica that holds their adapter; every replica answers through the same
application as ``moegraft serve``. A desk remembers which adapters administrators have loaded: it tells all replicas,
and those that start later ask it. Keys: MOEGRAFT_API_KEY, MOEGRAFT_ADMIN_KEY, in the environment of the ingress.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.concurrency import run_in_threadpool

from moegraft.core.errors import MoegraftError
from moegraft.parallel import ParallelConfig
from moegraft.serving.engine import Engine
from moegraft.serving.http.app import create_app
from moegraft.serving.http.guard import ADMIN_PATHS, UPLOADS, Guard, ServerOptions
from moegraft.serving.http.protocol import ApiError

logger = logging.getLogger("moegraft.serving")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
LOST = "the replica that answered was lost; try again"


class Settings(BaseModel):
    """What ``build`` takes, from Python, YAML or the command line.

    model, adapters, adapters_from, dtype, device, tp, ep, data_parallel, plan: of each replica's Engine, ``engine`` its
    further options · names: of the base model beside its folder's · replicas: a fixed number; else autoscaling from
    ``min_replicas`` to ``max_replicas`` so that each has ``target_ongoing_requests``, ``autoscaling`` for Serve's
    further options · max_ongoing_requests: of a
    replica, before others wait in the ingress · spread_after: an adapter's replicas may have this many requests more
    than the idlest one before that takes it too · num_gpus, num_cpus: of a replica (None: one GPU a rank) ·
    adapter_roots: adapters may be loaded by path from below these only · drain_seconds: for running requests when a
    replica is to stop · ingress_replicas: of the ingress.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    adapters: dict[str, str] = {}
    adapters_from: str | None = None
    names: list[str] = []
    dtype: str = "auto"
    device: str | None = None
    tp: int = 1
    ep: int = 1
    data_parallel: bool = False
    plan: bool = False
    engine: dict[str, Any] = {}
    replicas: int | None = None
    min_replicas: int = 1
    max_replicas: int = 8
    target_ongoing_requests: float = 32.0
    max_ongoing_requests: int = 512
    upscale_delay_seconds: float = 10.0
    downscale_delay_seconds: float = 300.0
    autoscaling: dict[str, Any] = {}
    spread_after: int = 8
    num_gpus: float | None = None
    num_cpus: float = 1.0
    ingress_replicas: int = 1
    adapter_roots: list[str] = []
    tool_parser: str | None = None
    drain_seconds: float = 60.0

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tp=self.tp, ep=self.ep, data_parallel=self.data_parallel)

    @property
    def base_names(self) -> tuple[str, ...]:
        return (*self.names, Path(self.model).resolve().name)


class ResidencyRouter(RequestRouter):
    """Sends a request to a replica on whose device its adapter lies, else to one that has it in host memory, else
    always to the same one; where these have much more to do than another, to any."""

    def initialize_state(self, spread_after: int = 8) -> None:
        self.spread_after = spread_after

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, of each of which Serve takes the idlest."""
        adapter = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not adapter or not candidate_replicas:
            return [candidate_replicas]

        def queued(replica: RunningReplica) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        def place(replica: RunningReplica) -> bytes:
            return hashlib.blake2b(f"{adapter}\0{replica.replica_id.unique_id}".encode()).digest()

        where = [
            [r for r in candidate_replicas if adapter in r.routing_stats.get(key, ())] for key in ("device", "host")
        ]
        preferred = where[0] or where[1] or [max(candidate_replicas, key=place)]
        idlest = min(map(queued, candidate_replicas))
        if min(map(queued, preferred)) - idlest >= self.spread_after:
            return [candidate_replicas]
        return [preferred, candidate_replicas]


@dataclass(frozen=True, kw_only=True)
class Act:
    """What an administrator has asked for: a request of one of ADMIN_PATHS, with its number."""

    number: int
    name: str
    path: str
    query: str
    content_type: str
    body: bytes

    @property
    def loads(self) -> bool:
        return "/load_" in self.path

    @property
    def replacing(self) -> Act:
        """The same, whatever has the name now."""
        if self.path in UPLOADS:
            query = self.query.replace("load_inplace=false", "") + "&load_inplace=true"
            return Act(**{**vars(self), "query": query})
        body = json.dumps({**json.loads(self.body), "load_inplace": True}).encode()
        return Act(**{**vars(self), "body": body})


@serve.deployment
class EngineReplica:
    """An engine and the application of ``moegraft serve``, called without a network between."""

    async def __init__(self, settings: Settings, desk: str) -> None:  # type: ignore[misc]  # as Serve has it
        self._desk_name = desk
        self._applied: dict[str, Act] = {}
        self._acting = asyncio.Lock()
        self._drain_seconds = settings.drain_seconds
        self.engine = await run_in_threadpool(_open_engine, settings)
        # Who may ask for what was checked at the ingress: here the caller is this machine.
        options = ServerOptions(
            served_names=tuple(settings.names),
            adapter_roots=tuple(map(Path, settings.adapter_roots)),
            tool_parser=settings.tool_parser,
        )
        self._app = create_app(self.engine, options)
        with suppress(TimeoutError, RayError, RayServeException):  # or with the first health check
            await asyncio.wait_for(self._catch_up(), 30)

    async def http(self, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
        """ASGI messages of the answer, those that are there together; whoever stops reading has hung up."""
        inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.ensure_future(_run(self._app, scope, body, inbox.put))
        task.add_done_callback(lambda _: inbox.put_nowait(None))
        try:
            while (message := await inbox.get()) is not None:
                messages = [message]
                while not inbox.empty() and (more := inbox.get_nowait()) is not None:
                    messages.append(more)
                yield messages
                if not messages[-1].get("more_body", True):
                    return
            task.result()
        finally:
            task.cancel()

    async def apply(self, act: Act) -> tuple[int, bytes]:
        """Status and body of the answer to an administrator."""
        async with self._acting:
            return await self._apply(act)

    async def _apply(self, act: Act) -> tuple[int, bytes]:
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        headers = [(b"content-type", act.content_type.encode()), (b"content-length", str(len(act.body)).encode())]
        scope = {"method": "POST", "path": act.path, "query_string": act.query.encode(), "headers": headers}
        await _run(self._app, scope, act.body, send)
        status = messages[0]["status"]
        if act.loads and status == 200:
            self._applied[act.name] = act
        elif act.path.endswith("/unload_lora_adapter"):
            self._applied.pop(act.name, None)
        return status, b"".join(message.get("body", b"") for message in messages[1:])

    async def applied(self) -> list[Act]:
        """Adapters that administrators have loaded here: what a desk that was restarted asks for."""
        return list(self._applied.values())

    async def running(self) -> int:
        """Sequences that run here."""
        return self.engine.stats().running

    async def _catch_up(self) -> None:
        desk = serve.get_deployment_handle(self._desk_name, serve.get_replica_context().app_name)
        settled, known = await desk.known.remote()
        async with self._acting:
            for name, act in known.items():
                mine = self._applied.get(name)
                if mine is None or mine.number < act.number:
                    status, body = await self._apply(act.replacing)
                    if status != 200:
                        logger.error("adapter %s, which other replicas have, was refused: %s", name, body[:500])
            for name, act in list(self._applied.items()):
                if name not in known and act.number <= settled:
                    with suppress(MoegraftError):
                        await run_in_threadpool(self.engine.unload_adapter, name)
                    del self._applied[name]

    async def check_health(self) -> None:
        """Serve starts the replica again where this raises."""
        if self.engine.failure is not None:
            raise MoegraftError(self.engine.failure)
        with suppress(TimeoutError, RayError, RayServeException):  # the desk is being started again
            await asyncio.wait_for(self._catch_up(), 10)

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """What ResidencyRouter asks for."""
        found: dict[str, list[str]] = {"device": [], "host": []}
        for name, status in self.engine.adapters.items():
            if status.residency in found and status.state != "draining":
                found[status.residency].append(name)
        return found

    async def __del__(self) -> None:
        """Serve has waited for what it sent here; what is left is cancelled."""
        if hasattr(self, "engine"):
            await run_in_threadpool(self.engine.drain, self._drain_seconds)
            await run_in_threadpool(self.engine.close)


def _open_engine(settings: Settings) -> Engine:
    return Engine(
        settings.model,
        adapters=settings.adapters,
        adapters_from=settings.adapters_from,
        dtype=settings.dtype,
        device=settings.device,
        parallel=settings.parallel,
        plan=settings.plan,
        **settings.engine,
    )


async def _run(app: Any, scope: Message, body: bytes, send: Send) -> None:
    """One request through an application in this process."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # whoever hangs up cancels
        raise AssertionError

    fixed = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
    given = {**scope, "raw_path": scope["path"].encode(), "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80)}
    headers = [(name, value) for name, value in scope["headers"] if name not in (b"host", b"origin", b"authorization")]
    await app({**fixed, **given, "headers": [*headers, (b"host", b"localhost")]}, receive, send)


@serve.deployment
class AdapterDesk:
    """One for all: adapters are loaded and unloaded on all replicas, or on none."""

    def __init__(self, engines: Any) -> None:
        self._engines = engines
        self._known: dict[str, Act] = {}
        self._number = self._settled = 0
        self._acting = asyncio.Lock()
        self._is_restored = False

    async def known(self) -> tuple[int, dict[str, Act]]:
        """(number of the last act that is over, what is loaded)."""
        await self._restore()
        return self._settled, dict(self._known)

    async def act(self, path: str, query: str, content_type: str, name: str, body: bytes) -> tuple[int, bytes]:
        """The answer to an administrator: that of the replicas, or of the first that refuses."""
        await self._restore()
        async with self._acting:
            self._number += 1
            act = Act(number=self._number, name=name, path=path, query=query, content_type=content_type, body=body)
            try:
                return await self._act(act)
            finally:
                self._settled = self._number

    async def _act(self, act: Act) -> tuple[int, bytes]:
        found = await self._engines.broadcast("apply", act).results_async(return_exceptions=True)
        answers = [one for one in found if isinstance(one, tuple)]  # of a replica that was lost there is none
        if not answers:
            return 503, json.dumps(ApiError(503, "no replica is there").body).encode()
        refused = [one for one in answers if one[0] != 200]
        if act.path.endswith("/unload_lora_adapter"):
            self._known.pop(act.name, None)
            draining = [one for one in refused if one[0] == 409]
            return draining[0] if draining else min(answers)
        if refused and act.loads:
            await self._undo(act)
        elif act.loads:
            self._known[act.name] = act
        return refused[0] if refused else answers[0]

    async def _undo(self, act: Act) -> None:
        """Where some replicas have it and some do not: back to what all had."""
        before = self._known.get(act.name)
        if before is not None:
            back = Act(**{**vars(before.replacing), "number": act.number})
            self._known[act.name] = back
        else:
            body = json.dumps({"lora_name": act.name, "force": True}).encode()
            path, kind = "/v1/unload_lora_adapter", "application/json"
            back = Act(number=act.number, name=act.name, path=path, query="", content_type=kind, body=body)
        if not any(mine.name == act.name and mine.number == act.number for mine in await self._applied()):
            return
        await self._engines.broadcast("apply", back).results_async(return_exceptions=True)

    async def _applied(self) -> list[Act]:
        found = await self._engines.broadcast("applied").results_async(timeout_s=10, return_exceptions=True)
        return [act for one in found if isinstance(one, list) for act in one]

    async def _restore(self) -> None:
        """A desk that was started again knows what the replicas know."""
        if self._is_restored:
            return
        self._is_restored = True
        with suppress(TimeoutError, RayError, RayServeException):
            for act in await asyncio.wait_for(self._applied(), 10):
                if act.number > self._number or act.name not in self._known:
                    self._known[act.name] = act
                self._number = self._settled = max(self._number, act.number)


_ingress = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class _Passed(Response):
    """A response that another application writes."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


# serve.ingress pickles what stands above it.


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


async def _send_whole(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_loss(send: Send, started: Message | None) -> None:
    """Before the first byte an error of its own; in a stream the last event; in the middle of a body nothing helps."""
    error = ApiError(503, LOST)
    if started is None:
        await _send_whole(send, 503, json.dumps(error.body).encode())
        return
    is_stream = any(name == b"content-type" and b"event-stream" in value for name, value in started["headers"])
    if not is_stream:
        raise error
    text = f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": False})


@serve.deployment
@serve.ingress(_ingress)
class Ingress:
    """Checks who asks, and passes requests on."""

    def __init__(self, settings: Settings, engines: Any, desk: Any) -> None:
        keys = tuple(key for key in os.environ.get("MOEGRAFT_API_KEY", "").split(",") if key)
        admin_key = os.environ.get("MOEGRAFT_ADMIN_KEY") or None
        # On loopback alone without keys, as ``moegraft serve``: Serve's proxy says where it listens.
        host = "127.0.0.1" if not keys and admin_key is None else "0.0.0.0"
        self._engines, self._desk = engines, desk
        self._base_names = settings.base_names
        self._guard = Guard(self._serve, ServerOptions(host=host, api_keys=keys, admin_key=admin_key))

    @_ingress.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "OPTIONS", "DELETE", "PUT", "PATCH"])
    async def handle(self, request: Request) -> Response:
        """Any request."""
        return _Passed(self._guard)

    async def _serve(self, scope: Message, receive: Any, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
            if scope["path"] in ADMIN_PATHS and scope["method"] == "POST":
                await self._administer(request, body, send)
            else:
                await self._pass_on(request, body, send)
        except ApiError as error:
            await _send_whole(send, error.status, json.dumps(error.body).encode())

    async def _administer(self, request: Request, body: bytes, send: Send) -> None:
        name = request.query_params.get("lora_name")
        if request.scope["path"] not in UPLOADS:
            given = _json(body)
            name = given.get("lora_name") if isinstance(given, dict) else None
        kind = request.headers.get("content-type", "")
        status, answer = await self._desk.act.remote(request.scope["path"], request.url.query, kind, str(name), body)
        await _send_whole(send, status, answer)

    async def _pass_on(self, request: Request, body: bytes, send: Send) -> None:
        scope = {key: request.scope[key] for key in ("method", "path", "query_string", "headers")}
        handle = self._engines.options(stream=True, multiplexed_model_id=self._adapter(body))
        answer = handle.http.remote(scope, body)
        started: Message | None = None
        try:
            async for messages in answer:
                for message in messages:
                    started = started or message
                    await send(message)
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", request.scope["path"], str(error).splitlines()[0])
            await _send_loss(send, started)
        except BaseException:
            answer.cancel()  # the client has hung up
            raise

    def _adapter(self, body: bytes) -> str:
        """By which the router chooses: the adapter that ``model`` names."""
        given = _json(body)
        model = given.get("model") if isinstance(given, dict) else None
        if not isinstance(model, str) or model in self._base_names:
            return ""
        for name in self._base_names:
            model = model.removeprefix(f"{name}:")
        return model


def build(args: Settings) -> serve.Application:
    """The application: ``serve.run(build(Settings(...)))``, ``serve run moegraft.serving.ray_app:build model=...``, or
    an ``import_path`` with ``args`` in a Serve YAML."""
    is_on_gpu = args.device != "cpu"
    num_gpus = args.parallel.world_size if args.num_gpus is None else args.num_gpus
    options: dict[str, Any] = {
        "max_ongoing_requests": args.max_ongoing_requests,
        "graceful_shutdown_timeout_s": args.drain_seconds + 10,
        "health_check_period_s": 5,
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": num_gpus if is_on_gpu else 0},
        "request_router_config": RequestRouterConfig(
            request_router_class="moegraft.serving.ray_app.ResidencyRouter",
            request_router_kwargs={"spread_after": args.spread_after},
            request_routing_stats_period_s=1.0,
        ),
    }
    if args.replicas is None:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_ongoing_requests,
            upscale_delay_s=args.upscale_delay_seconds,
            downscale_delay_s=args.downscale_delay_seconds,
            **args.autoscaling,
        )
    else:
        options["num_replicas"] = args.replicas
    light = {"num_cpus": 0.1}
    replica, desk_type, ingress = (_deployment(one) for one in (EngineReplica, AdapterDesk, Ingress))
    engines = replica.options(**options).bind(args, "AdapterDesk")
    desk = desk_type.options(num_replicas=1, ray_actor_options=light).bind(engines)
    return ingress.options(num_replicas=args.ingress_replicas, max_ongoing_requests=4096, ray_actor_options=light).bind(
        args, engines, desk
    )


def _deployment(decorated: Any) -> Any:
    """What ``serve.deployment`` has made of a class."""
    return decorated

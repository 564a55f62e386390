"""``moegraft serve``: an engine behind the OpenAI-compatible server."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moegraft.cli.console import CommandError, stderr
from moegraft.cli.loading import quiet_transformers
from moegraft.parallel import ParallelConfig
from moegraft.serving.engine import Engine
from moegraft.serving.http.guard import ServerOptions

API_KEY, ADMIN_KEY = "MOEGRAFT_API_KEY", "MOEGRAFT_ADMIN_KEY"
FAILURE_SECONDS = 10.0
"""For the server to end by itself once a rank is lost."""
DEMO_ADAPTERS = ("shout", "pirate", "json")


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """model: a checkpoint; none where ``is_demo``, whose model and adapters are made first · engine: fields of
    EngineConfig · parallel, plan: ranks that share the model, which the engine starts."""

    model: Path | None
    is_demo: bool = False
    adapters: Mapping[str, Path]
    adapters_from: Path | None
    options: ServerOptions
    dtype: str = "auto"
    device: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: bool = False
    demo_steps: int = 200


def server_options(**options: Any) -> ServerOptions:
    """With the keys of the environment: several API keys stand between commas."""
    keys = tuple(key for key in os.environ.get(API_KEY, "").split(",") if key)
    return ServerOptions(api_keys=keys, admin_key=os.environ.get(ADMIN_KEY) or None, **options)


def run_serve(request: ServeRequest) -> None:
    """Serves until a signal: SIGTERM and Ctrl-C let running requests end, a second one does not."""
    import uvicorn

    from moegraft.serving.http.app import create_app

    if request.is_demo == (request.model is not None):
        raise CommandError("serve takes a MODEL or --demo")
    quiet_transformers()
    with _model(request) as (folder, adapters):
        engine = Engine(
            folder,
            adapters=adapters,
            adapters_from=request.adapters_from,
            dtype=request.dtype,
            device=request.device,
            parallel=request.parallel,
            plan=request.plan,
            **request.engine,
        )
        options = request.options
        app = create_app(engine, options)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=int(options.drain_seconds),
        )
        server = uvicorn.Server(config)
        engine.on_failure = partial(_end_soon, server)
        try:
            with _announced(server, engine, options):
                server.run()
        finally:
            engine.close()
        if engine.failure is not None:
            raise CommandError(engine.failure, exit_code=1)
        if not server.started:
            raise CommandError(f"could not listen on {options.host}:{options.port}")


def _end_soon(server: Any, message: str) -> None:
    """A rank is lost: whoever is being answered is told, and the process ends, for its supervisor to start it again."""
    server.should_exit = True

    def end() -> None:
        # The engine's thread, or a destructor, may wait for the rank for ever.
        stderr.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
        os._exit(1)

    timer = threading.Timer(FAILURE_SECONDS, end)
    timer.daemon = True
    timer.start()


@contextmanager
def _model(request: ServeRequest) -> Iterator[tuple[Path, Mapping[str, Path]]]:
    """The checkpoint and the adapters; the demo's live as long as the server."""
    if request.model is not None:
        yield request.model, request.adapters
        return
    from moegraft.cli.demo import make_demo

    with tempfile.TemporaryDirectory(prefix="moegraft-demo-") as temporary:
        folder = Path(temporary)
        make_demo(folder, max_steps=request.demo_steps)
        yield folder / "base", {**{name: folder / name for name in DEMO_ADAPTERS}, **request.adapters}


@contextmanager
def _announced(server: Any, engine: Engine, options: ServerOptions) -> Iterator[None]:
    """Says where the server is once it listens."""
    started = server.startup

    async def startup(*args: Any, **kwargs: Any) -> None:
        await started(*args, **kwargs)
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            host = f"[{options.host}]" if ":" in options.host else options.host
            names = ", ".join(engine.adapters) or "none yet"
            stderr.print(
                f"moegraft serves {engine.model_name} at http://{host}:{port}/v1, adapters: {names}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

    server.startup = startup
    yield

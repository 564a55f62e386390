"""The OpenAI-compatible server: one FastAPI application over one engine."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from moegraft.core.errors import (
    AdapterInUseError,
    AdapterMemoryError,
    AdapterNameError,
    MoegraftError,
    UnknownAdapterError,
)
from moegraft.serving.engine import Engine
from moegraft.serving.http.admin import adapter_card, add_admin_routes
from moegraft.serving.http.answers import Answer, RequestFailed, stream, whole
from moegraft.serving.http.chat import chat_grammar, chat_parser
from moegraft.serving.http.guard import Guard, ServerOptions, read_json
from moegraft.serving.http.metrics import CONTENT_TYPE, Metrics
from moegraft.serving.http.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    first_problem,
    parse,
    shortened,
)
from moegraft.serving.requests import (
    AdapterChoice,
    EngineBusyError,
    EngineClosedError,
    Grammar,
    RequestError,
    SamplingParams,
    TokenEvent,
    adapters_of,
)
from moegraft.serving.requests import Request as EngineRequest
from moegraft.serving.stream import TokenStream

_WEIGHT = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,17})?")
STATIC = Path(__file__).parent / "static"
_STATUS_OF: tuple[tuple[type[MoegraftError], int], ...] = (
    (RequestError, 400),
    (EngineBusyError, 429),
    (EngineClosedError, 503),
    (UnknownAdapterError, 404),
    (AdapterInUseError, 409),
    (AdapterNameError, 409),
    (AdapterMemoryError, 507),
    (MoegraftError, 400),
)
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app(engine: Engine, options: ServerOptions | None = None) -> FastAPI:
    """The application. It drains and closes the engine when it is shut down."""
    options = options or ServerOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(engine.drain, options.drain_seconds)
            await run_in_threadpool(engine.close)

    app = FastAPI(title="moegraft", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, options=options)
    metrics = Metrics(engine)
    _add_errors(app)
    _add_state_routes(app, engine, options, metrics)
    _add_openai_routes(app, Frontend(engine, options))
    add_admin_routes(app, engine, options)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        route = request.scope.get("route")
        metrics.answers.labels(getattr(route, "path", "_unknown"), str(response.status_code)).inc()
        return response

    return app


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, f"{request.method} {shortened(request.url.path)}: {error.detail}"))

    @app.exception_handler(MoegraftError)
    async def raised(_: Request, error: MoegraftError) -> JSONResponse:
        return answer(api_error(error))

    @app.exception_handler(RequestFailed)
    async def failed(_: Request, error: RequestFailed) -> JSONResponse:
        return answer(ApiError(500, str(error)))


def api_error(error: MoegraftError) -> ApiError:
    """An engine's error as an answer."""
    status = next(status for kind, status in _STATUS_OF if isinstance(error, kind))
    param = error.field if isinstance(error, RequestError) else None
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return ApiError(status, f"{error}{notes}", param=param)


def _add_state_routes(app: FastAPI, engine: Engine, options: ServerOptions, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the process can answer."""
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while requests are taken, 503 before and after."""
        return JSONResponse({"ready": engine.is_ready}, status_code=200 if engine.is_ready else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(await run_in_threadpool(metrics.text), media_type=CONTENT_TYPE)

    @app.get("/status.json")
    async def status() -> JSONResponse:
        """What the status page shows."""
        return JSONResponse(await run_in_threadpool(_status, engine))

    files = {"/": "index.html", "/status.js": "status.js", "/status.css": "status.css"}
    for path, name in files.items():
        app.get(path, include_in_schema=False)(partial(_static, name))


async def _static(name: str) -> FileResponse:
    return FileResponse(STATIC / name, headers=_PAGE_HEADERS)


def _status(engine: Engine) -> dict[str, Any]:
    stats = engine.stats()
    adapters = []
    for name, status in engine.adapters.items():
        counted = stats.adapters.get(name)
        card = adapter_card(status)
        if counted is not None:
            first = counted.first_token_seconds
            card["generated_tokens"] = counted.generated_tokens
            card["first_token_seconds"] = first.total / first.count if first.count else None
        adapters.append(card)
    base = stats.adapters.get("")
    return {
        "model": engine.model_name,
        "ready": engine.is_ready,
        "time": time.time(),
        "running": stats.running,
        "waiting": stats.waiting,
        "pages": {"total": stats.pages_total, "used": stats.pages_used, "cached": stats.pages_cached},
        "steps": stats.steps,
        "failed_steps": stats.failed_steps,
        "preemptions": stats.preemptions,
        "generated_tokens": sum(one.generated_tokens for one in stats.adapters.values()),
        "base": {"generated_tokens": base.generated_tokens, "running": base.running} if base else None,
        "adapters": adapters,
        "available": list(engine.available_adapters)[:1000],
    }


class Frontend:
    """From OpenAI's requests to the engine's, and back."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.options = options
        self.base_names = (*options.served_names, engine.model_name)
        self.created = int(time.time())

    def models(self) -> dict[str, Any]:
        """Base models first, then adapters, loaded or not."""
        base = self.base_names[0]
        common = {"object": "model", "created": self.created, "owned_by": "moegraft"}
        cards: list[dict[str, Any]] = [
            {"id": name, **common, "root": name, "parent": None, "max_model_len": self.engine.max_model_len}
            for name in dict.fromkeys(self.base_names)
        ]
        loaded = {name: status for name, status in self.engine.adapters.items() if status.state != "failed"}
        for name, status in loaded.items():
            card = adapter_card(status)
            cards.append({"id": name, **common, "root": status.source, "parent": base, "adapter": card})
        for name in self.engine.available_adapters:
            if name not in loaded:
                cards.append({"id": name, **common, "root": None, "parent": base, "adapter": None})
        return {"object": "list", "data": cards}

    def adapter_of(self, model: str) -> AdapterChoice:
        """The adapter that a model's name means, several for ``style+0.5*domain``, None for the base. A name that has
        such a sign itself comes first. Raises ApiError."""
        if model in self.base_names:
            return None
        for name in self.base_names:
            if model.startswith(f"{name}:"):
                model = model.removeprefix(f"{name}:")
                break
        known = {name for name, status in self.engine.adapters.items() if status.state != "failed"}
        if model in known:
            return model
        known |= set(self.engine.available_adapters)  # looks into the folder: not for every request
        if model in known:
            return model
        parts = [_weighted(part, known) for part in model.split("+")]
        if all(parts):
            try:
                return adapters_of([part for part in parts if part])
            except RequestError as error:
                raise ApiError(400, f"model: {error}", param="model", code="invalid_value") from None
        message = f"model: found {shortened(model)}, expected the base model, an adapter, base:adapter, or several "
        message += "adapters as style+0.5*domain"
        raise ApiError(404, f"{message}; see /v1/models", param="model", code="model_not_found")

    async def complete(self, request: Request, asked: CompletionRequest) -> Response:
        adapter, codec = self.adapter_of(asked.model), self.engine.text
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not served", param="echo")
        prompts = await run_in_threadpool(lambda: [self._prompt_ids(prompt) for prompt in asked.prompts])
        if not prompts:
            raise ApiError(400, "prompt: found an empty list, expected at least one prompt", param="prompt")
        n = asked.n or 1
        echoed: list[str] = []
        if asked.echo:
            texts = [p if isinstance(p, str) else codec.decode(p) for p in asked.prompts]
            echoed = [text for text in texts for _ in range(n)]
        sampling = self._sampling(asked, max_tokens=asked.max_tokens or 16, logprobs=asked.logprobs)
        answer = self._answer(asked, num_prompts=len(prompts), is_chat=False, top_logprobs=asked.logprobs)
        answer = replace(answer, echoed=tuple(echoed))
        return await self._respond(request, answer, prompts, adapter, sampling, streams=bool(asked.stream))

    async def chat(self, request: Request, asked: ChatRequest) -> Response:
        adapter = self.adapter_of(asked.model)
        grammar, forced = chat_grammar(asked)
        shows_tools = asked.tools and asked.tool_choice != "none"
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] if shows_tools else None
        parser = chat_parser(self.engine.text, tools, forced, self.options.tool_parser)
        ids = await run_in_threadpool(
            self.engine.text.render_chat,
            [message.as_template() for message in asked.messages],
            adapter=adapter,
            tools=tools,
            add_generation_prompt=asked.add_generation_prompt,
            options=_template_options(asked.chat_template_kwargs),
        )
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = self._sampling(asked, max_tokens=asked.limit, logprobs=logprobs, grammar=grammar)
        answer = self._answer(asked, num_prompts=1, is_chat=True, top_logprobs=logprobs)
        answer = replace(answer, parse=parser)
        return await self._respond(request, answer, [tuple(ids)], adapter, sampling, streams=bool(asked.stream))

    def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        return self.engine.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)

    def _answer(
        self, asked: CompletionRequest | ChatRequest, *, num_prompts: int, is_chat: bool, top_logprobs: int | None
    ) -> Answer:
        return Answer(
            model=asked.model,
            codec=self.engine.text,
            is_chat=is_chat,
            num_choices=num_prompts * (asked.n or 1),
            num_prompts=num_prompts,
            top_logprobs=top_logprobs,
            include_usage=asked.stream_options is not None and asked.stream_options.include_usage,
        )

    def _sampling(
        self,
        asked: CompletionRequest | ChatRequest,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """What the request leaves open is OpenAI's default: temperature 1, everything else off."""
        given = {
            name: value
            for name in (
                "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
                "n", "min_tokens", "ignore_eos", "skip_special_tokens",
            )
            if (value := getattr(asked, name)) is not None
        }  # fmt: skip
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(0, asked.top_k or 0),
            stop=asked.stops,
            stop_token_ids=tuple(asked.stop_token_ids or ()),
            logit_bias=asked.bias,
            logprobs=logprobs,
            grammar=grammar,
            **given,
        )

    async def _respond(
        self,
        request: Request,
        answer: Answer,
        prompts: Sequence[tuple[int, ...]],
        adapter: AdapterChoice,
        sampling: SamplingParams,
        *,
        streams: bool,
    ) -> Response:
        """Queues the prompts, all or none, and gives the answer back whole or as it grows."""
        queued: list[TokenStream] = []
        try:
            for number, prompt in enumerate(prompts):
                request_id = f"{answer.answer_id}-{number}"
                wanted = EngineRequest(request_id=request_id, prompt_ids=prompt, adapter=adapter, sampling=sampling)
                queued.append(await run_in_threadpool(self.engine.submit, wanted))
        except BaseException:
            self._cancel(queued)
            raise
        events = self._events(queued, sampling.n)
        if streams:
            return StreamingResponse(
                _closing(stream(answer, events), events),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        return await _unless_gone(request, answer, events)

    async def _events(self, queued: Sequence[TokenStream], n: int) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Events of all streams as they come. Whoever stops reading before the end has cancelled them."""
        inbox: asyncio.Queue[tuple[int, TokenEvent] | None] = asyncio.Queue()

        async def read(number: int, one: TokenStream) -> None:
            async for event in one:
                inbox.put_nowait((number * n + event.index, event))
            inbox.put_nowait(None)

        readers = [asyncio.ensure_future(read(number, one)) for number, one in enumerate(queued)]
        try:
            left = len(readers)
            while left:
                found = await inbox.get()
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for reader in readers:
                reader.cancel()
            self._cancel(queued)

    def _cancel(self, queued: Sequence[TokenStream]) -> None:
        for one in queued:
            self.engine.cancel(one.request_id)


def _weighted(text: str, known: Collection[str]) -> tuple[str, float] | None:
    """``0.5*name`` or ``name``, where the name is known."""
    weight, star, name = text.partition("*")
    if text in known:
        return text, 1.0
    return (name, float(weight)) if star and name in known and _WEIGHT.fullmatch(weight) else None


def _template_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables for the chat template; what ``apply_chat_template`` itself is told by is not one of them."""
    taken = {"tokenize", "chat_template", "tools", "conversation", "return_tensors", "add_generation_prompt", "padding"}
    found = dict(given or {})
    if wrong := sorted(taken & found.keys()):
        raise ApiError(400, f"chat_template_kwargs.{wrong[0]}: this name is no variable of a template")
    return found


async def _closing(lines: AsyncIterator[str], events: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The lines; the events are closed whatever ends the stream, a client that has gone included."""
    async with aclosing(events), aclosing(lines):  # type: ignore[type-var]
        async for line in lines:
            yield line


async def _unless_gone(request: Request, answer: Answer, events: AsyncIterator[Any]) -> Response:
    """The whole answer; nothing is computed further for a client that has hung up."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)

    async with aclosing(events):  # type: ignore[type-var]
        work, watch = asyncio.ensure_future(whole(answer, events)), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)
            return JSONResponse(work.result())
        finally:
            for task in (work, watch):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


def _add_openai_routes(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The base model, and every adapter with its parent, ranks and residency."""
        return await run_in_threadpool(frontend.models)

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def model(model: str) -> dict[str, Any]:
        found = (await run_in_threadpool(frontend.models))["data"]
        wanted = next((card for card in found if card["id"] == model), None)
        if wanted is None:
            raise ApiError(404, f"model: {shortened(model)} is not here", param="model", code="model_not_found")
        return dict(wanted)

    def body(record: type[BaseModel]) -> dict[str, Any]:
        """For the schema: the body is read by hand, so that its errors are OpenAI's."""
        content = {"application/json": {"schema": record.model_json_schema()}}
        return {"requestBody": {"required": True, "content": content}}

    @app.post("/v1/completions", tags=["completions"], openapi_extra=body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """OpenAI's completions; ``model`` names the base model, an adapter, base:adapter, or several adapters."""
        return await frontend.complete(request, parse(CompletionRequest, read_json(await request.body())))

    @app.post("/v1/chat/completions", tags=["completions"], openapi_extra=body(ChatRequest))
    async def chat(request: Request) -> Response:
        """OpenAI's chat completions, with tools and response_format."""
        return await frontend.chat(request, parse(ChatRequest, read_json(await request.body())))

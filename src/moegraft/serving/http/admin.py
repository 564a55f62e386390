"""Routes that change which adapters there are. ``Guard`` has asked for the key before they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from moegraft.serving.engine import Engine
from moegraft.serving.http.guard import ServerOptions, read_json
from moegraft.serving.http.protocol import (
    MAX_NAME,
    ApiError,
    LoadAdapterRequest,
    PinAdapterRequest,
    UnloadAdapterRequest,
    parse,
    shortened,
)
from moegraft.serving.status import AdapterStatus

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAX_CONFIG_BYTES = 1 << 20


def adapter_card(status: AdapterStatus) -> dict[str, Any]:
    """What ``/v1/models`` and the status page say of an adapter."""
    return {
        "name": status.name,
        "version": status.version,
        "state": status.state,
        "residency": status.residency,
        "pinned": status.pinned,
        "source": status.source,
        "max_rank": max(status.ranks.values(), default=0),
        "modules": len(status.ranks),
        "bytes": status.num_bytes,
        "running": status.running,
        "waiting": status.waiting,
        "draining": status.draining,
        "load_seconds": status.load_seconds,
        "left_out": list(status.left_out),
        "error": status.error,
    }


def add_admin_routes(app: FastAPI, engine: Engine, options: ServerOptions) -> None:
    """The adapter routes, spelt as vLLM spells them, and those that vLLM does not have."""
    reserved = {engine.model_name, *options.served_names}

    def check_name(name: str) -> None:
        if name in reserved or any(name.startswith(f"{base}:") for base in reserved) or not name.isprintable():
            raise ApiError(
                400, f"lora_name: found {shortened(name)}, expected printable text that is no name of the base model",
                param="lora_name",
            )  # fmt: skip

    @app.post("/v1/load_lora_adapter", tags=["adapters"])
    async def load(request: Request) -> JSONResponse:
        """Reads an adapter folder of this machine; ``load_inplace`` replaces one that has the name; ``skip_unserved``
        leaves out modules that are not served, and lists them."""
        wanted: LoadAdapterRequest = parse(LoadAdapterRequest, await _json(request))
        check_name(wanted.lora_name)
        source = _allowed(wanted.lora_path, options)
        status = await run_in_threadpool(
            engine.load_adapter,
            wanted.lora_name,
            source,
            replace=wanted.load_inplace,
            skip_unserved=wanted.skip_unserved,
        )
        if wanted.pin:
            await run_in_threadpool(engine.pin_adapter, wanted.lora_name)
        return _loaded(status)

    @app.post("/v1/load_lora_adapter_from_tensors", tags=["adapters"])
    async def load_from_tensors(request: Request, lora_name: str, load_inplace: bool = False) -> JSONResponse:
        """An adapter in the request: a form with the files adapter_config.json and adapter_model.safetensors."""
        if not 0 < len(lora_name) <= MAX_NAME:
            raise ApiError(400, f"lora_name: found {len(lora_name)} characters, expected 1 to {MAX_NAME}")
        check_name(lora_name)
        status = await run_in_threadpool(engine.load_adapter, lora_name, await _uploaded(request), replace=load_inplace)
        return _loaded(status)

    @app.post("/v1/unload_lora_adapter", tags=["adapters"])
    async def unload(request: Request) -> JSONResponse:
        """Forgets an adapter. 409 with the count while requests use it: it takes no more and goes with the last."""
        wanted: UnloadAdapterRequest = parse(UnloadAdapterRequest, await _json(request))
        await run_in_threadpool(engine.unload_adapter, wanted.lora_name, force=wanted.force)
        return JSONResponse({"status": "unloaded", "lora_name": wanted.lora_name})

    @app.post("/v1/pin_lora_adapter", tags=["adapters"])
    async def pin(request: Request) -> JSONResponse:
        """Keeps an adapter on the device."""
        wanted: PinAdapterRequest = parse(PinAdapterRequest, await _json(request))
        await run_in_threadpool(engine.pin_adapter, wanted.lora_name)
        return JSONResponse({"status": "pinned", "lora_name": wanted.lora_name})

    @app.post("/v1/unpin_lora_adapter", tags=["adapters"])
    async def unpin(request: Request) -> JSONResponse:
        """Lets an adapter be evicted again."""
        wanted: PinAdapterRequest = parse(PinAdapterRequest, await _json(request))
        await run_in_threadpool(engine.unpin_adapter, wanted.lora_name)
        return JSONResponse({"status": "unpinned", "lora_name": wanted.lora_name})


def _loaded(status: AdapterStatus) -> JSONResponse:
    return JSONResponse({"status": "loaded", "lora_name": status.name, "adapter": adapter_card(status)})


async def _json(request: Request) -> Any:
    """The body. A page of another site can send a form without asking the browser, but no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type: found {shortened(kind)}, expected application/json")
    return read_json(await request.body())


def _allowed(path: str, options: ServerOptions) -> str:
    """The path, where it is below one of the folders that adapters may come from."""
    if "\0" in path:
        raise ApiError(400, "lora_path: found a NUL character", param="lora_path")
    if not options.adapter_roots:
        return path
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise ApiError(400, f"lora_path: {shortened(path)} leads nowhere", param="lora_path") from None
    if not any(resolved.is_relative_to(root.resolve()) for root in options.adapter_roots):
        raise ApiError(403, f"lora_path: {shortened(path)} is outside the folders that adapters may come from")
    return str(resolved)


async def _uploaded(request: Request) -> Mapping[str, bytes]:
    async with request.form(max_files=2, max_fields=0) as form:
        files: dict[str, bytes] = {}
        for name in _FILES:
            found = form.get(name)
            if not isinstance(found, UploadFile):
                raise ApiError(400, f"{name}: no file of this name in the form", param=name)
            if name == _FILES[0] and (found.size or 0) > _MAX_CONFIG_BYTES:
                raise ApiError(413, f"{name} has {found.size} bytes, at most {_MAX_CONFIG_BYTES} are taken", param=name)
            files[name] = await found.read()
    return files

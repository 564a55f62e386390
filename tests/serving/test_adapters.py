"""Adapters that come, go and change while requests run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import write_adapter
from support.mixed import MixedBatch
from support.serving import draw_prompts

from moegraft import Engine, SamplingParams
from moegraft.core.errors import (
    AdapterError,
    AdapterFileError,
    AdapterInUseError,
    AdapterNameError,
    UnknownAdapterError,
)
from moegraft.serving.requests import FinishReason, Request
from moegraft.serving.status import OTHERS

PROMPT = draw_prompts([9])[0]
GREEDY = SamplingParams(temperature=0, max_tokens=6, min_tokens=6)
LONG = SamplingParams(temperature=0, max_tokens=60, min_tokens=60)
OPTIONS: dict[str, Any] = {"page_size": 4, "adapter_memory": "4MiB", "max_model_len": 100}


def tokens(engine: Engine, name: str | None) -> tuple[int, ...]:
    found = next(engine.generate([(PROMPT, name)], GREEDY)).outputs[0]
    assert found.error is None
    return found.token_ids


def start_long(engine: Engine, name: str, request_id: str = "long") -> Any:
    """A request that runs: its first token is there."""
    stream = engine.submit(Request(request_id=request_id, prompt_ids=PROMPT, adapter=name, sampling=LONG))
    assert stream.get(timeout=60) is not None
    return stream


def test_loaded_on_first_use_from_a_folder(mixed: MixedBatch, kinds: dict[str, Path], truth: Any) -> None:
    folder = kinds["fused"].parent
    with Engine(mixed.model, adapters_from=folder, **OPTIONS) as engine:
        assert engine.available_adapters == ("dora", "fused", "per_expert")
        assert not engine.adapters
        requests = [(PROMPT, "fused"), (PROMPT, "per_expert"), (PROMPT, "fused")]
        found = [each.token_ids for each in engine.generate(requests, GREEDY)]
        assert found == truth(requests, 6)
        assert engine.available_adapters == ("dora",)
        assert engine.adapters["fused"].state == "ready"
        assert engine.adapters["fused"].version == 1
        for name in ("../dora", "nobody", ".", "", "dora/../fused", "a\0b"):
            with pytest.raises(UnknownAdapterError):
                engine.submit(Request(request_id="x", prompt_ids=PROMPT, adapter=name))


def test_a_load_that_fails_ends_the_requests_that_wait_for_it(mixed: MixedBatch, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad", {"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)})
    with Engine(mixed.model, adapters_from=tmp_path, **OPTIONS) as engine:
        found = list(engine.generate([(PROMPT, "bad"), (PROMPT, None)], GREEDY))
        assert found[0].outputs[0].finish_reason is FinishReason.ERROR
        assert "nowhere" in str(found[0].outputs[0].error)
        assert found[1].outputs[0].error is None
        assert engine.adapters["bad"].state == "failed"
        with pytest.raises(AdapterError, match="nowhere"):
            engine.load_adapter("bad", tmp_path / "bad")
        with pytest.raises(AdapterFileError, match="no such folder"):
            engine.load_adapter("gone", tmp_path / "gone")
        assert not engine._store._keys, "versions that failed are kept"
        engine.check_integrity()


def test_replaced_in_place(mixed: MixedBatch, kinds: dict[str, Path], truth: Any) -> None:
    """The request that runs ends on the old version; the next runs on the new one, and finds none of the old pages."""
    with Engine(mixed.model, adapters={"a": kinds["fused"]}, **OPTIONS) as engine:
        assert [tokens(engine, "a")] == truth([(PROMPT, "fused")], 6)
        engine.pin_adapter("a")
        stream = start_long(engine, "a")
        with pytest.raises(AdapterNameError, match="loaded already"):
            engine.load_adapter("a", kinds["dora"])
        status = engine.load_adapter("a", kinds["dora"], replace=True)
        assert (status.version, status.draining, status.pinned) == (2, 1, True)
        assert [tokens(engine, "a")] == truth([(PROMPT, "dora")], 6)
        rest = [token for event in stream for token in event.token_ids]
        assert [tuple(rest)] == [each[1:] for each in truth([(PROMPT, "fused")], 60)]
        assert engine.adapters["a"].draining == 0
        assert len(engine._graft.adapters) == 1
        engine.check_integrity()


def test_a_replacement_that_fails_changes_nothing(mixed: MixedBatch, kinds: dict[str, Path], tmp_path: Path) -> None:
    with Engine(mixed.model, adapters={"a": kinds["fused"]}, **OPTIONS) as engine:
        before = tokens(engine, "a")
        with pytest.raises(AdapterFileError):
            engine.load_adapter("a", tmp_path / "gone", replace=True)
        assert tokens(engine, "a") == before
        assert engine.adapters["a"].version == 1


def test_from_memory(mixed: MixedBatch, kinds: dict[str, Path], truth: Any) -> None:
    files = {path.name: path.read_bytes() for path in kinds["fused"].iterdir() if path.suffix != ".md"}
    with Engine(mixed.model, **OPTIONS) as engine:
        assert engine.load_adapter("a", files).source == "memory"
        assert [tokens(engine, "a")] == truth([(PROMPT, "fused")], 6)
        with pytest.raises(AdapterFileError, match="found files"):
            engine.load_adapter("b", {"adapter_config.json": b"{}"})
        with pytest.raises(AdapterFileError, match="names that end in"):
            engine.load_adapter("b", {**files, "../evil.json": b""})
        with pytest.raises(AdapterFileError, match="names that end in"):
            engine.load_adapter("b", {**files, "adapter_model.bin": b""})


def test_from_fsspec(mixed: MixedBatch, kinds: dict[str, Path], truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(kinds["dora"]), "/adapters/dora", recursive=True)
    with Engine(mixed.model, **OPTIONS) as engine:
        engine.load_adapter("a", "memory://adapters/dora")
        assert [tokens(engine, "a")] == truth([(PROMPT, "dora")], 6)
        with pytest.raises(AdapterError):
            engine.load_adapter("b", "memory://adapters/gone")
        for url in ("reference://memory://adapters/dora", "simplecache::memory://adapters/dora", "http://localhost/a"):
            with pytest.raises(AdapterFileError, match=r"expected one of file, local, memory, s3"):
                engine.load_adapter("b", url)
        size = sum(file.stat().st_size for file in kinds["dora"].iterdir() if file.suffix != ".md")
        monkeypatch.setattr("moegraft.serving.adapters.MAX_REMOTE_BYTES", size - 1)
        own = memory.ls
        for tells in (True, False):  # what a store says of sizes may be wrong
            listed = own if tells else lambda *args, **kwargs: [{**each, "size": 0} for each in own(*args, **kwargs)]
            monkeypatch.setattr(type(memory), "ls", staticmethod(listed))
            with pytest.raises(AdapterFileError, match=f"more than {size - 1} bytes"):
                engine.load_adapter("b", "memory://adapters/dora")


def test_unload_drains(mixed: MixedBatch, kinds: dict[str, Path], truth: Any) -> None:
    with Engine(mixed.model, adapters={"a": kinds["fused"]}, **OPTIONS) as engine:
        stream = start_long(engine, "a")
        with pytest.raises(AdapterInUseError, match="1 requests"):
            engine.unload_adapter("a")
        assert engine.adapters["a"].state == "draining"
        with pytest.raises(UnknownAdapterError):
            engine.submit(Request(request_id="late", prompt_ids=PROMPT, adapter="a"))
        rest = [token for event in stream for token in event.token_ids]
        assert [tuple(rest)] == [each[1:] for each in truth([(PROMPT, "fused")], 60)]
        assert "a" not in engine.adapters
        assert not engine._graft.adapters
        with pytest.raises(UnknownAdapterError):
            engine.unload_adapter("a")
        assert engine.load_adapter("a", kinds["dora"]).version == 2
        engine.unload_adapter("a")
        assert not engine._graft.adapters


def test_unload_by_force(mixed: MixedBatch, kinds: dict[str, Path]) -> None:
    with Engine(mixed.model, adapters={"a": kinds["fused"], "b": kinds["dora"]}, **OPTIONS) as engine:
        streams = [start_long(engine, "a", f"a{i}") for i in range(3)]
        other = start_long(engine, "b", "b")
        engine.unload_adapter("a", force=True)
        assert engine._graft.adapters.keys() == {"b@1"}
        assert [list(stream)[-1].finish_reason for stream in streams] == [FinishReason.CANCELLED] * 3
        assert list(other)[-1].finish_reason is FinishReason.LENGTH
        engine.check_integrity()


def test_pins_decide_who_goes_to_host_memory(mixed: MixedBatch, kinds: dict[str, Path]) -> None:
    names = ("fused", "dora", "per_expert")
    with Engine(mixed.model, adapters={n: kinds[n] for n in names}, max_adapters=2, **OPTIONS) as engine:
        engine.pin_adapter("fused")
        tokens(engine, "dora")
        tokens(engine, "per_expert")
        assert {n: engine.adapters[n].residency for n in names} == {
            "fused": "device",
            "dora": "host",
            "per_expert": "device",
        }
        engine.pin_adapter("per_expert")
        found = next(engine.generate([(PROMPT, "dora")], GREEDY)).outputs[0]
        assert "no room" in str(found.error)
        engine.unpin_adapter("fused")
        tokens(engine, "dora")
        assert engine.adapters["fused"].residency == "host"
        assert engine.stats().evictions == 2


def test_counters_are_bounded(mixed: MixedBatch, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """New names count together where there is no room; those of adapters that are gone make room, and none is lost."""
    monkeypatch.setattr("moegraft.serving.loop.MAX_NAMED", 1)
    names = ("fused", "dora", "per_expert")
    with Engine(mixed.model, adapters={n: kinds[n] for n in names}, **OPTIONS) as engine:

        def counted() -> dict[str, int]:
            return {name: each.generated_tokens for name, each in engine.stats().adapters.items()}

        tokens(engine, "fused")
        tokens(engine, "dora")
        assert counted() == {"": 0, "fused": 6, OTHERS: 6}
        engine.unload_adapter("fused")
        tokens(engine, "per_expert")
        assert counted() == {"": 0, OTHERS: 12, "per_expert": 6}
        assert engine.stats().adapters[OTHERS].between_tokens_seconds.count == 10


def test_loading_stalls_nobody(mixed: MixedBatch, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that never answers: others run on, and requests for other adapters too."""
    with Engine(mixed.model, adapters={"b": kinds["dora"]}, **OPTIONS) as engine:
        answer = threading.Event()
        load = engine._graft.load_adapter

        def slow(*args: Any, **kwargs: Any) -> Any:
            answer.wait(60)
            return load(*args, **kwargs)

        monkeypatch.setattr(engine._graft, "load_adapter", slow)
        loading = threading.Thread(target=engine.load_adapter, args=("a", kinds["fused"]))
        loading.start()
        while "a" not in engine.adapters:
            pass
        waiting = engine.submit(Request(request_id="a", prompt_ids=PROMPT, adapter="a", sampling=GREEDY))
        assert engine.adapters["a"].state == "loading"
        tokens(engine, None)
        tokens(engine, "b")
        answer.set()
        assert list(waiting)[-1].finish_reason is FinishReason.LENGTH
        loading.join()

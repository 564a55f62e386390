"""Calls in flight at once on one GraftedModel: threads, tasks, engines with threads of their own."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.mixed import MixedBatch

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import AdapterInUseError, AdapterMemoryError

REPEATS = 300


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Python changes threads as often as it can, so that a window of a few lines is hit."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def ids(mixed: MixedBatch) -> torch.Tensor:
    return mixed.input_ids[:2, :3]


MAPPINGS: tuple[list[str | None], ...] = (["fused", None], ["per_expert", "dora"], [None, "fused"], [None, None])


def expected_logits(graft: GraftedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    return [graft(input_ids=ids, adapters=names).logits for names in MAPPINGS]


def together(*works: Callable[[], list[str]]) -> list[str]:
    """Runs all at once, from one starting line; what they complain of."""
    line = threading.Barrier(len(works))

    def run(work: Callable[[], list[str]]) -> list[str]:
        torch.set_num_threads(1)
        line.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [complaint for future in [pool.submit(run, work) for work in works] for complaint in future.result()]


def test_different_mappings_at_once(graft: GraftedModel, ids: torch.Tensor) -> None:
    expected = expected_logits(graft, ids)

    def work(i: int) -> list[str]:
        return [
            f"{MAPPINGS[i]}, call {n}"
            for n in range(REPEATS // 2)
            if not torch.equal(graft(input_ids=ids, adapters=MAPPINGS[i]).logits, expected[i])
        ]

    assert together(*(lambda i=i: work(i) for i in range(len(MAPPINGS)))) == []
    assert not any(info.in_use for info in graft.adapters.values())


def test_every_thread_changes_its_mapping(graft: GraftedModel, ids: torch.Tensor) -> None:
    expected = expected_logits(graft, ids)

    def work(offset: int) -> list[str]:
        order = [(offset + n) % len(MAPPINGS) for n in range(REPEATS)]
        return [
            str(MAPPINGS[i])
            for i in order
            if not torch.equal(graft(input_ids=ids, adapters=MAPPINGS[i]).logits, expected[i])
        ]

    assert together(lambda: work(0), lambda: work(1)) == []


def test_generate_at_once(graft: GraftedModel, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = [graft.generate(ids, adapters=names, **options) for names in MAPPINGS[:2]]

    def work(i: int) -> list[str]:
        return [
            f"{MAPPINGS[i]}, call {n}"
            for n in range(25)
            if not torch.equal(graft.generate(ids, adapters=MAPPINGS[i], **options), expected[i])
        ]

    assert together(lambda: work(0), lambda: work(1)) == []


def test_loading_and_unloading_beside_a_batch(graft: GraftedModel, mixed: MixedBatch, ids: torch.Tensor) -> None:
    """Seams come and go, pages are freed and taken, while another thread runs: it sees its own adapters only."""
    mapping: list[str | None] = ["per_expert", None]
    expected = graft(input_ids=ids, adapters=mapping).logits

    def churn() -> list[str]:
        for _ in range(20):
            for name in ("fused", "dora"):
                graft.unload_adapter(name)
                graft.load_adapter(mixed.adapters[name], name=name)
        return []

    def serve() -> list[str]:
        return [
            f"call {n}"
            for n in range(REPEATS // 2)
            if not torch.equal(graft(input_ids=ids, adapters=mapping).logits, expected)
        ]

    assert together(churn, serve) == []
    graft.bank.check_integrity()


def test_evicting_beside_a_batch(mixed: MixedBatch, ids: torch.Tensor) -> None:
    """Slots for two of three adapters and two threads: pages move all the time, nobody gets another's."""
    with moegraft.attach(mixed.model, adapter_memory="4MiB", max_adapters=2) as graft:
        for name, path in mixed.adapters.items():
            graft.load_adapter(path, name=name)
        names = ("fused", "per_expert", "dora")
        expected = {name: graft(input_ids=ids, adapters=[name, None]).logits for name in names}

        def work(offset: int) -> list[str]:
            order = [names[(offset + n) % 3] for n in range(90)]
            return [
                name
                for name in order
                if not torch.equal(graft(input_ids=ids, adapters=[name, None]).logits, expected[name])
            ]

        assert together(lambda: work(0), lambda: work(1)) == []
        graft.bank.check_integrity()


def test_base_calls_beside_a_batch(graft: GraftedModel, ids: torch.Tensor) -> None:
    """A thread that calls the model itself, with no batch of its own, runs the base."""
    with torch.no_grad():
        plain = graft.model(input_ids=ids).logits
    adapted = graft(input_ids=ids, adapters=["fused", "dora"]).logits

    def direct() -> list[str]:
        with torch.no_grad():
            return [f"{n}" for n in range(REPEATS) if not torch.equal(graft.model(input_ids=ids).logits, plain)]

    def with_adapters() -> list[str]:
        return [
            f"{n}"
            for n in range(REPEATS)
            if not torch.equal(graft(input_ids=ids, adapters=["fused", "dora"]).logits, adapted)
        ]

    assert together(direct, with_adapters) == []


class TestTasks:
    """A task that waits in the middle of its batch does not lend it to the others."""

    def test_interleaved(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        expected = expected_logits(graft, ids)

        async def task(i: int) -> bool:
            right = True
            for _ in range(10):
                with graft.batch(MAPPINGS[i]):
                    await asyncio.sleep(0)
                    right &= torch.equal(graft.model(input_ids=ids).logits, expected[i])
                    await asyncio.sleep(0)
                    right &= torch.equal(graft.model(input_ids=ids).logits, expected[i])
            return right

        async def main() -> list[bool]:
            return await asyncio.gather(*(task(i % len(MAPPINGS)) for i in range(8)))

        assert asyncio.run(main()) == [True] * 8

    def test_the_batch_follows_into_a_worker_thread(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        expected = expected_logits(graft, ids)

        async def task(i: int) -> bool:
            with graft.batch(MAPPINGS[i]):
                logits = await asyncio.to_thread(lambda: graft.model(input_ids=ids).logits)
            return torch.equal(logits, expected[i])

        async def main() -> list[bool]:
            return await asyncio.gather(*(task(i % 3) for i in range(12)))

        assert asyncio.run(main()) == [True] * 12


class TestAllThreads:
    """``graft.batch(..., all_threads=True)``: for engines whose forward pass runs on threads of their own."""

    def in_thread(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    def test_is_seen_by_threads_that_the_block_did_not_start(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        expected = expected_logits(graft, ids)
        with ThreadPoolExecutor(1) as engine:

            def forward() -> torch.Tensor:
                return engine.submit(graft.model, input_ids=ids).result().logits

            plain = forward()
            with graft.batch(MAPPINGS[0]):
                assert torch.equal(forward(), plain)
            with graft.batch(MAPPINGS[0], all_threads=True):
                assert torch.equal(forward(), expected[0])
            with graft.batch(MAPPINGS[1], all_threads=True):
                assert torch.equal(forward(), expected[1])
            assert torch.equal(forward(), plain)

    def test_a_batch_of_ones_own_wins(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        expected = expected_logits(graft, ids)
        with graft.batch(MAPPINGS[0], all_threads=True):
            for i, names in enumerate(MAPPINGS):
                found = self.in_thread(lambda names=names: graft(input_ids=ids, adapters=names).logits)
                assert torch.equal(found, expected[i])

    def test_holds_its_adapters(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        with graft.batch(["dora", None], all_threads=True), pytest.raises(AdapterInUseError):
            graft.unload_adapter("dora")
        graft.unload_adapter("dora")

    def test_ends_with_an_exception(self, graft: GraftedModel, ids: torch.Tensor) -> None:
        expected = expected_logits(graft, ids)
        with pytest.raises(ZeroDivisionError), graft.batch(["dora", None], all_threads=True):
            _ = 1 / 0
        assert torch.equal(self.in_thread(lambda: graft(input_ids=ids).logits), expected[3])
        assert not graft.adapters["dora"].in_use


class TestLoading:
    """An adapter that others can name works in full, and one that does not fit leaves nothing behind."""

    def test_seams_stand_before_the_adapter_can_be_named(
        self, mixed: MixedBatch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            seen = {}
            install = graft.bank.install

            def install_and_call(new: Any) -> Any:
                handle = install(new)
                # What a second thread would get at this moment, before load_adapter has returned.
                seen[handle.name] = graft(input_ids=mixed.input_ids[:1], adapters=[handle.name]).logits
                return handle

            monkeypatch.setattr(graft.bank, "install", install_and_call)
            for name, path in mixed.adapters.items():
                graft.load_adapter(path, name=name)
                later = graft(input_ids=mixed.input_ids[:1], adapters=[name]).logits
                assert torch.equal(seen[name], later), name
                graft.unload_adapter(name)

    def test_a_load_that_fails_leaves_no_seam(self, mixed: MixedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise AdapterMemoryError("planted")

            monkeypatch.setattr(graft.bank, "install", refuse)
            before = _hooks(mixed.model)  # transformers leaves some of its own behind
            for path in mixed.adapters.values():
                with pytest.raises(AdapterMemoryError, match="planted"):
                    graft.load_adapter(path)
            assert _hooks(mixed.model) == before
            assert all(type(param) is torch.nn.Parameter for param in mixed.model.parameters())


def _hooks(model: torch.nn.Module) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]

"""A call belongs to its block: once that was left, no layer runs with its adapters, whoever left it and where."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import torch
from support.mixed import MixedBatch

from moegraft import GraftedModel
from moegraft.core.errors import BatchError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(graft: GraftedModel, mixed: MixedBatch) -> Callable[[], torch.Tensor]:
    """Logits of one row, under whichever batch is current."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            return graft.model(input_ids=mixed.input_ids[:1]).logits

    return run


@pytest.fixture
def expected(graft: GraftedModel, mixed: MixedBatch) -> dict[str | None, torch.Tensor]:
    names = (None, "fused", "dora")
    return {name: graft(input_ids=mixed.input_ids[:1], adapters=[name]).logits for name in names}


def stream(graft: GraftedModel, name: str, *, all_threads: bool = False) -> Iterator[None]:
    with graft.batch([name], all_threads=all_threads):
        while True:
            yield


def in_thread(act: Callable[[], object]) -> BaseException | None:
    """What ``act`` raised on a thread of its own."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def in_use(graft: GraftedModel) -> set[str]:
    return {name for name, info in graft.adapters.items() if info.in_use}


def test_blocks_nest(
    graft: GraftedModel, run: Callable[[], torch.Tensor], expected: dict[str | None, torch.Tensor]
) -> None:
    with graft.batch(["fused"]):
        with graft.batch(["dora"]):
            assert torch.equal(run(), expected["dora"])
        assert torch.equal(run(), expected["fused"])
    assert torch.equal(run(), expected[None])


@pytest.mark.parametrize("all_threads", [False, True])
def test_interleaved_streams(
    graft: GraftedModel,
    run: Callable[[], torch.Tensor],
    expected: dict[str | None, torch.Tensor],
    all_threads: bool,
) -> None:
    """The first is left while the second runs: it says so, the second goes on, and nothing stays behind."""
    first, second = (stream(graft, name, all_threads=all_threads) for name in ("fused", "dora"))
    next(first), next(second)
    with pytest.raises(BatchError, match="out of order"):
        first.close()  # type: ignore[attr-defined]
    assert in_use(graft) == {"dora"}
    assert torch.equal(run(), expected["dora"])
    second.close()  # type: ignore[attr-defined]
    assert in_use(graft) == set()
    assert torch.equal(run(), expected[None])
    graft.unload_adapter("fused")


def test_interleaved_async_streams(
    graft: GraftedModel, run: Callable[[], torch.Tensor], expected: dict[str | None, torch.Tensor]
) -> None:
    async def stream(name: str) -> AsyncIterator[None]:
        with graft.batch([name]):
            while True:
                yield

    async def main() -> torch.Tensor:
        first, second = stream("fused"), stream("dora")
        await anext(first), await anext(second)
        with pytest.raises(BatchError, match="out of order"):
            await first.aclose()  # type: ignore[attr-defined]
        await second.aclose()  # type: ignore[attr-defined]
        return run()

    assert torch.equal(asyncio.run(main()), expected[None])


def test_a_stream_that_another_thread_ends(
    graft: GraftedModel, run: Callable[[], torch.Tensor], expected: dict[str | None, torch.Tensor]
) -> None:
    one = stream(graft, "fused")
    next(one)
    assert torch.equal(run(), expected["fused"])
    raised = in_thread(one.close)  # type: ignore[attr-defined]
    assert isinstance(raised, BatchError) and "on its own thread" in str(raised)
    assert in_use(graft) == set()
    assert torch.equal(run(), expected[None])
    with graft.batch(["dora"]):
        assert torch.equal(run(), expected["dora"])


def test_a_batch_that_is_released_while_the_model_runs(
    graft: GraftedModel, run: Callable[[], torch.Tensor], expected: dict[str | None, torch.Tensor]
) -> None:
    """Half of the layers would have run with the adapter and half without."""
    one = stream(graft, "fused")
    next(one)
    layer = graft.model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: in_thread(one.close) and None)  # type: ignore[attr-defined]
    with pytest.raises(BatchError, match="was released while the model ran"):
        run()
    handle.remove()
    assert torch.equal(run(), expected[None])


def test_two_threads_with_batches_for_all_threads(
    graft: GraftedModel, run: Callable[[], torch.Tensor], expected: dict[str | None, torch.Tensor]
) -> None:
    """Either would run with the other's adapter."""

    def second() -> None:
        with graft.batch(["dora"], all_threads=True):
            pass

    with graft.batch(["fused"], all_threads=True):
        raised = in_thread(second)
        assert isinstance(raised, BatchError) and "another thread runs a batch" in str(raised)
        assert in_use(graft) == {"fused"}
        assert torch.equal(run(), expected["fused"])
        with graft.batch(["dora"], all_threads=True):  # nested, on the same thread
            assert torch.equal(run(), expected["dora"])
        assert torch.equal(run(), expected["fused"])
    assert in_thread(second) is None
    assert torch.equal(run(), expected[None])

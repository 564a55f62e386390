"""One engine over several ranks: rank 0 schedules and samples, the others run each step with it.

Rank 0 *says* every act to the others over a group of its own before it takes part itself: the step's plan as plain
data, adapters that are to be held or let go, adapters that are to be loaded. The others do what they hear, in that
order, so that nobody has to ask anybody during a step. Adapters are read and installed by another thread of every rank.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import threading
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from moegraft.core.errors import AdapterMemoryError, MoegraftError, ParallelError
from moegraft.integrations.transformers import GraftedModel
from moegraft.lora.bank import AdapterBatch
from moegraft.lora.peft import LoadReport
from moegraft.parallel import Agreement, ParallelGroups
from moegraft.serving.graphs import bound_of
from moegraft.serving.pages import SCRATCH_PAGE
from moegraft.serving.rank_graphs import Decision, RankGraphs
from moegraft.serving.runner import Runner
from moegraft.serving.scheduler import BASE, Chunk, SequenceState, StepPlan

logger = logging.getLogger("moegraft.serving")
T = TypeVar("T")

GRACE_SECONDS = 5.0
"""For rank 0 to fail too, after a step that failed on another rank."""
_HEAD_BYTES = 1 << 14
_COUNT = 8


class _Window:
    """Stands for the tokens of a sequence of which a rank was told those of one chunk."""

    def __init__(self, start: int, ids: Sequence[int]) -> None:
        self._start, self._ids = start, ids

    def __len__(self) -> int:
        return self._start + len(self._ids)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, int):
            return self._ids[at - self._start if at >= 0 else at]
        start, stop, _ = at.indices(len(self))
        return list(self._ids[start - self._start : stop - self._start])


def encode_plan(plan: StepPlan) -> list[tuple[Any, ...]]:
    """A plan as plain data: of each chunk what the rows of a step are made of."""
    return [
        (
            chunk.place,
            chunk.sequence.lane,
            chunk.sequence.slot,
            (chunk.start, chunk.count, chunk.samples),
            array("q", chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]),
            array("q", chunk.sequence.pages),
        )
        for chunk in plan.chunks
    ]


def decode_plan(said: Sequence[tuple[Any, ...]]) -> StepPlan:
    """The plan as the other ranks run it; nothing of the sequences but what the step needs."""
    chunks = []
    for place, lane, slot, (start, count, samples), ids, pages in said:
        window = cast("list[int]", _Window(start, ids))
        sequence = SequenceState(tokens=window, lane=lane, pages=pages.tolist(), slot=slot)
        chunks.append(Chunk(sequence, start, count, samples, place))
    return StepPlan(tuple(chunks))


class Channel:
    """What rank 0 says and the others hear, and votes between; of one thread a rank."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._ranks = groups.another("plans")
        self.agreement = Agreement(self._ranks)
        self.timeout_seconds = groups.config.timeout_seconds

    def say(self, *message: Any) -> None:
        """Rank 0 alone. Raises ParallelError where a rank is lost."""
        data = pickle.dumps(message, protocol=5)
        size = len(data).to_bytes(_COUNT, "little")
        head = torch.frombuffer(bytearray(size + data[: _HEAD_BYTES - _COUNT]), dtype=torch.uint8)
        self._ranks.broadcast(torch.nn.functional.pad(head, (0, _HEAD_BYTES - len(head))))
        rest = data[_HEAD_BYTES - _COUNT :]
        if rest:
            self._ranks.broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def hear(self) -> tuple[Any, ...]:
        """The next message. Raises ParallelError where rank 0 is lost, or silent for longer than the timeout."""
        head = self._ranks.broadcast(torch.empty(_HEAD_BYTES, dtype=torch.uint8)).numpy().tobytes()
        size = int.from_bytes(head[:_COUNT], "little")
        data = head[_COUNT : _COUNT + size]
        if len(data) < size:
            data += self._ranks.broadcast(torch.empty(size - len(data), dtype=torch.uint8)).numpy().tobytes()
        message: tuple[Any, ...] = pickle.loads(data)  # of rank 0 of this engine, which started us
        return message


class RankRunner(Runner):
    """Runs this rank's share of every plan; see ``Runner``. ``leader``: rank 0's, once the model is open."""

    leader: Leader | None = None
    graphs_type = RankGraphs
    _agreed: tuple[str, ...] = ()

    def close(self) -> None:
        # A communicator is not given back while a graph that holds its kernels lives: NCCL waits for that.
        if self.graphs is not None:
            self.graphs.forget()
        super().close()

    @property
    def beat_seconds(self) -> float | None:
        return None if self.leader is None else self.leader.beat_seconds

    def beat(self) -> None:
        """While there is nothing to do: shows the other ranks that this one lives, and asks whether they do."""
        assert self.leader is not None
        self.leader.beat()

    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all ranks' rows, in the plan's order. Where the step fails on all ranks alike the engine goes on;
        ParallelError where the ranks have parted."""
        if self.leader is None:
            return super().run(plan, ids)
        decision = self._decide(plan)
        self.leader.channel.say("step", encode_plan(plan), ids is not None, decision)
        try:
            return self.run_share(plan, ids, decision)
        except ParallelError:
            raise
        except Exception as error:
            agree_on_failure(self.leader.channel, error)
            raise

    def _decide(self, plan: StepPlan) -> Decision | None:
        """How all ranks run a step: as which graph, or None."""
        if self.graphs is None or not all(chunk.samples and chunk.count == 1 for chunk in plan.chunks):
            return None
        assert self.leader is not None
        bank = self.graft.bank
        lanes = {chunk.sequence.lane for chunk in plan.chunks} - {BASE}
        return self.graphs.decide(
            plan, [bank.get(self._names(lane)) for lane in lanes], may_capture=self.leader.is_quiet
        )

    @property
    def graphs(self) -> RankGraphs | None:
        return cast("RankGraphs | None", self._graphs)

    def hear_ids(self, plan: StepPlan) -> torch.Tensor:
        """Room for the tokens that only the device of rank 0 knows yet."""
        return torch.empty(len(plan.chunks), dtype=torch.long, device=self.device)

    @torch.no_grad()
    def run_share(self, plan: StepPlan, ids: torch.Tensor | None, decision: Decision | None) -> torch.Tensor:
        """This rank's rows of a plan; on rank 0, which samples, what the head gives for those of all ranks. ids: of
        rank 0, where any."""
        groups, places = self.graft.layout.groups, [chunk.place for chunk in plan.chunks]
        self._agreed = tuple({self._names(c.sequence.lane) for c in plan.chunks if c.sequence.lane != BASE})
        if ids is not None:
            ids = groups.world.broadcast(ids.long())
        if decision is not None:
            assert self.graphs is not None
            found = self.graphs.follow(decision, plan, ids)
            if found is not None:
                return found
        if not groups.config.data_parallel:
            return super().run(plan, ids)
        own = [i for i, place in enumerate(places) if place == groups.ep.rank]
        if ids is not None:
            ids = ids[torch.tensor(own, device=ids.device)] if own else None
        logits = super().run(StepPlan(tuple(plan.chunks[i] for i in own) or (_no_row(),)), ids)
        if groups.tp.rank > 0:
            return logits  # they are those of the first rank of its tensor-parallel group
        counts = [0] * groups.ep.size
        for chunk in plan.chunks:
            counts[chunk.place] += chunk.samples
        to_first, nothing = [counts[groups.ep.rank]], [0] * groups.ep.size
        sent = to_first + nothing[1:]
        return groups.ep.all_to_all(logits[: to_first[0]], sent, nothing if groups.ep.rank else counts)

    def _adapters(self, lanes: tuple[int, ...], lengths: tuple[int, ...]) -> AbstractContextManager[Any]:
        names = [None if lane == BASE else self._names(lane) for lane in lanes]
        return self.graft.batch(names, lengths=lengths, agreed=self._agreed)

    def _bounded(self, lanes: Sequence[int], *, rank_bound: int | None, **stated: Any) -> AbstractContextManager[Any]:
        names = [None if lane == BASE else self._names(lane) for lane in lanes]
        return self.graft.batch(names, len(names), rank_bound=rank_bound, agreed=self._agreed, **stated)

    def hold_together(self, channel: Channel, key: str) -> AdapterBatch:
        """Makes an adapter resident on all ranks. Raises AdapterMemoryError on all where one has no room for it."""
        held = None
        try:
            with channel.agreement.step([0]) as step:
                held = self.graft.bank.acquire([key])
                step.words[0] = bound_of(self.graft.bank.get(key).largest_rank)
        except BaseException:
            if held is not None:
                held.release()
            raise
        if self.graphs is not None:
            self.graphs.bound = max(self.graphs.bound, *(words[0] for words in step.told))
        return held


def _no_row() -> Chunk:
    """A rank without requests takes part with a row of the base model that leaves nothing behind."""
    return Chunk(SequenceState(tokens=[0], lane=BASE, pages=[SCRATCH_PAGE]), 0, 1, samples=True)


def agree_on_failure(channel: Channel, error: Exception) -> None:
    """After a step that failed: raises ParallelError where it did not fail in the same way on all ranks."""
    channel.say("failed")
    _vote_on_failure(channel, error)


def _vote_on_failure(channel: Channel, error: Exception | None) -> None:
    with channel.agreement.step() as step:
        step.same("how a step ended", lambda: None if error is None else type(error).__name__)


class Leader:
    """Rank 0's side of the channel; of the engine's thread, save for ``announce``.

    ``is_quiet``: no rank loads or unloads an adapter.
    """

    def __init__(self, runner: RankRunner, channel: Channel) -> None:
        self.channel = channel
        self.is_quiet = True
        self.beat_seconds = min(5.0, channel.timeout_seconds / 4)
        self.call: Callable[[Callable[[], Any]], Any]
        self._is_closed = False
        self._runner = runner
        self._is_planned = runner.graft.layout.plan is not None

    def hold(self, lane: int, key: str) -> AdapterBatch:
        """See ``RankRunner.hold_together``."""
        self.channel.say("hold", lane, key)
        return self._runner.hold_together(self.channel, key)

    def lead(self, call: Callable[[Callable[[], Any]], Any]) -> None:
        """From now on the runner says its steps; ``call``: runs something on the engine's thread between two."""
        self.call = call
        self._runner.leader = self

    def let_go(self, lane: int) -> None:
        with suppress(ParallelError):  # of a lost rank: its requests end, and the next step tells
            self.channel.say("let go", lane)

    def beat(self) -> None:
        self.channel.say("beat")
        with self.channel.agreement.step():
            pass

    def together(self, act: str, args: tuple[Any, ...], own: Callable[[], T]) -> T:
        """An act on adapters, on all ranks; ``own``: this rank's part. From any thread, and the steps go on.

        Under a plan of transformers it may gather parameters over the groups of the steps: then it is done between two
        of them.
        """

        def say() -> T | None:
            if self._is_closed:
                raise MoegraftError("the engine was closed")
            self.is_quiet = False
            self.channel.say("adapters", act, args)
            return own() if self._is_planned else None

        try:
            found = self.call(say)
            return cast("T", found) if self._is_planned else own()
        finally:
            self.is_quiet = True

    def close(self) -> None:
        """Lets the others leave. The engine's thread has ended."""
        self._is_closed = True
        with suppress(ParallelError):
            self.channel.say("close")


class RankedAdapters:
    """The adapters of a model on all ranks, as the store of rank 0 changes them: each act is said first."""

    def __init__(self, graft: GraftedModel, leader: Leader) -> None:
        self.bank = graft.bank
        self._graft = graft
        self._leader = leader

    def load_adapter(
        self, path: str | os.PathLike[str], name: str, *, resident: bool, skip_unserved: bool
    ) -> LoadReport:
        assert not resident
        report: LoadReport = self._act("load", os.path.abspath(path), name, skip_unserved)
        return report

    def combine_adapters(self, parts: Sequence[tuple[str, float]], name: str) -> None:
        self._act("combine", parts, name)

    def unload_adapter(self, name: str) -> None:
        self._act("unload", name)

    def pin_adapter(self, name: str) -> None:
        self._act("pin", name)

    def unpin_adapter(self, name: str) -> None:
        self._act("unpin", name)

    def _act(self, what: str, *args: Any) -> Any:
        return self._leader.together(what, args, partial(act_on_adapters, self._graft, what, args))


def act_on_adapters(graft: GraftedModel, what: str, args: tuple[Any, ...]) -> LoadReport | None:
    """One rank's part of what all do together: when it returns, or raises AdapterError of the kind that fits, all have
    done theirs."""
    try:
        return _act_alone(graft, what, args)
    finally:
        with Agreement(graft.layout.groups.control).step():
            pass


def _act_alone(graft: GraftedModel, what: str, args: tuple[Any, ...]) -> LoadReport | None:
    match what:
        case "load":
            path, name, skip_unserved = args
            return graft.load_adapter(path, name=name, resident=False, skip_unserved=skip_unserved)
        case "combine":
            graft.combine_adapters(*args)
        case "unload":
            graft.unload_adapter(*args)
        case "pin":
            graft.pin_adapter(*args)
        case "unpin":
            graft.unpin_adapter(*args)
    return None


@dataclass(frozen=True)
class _Failed:
    """A step that failed here, and the timer that ends this rank where rank 0 does not fail too."""

    error: Exception
    timer: threading.Timer


class Follower:
    """Any rank but 0: does what it hears until it is told to leave."""

    def __init__(self, graft: GraftedModel, runner: RankRunner, channel: Channel, keys: dict[int, str]) -> None:
        """keys: the bank's name of an adapter by lane, as the runner looks them up."""
        self._graft, self._runner, self._channel, self._keys = graft, runner, channel, keys
        self._held: dict[int, AdapterBatch] = {}
        self._failed: _Failed | None = None
        self._acts: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._act_all, name="moegraft-adapters", daemon=True)

    def run(self) -> None:
        """Returns when rank 0 closes its engine. Raises ParallelError where a rank is lost, and what a step raised
        that went well elsewhere."""
        self._thread.start()
        while self._obey(*self._channel.hear()):
            pass
        self._acts.put(None)
        self._thread.join()

    def _obey(self, what: str, *args: Any) -> bool:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed.timer.cancel()
            if what != "failed":
                raise failed.error
        match what:
            case "step":
                self._step(decode_plan(args[0]), *args[1:])
            case "hold":
                self._hold(*args)
            case "let go":
                self._held.pop(args[0]).release()
                del self._keys[args[0]]
            case "adapters" if self._graft.layout.plan is not None:
                self._act(*args)
            case "adapters":
                self._acts.put(args)
            case "beat":
                with self._channel.agreement.step():
                    pass
            case "failed":
                _vote_on_failure(self._channel, None if failed is None else failed.error)
        return what != "close"

    def _step(self, plan: StepPlan, has_ids: bool, decision: Decision | None) -> None:
        try:
            self._runner.run_share(plan, self._runner.hear_ids(plan) if has_ids else None, decision)
        except ParallelError:
            raise
        except Exception as error:
            logger.exception("a step failed on rank %d", self._graft.layout.groups.rank)
            timer = threading.Timer(GRACE_SECONDS, _end_process, (error,))
            timer.daemon = True
            timer.start()
            self._failed = _Failed(error, timer)

    def _hold(self, lane: int, key: str) -> None:
        with suppress(AdapterMemoryError):
            self._held[lane] = self._runner.hold_together(self._channel, key)
            self._keys[lane] = key

    def _act_all(self) -> None:
        """The thread: what rank 0's does, at the same time."""
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)  # a thread begins on the first
        while (act := self._acts.get()) is not None:
            self._act(*act)

    def _act(self, what: str, args: tuple[Any, ...]) -> None:
        try:
            act_on_adapters(self._graft, what, args)
        except Exception as error:  # it fails on all ranks, and rank 0 tells whoever asked
            logger.debug("rank %d: %s %s: %s", self._graft.layout.groups.rank, what, args, error)


def _end_process(error: Exception) -> None:
    """The other ranks wait for this one in a collective, and learn from its end that it has failed alone."""
    logger.error("rank %d ends: %s: %s", dist.get_rank(), type(error).__name__, error)
    os._exit(1)

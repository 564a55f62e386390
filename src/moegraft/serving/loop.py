"""The engine's thread: receive, plan, run, sample, emit."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from moegraft.core.errors import ParallelError
from moegraft.serving.adapters import AdapterStore, AdapterVersion
from moegraft.serving.requests import FinishReason, Request, TokenEvent, TokenLogprobs, Usage
from moegraft.serving.runner import Runner
from moegraft.serving.sampler import Draw, SamplingRow, draw
from moegraft.serving.scheduler import Scheduler, SequenceState, State, StepPlan
from moegraft.serving.spread import SpreadScheduler
from moegraft.serving.status import (
    BETWEEN_TOKENS_BUCKETS,
    FIRST_TOKEN_BUCKETS,
    MAX_NAMED,
    OTHERS,
    AdapterCounters,
    Observations,
)
from moegraft.serving.stream import TokenStream
from moegraft.serving.text import TextGrowth

logger = logging.getLogger("moegraft.serving")
T = TypeVar("T")

ABANDON_SECONDS = 2.0
"""For the thread to notice by itself that a rank is lost."""


@dataclass(eq=False)
class Live:
    """One sequence of a request in flight. ``growth`` is None for an engine without a tokenizer."""

    request: LiveRequest
    index: int
    state: SequenceState
    row: SamplingRow
    growth: TextGrowth | None
    max_total: int
    last_token_at: float | None = None

    @property
    def num_new(self) -> int:
        return len(self.state.tokens) - len(self.request.request.prompt_ids)

    @property
    def goes_on(self) -> bool:
        """Whether there may be a token behind the one that is being drawn."""
        return len(self.state.tokens) + 1 < self.max_total


@dataclass(eq=False)
class LiveRequest:
    """A request in flight, until all its sequences have ended."""

    request: Request
    stream: TokenStream
    version: AdapterVersion | None
    submitted_at: float
    sequences: list[Live] = field(default_factory=list)
    open: int = 0


@dataclass(eq=False)
class _Flight:
    """A step that has been begun. ``rows``: those that get a token."""

    plan: StepPlan
    rows: list[Live]
    started_at: float
    drawn: Draw | None = None
    error: Exception | None = None

    def tokens_of(self, plan: StepPlan) -> torch.Tensor:
        """On the device: the tokens of this step that the rows of the next one begin with."""
        assert self.drawn is not None
        places = {live.state: i for i, live in enumerate(self.rows)}
        at = [places[chunk.sequence] for chunk in plan.chunks]
        tokens_R = self.drawn.tokens_R
        return tokens_R if at == list(range(len(self.rows))) else tokens_R[torch.tensor(at, device=tokens_R.device)]


class Counters:
    """Counts of one adapter, since the start."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.finished: Counter[str] = Counter()
        self.first_token = Observations(FIRST_TOKEN_BUCKETS)
        self.between_tokens = Observations(BETWEEN_TOKENS_BUCKETS)

    def merge(self, other: Counters) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.finished.update(other.finished)
        self.first_token.merge(other.first_token)
        self.between_tokens.merge(other.between_tokens)

    def snapshot(self, running: int, waiting: int) -> AdapterCounters:
        return AdapterCounters(
            running=running,
            waiting=waiting,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            finished=dict(self.finished),
            first_token_seconds=self.first_token.snapshot(),
            between_tokens_seconds=self.between_tokens.snapshot(),
        )


class EngineLoop:
    """Owns the scheduler and runs the model. Other threads only put messages into its inbox."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler | SpreadScheduler,
        store: AdapterStore,
        *,
        runs_ahead: bool,
        on_failure: Callable[[str], object],
    ) -> None:
        """on_failure: is told, in one line, why the thread ends before ``close``: a rank is lost."""
        self._on_failure = on_failure
        self.runner = runner
        self.scheduler = scheduler
        self.store = store
        self.runs_ahead = runs_ahead
        self.steps = self.failed_steps = 0
        self.step_seconds = self._finished_at = 0.0
        self.counters: dict[str, Counters] = {"": Counters()}
        self.live: dict[str, LiveRequest] = {}
        self.lock = threading.Lock()
        self.all_done = threading.Condition(self.lock)
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._loading: dict[AdapterVersion, list[LiveRequest]] = {}
        self.failure: str | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._main, name="moegraft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Other threads

    def submit(self, request: LiveRequest) -> None:
        self._inbox.put(partial(self._begin, request))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(partial(self._cancel, request_id))

    def adapter_loaded(self, version: AdapterVersion) -> None:
        self._inbox.put(partial(self._loaded, version))

    def adapter_gone(self, uid: int) -> None:
        self._inbox.put(partial(self.scheduler.pages.forget, uid))

    def call(self, run: Callable[[], T]) -> T:
        """Runs something between two steps, and gives its result."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return run()
        future: Future[T] = Future()

        def answer() -> None:
            try:
                future.set_result(run())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(answer)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():
                    raise
                if not self._thread.is_alive():
                    return run()

    def abandon(self, message: str) -> None:
        """All requests end with an error now, and the thread when it can: it may wait for a rank that is lost."""
        self.failure, self._is_closing = message, True
        self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(ABANDON_SECONDS)
        self._end_all()

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        self._inbox.put(self._set_closing)
        self._thread.join(None if self.failure is None else ABANDON_SECONDS)

    def _set_closing(self) -> None:
        self._is_closing = True

    # The thread

    def _main(self) -> None:
        try:
            self._run_steps()
        except ParallelError as error:
            logger.error("the engine ends: %s", error)
            self._on_failure(str(error))
        self._end_all()
        while not self._inbox.empty():
            self._inbox.get()()
        self._end_all()

    def _end_all(self) -> None:
        reason = FinishReason.CANCELLED if self.failure is None else FinishReason.ERROR
        for request in list(self.live.values()):
            self._end_request(request, reason, self.failure)

    def _run_steps(self) -> None:
        flight: _Flight | None = None
        while not self._is_closing:
            self._receive(has_work=flight is not None)
            flight = flight or self._next_step()
            if flight is not None:
                ahead = self._step_ahead(flight) if self.runs_ahead else None
                self._finish_step(flight)
                if ahead is not None and ahead.error is None:
                    self.scheduler.advance(ahead.plan)  # its tokens are known now
                flight = ahead

    def _receive(self, *, has_work: bool) -> None:
        """All messages that are there; waits for one where there is nothing to do."""
        while self.scheduler.is_idle and not has_work and not self._is_closing:
            try:
                self._inbox.get(timeout=self.runner.beat_seconds)()
            except queue.Empty:
                self.runner.beat()
        while not self._inbox.empty() and not self._is_closing:
            self._inbox.get()()

    def _begin(self, request: LiveRequest) -> None:
        if request.request.request_id not in self.live:
            return  # cancelled before it was here
        version = request.version
        if version is not None and version.state == "loading":
            self._loading.setdefault(version, []).append(request)
        elif version is not None and version.state == "failed":
            self._end_request(request, FinishReason.ERROR, str(version.error))
        else:
            for sequence in request.sequences:
                self.scheduler.add(sequence.state)

    def _loaded(self, version: AdapterVersion) -> None:
        for request in self._loading.pop(version, ()):
            self._begin(request)

    def _cancel(self, request_id: str) -> None:
        request = self.live.get(request_id)
        if request is not None:
            self._end_request(request, FinishReason.CANCELLED)

    def _refuse_oldest(self) -> None:
        """Nobody runs, and the first in the queue cannot: its adapter does not fit beside what is pinned."""
        oldest = min(self.scheduler.waiting(), key=lambda state: state.arrival)
        self._end(oldest.owner, FinishReason.ERROR, error="there is no room on the device for the request's adapter")

    def _next_step(self) -> _Flight | None:
        plan = self.scheduler.plan()
        if plan.chunks:
            flight = self._start_step(plan)
            if flight.error is None:
                self.scheduler.advance(plan)
            return flight
        if not self.scheduler.running and self.scheduler.num_waiting:
            self._refuse_oldest()
        return None

    def _step_ahead(self, flight: _Flight) -> _Flight | None:
        """Begins the step behind ``flight`` before its tokens are here, which the device has: the host's work is done
        while the device runs. A row that turns out to have ended has run in vain."""
        if flight.error is not None or any(live.row.needs_history for live in flight.rows):
            return None
        plan = self.scheduler.plan_ahead(flight.plan, lambda sequence: sequence.owner.goes_on)
        return None if plan is None else self._start_step(plan, behind=flight)

    def _start_step(self, plan: StepPlan, behind: _Flight | None = None) -> _Flight:
        """Without waiting for the device. What is raised comes with the flight: the step before it ends first."""
        flight = _Flight(plan, [chunk.sequence.owner for chunk in plan.chunks if chunk.samples], time.perf_counter())
        try:
            logits = self.runner.run(plan, None if behind is None else behind.tokens_of(plan))
            ready = [live for live in flight.rows if self._prepare(live, logits.shape[1])]
            if len(ready) < len(flight.rows):
                logits = logits[[i for i, live in enumerate(flight.rows) if live in ready]]
                flight.rows = ready
            if ready:
                ahead = 0 if behind is None else 1
                flight.drawn = draw(logits[: len(ready)], [live.row for live in ready], ahead=ahead)
        except ParallelError:
            raise
        except Exception as error:
            flight.error = error
        return flight

    def _finish_step(self, flight: _Flight) -> None:
        """Waits for the device, and gives every row its token."""
        try:
            if flight.error is not None:
                raise flight.error
            drawn = None if flight.drawn is None else flight.drawn.read()
        except Exception as error:
            self._fail(flight.plan, error)
            return
        if self.failure is not None:
            return  # all have been told
        self.steps += 1
        now = time.perf_counter()
        self.step_seconds += now - max(flight.started_at, self._finished_at)
        self._finished_at = now
        if drawn is None:
            return
        for live, token, logprobs, ok in zip(flight.rows, drawn.tokens, drawn.logprobs, drawn.is_finite, strict=True):
            if live.state.state is not State.RUNNING:
                continue  # cancelled, or at its end already when this step was begun ahead
            if ok:
                self._accept(live, token, logprobs, now)
            else:
                error_text = "the model gave logits that are not finite under this adapter"
                self._end(live, FinishReason.ERROR, error=error_text)

    def _prepare(self, live: Live, vocabulary: int) -> bool:
        """What the row brings to its draw; False where its grammar is broken, which ends it alone."""
        try:
            live.row.prepare(vocabulary)
        except Exception as error:
            self._end(live, FinishReason.ERROR, error=str(error))
            return False
        return True

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """A step that raised ends its own requests; the engine goes on."""
        logger.exception("a step failed; its %d sequences end", len(plan.chunks))
        self.failed_steps += 1
        message = f"{type(error).__name__}: {error}"
        for request in {chunk.sequence.owner.request: None for chunk in plan.chunks}:
            self._end_request(request, FinishReason.ERROR, message)

    def _accept(self, live: Live, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        try:
            live.row.accept(token)
        except Exception as error:
            self._end(live, FinishReason.ERROR, error=str(error))
            return
        self._count(live, now)
        self.scheduler.append(live.state, token)
        params = live.request.request.sampling
        text = ""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if token in live.row.end_ids:
            reason = FinishReason.STOP
            stop_reason = token if token in params.stop_token_ids else None
        elif live.growth is not None:
            text, stop_reason = live.growth.add(token)
            reason = FinishReason.STOP if stop_reason is not None else None
        if reason is None and live.row.matcher is not None and live.row.matcher.has_ended:
            reason = FinishReason.STOP
        if reason is None and len(live.state.tokens) >= live.max_total:
            reason = FinishReason.LENGTH
        if reason is None:
            event = TokenEvent(
                request_id=live.request.request.request_id,
                index=live.index,
                token_ids=(token,),
                text=text,
                logprobs=() if logprobs is None else (logprobs,),
            )
            live.request.stream.put(event)
        else:
            self._end(live, reason, tokens=(token,), text=text, logprobs=logprobs, stop_reason=stop_reason)

    def _count(self, live: Live, now: float) -> None:
        counters = self.counters_of(live.request)
        counters.generated_tokens += 1
        if live.last_token_at is None:
            counters.first_token.add(now - live.request.submitted_at)
            counters.prompt_tokens += len(live.request.request.prompt_ids)
            counters.cached_tokens += live.state.cached
        else:
            counters.between_tokens.add(now - live.last_token_at)
        live.last_token_at = now

    def counters_of(self, request: LiveRequest) -> Counters:
        """Where a request counts. Names are bounded: of adapters that are gone, and then new ones, count together."""
        name = request.request.label
        if name not in self.counters and len(self.counters.keys() - {"", OTHERS}) >= MAX_NAMED:
            others = self.counters.setdefault(OTHERS, Counters())
            gone = [each for each in self.counters if each not in ("", OTHERS) and not self.store.is_loaded(each)]
            for each in gone:
                others.merge(self.counters.pop(each))
            if not gone:
                return others
        return self.counters.setdefault(name, Counters())

    # Ends

    def _end_request(self, request: LiveRequest, reason: FinishReason, error: str | None = None) -> None:
        for waiting in self._loading.values():
            if request in waiting:
                waiting.remove(request)
        for live in request.sequences:
            if live.state.state is not State.DONE:
                self._end(live, reason, error=error)

    def _end(
        self,
        live: Live,
        reason: FinishReason,
        *,
        tokens: tuple[int, ...] = (),
        text: str = "",
        logprobs: TokenLogprobs | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        request = live.request
        if isinstance(stop_reason, int) or stop_reason is None:
            text += "" if live.growth is None else live.growth.finish()
        if live.state.arrival >= 0:
            self.scheduler.finish(live.state)
        live.state.state = State.DONE
        self.counters_of(request).finished[reason.value] += 1
        request.open -= 1
        if request.open == 0:  # before the reader is told, who may then expect that nothing is in use
            self._close(request)
        usage = Usage(
            prompt_tokens=len(request.request.prompt_ids),
            cached_tokens=live.state.cached,
            completion_tokens=live.num_new,
        )
        event = TokenEvent(
            request_id=request.request.request_id,
            index=live.index,
            token_ids=tokens,
            text=text,
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            usage=usage,
        )
        request.stream.put(event)

    def _close(self, request: LiveRequest) -> None:
        if request.version is not None:
            self.store.done(request.version)
        with self.lock:
            del self.live[request.request.request_id]
            self.all_done.notify_all()

"""Which tokens of which sequences run in the next step: continuous batching with chunked prefill, fair to adapters.

Waiting sequences queue by adapter. Queues are served by deficit round robin: each earns credit in turn and pays with
the tokens that are computed for it; a sequence that has waited for longer than ``patience`` steps goes before all
others, and while there is no room for it nobody else is let in. Where pages run short, the youngest running sequence
gives its own up and is computed again later. The oldest sequence thus always advances.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from moegraft.core.errors import MoegraftError
from moegraft.serving.pages import PagePool

BASE = 0
"""The lane of the base model."""


class Residents(Protocol):
    """What the scheduler asks of adapters, by lane: the uid of an adapter's version."""

    def hold(self, lane: int) -> bool:
        """Makes it resident and keeps it so; False where there is no room for it now."""

    def let_go(self, lane: int) -> None:
        """Undoes ``hold``."""


class State(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False)
class SequenceState:
    """One sequence in flight. ``tokens``: the prompt's and the new ones, of which keys and values of the first
    ``computed`` lie in ``pages``. ``slot``: its own among those that run, from 1 up; 0 while it waits. ``owner``:
    whatever the engine needs of it."""

    tokens: list[int]
    lane: int
    owner: Any = None
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = 0
    published: int = 0
    cached: int = 0
    state: State = State.WAITING
    arrival: int = -1
    queued_at: int = 0
    is_resumed: bool = False

    @property
    def todo(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence in one step; ``samples``: the last of them gives a new token.
    ``place``: of the ranks that bring rows of their own, the one whose row it is; -1: every rank's."""

    sequence: SequenceState
    start: int
    count: int
    samples: bool
    place: int = -1


@dataclass(frozen=True)
class StepPlan:
    """One step: decode rows first, in order of arrival, then chunks of prompts."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        pages: PagePool,
        residents: Residents,
        *,
        max_rows: int,
        chunk_tokens: int,
        quantum: int = 256,
        patience: int = 200,
    ) -> None:
        self.pages = pages
        self.residents = residents
        self.max_rows = max_rows
        self.chunk_tokens = chunk_tokens
        self.quantum = quantum
        self.patience = patience
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self.steps = 0
        self._queues: dict[int, deque[SequenceState]] = {}  # in the order of their turns; none is empty
        self._credit: dict[int, int] = {}
        self._holds: Counter[int] = Counter()
        self._free_slots = list(range(max_rows, 0, -1))
        self._arrivals = 0

    # Coming and going

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence, which must fit into the pages by itself to its last token."""
        self._arrivals += 1
        sequence.arrival, sequence.queued_at = self._arrivals, self.steps
        self._enqueue(sequence, first=False)

    def finish(self, sequence: SequenceState) -> None:
        """Ends a sequence, running or waiting, and gives back what it holds."""
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        elif sequence.state is State.WAITING:
            self._dequeue(sequence)
        sequence.state = State.DONE

    def waiting(self) -> Iterator[SequenceState]:
        for queue in self._queues.values():
            yield from queue

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def is_idle(self) -> bool:
        return not self.running and not self._queues

    # Steps

    def plan(self) -> StepPlan:
        """The next step; empty where nobody can run."""
        self.steps += 1
        before = self.preemptions
        chosen: dict[SequenceState, Chunk] = {}
        budget = self.chunk_tokens
        by_age = sorted(self.running, key=lambda sequence: (sequence.todo > 1, sequence.arrival))
        for sequence in by_age:
            if sequence.state is not State.RUNNING or budget == 0:
                continue
            count = min(sequence.todo, budget)
            if self._make_room(sequence, count, chosen):
                chosen[sequence] = _chunk(sequence, count)
                budget = self.chunk_tokens - sum(chunk.count for chunk in chosen.values())
        while budget > 0 and len(self.running) < self.max_rows and self.preemptions == before:
            admitted = self._admit_next()
            if admitted is None:
                break
            chunk = _chunk(admitted, min(admitted.todo, budget))
            chosen[admitted] = chunk
            budget -= chunk.count
        return StepPlan(chunks=tuple(sorted(chosen.values(), key=lambda c: (c.count > 1, c.sequence.arrival))))

    def plan_ahead(self, plan: StepPlan, goes_on: Callable[[SequenceState], bool]) -> StepPlan | None:
        """The step behind ``plan``, which has been begun and whose new tokens are not known yet: its rows again, those
        of sequences that go on. None where that is not certain: others may be let in, or pages are short."""
        alive = [chunk.sequence for chunk in plan.chunks if chunk.sequence.state is State.RUNNING]
        is_decode = all(chunk.samples for chunk in plan.chunks) and len(alive) == len(self.running)
        if not is_decode or (self._queues and len(self.running) < self.max_rows):
            return None
        chunks = []
        for sequence in alive:
            if not goes_on(sequence):
                continue
            pages = self.pages.allocate(max(0, self.pages.pages_for(sequence.computed + 1) - len(sequence.pages)))
            if pages is None:
                return None  # what was allocated for others is theirs: they need it next
            sequence.pages += pages
            chunks.append(Chunk(sequence, sequence.computed, 1, samples=True))
        self.steps += 1
        return StepPlan(tuple(chunks)) if chunks else None

    def advance(self, plan: StepPlan) -> None:
        """After the plan was begun, and its tokens are known: full pages can be found by those that run behind it."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.state is not State.RUNNING:
                continue
            sequence.computed = chunk.start + chunk.count
            size = self.pages.page_size
            for at in range(sequence.published, sequence.computed // size):
                tokens = sequence.tokens[at * size : (at + 1) * size]
                sequence.pages[at] = self.pages.publish(sequence.pages, at, tokens, sequence.lane)
                sequence.published = at + 1

    def append(self, sequence: SequenceState, token: int) -> None:
        """A new token of a running sequence, which its queue pays for."""
        sequence.tokens.append(token)
        self._pay(sequence.lane, 1)

    # Pages

    def _make_room(self, sequence: SequenceState, count: int, chosen: dict[SequenceState, Chunk]) -> bool:
        """Pages for ``count`` more tokens; younger sequences, then itself, give theirs up where there are too few."""
        needed = self.pages.pages_for(sequence.computed + count) - len(sequence.pages)
        while (pages := self.pages.allocate(max(0, needed))) is None:
            youngest = max(self.running, key=lambda other: other.arrival)
            chosen.pop(youngest, None)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += pages
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self._leave(sequence)
        sequence.is_resumed = True
        self.preemptions += 1
        self._enqueue(sequence, first=True)

    def _leave(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.published = [], 0, 0
        self._free_slots.append(sequence.slot)
        sequence.slot = 0
        self._let_go(sequence.lane)

    # Queues

    def _enqueue(self, sequence: SequenceState, *, first: bool) -> None:
        sequence.state = State.WAITING
        queue = self._queues.setdefault(sequence.lane, deque())
        self._credit.setdefault(sequence.lane, 0)
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)

    def _dequeue(self, sequence: SequenceState) -> None:
        queue = self._queues[sequence.lane]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.lane], self._credit[sequence.lane]

    def _pay(self, lane: int, tokens: int) -> None:
        if lane in self._credit:
            self._credit[lane] = max(self._credit[lane] - tokens, -8 * self.quantum)

    def _admit_next(self) -> SequenceState | None:
        """The next sequence that is let in, running; None where there is none, or no room."""
        if not self._queues:
            return None
        oldest = min((queue[0] for queue in self._queues.values()), key=lambda sequence: sequence.arrival)
        if self.steps - oldest.queued_at > self.patience:
            return oldest if self._admit(oldest) else None
        blocked: set[int] = set()
        while lanes := [lane for lane in self._queues if lane not in blocked]:
            best = max(self._credit[lane] for lane in lanes)
            if best <= 0:
                earned = -(-(1 - best) // self.quantum) * self.quantum
                for lane in lanes:
                    self._credit[lane] += earned
            lane = next(lane for lane in lanes if self._credit[lane] > 0)
            sequence = self._queues[lane][0]
            if self._admit(sequence):
                return sequence
            blocked.add(lane)
        return None

    def _admit(self, sequence: SequenceState) -> bool:
        """Lets a waiting sequence run where its adapter and its pages have room."""
        if not self._hold(sequence.lane):
            return False
        known = self.pages.match(sequence.tokens, sequence.lane)
        # The whole prompt and a page to grow, so that it is not let in to be preempted at once.
        wanted = self.pages.pages_for(len(sequence.tokens)) - len(known)
        headroom = 1 if self.running else 0
        size = self.pages.page_size
        new = None
        if wanted + headroom <= self.pages.available:
            first = min(len(sequence.tokens) - len(known) * size, self.chunk_tokens)
            new = self.pages.allocate(self.pages.pages_for(len(known) * size + first) - len(known))
        if new is None:
            self.pages.release(known)
            self._let_go(sequence.lane)
            return False
        sequence.pages = known + new
        sequence.computed = len(known) * size
        sequence.published = len(known)
        if not sequence.is_resumed:
            sequence.cached = sequence.computed
        self._dequeue(sequence)
        self._pay(sequence.lane, sequence.todo)
        if self._credit.get(sequence.lane, 1) <= 0:
            self._queues[sequence.lane] = self._queues.pop(sequence.lane)  # its turn is over
        sequence.state = State.RUNNING
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        return True

    # Adapters

    def _hold(self, lane: int) -> bool:
        if lane != BASE and not self._holds[lane] and not self.residents.hold(lane):
            return False
        self._holds[lane] += 1
        return True

    def _let_go(self, lane: int) -> None:
        self._holds[lane] -= 1
        if not self._holds[lane]:
            del self._holds[lane]
            if lane != BASE:
                self.residents.let_go(lane)

    def check_integrity(self) -> None:
        """Raises MoegraftError where sequences, pages and held adapters do not agree."""
        self.pages.check_integrity([sequence.pages for sequence in self.running])
        if Counter(sequence.lane for sequence in self.running) != self._holds:
            raise MoegraftError(f"adapters held {dict(self._holds)}, by lane, are not those that run")
        if len(self.running) > self.max_rows or any(s.state is not State.RUNNING for s in self.running):
            raise MoegraftError(f"{len(self.running)} sequences run, of at most {self.max_rows}, or are not marked so")
        if sorted([*self._free_slots, *(s.slot for s in self.running)]) != list(range(1, self.max_rows + 1)):
            raise MoegraftError(
                f"slots {[s.slot for s in self.running]} and those that are free are not each there once"
            )
        for lane, queue in self._queues.items():
            wrong = [s for s in queue if s.state is not State.WAITING or s.pages or s.computed or s.lane != lane]
            wrong += [s for s in queue if s.slot]
            if wrong or not queue or lane not in self._credit:
                raise MoegraftError(f"lane {lane}: its queue is empty, or has sequences that hold pages")


def _chunk(sequence: SequenceState, count: int) -> Chunk:
    return Chunk(sequence, sequence.computed, count, samples=count == sequence.todo)

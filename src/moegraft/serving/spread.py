"""Sequences spread over ranks that bring rows of their own: a scheduler and pages for each, one plan for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from moegraft.serving.pages import PagePool
from moegraft.serving.scheduler import Residents, Scheduler, SequenceState, StepPlan


class SharedResidents:
    """Adapters that several schedulers hold: resident from the first that asks to the last that lets go."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._holds: Counter[int] = Counter()

    def hold(self, lane: int) -> bool:
        if not self._holds[lane] and not self._residents.hold(lane):
            return False
        self._holds[lane] += 1
        return True

    def let_go(self, lane: int) -> None:
        self._holds[lane] -= 1
        if not self._holds[lane]:
            del self._holds[lane]
            self._residents.let_go(lane)


class SpreadPages:
    """The pages of all ranks, counted together."""

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self._pools = pools

    @property
    def capacity(self) -> int:
        return sum(pool.capacity for pool in self._pools)

    @property
    def num_held(self) -> int:
        return sum(pool.num_held for pool in self._pools)

    @property
    def num_cached(self) -> int:
        return sum(pool.num_cached for pool in self._pools)

    def forget(self, lane: int) -> None:
        for pool in self._pools:
            pool.forget(lane)


class SpreadScheduler:
    """Stands for the schedulers of all ranks: a sequence stays on the rank that had the least to do when it came.

    See ``Scheduler``, whose methods these are; the chunks of a plan stand in the order of the ranks.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self.schedulers = tuple(schedulers)
        self.pages = SpreadPages([scheduler.pages for scheduler in schedulers])
        self._of: dict[SequenceState, Scheduler] = {}

    def add(self, sequence: SequenceState) -> None:
        least = min(self.schedulers, key=lambda each: (len(each.running) + each.num_waiting, _todo(each)))
        self._of[sequence] = least
        least.add(sequence)

    def finish(self, sequence: SequenceState) -> None:
        self._of.pop(sequence).finish(sequence)

    def append(self, sequence: SequenceState, token: int) -> None:
        self._of[sequence].append(sequence, token)

    def plan(self) -> StepPlan:
        chunks = []
        for place, scheduler in enumerate(self.schedulers):
            chunks += [replace(chunk, place=place) for chunk in scheduler.plan().chunks]
        return StepPlan(tuple(chunks))

    def plan_ahead(self, plan: StepPlan, goes_on: Callable[[SequenceState], bool]) -> StepPlan | None:
        """None where one rank's is not certain."""
        chunks = []
        for place, scheduler in enumerate(self.schedulers):
            own = _of_place(plan, place)
            if scheduler.is_idle and not own.chunks:
                continue
            ahead = scheduler.plan_ahead(own, goes_on)
            if ahead is None:
                return None
            chunks += [replace(chunk, place=place) for chunk in ahead.chunks]
        return StepPlan(tuple(chunks)) if chunks else None

    def advance(self, plan: StepPlan) -> None:
        for place, scheduler in enumerate(self.schedulers):
            scheduler.advance(_of_place(plan, place))

    def waiting(self) -> Iterator[SequenceState]:
        for scheduler in self.schedulers:
            yield from scheduler.waiting()

    @property
    def running(self) -> list[SequenceState]:
        return [sequence for scheduler in self.schedulers for sequence in scheduler.running]

    @property
    def num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self.schedulers)

    @property
    def is_idle(self) -> bool:
        return all(scheduler.is_idle for scheduler in self.schedulers)

    @property
    def preemptions(self) -> int:
        return sum(scheduler.preemptions for scheduler in self.schedulers)

    def check_integrity(self) -> None:
        for scheduler in self.schedulers:
            scheduler.check_integrity()


def _of_place(plan: StepPlan, place: int) -> StepPlan:
    return StepPlan(tuple(chunk for chunk in plan.chunks if chunk.place == place))


def _todo(scheduler: Scheduler) -> int:
    """Tokens that wait to be computed."""
    return sum(sequence.todo for sequence in (*scheduler.running, *scheduler.waiting()))

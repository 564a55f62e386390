"""The scheduler against a naive model: every sequence gets exactly its tokens, in order, and nobody starves."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moegraft.serving.pages import PagePool
from moegraft.serving.scheduler import BASE, Scheduler, SequenceState, State, StepPlan

SIZE = 2
MAX_TOKENS = 10
PATIENCE = 6


class Slots:
    """Room for so many adapters at once; holds are counted by name."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: set[int] = set()

    def hold(self, lane: int) -> bool:
        assert lane not in self.held
        if len(self.held) == self.room:
            return False
        self.held.add(lane)
        return True

    def let_go(self, lane: int) -> None:
        self.held.remove(lane)


class SchedulerMachine(RuleBasedStateMachine):
    """``computed`` follows by itself what the plans compute, so that a token that is skipped or run twice shows."""

    @initialize(pages=st.integers(6, 14), rows=st.integers(1, 4), chunk=st.integers(4, 9), room=st.integers(1, 2))
    def open(self, pages: int, rows: int, chunk: int, room: int) -> None:
        self.slots = Slots(room)
        self.scheduler = Scheduler(
            PagePool(pages, SIZE), self.slots, max_rows=rows, chunk_tokens=chunk, quantum=4, patience=PATIENCE
        )
        self.rows, self.chunk = rows, chunk
        self.total: dict[SequenceState, int] = {}
        self.waited: Counter[SequenceState] = Counter()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=7), new=st.integers(1, 3), lane=st.integers(0, 3))
    def add(self, prompt: list[int], new: int, lane: int) -> None:
        sequence = SequenceState(tokens=list(prompt), lane=lane)
        self.scheduler.add(sequence)
        self.total[sequence] = len(prompt) + new

    @precondition(lambda self: self.total)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.total, key=lambda s: s.arrival)))
        self.scheduler.finish(sequence)
        assert sequence.state is State.DONE
        assert not sequence.pages
        del self.total[sequence]

    @rule(ahead=st.integers(0, 3), stop=st.integers(0, 9))
    def step(self, ahead: int, stop: int) -> None:
        """``ahead`` further steps are begun before the tokens of the one before them are known; a sequence whose tokens
        sum up to ``stop`` ends unforeseen."""
        before = {sequence: sequence.computed for sequence in self.total if sequence.state is State.RUNNING}
        plan: StepPlan | None = self.scheduler.plan()
        assert plan is not None
        self.check(plan, before)
        self.scheduler.advance(plan)
        for _ in range(ahead):
            behind = (
                self.scheduler.plan_ahead(plan, lambda s: len(s.tokens) + 1 < self.total[s]) if plan.chunks else None
            )
            self.take(plan, stop)
            if behind is None:
                return
            for chunk in behind.chunks:
                if chunk.sequence.state is State.RUNNING:
                    assert (chunk.start, chunk.count, chunk.samples) == (len(chunk.sequence.tokens) - 1, 1, True)
                    assert len(chunk.sequence.pages) * SIZE > chunk.start
            self.scheduler.advance(behind)
            plan = behind
        self.take(plan, stop)

    def take(self, plan: StepPlan, stop: int) -> None:
        """The tokens of a step."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.samples and sequence.state is State.RUNNING:
                self.scheduler.append(sequence, sum(sequence.tokens) % 2)
                if len(sequence.tokens) >= self.total[sequence] or sum(sequence.tokens) == stop:
                    self.scheduler.finish(sequence)
                    del self.total[sequence]
        for sequence in self.total:
            self.waited[sequence] += sequence.state is State.WAITING

    def check(self, plan: StepPlan, before: dict[SequenceState, int]) -> None:
        assert plan.num_tokens <= self.chunk
        assert len(plan.chunks) <= self.rows
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
        running = [sequence for sequence in self.total if sequence.state is State.RUNNING]
        assert bool(plan.chunks) == bool(running)
        if self.total:
            assert plan.chunks, "somebody waits and nobody runs"
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.state is State.RUNNING
            assert chunk.start == sequence.computed
            assert chunk.start == before.get(sequence, sequence.computed)
            assert 0 < chunk.count <= len(sequence.tokens) - chunk.start
            assert chunk.samples == (chunk.start + chunk.count == len(sequence.tokens))
            assert len(sequence.pages) * SIZE >= chunk.start + chunk.count
        lanes = {sequence.lane for sequence in running} - {BASE}
        assert lanes == self.slots.held
        oldest = min(running, key=lambda s: s.arrival, default=None)
        if oldest is not None:
            assert any(chunk.sequence is oldest for chunk in plan.chunks), "the oldest does not advance"

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            waiting = {sequence for sequence in self.total if sequence.state is State.WAITING}
            assert set(self.scheduler.waiting()) == waiting

    @invariant()
    def nobody_starves(self) -> None:
        """Whoever is older than ``patience`` goes first, one after the other, each for at most its own steps."""
        for sequence, steps in self.waited.items():
            if sequence in self.total:
                older = sum(other.arrival < sequence.arrival for other in self.scheduler.running)
                assert steps <= PATIENCE + MAX_TOKENS * (sequence.arrival + older), "starved"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40)


def make(pages: int = 100, room: int = 9, **sizes: int) -> Scheduler:
    return Scheduler(PagePool(pages, SIZE), Slots(room), **{"max_rows": 4, "chunk_tokens": 8, **sizes})


def run(scheduler: Scheduler, steps: int = 1) -> list[StepPlan]:
    plans = []
    for _ in range(steps):
        plans.append(scheduler.plan())
        scheduler.advance(plans[-1])
        for chunk in plans[-1].chunks:
            if chunk.samples:
                scheduler.append(chunk.sequence, 0)
    return plans


def test_decode_rows_run_beside_a_chunk_of_a_long_prompt() -> None:
    scheduler = make()
    short, long = SequenceState(tokens=[1, 2], lane=0), SequenceState(tokens=list(range(3, 23)), lane=1)
    scheduler.add(short)
    run(scheduler)
    scheduler.add(long)
    plans = run(scheduler, 3)
    assert [[(c.sequence is long, c.count) for c in plan.chunks] for plan in plans] == [
        [(False, 1), (True, 7)],
        [(False, 1), (True, 7)],
        [(False, 1), (True, 6)],
    ]


def test_an_adapter_with_one_request_is_not_behind_another_with_hundreds() -> None:
    scheduler = make(max_rows=1, quantum=4)
    for i in range(100):
        scheduler.add(SequenceState(tokens=[i, 1, 2, 3], lane=1))
    lonely = SequenceState(tokens=[7, 7, 7], lane=2)
    scheduler.add(lonely)
    for _ in range(3):
        run(scheduler)
        (running,) = scheduler.running
        if running is lonely:
            return
        scheduler.finish(running)
    raise AssertionError("three of the crowd went first")


def test_base_takes_no_slot() -> None:
    scheduler = make(room=0)
    scheduler.add(SequenceState(tokens=[1], lane=3))
    scheduler.add(SequenceState(tokens=[1], lane=BASE))
    (plan,) = run(scheduler)
    assert [chunk.sequence.lane for chunk in plan.chunks] == [BASE]


def test_the_youngest_gives_up_its_pages_and_is_computed_again() -> None:
    scheduler = make(pages=7)  # six to hold
    old, young = SequenceState(tokens=[1] * 5, lane=0), SequenceState(tokens=[2] * 3, lane=0)
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler, 8)
    assert scheduler.preemptions == 1
    assert young.state is State.WAITING
    assert old.computed == len(old.tokens) - 1 == 12
    scheduler.finish(old)
    (plan,) = run(scheduler)
    assert [(c.sequence, c.count) for c in plan.chunks] == [(young, young.computed)] or plan.chunks[0].start > 0
    scheduler.check_integrity()


def test_patience_holds_others_back_until_there_is_room() -> None:
    """Its adapter finds no slot while two others always have rows: when its patience ends, no new row is let in."""
    scheduler = make(room=1, max_rows=4, patience=5)
    starving = SequenceState(tokens=[1], lane=2)
    scheduler.add(SequenceState(tokens=[9], lane=1))
    run(scheduler)
    scheduler.add(starving)
    for step in range(50):
        scheduler.add(SequenceState(tokens=[step], lane=1))
        run(scheduler)
        if starving.state is State.RUNNING:
            break
        scheduler.finish(scheduler.running[0])
    assert starving.state is State.RUNNING
    assert step <= 12

"""A rank that dies, comes late or fails while others wait for it: they end in ParallelError, in time and tidily."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import Outcome, WorldPool
from support.expert_parallel import ParallelCase, build_rank_layer
from test_collective_bank import Rank, save_adapter
from test_expert_parallel import case_of

from moegraft.core.errors import ParallelError
from moegraft.lora.peft import load_peft_adapter
from moegraft.moe.experts import TorchExperts
from moegraft.parallel import ParallelConfig, ParallelGroups
from moegraft.parallel.groups import Dispatch
from moegraft.parallel.slices import ExpertMap

TIMEOUT = 2.0
VICTIM = 1
# What the slowest survivor may take: one timeout, and what two busy cores add to it.
PATIENCE = TIMEOUT + 4.0


@pytest.fixture
def doomed() -> Iterator[WorldPool]:
    """Three ranks of their own for one fault."""
    with WorldPool(3) as pool:
        yield pool


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_late() -> None:
    time.sleep(2 * TIMEOUT)


def fail() -> None:
    raise ZeroDivisionError("on one rank alone")


FAULTS: dict[str, Callable[[], None]] = {"killed": die, "late": be_late, "failing": fail}


@dataclass(frozen=True)
class Survivor:
    """The error that a rank ended in, how long it took, and what the next call and its bank say afterwards."""

    error: str
    seconds: float
    next_error: str
    loaded: tuple[str, ...]
    in_use: bool


def endure(act: Callable[[], object], again: Callable[[], object], rank: Any) -> Survivor:
    began = time.monotonic()
    with pytest.raises(ParallelError) as caught:
        act()
    seconds = time.monotonic() - began
    with pytest.raises(ParallelError) as caught_again:
        again()
    rank.check_integrity()
    in_use = any(rank.info(name).in_use for name in rank.names())
    return Survivor(str(caught.value), seconds, str(caught_again.value), rank.names(), in_use)


def check_survivors(outcomes: list[Outcome], fault: str, *, loaded: tuple[str, ...]) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank == VICTIM and fault != "late":
            assert outcome.died if fault == "killed" else isinstance(outcome.error, ZeroDivisionError), outcome.trace
            continue
        assert outcome.error is None and not outcome.died, outcome.trace or f"rank {rank} hung or died"
        survivor: Survivor = outcome.result
        assert (
            f"rank {rank}, " in survivor.error and "a peer is dead, late, or runs another collective" in survivor.error
        )
        assert survivor.seconds < PATIENCE + (2 * TIMEOUT if rank == VICTIM else 0)
        assert "refused, an earlier collective failed" in survivor.next_error
        assert survivor.loaded == loaded
        assert not survivor.in_use


def _step(dispatch: Dispatch, where: str, fault: str) -> Survivor:
    """Layers run; then the victim goes wrong: before it sends rows, or with everyone's rows on its bench."""
    config = ParallelConfig(ep=3, data_parallel=True, dispatch=dispatch, timeout_seconds=TIMEOUT)
    groups = ParallelGroups.create(config)
    case = ParallelCase(case=case_of("partial"), config=config, expert_map=ExpertMap.contiguous(7, 3), rows=(10, 10, 6))
    layer = build_rank_layer(case, groups)
    assert layer.run(layer.names).isfinite().all()
    if groups.rank == VICTIM and where == "before":
        FAULTS[fault]()
    elif groups.rank == VICTIM:
        apply = TorchExperts.apply

        def go_wrong(*args: Any, **options: Any) -> Any:
            FAULTS[fault]()
            return apply(*args, **options)

        TorchExperts.apply = go_wrong  # type: ignore[method-assign]
    return endure(lambda: layer.run(layer.names), lambda: layer.run(None), layer.bank.bank)


@pytest.mark.parametrize(
    ("dispatch", "where", "fault"),
    [
        ("all_to_all", "before", "killed"),
        ("all_to_all", "within", "late"),
        ("all_to_all", "within", "failing"),
        ("all_gather", "within", "killed"),
    ],
)
def test_a_rank_is_lost_in_a_step(doomed: WorldPool, dispatch: Dispatch, where: str, fault: str) -> None:
    check_survivors(doomed.outcomes(_step, dispatch, where, fault), fault, loaded=("a0", "a1", "a2"))


def _load(path: Path, where: str, fault: str) -> Survivor:
    """One adapter is loaded; while the next one is, the victim goes wrong: reading it, or with it in the bank."""
    rank = Rank(ParallelConfig(ep=3, data_parallel=True, timeout_seconds=TIMEOUT))
    rank.load(path, "kept")
    is_victim = rank.groups.rank == VICTIM

    def read(step: Any) -> Any:
        if is_victim and where == "reading":
            FAULTS[fault]()
        return load_peft_adapter(path, rank.targets, dtype=torch.float32, rank_slice=rank.slice)

    def fit() -> None:
        if is_victim and where == "installed" and len(rank.local.handles(coming=True)) > 1:
            FAULTS[fault]()

    rank.bank._fit = fit

    def load() -> None:
        rank.bank.load("lost", read)

    survivor = endure(load, lambda: rank.bank.acquire(["kept"]), rank.local)
    assert rank.bank.ids == {"kept": 0}
    return survivor


@pytest.mark.parametrize(("where", "fault"), [("reading", "late"), ("installed", "killed")])
def test_a_rank_is_lost_in_a_load(doomed: WorldPool, tmp_path: Path, where: str, fault: str) -> None:
    check_survivors(doomed.outcomes(_load, save_adapter(tmp_path / "a"), where, fault), fault, loaded=("kept",))


def _acquire(path: Path) -> Survivor:
    rank = Rank(ParallelConfig(ep=3, data_parallel=True, timeout_seconds=TIMEOUT))
    rank.load(path, "kept")
    if rank.groups.rank == VICTIM:
        die()
    return endure(lambda: rank.bank.acquire(["kept"]), lambda: rank.bank.unload("kept"), rank.local)


def test_a_rank_is_lost_before_a_batch(doomed: WorldPool, tmp_path: Path) -> None:
    check_survivors(doomed.outcomes(_acquire, save_adapter(tmp_path / "a")), "killed", loaded=("kept",))


@dataclass(frozen=True)
class Interrupted:
    """What a rank raised, how long it took, what the next vote said, and what the bank holds."""

    raised: str
    seconds: float
    next_error: str
    loaded: tuple[str, ...]


def _interrupted_vote(path: Path, when: str) -> Interrupted:
    """While an adapter is loaded, Ctrl-C reaches the victim within its first vote."""
    rank = Rank(ParallelConfig(ep=3, data_parallel=True, timeout_seconds=TIMEOUT))
    rank.load(path, "kept")
    if rank.groups.rank == VICTIM:
        control = rank.groups.control
        gather = control.all_gather

        def interrupted(x: torch.Tensor, counts: Any = None) -> torch.Tensor:
            if when == "after it has told the others":
                gather(x, counts)
            raise KeyboardInterrupt

        control.all_gather = interrupted  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises((KeyboardInterrupt, ParallelError)) as caught:
        rank.load(path, "lost")
    seconds = time.monotonic() - began
    if rank.groups.rank == VICTIM:
        control.all_gather = gather  # type: ignore[method-assign]
    with pytest.raises(ParallelError) as again:
        rank.bank.unload("kept")
    rank.local.check_integrity()
    return Interrupted(caught.type.__name__, seconds, str(again.value), rank.local.names())


@pytest.mark.parametrize("when", ["before it has told the others", "after it has told the others"])
def test_a_rank_is_interrupted_within_a_vote(doomed: WorldPool, tmp_path: Path, when: str) -> None:
    """It raises at once, the others in time; nothing is loaded, and no rank ever waits for another again."""
    outcomes = doomed.outcomes(_interrupted_vote, save_adapter(tmp_path / "a"), when)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None and not outcome.died, outcome.trace or f"rank {rank} hung or died"
        found: Interrupted = outcome.result
        assert found.raised == ("KeyboardInterrupt" if rank == VICTIM else "ParallelError")
        assert found.seconds < PATIENCE
        assert "refused, an earlier collective failed" in found.next_error
        assert found.loaded == ("kept",)

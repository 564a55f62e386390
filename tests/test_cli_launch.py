"""Ranks started by the command line: the result of rank 0, or the error of the rank that failed first; no survivors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moegraft.cli.console import CommandError
from moegraft.cli.launch import run_on_ranks
from moegraft.core.errors import AdapterFileError, ParallelError

CPU = torch.device("cpu")


def _sum_of_ranks(start: int, rank: int) -> int:
    total = torch.tensor([start + rank])
    dist.all_reduce(total)
    return int(total)


def _fail(how: str, rank: int) -> None:
    """Rank 1 fails; rank 0 waits for it, and fails in turn or not at all."""
    if rank == 1:
        match how:
            case "refused":
                raise AdapterFileError("adapter.safetensors: truncated")
            case "crash":
                raise ZeroDivisionError("no such number")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
    if how == "refused":
        time.sleep(60)
    try:
        dist.barrier()
    except RuntimeError as error:
        raise ParallelError("a peer is dead") from error


def survivors() -> list[str]:
    return [child.name for child in multiprocessing.active_children() if child.name.startswith("rank ")]


def test_result_is_that_of_rank_0() -> None:
    assert run_on_ranks(_sum_of_ranks, 5, size=2, device=CPU) == 11
    assert not survivors()


@pytest.mark.parametrize(
    ("how", "message", "exit_code"),
    [
        ("refused", "rank 1 of 2: adapter.safetensors: truncated", 2),
        pytest.param(
            "crash",
            "rank 1 of 2: unexpected ZeroDivisionError: no such number (MOEGRAFT_TRACEBACK=1 shows where)",
            1,
            marks=pytest.mark.soak,
        ),
        ("killed", "rank 1 of 2: was killed by SIGKILL", 137),
    ],
)
def test_a_failing_rank_ends_all(how: str, message: str, exit_code: int) -> None:
    with pytest.raises(CommandError) as caught:
        run_on_ranks(_fail, how, size=2, device=CPU)
    assert str(caught.value) == message
    assert caught.value.exit_code == exit_code
    assert not survivors()


def test_more_ranks_than_the_machine_can_hold() -> None:
    with pytest.raises(CommandError, match="found 1000000000 ranks, expected at most"):
        run_on_ranks(_sum_of_ranks, 0, size=10**9, device=CPU)


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CommandError, match="2 ranks need 2 GPUs, found 1"):
        run_on_ranks(_sum_of_ranks, 0, size=2, device=torch.device("cuda"))


SCRIPT = """
import multiprocessing, signal, sys, time, torch
from moegraft.cli.launch import run_on_ranks
from moegraft.core.errors import AdapterFileError

def work(request, rank):
    work.lock = multiprocessing.RLock()  # as progress bars have one
    if request == "error" and rank == 1:
        raise AdapterFileError("damaged")
    if request != "result":
        time.sleep(60)
    return rank

if __name__ == "__main__":
    # A shell lets what it runs in the background ignore Ctrl-C, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("starting", flush=True)
    try:
        run_on_ranks(work, sys.argv[1], size=2, device=torch.device("cpu"))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(0 if str(error) == "rank 1 of 2: damaged" else repr(error))
"""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    (tmp_path / "ranks.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "ranks.py")]


@pytest.mark.parametrize("how", [pytest.param("result", marks=pytest.mark.soak), "error"])
def test_ranks_leave_nothing_behind(how: str, script: list[str]) -> None:
    """A semaphore that a rank left would be reported to the user when the command ends."""
    done = subprocess.run([*script, how], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("after", [0.0, pytest.param(0.5, marks=pytest.mark.soak), 5.0])
def test_interrupted_while_ranks_start(after: float, script: list[str]) -> None:
    """The terminal sends Ctrl-C to the whole group: whoever is importing then says nothing, and all end."""
    process = subprocess.Popen(
        [*script, "interrupt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")
    deadline = time.monotonic() + 30  # multiprocessing's own tracker ends when it sees that nobody is left
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(process.pid)


def running(group: int) -> list[str]:
    """Processes of a group, but for those that have ended and were not fetched."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, pgrp, *_ = stat.read_text().rpartition(")")[2].split()
            found += [stat.parent.name] if int(pgrp) == group and state != "Z" else []
    return found

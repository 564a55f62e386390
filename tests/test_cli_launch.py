"""Ranks started by the command line: the result of rank 0, or the error of the rank that failed first; no survivors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
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
    assert run_on_ranks(_sum_of_ranks, 5, size=3, device=CPU) == 18
    assert not survivors()


@pytest.mark.parametrize(
    ("how", "message", "exit_code"),
    [
        ("refused", "rank 1 of 2: adapter.safetensors: truncated", 2),
        ("crash", "rank 1 of 2: ZeroDivisionError: no such number", 1),
        ("killed", "rank 1 of 2: was killed by SIGKILL", 137),
    ],
)
def test_a_failing_rank_ends_all(how: str, message: str, exit_code: int) -> None:
    with pytest.raises(CommandError) as caught:
        run_on_ranks(_fail, how, size=2, device=CPU)
    assert str(caught.value) == message
    assert caught.value.exit_code == exit_code
    assert not survivors()


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CommandError, match="2 ranks need 2 GPUs, found 1"):
        run_on_ranks(_sum_of_ranks, 0, size=2, device=torch.device("cuda"))


SCRIPT = """
import multiprocessing, torch
from moegraft.cli.launch import run_on_ranks

def work(request, rank):
    work.lock = multiprocessing.RLock()  # as progress bars have one
    return rank

if __name__ == "__main__":
    run_on_ranks(work, None, size=2, device=torch.device("cpu"))
"""


def test_ranks_leave_nothing_behind(tmp_path: Path) -> None:
    """A semaphore that a rank left would be reported to the user when the command ends."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stderr == ""

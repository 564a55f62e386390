"""Real processes for tests, over gloo or NCCL: a pool of N ranks runs one module-level function in all of them at once.

Processes come from a fork server that has torch imported already, so that a pool costs tenths of a second, and a test
that kills ranks can have a pool of its own.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moegraft.parallel import backend_of
from support.interpreter import hasten_interpreter

PRELOADED = ["torch.distributed", "moegraft.testing", "support.parallel_acts", "support.rank_engines"]
START_SECONDS = 120.0
CASE_SECONDS = 60.0
NCCL_GRACE_SECONDS = 20.0
"""For the other ranks, once one has failed: over NCCL they wait for it until a watchdog ends them."""


@dataclass(frozen=True)
class Outcome:
    """What one rank made of a case: its result, the exception it raised, or neither where it died."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    died: bool = False
    seconds: float = 0.0


class RankError(AssertionError):
    """A case failed on some ranks."""


class WorldPool:
    """``size`` processes in one world, kept for many cases; a context manager.

    A case is ``function(*args)``, module-level, run by every rank at once; arguments and results travel as pickles.
    After a case that failed on any rank the processes are started anew: their groups may be out of step.
    ``group_seconds``: timeout of the default group. ``device`` "cuda": rank r has GPU r, and NCCL beside gloo;
    where there are fewer GPUs, all ranks share the first, over gloo, which exchanges no rows of CUDA tensors.
    """

    def __init__(
        self,
        size: int,
        *,
        timeout_seconds: float = CASE_SECONDS,
        group_seconds: float = CASE_SECONDS,
        device: str = "cpu",
    ) -> None:
        self.size = size
        self.device = device
        self.timeout_seconds = timeout_seconds
        self.group_seconds = group_seconds
        self._ranks: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank. Raises RankError with every rank's trace where one failed."""
        outcomes = self.outcomes(function, *args)
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome.died or outcome.error is not None]
        if failed:
            reports = [f"rank {rank}: {'died' if outcomes[rank].died else outcomes[rank].trace}" for rank in failed]
            raise RankError("\n".join(reports))
        return [outcome.result for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, per_rank: Sequence[tuple[Any, ...]] | None = None
    ) -> list[Outcome]:
        """What became of every rank. ``per_rank``: more arguments, of each rank. A rank that hangs counts as died; the
        stacks of its threads are on stderr."""
        if not self._ranks:
            self._start()
        for rank, (_, connection) in enumerate(self._ranks):
            mine = (*args, *(per_rank[rank] if per_rank else ()))
            connection.send_bytes(_dump((function, mine)))
        outcomes = self._collect()
        if any(outcome.died or outcome.error is not None for outcome in outcomes):
            self.close()
        return outcomes

    def _collect(self) -> list[Outcome]:
        deadline = time.monotonic() + self.timeout_seconds
        open_ranks = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        found: dict[int, Outcome] = {}
        while open_ranks:
            ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = open_ranks.pop(connection)  # type: ignore[call-overload]
                found[rank] = self._receive(self._ranks[rank][1], deadline)
                if self.device == "cuda" and (found[rank].died or found[rank].error is not None):
                    deadline = min(deadline, time.monotonic() + NCCL_GRACE_SECONDS)
        for rank in open_ranks.values():
            process = self._ranks[rank][0]
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
            process.join(1.0)
        return [found.get(rank, Outcome(died=True)) for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> WorldPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # transformers takes seconds to import: once, and not in every rank. The server knows no sys.path but its own,
        # and leaves out in silence what it does not find.
        # Forks of a process that has asked for GPUs get none: for these, only what surely does not ask.
        context.set_forkserver_preload(PRELOADED if self.device == "cpu" else PRELOADED[:2])
        # A file is the meeting point: no port that another test run might take.
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "meeting"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, str(meeting), self.group_seconds, self.device)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with _this_path():
                process.start()
            theirs.close()
            self._ranks.append((process, ours))
        deadline = time.monotonic() + START_SECONDS
        for _, connection in self._ranks:
            started = self._receive(connection, deadline)
            if started.error is not None or started.died:
                self.close()
                raise RankError(f"a rank did not start: {started.trace or 'died'}")

    @staticmethod
    def _receive(connection: Connection, deadline: float) -> Outcome:
        with suppress(EOFError, ConnectionError):
            if connection.poll(max(0.0, deadline - time.monotonic())):
                outcome: Outcome = _load(connection.recv_bytes())
                return outcome
        return Outcome(died=True)


@contextmanager
def _this_path() -> Iterator[None]:
    """Processes that are started find what this one finds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(connection: Connection, rank: int, size: int, meeting: str, group_seconds: float, device: str) -> None:
    hasten_interpreter()
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    has_own_gpu = device == "cuda" and torch.cuda.device_count() >= size
    if has_own_gpu:
        torch.cuda.set_device(rank)
        os.environ["LOCAL_RANK"] = str(rank)  # as torchrun says it: transformers' plans ask for it on GPUs
    elif device == "cuda":
        make_group = dist.new_group
        dist.new_group = lambda *args, **options: make_group(*args, **{**options, "backend": "gloo"})
    backend = backend_of("cuda" if has_own_gpu else "cpu")
    # Mostly long: a case that fails is over at the pool's own deadline, and groups have timeouts of their own.
    timeout = timedelta(seconds=group_seconds)
    with suppress(KeyboardInterrupt, EOFError, ConnectionError):
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
        connection.send_bytes(_dump(Outcome()))
        while True:
            function, args = _load(connection.recv_bytes())
            connection.send_bytes(_dump(_attempt(function, args)))


def _attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    began = time.monotonic()
    try:
        result = function(*args)
    except Exception as error:
        error = _picklable(error)
        return Outcome(error=error, trace=traceback.format_exc(), seconds=time.monotonic() - began)
    return Outcome(result=result, seconds=time.monotonic() - began)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _dump(value: Any) -> bytes:
    """torch.save, not pickle: tensors of another process must not share memory with this one."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)

"""Ranks as processes of this machine: started, watched, and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moegraft.core.errors import MoegraftError, ParallelError
from moegraft.parallel.groups import backend_of

GRACE_SECONDS = 3.0
"""For the other ranks to say what they know, once one has failed."""
MAX_CPU_RANKS = max(8, os.cpu_count() or 1)
Describe = Callable[[Exception], tuple[str, int]]
"""One line for an error, and the exit code of a process that it ends."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank ended: with a result, or with an error in one line and its exit code."""

    result: Any = None
    error: str | None = None
    exit_code: int = 0
    is_consequence: bool = False  # of another rank's end


@dataclass(frozen=True)
class Rank:
    """One process and the end of its pipe from which its report comes."""

    number: int
    process: Any
    connection: Connection

    def report(self) -> Report:
        """Waits for the end of it."""
        try:
            report: Report = self.connection.recv()
            return report
        except EOFError:
            self.process.join(GRACE_SECONDS)
            code = self.process.exitcode
            if code is not None and code < 0:
                return Report(error=f"was killed by {signal.Signals(-code).name}", exit_code=128 - code)
            return Report(error=f"ended with exit code {code}", exit_code=code or 1)


def describe_briefly(error: Exception) -> tuple[str, int]:
    """See ``Describe``."""
    if isinstance(error, MoegraftError):
        return str(error), 2
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 1


class World:
    """Starts ranks of one world, each ``work(request, rank)``, a module-level function, with torch.distributed
    initialised; ``device``: CPU ranks talk over gloo, on CUDA rank r has GPU r and NCCL."""

    def __init__(
        self, work: Callable[[Any, int], Any], request: Any, *, size: int, device: torch.device, describe: Describe
    ) -> None:
        self.size = size
        self.device = device
        self.ranks: list[Rank] = []
        self._work, self._request, self._describe = work, request, describe
        self._context = multiprocessing.get_context("spawn")
        # A free port, held from here on.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, first: int = 0) -> None:
        """Starts the ranks from ``first`` on."""
        # Starting it unblocks Ctrl-C, which would reach the first rank while it imports.
        resource_tracker.ensure_running()
        for rank in range(first, self.size):
            ours, theirs = self._context.Pipe(duplex=False)
            place = (rank, self.size, self.store.port, self.device.type)
            args = (theirs, self._work, self._request, place, self._describe)
            process = self._context.Process(target=_run_rank, args=args, name=f"rank {rank}", daemon=True)
            with interrupts_later():
                process.start()
                self.ranks.append(Rank(rank, process, ours))
            theirs.close()

    def kill(self) -> None:
        """Ends what is left of them."""
        with interrupts_later():
            for rank in self.ranks:
                rank.process.kill()
                rank.process.join()


def check_devices(device: torch.device, size: int) -> None:
    """Raises ParallelError where the machine has not enough of them."""
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise ParallelError(f"{size} ranks need {size} GPUs, found {torch.cuda.device_count()}; or give --device cpu")
    if device.type != "cuda" and size > MAX_CPU_RANKS:
        raise ParallelError(f"found {size} ranks, expected at most {MAX_CPU_RANKS} on the processors of this machine")


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the block is done; a process started in it is born deaf to it, while it imports too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def local_rank() -> Iterator[None]:
    """transformers binds a plan to the GPU of this number, which torchrun says, and nobody to a process that has
    started its own ranks."""
    if "LOCAL_RANK" in os.environ or not torch.cuda.is_available():
        yield
        return
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


class Followers:
    """The ranks of a world from 1 on; rank 0 is this process. They are watched until ``close``.

    ``on_end``: is told in one line that a rank has ended before its time, from a thread of its own.
    """

    def __init__(
        self,
        work: Callable[[Any, int], Any],
        request: Any,
        *,
        size: int,
        device: torch.device,
        on_end: Callable[[str], None],
    ) -> None:
        check_devices(device, size)
        if dist.is_initialized():
            raise ParallelError("this process is a rank of a world already: it cannot start another one")
        self._world = World(work, request, size=size, device=device, describe=describe_briefly)
        self._on_end = on_end
        self._is_closing = False
        self._failure: str | None = None
        self._has_failed = threading.Event()
        try:
            self._world.start(first=1)
            if device.type == "cuda":
                torch.cuda.set_device(0)
            store = TCPStore("127.0.0.1", self._world.store.port, is_master=False)
            self._watcher = threading.Thread(target=self._watch, name="moegraft-ranks", daemon=True)
            self._watcher.start()
            dist.init_process_group(backend_of(device), store=store, rank=0, world_size=size)
        except BaseException:
            self.close()
            raise

    def why(self, otherwise: str) -> str:
        """What has become of a rank that ended before its time, within the grace; ``otherwise`` where none has."""
        self._has_failed.wait(GRACE_SECONDS)
        return self._failure or otherwise

    def _watch(self) -> None:
        by_connection = {rank.connection: rank for rank in self._world.ranks}
        while by_connection:
            for connection in wait(list(by_connection)):
                rank = by_connection.pop(connection)  # type: ignore[call-overload]
                report = rank.report()
                if not self._is_closing and self._failure is None:
                    self._failure = f"rank {rank.number} of {self._world.size}: {report.error or 'has left'}"
                    self._has_failed.set()
                    self._on_end(self._failure)

    def close(self) -> None:
        """Waits for ranks that end by themselves, ends the others, and gives the world back."""
        self._is_closing = True
        if self._failure is None:
            for rank in self._world.ranks:
                rank.process.join(GRACE_SECONDS)
        self._world.kill()
        # After a lost rank NCCL's groups would wait for it.
        if dist.is_initialized() and (self._failure is None or self._world.device.type == "cpu"):
            dist.destroy_process_group()


def _run_rank(
    connection: Connection,
    work: Callable[[Any, int], Any],
    request: Any,
    place: tuple[int, int, int, str],
    describe: Describe,
) -> None:
    """The life of one rank; ``place``: rank, size, port, kind of device."""
    rank, size, port, kind = place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends its ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Locks of a process that may fork are nameless: none is left behind, and reported, when a rank is killed.
    multiprocessing.set_start_method("fork", force=True)
    # As torchrun does: transformers binds its plans to the GPU of this number.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        if kind == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend_of(kind), store=store, rank=rank, world_size=size)
        result = work(request, rank)
        report = Report(result=result if rank == 0 else None)
    except Exception as error:
        message, exit_code = describe(error)
        report = Report(error=message, exit_code=exit_code, is_consequence=isinstance(error, ParallelError))
    with suppress(BrokenPipeError):
        connection.send(report)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if report.error is None:
        dist.destroy_process_group()
        return
    # Not sys.exit: after a failed collective the destructors of groups may wait for peers.
    os._exit(report.exit_code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

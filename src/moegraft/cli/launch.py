"""One command on several ranks of this machine: starts the processes, gives back what rank 0 made, ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moegraft.cli.console import CommandError, describe, stderr
from moegraft.core.errors import ParallelError
from moegraft.parallel import backend_of

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")

GRACE_SECONDS = 3.0
"""For the other ranks to say what they know, once one has failed."""
MAX_CPU_RANKS = max(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank ended: with a result, or with an error in one line and its exit code."""

    result: Any = None
    error: str | None = None
    exit_code: int = 0
    is_consequence: bool = False  # of another rank's end


def run_on_ranks(
    work: Callable[[_Request, int], _Result], request: _Request, *, size: int, device: torch.device
) -> _Result:
    """``work(request, rank)`` in ``size`` processes with torch.distributed initialised; what rank 0 gave back.

    ``work`` is a module-level function; ``device``: CPU ranks talk over gloo, on CUDA rank r has GPU r and NCCL.
    Raises CommandError with the error and the exit code of the rank that failed first; no process outlives the call.
    """
    _check_devices(device, size)
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port, held from here on
    ranks: list[tuple[Any, Connection]] = []
    # Starting it unblocks Ctrl-C, which would reach the first rank while it imports.
    resource_tracker.ensure_running()
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            args = (theirs, work, request, rank, size, store.port, device.type)
            process = context.Process(target=_run_rank, args=args, name=f"rank {rank}", daemon=True)
            with _interrupts_later():
                process.start()
                ranks.append((process, ours))
            theirs.close()
        reports = _collect(ranks)
        _raise_first([reports[rank] for rank in range(size)])
        for process, _ in ranks:
            process.join(GRACE_SECONDS)
        result: _Result = reports[0].result
        return result
    finally:
        with _interrupts_later():
            for process, _ in ranks:
                process.kill()
                process.join()


@contextmanager
def _interrupts_later() -> Iterator[None]:
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


def _check_devices(device: torch.device, size: int) -> None:
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise CommandError(f"{size} ranks need {size} GPUs, found {torch.cuda.device_count()}; or give --device cpu")
    if device.type != "cuda" and size > MAX_CPU_RANKS:
        raise CommandError(f"found {size} ranks, expected at most {MAX_CPU_RANKS} on the processors of this machine")


def _collect(ranks: Sequence[tuple[Any, Connection]]) -> dict[int, Report]:
    """Every rank's report; once one has failed, what has come within the grace."""
    reports: dict[int, Report] = {}
    open_ranks = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    deadline: float | None = None
    while open_ranks:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(open_ranks), timeout=remaining)
        if not ready:
            break
        for connection in ready:
            rank = open_ranks.pop(connection)  # type: ignore[call-overload]
            reports[rank] = _receive(connection, ranks[rank][0])  # type: ignore[arg-type]
            if reports[rank].error is not None and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    for rank in open_ranks.values():
        reports[rank] = Report(error="was ended with the others", exit_code=1, is_consequence=True)
    return reports


def _receive(connection: Connection, process: Any) -> Report:
    try:
        report: Report = connection.recv()
        return report
    except EOFError:
        process.join(GRACE_SECONDS)
        code = process.exitcode
        if code is not None and code < 0:
            return Report(error=f"was killed by {signal.Signals(-code).name}", exit_code=128 - code)
        return Report(error=f"ended with exit code {code}", exit_code=code or 1)


def _raise_first(reports: Sequence[Report]) -> None:
    """The failure that the others follow from: a lost peer is somebody else's error."""
    failed = [(report.is_consequence, rank) for rank, report in enumerate(reports) if report.error is not None]
    if failed:
        rank = min(failed)[1]
        raise CommandError(f"rank {rank} of {len(reports)}: {reports[rank].error}", exit_code=reports[rank].exit_code)


def _run_rank(
    connection: Connection, work: Callable[[Any, int], Any], request: Any, rank: int, size: int, port: int, kind: str
) -> None:
    """The life of one rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends its ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Locks of a process that may fork are nameless: none is left behind, and reported, when a rank is killed.
    multiprocessing.set_start_method("fork", force=True)
    stderr.quiet = rank > 0
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

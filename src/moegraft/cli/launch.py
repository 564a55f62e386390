"""One command on several ranks of this machine: starts the processes, gives back what rank 0 made, ends them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

from moegraft.cli.console import CommandError, describe, stderr
from moegraft.core.errors import ParallelError
from moegraft.parallel.processes import GRACE_SECONDS, Rank, Report, World, check_devices

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


def run_on_ranks(
    work: Callable[[_Request, int], _Result], request: _Request, *, size: int, device: torch.device
) -> _Result:
    """``work(request, rank)`` in ``size`` processes with torch.distributed initialised; what rank 0 gave back.

    ``work`` is a module-level function; ``device``: CPU ranks talk over gloo, on CUDA rank r has GPU r and NCCL.
    Raises CommandError with the error and the exit code of the rank that failed first; no process outlives the call.
    """
    try:
        check_devices(device, size)
    except ParallelError as error:
        raise CommandError(str(error)) from error
    world = World(partial(_quietly, work), request, size=size, device=device, describe=describe)
    try:
        world.start()
        reports = _collect(world.ranks)
        _raise_first([reports[rank] for rank in range(size)])
        for rank in world.ranks:
            rank.process.join(GRACE_SECONDS)
        result: _Result = reports[0].result
        return result
    finally:
        world.kill()


def _quietly(work: Callable[[Any, int], Any], request: Any, rank: int) -> Any:
    """One rank is enough to speak for all."""
    stderr.quiet = rank > 0
    return work(request, rank)


def _collect(ranks: Sequence[Rank]) -> dict[int, Report]:
    """Every rank's report; once one has failed, what has come within the grace."""
    reports: dict[int, Report] = {}
    open_ranks = {rank.connection: rank for rank in ranks}
    deadline: float | None = None
    while open_ranks:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(open_ranks), timeout=remaining)
        if not ready:
            break
        for connection in ready:
            rank = open_ranks.pop(connection)  # type: ignore[call-overload]
            reports[rank.number] = rank.report()
            if reports[rank.number].error is not None and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    for rank in open_ranks.values():
        reports[rank.number] = Report(error="was ended with the others", exit_code=1, is_consequence=True)
    return reports


def _raise_first(reports: Sequence[Report]) -> None:
    """The failure that the others follow from: a lost peer is somebody else's error."""
    failed = [(report.is_consequence, rank) for rank, report in enumerate(reports) if report.error is not None]
    if failed:
        rank = min(failed)[1]
        raise CommandError(f"rank {rank} of {len(reports)}: {reports[rank].error}", exit_code=reports[rank].exit_code)

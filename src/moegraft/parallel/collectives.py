"""The collectives that the layers need, over one group of ranks: thin, counted, and never silent about a lost peer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moegraft.core.errors import ParallelError

# What gloo cannot send as itself travels as bytes.
_SENT_AS_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool, torch.uint16)

# torch 2.13 calls it by a new name and warns of the old one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What one rank sent: calls and payload bytes to other ranks, by collective.

    An all-reduce counts as the reduce-scatter and all-gather that it is: 2 (n - 1) / n of its buffer.
    """

    calls: dict[str, int] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, op: str, sent_bytes: int) -> None:
        """Counts one call."""
        self.calls[op] = self.calls.get(op, 0) + 1
        self.sent_bytes[op] = self.sent_bytes.get(op, 0) + sent_bytes

    def reset(self) -> None:
        """Back to nothing."""
        self.calls.clear()
        self.sent_bytes.clear()

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())


class GroupHealth:
    """Shared by the groups of one world: after a failed collective none of them is used again."""

    def __init__(self) -> None:
        self.error: ParallelError | None = None


class Communicator:
    """One group of ranks. Every rank of it calls the same methods in the same order, from one thread at a time.

    ``ranks``: global ranks of the group · ``rank``: this process's place among them · ``timeout_seconds``: of a
    collective. A group of one rank sends nothing. Tensors on the CPU travel over gloo, those on CUDA over NCCL. Over
    gloo a lost or late peer raises ParallelError within the timeout; over NCCL, which runs behind the host's back,
    torch's watchdog ends the process after it.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        rank: int,
        *,
        group: dist.ProcessGroup | None,
        timeout_seconds: float,
        health: GroupHealth | None = None,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = rank
        self.size = len(self.ranks)
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic()
        self._group = group
        self._health = health or GroupHealth()

    @classmethod
    def alone(cls, name: str = "world", rank: int = 0) -> Communicator:
        """A group of one."""
        return cls(name, (rank,), 0, group=None, timeout_seconds=0.0)

    @property
    def failure(self) -> ParallelError | None:
        """Why no group of this world is used any more."""
        return self._health.error

    def give_up(self, reason: str) -> None:
        """No group of this world is used again: every later collective raises ParallelError at once."""
        if self._health.error is None:
            self._health.error = ParallelError(f"{self._where}: {reason}; start the processes again")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; gives ``x`` back."""
        if self.size > 1:
            with self._running("all_reduce", x.nbytes, sent_bytes=2 * x.nbytes * (self.size - 1) // self.size):
                dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """The rows of all ranks, one after the other. ``counts``: rows of each rank, where they differ."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if counts is not None and len(set(counts)) > 1:
            return self._exchange("all_gather", x.repeat(self.size, *[1] * (x.dim() - 1)), [len(x)] * self.size, counts)
        out = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        with self._running("all_gather", x.nbytes, sent_bytes=x.nbytes * (self.size - 1)):
            _all_gather_single(_bits(out), _bits(x), group=self._group)
        return out

    def reduce_scatter(self, x: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """The sum over the ranks of the rows that belong to this one; ``counts``: rows of each rank, equal by default.

        Summed in the order of the ranks, in float32 for narrower floats: an element has the same bits wherever it
        stands in the buffer.
        """
        if self.size == 1:
            return x
        if counts is None:
            counts = [self._share_of(x.shape[0])] * self.size
        mine = counts[self.rank]
        parts = self._exchange("reduce_scatter", x.contiguous(), counts, [mine] * self.size)
        return sum_in_order(parts.view(self.size, mine, *x.shape[1:]))

    def all_to_all(self, x: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        """Rows of ``x``, the first ``send_counts[0]`` to rank 0 of the group and so on; what came, by sender."""
        if self.size == 1:
            return x
        return self._exchange("all_to_all", x.contiguous(), send_counts, receive_counts)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """What the first rank of the group has in ``x``, in place; gives ``x`` back."""
        if self.size > 1:
            sent_bytes = x.nbytes * (self.size - 1) if self.rank == 0 else 0
            with self._running("broadcast", x.nbytes, sent_bytes=sent_bytes):
                dist.broadcast(x, self.ranks[0], group=self._group)
        return x

    def all_gather_object(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, for votes and checks outside the hot path."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._running("all_gather_object", 0, sent_bytes=0):
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            with self._running("barrier", 0, sent_bytes=0):
                dist.barrier(group=self._group)

    def _exchange(
        self, op: str, x: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> torch.Tensor:
        if sum(send_counts) != x.shape[0]:
            raise ValueError(f"{op}: {x.shape[0]} rows, but {list(send_counts)} are to be sent")
        out = x.new_empty(sum(receive_counts), *x.shape[1:])
        row_bytes = x.nbytes // x.shape[0] if x.shape[0] else 0
        to_others = x.shape[0] - send_counts[self.rank]
        with self._running(op, x.nbytes, sent_bytes=to_others * row_bytes):
            dist.all_to_all_single(_bits(out), _bits(x), list(receive_counts), list(send_counts), group=self._group)
        return out

    def _share_of(self, rows: int) -> int:
        if rows % self.size:
            raise ValueError(f"reduce_scatter: {rows} rows cannot be shared out to {self.size} ranks; pass counts")
        return rows // self.size

    @contextmanager
    def _running(self, op: str, nbytes: int, *, sent_bytes: int) -> Iterator[None]:
        if self._health.error is not None:
            raise ParallelError(
                f"{self._where}: {op} refused, an earlier collective failed: {self._health.error}"
            ) from self._health.error
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._health.error = ParallelError(
                f"{self._where}: {op} of {nbytes} bytes failed after {time.monotonic() - began:.1f} s (timeout "
                f"{self.timeout_seconds:g} s); a peer is dead, late, or runs another collective: {_first_line(error)}"
            )
            raise self._health.error from error
        except BaseException as interrupt:
            self.give_up(f"{op} was interrupted ({type(interrupt).__name__})")
            raise
        self.traffic.add(op, sent_bytes)

    @property
    def _where(self) -> str:
        return f"rank {self.ranks[self.rank]}, {self.name} group of ranks {list(self.ranks)}"


def sum_in_order(parts_NX: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, one entry after the other; float32 inside for narrower floats."""
    dtype = parts_NX.dtype
    total = (
        parts_NX[0].to(torch.float32, copy=True)
        if dtype.is_floating_point and dtype.itemsize < 4
        else parts_NX[0].clone()
    )
    for part in parts_NX[1:]:
        total += part
    return total.to(dtype)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype in _SENT_AS_BYTES else x


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

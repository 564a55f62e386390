"""The collectives that the layers need, over one group of ranks: thin, counted, and never silent about a lost peer.

Over them the ranks agree: ``Agreement.step`` is a block that all ranks leave alike, or all by an error.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moegraft.core import errors
from moegraft.core.errors import MoegraftError, ParallelError

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


_FAILED, _ALL, _SHARING, _NUM_WORDS = 0, 1, 2, 3


@dataclass(frozen=True)
class _Fact:
    what: str
    value: object
    error: type[MoegraftError]

    def shown(self) -> str:
        text = repr(self.value)
        return text if len(text) <= 200 else f"{text[:160]}… ({zlib.crc32(text.encode()):08x})"


class Agreement:
    """Steps that the ranks of one group take together; one process is an agreement of one, and sends nothing.

    ``sharing``: sets of ranks that bring the same rows; what ``Step.same(sharing=True)`` compares. ``is_alone``: one
    rank · ``shares_with_nobody``: every rank brings rows of its own. Every rank takes the same steps in the same order,
    from one thread at a time.
    """

    def __init__(self, ranks: Communicator, sharing: Sequence[Sequence[int]] = ()) -> None:
        self.ranks = ranks
        self.sharing = tuple(tuple(members) for members in sharing)
        self.is_alone = ranks.size == 1
        self.shares_with_nobody = bool(sharing) and all(len(members) == 1 for members in sharing)

    def step(self, words: Sequence[int] = ()) -> Step:
        """The step inside a ``with`` block; ``words``: as many integers on every rank, which all ranks are told.

        At the end of the block the ranks vote, with one small tensor while all is well. Where the block raised on some
        rank, all ranks raise that rank's error: a MoegraftError as itself with the rank's number in front, anything
        else as it is on the rank and as ParallelError on the others. Where a rank is lost, the others raise
        ParallelError. After an interrupt inside the vote itself the group is of no use any more.
        """
        return Step(self, list(words))


class Step:
    """One step of an ``Agreement``.

    ``words``: of this rank, to be changed inside the block · ``told``: after it, those of every rank · ``agreed``:
    whether the block has succeeded on every rank.
    """

    def __init__(self, agreement: Agreement, words: list[int]) -> None:
        self.words = words
        self.told: list[list[int]] = []
        self.agreed = False
        self._agreement = agreement
        self._facts: tuple[list[_Fact], list[_Fact]] = ([], [])

    def same(
        self,
        what: str,
        value: Callable[[], object],
        *,
        error: type[MoegraftError] = ParallelError,
        sharing: bool = False,
    ) -> None:
        """Something that must be the same on all ranks, or on those that share their rows; else all raise ``error``.

        ``what`` completes "the ranks differ in …"; ``value`` gives something with a ``repr`` that says all of it, and
        is not called where there is one rank.
        """
        if not self._agreement.is_alone and not (sharing and self._agreement.shares_with_nobody):
            self._facts[sharing].append(_Fact(what, value(), error))

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._agreement.is_alone:
            self._vote(error)
        elif error is None:  # its own error goes on
            self.told, self.agreed = [self.words], True

    def _vote(self, error: BaseException | None) -> None:
        ranks = self._agreement.ranks
        failures: list[tuple[str, str] | None] = []
        try:
            facts = [zlib.crc32(repr(part).encode()) for part in self._facts]
            vote = torch.tensor([error is not None, *facts, *self.words])
            votes = ranks.all_gather(vote[None]).tolist()
            if any(mine[_FAILED] for mine in votes):
                failures = ranks.all_gather_object(_portable(error))
            else:
                self._compare(votes)
        except Exception:
            raise
        except BaseException as interrupt:
            ranks.give_up(f"a vote was interrupted ({type(interrupt).__name__}), the ranks may have parted")
            raise
        if failures:
            _raise_for_all(failures, error)
        self.told, self.agreed = [mine[_NUM_WORDS:] for mine in votes], True

    def _compare(self, votes: Sequence[Sequence[int]]) -> None:
        ranks = self._agreement.ranks
        everyone = tuple(range(ranks.size))
        for column, sets in ((_ALL, (everyone,)), (_SHARING, self._agreement.sharing or (everyone,))):
            words = [mine[column] for mine in votes]
            if all(words[rank] == words[members[0]] for members in sets for rank in members):
                continue
            found = ranks.all_gather_object([(fact.what, fact.shown()) for fact in self._facts[column - _ALL]])
            for fact_index, fact in enumerate(self._facts[column - _ALL]):
                for members in sets:
                    values: dict[tuple[str, str] | None, list[int]] = {}
                    for rank in members:
                        told = found[rank][fact_index] if fact_index < len(found[rank]) else None
                        values.setdefault(told, []).append(rank)
                    if len(values) > 1:
                        raise fact.error(_difference(fact.what, values, shares=column == _SHARING))
            raise ParallelError(f"the ranks are in different steps: {found}")


def _difference(what: str, values: dict[tuple[str, str] | None, list[int]], *, shares: bool) -> str:
    named = "; ".join(f"ranks {ranks}: {told[1] if told else 'another step'}" for told, ranks in values.items())
    everyone = sorted(rank for ranks in values.values() for rank in ranks)
    who = f"ranks {everyone} share their rows, but differ" if shares else "the ranks differ"
    return f"{who} in {what}: {named}"


def _portable(error: BaseException | None) -> tuple[str, str] | None:
    """An error as its class and message: other ranks raise it anew."""
    if error is None:
        return None
    name = type(error).__name__
    if isinstance(error, MoegraftError) and getattr(errors, name, None) is type(error):
        return name, str(error)
    return ParallelError.__name__, f"{name}: {error}"


def _raise_for_all(failures: Sequence[tuple[str, str] | None], own: BaseException | None) -> None:
    """The lowest failed rank's error on all ranks, and which ranks it is of where not of all."""
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    name, message = next(iter(failed.values()))
    if own is not None and not isinstance(own, MoegraftError):
        raise own
    alike = [rank for rank, failure in failed.items() if failure == (name, message)]
    if len(alike) < len(failures):
        where = f"rank {alike[0]}" if len(alike) == 1 else f"ranks {', '.join(map(str, alike))}"
        message = f"{where}: {message}"
    raise getattr(errors, name)(message) from own

"""CollectiveBank: the adapter banks of all ranks, changed by all of them together or by none."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from moegraft.core import errors
from moegraft.core.errors import (
    AdapterFileError,
    AdapterInUseError,
    AdapterNameError,
    BatchError,
    MoegraftError,
    ParallelError,
    UnknownAdapterError,
)
from moegraft.lora.bank import AdapterBank, AdapterBatch
from moegraft.lora.dora import finish_dora
from moegraft.lora.rows import GroupAdapters
from moegraft.lora.targets import AdapterWeights
from moegraft.parallel.groups import ParallelGroups

Report = TypeVar("Report")

_BITS = 63  # of an int64 that hold one adapter each


class GroupBatch:
    """The adapters of one batch of all ranks, held on each until it is released; a context manager.

    ``own``: of this rank's rows, for what reads no other rows · ``union``: of the rows of all ranks · ``group``: the
    ids and slots of the union.
    """

    def __init__(self, own: AdapterBatch, union: AdapterBatch, group: GroupAdapters) -> None:
        self.own = own
        self.union = union
        self.group = group

    @property
    def has_adapters(self) -> bool:
        """Of any rank's rows: the same on every rank."""
        return bool(self.group.ids)

    def release(self) -> None:
        """Lets the bank of this rank evict and unload the adapters again."""
        self.own.release()
        self.union.release()

    def __enter__(self) -> GroupBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class CollectiveBank:
    """One bank a rank, each with that rank's slice of every adapter, under names and ids that all ranks share.

    Every method is a collective act: all ranks call it in the same order, each with its own arguments. It succeeds on
    all of them, or raises the same error on all of them and leaves every bank as it was, save that adapters may have
    been evicted; where a rank is lost on the way, the others raise ParallelError and have nothing half-loaded.
    """

    def __init__(self, bank: AdapterBank, groups: ParallelGroups) -> None:
        if bank.names():
            raise AdapterNameError("adapters were loaded into the bank of one rank alone; begin with an empty bank")
        self.bank = bank
        self.groups = groups
        self._ranks = groups.control
        self._ids: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def ids(self) -> dict[str, int]:
        """Id of every loaded adapter: the smallest that was free when it came."""
        return dict(self._ids)

    def load(
        self,
        name: str,
        read: Callable[[], tuple[AdapterWeights, Report]],
        *,
        digest: Callable[[], str],
        install: Callable[[AdapterWeights], object] | None = None,
        source: str | None = None,
    ) -> Report:
        """Loads an adapter on all ranks. ``read`` gives this rank's slice, ``digest`` what its files are.

        ``install``: what makes the slice usable here, where that is more than ``bank.load``; where it raises, it has
        changed nothing. Raises what ``read`` or the bank raised, with the rank, on all ranks; AdapterFileError where
        the ranks' files differ.
        """
        enter = install or (lambda mine: self.bank.load(name, mine, source=source))
        entered: list[str] = []
        with self._lock:
            new_id = next(i for i in range(len(self._ids) + 1) if i not in self._ids.values())

            def fetch() -> tuple[tuple[AdapterWeights, Report], tuple[str, int, str]]:
                if name in self.bank.names():
                    raise AdapterNameError(f"an adapter {name!r} is already loaded; unload it first")
                return read(), (name, new_id, digest())

            def install_it() -> tuple[None, None]:
                # Every rank has read its slice: none waits here for one that has failed.
                enter(finish_dora(weights, self.groups))
                entered.append(name)
                return None, None

            def remove_it() -> None:
                for mine in entered:
                    self.bank.unload(mine)

            (weights, report), told = self._together(fetch)
            _check_same_adapter(told)
            self._together(install_it, undo=remove_it)
            self._ids[name] = new_id
            return report

    def unload(self, name: str) -> None:
        """Forgets an adapter on all ranks. Raises UnknownAdapterError; AdapterInUseError while a batch has it."""
        with self._lock:

            def check() -> tuple[None, str]:
                handle = self.bank.get(name)
                if handle.in_use:
                    raise AdapterInUseError(f"adapter {name!r} serves a batch and cannot be unloaded now")
                return None, name

            _, told = self._together(check)
            _check_same_names(told)
            self.bank.unload(name)
            del self._ids[name]

    def pin(self, name: str) -> None:
        """Makes an adapter resident on all ranks and keeps it so. Raises UnknownAdapterError or AdapterMemoryError."""
        pinned: list[str] = []

        def pin_it() -> tuple[None, str]:
            was_pinned = self.bank.get(name).pinned
            self.bank.pin(name)
            if not was_pinned:
                pinned.append(name)
            return None, name

        def unpin_it() -> None:
            for mine in pinned:
                self.bank.unpin(mine)

        with self._lock:
            _, told = self._together(pin_it, undo=unpin_it)
            try:
                _check_same_names(told)
            except AdapterNameError:
                unpin_it()
                raise

    def acquire(self, names: Sequence[str | None]) -> GroupBatch:
        """Holds the adapters of a batch of all ranks; ``names``: one a row of this rank (None = base), maybe no row.

        Raises UnknownAdapterError or AdapterMemoryError on all ranks where one has such an adapter, and BatchError
        where ranks that bring the same rows name different adapters.
        """
        with self._lock:
            wanted = self._agree_on_batch(names)
            name_of = {number: name for name, number in self._ids.items()}
            held: list[GroupBatch] = []

            def hold() -> tuple[GroupBatch, None]:
                # The union first: all at once, so that no eviction for one adapter hits another of the batch.
                union = self.bank.acquire([name_of[number] for number in wanted])
                group = GroupAdapters(wanted, union.row_slots, self.bank.pool.data.device)
                held.append(GroupBatch(self.bank.acquire(names), union, group))
                return held[0], None

            def let_go() -> None:
                for batch in held:
                    batch.release()

            if not wanted:
                return hold()[0]
            batch, _ = self._together(hold, undo=let_go, quick=True)
            return batch

    def refuse(self, failure: Exception) -> None:
        """Takes part in the others' ``acquire`` for a rank whose batch is wrong by itself: all raise ``failure``."""
        with self._lock:
            self._agree_on_batch((), failure)

    def _agree_on_batch(self, names: Sequence[str | None], failure: Exception | None = None) -> tuple[int, ...]:
        """Ids of the adapters that any rank names, ascending."""
        mine = [self._ids.get(name, -1) if name is not None else None for name in names]
        unknown = [name for name, number in zip(names, mine, strict=True) if number == -1]
        words = [0] * (-(-max(self._ids.values(), default=-1) // _BITS) + 1)
        for number in {number for number in mine if number is not None and number >= 0}:
            words[number // _BITS] |= 1 << number % _BITS
        status = torch.tensor([bool(unknown) or failure is not None, zlib.crc32(repr(mine).encode()), *words])
        all_words = self._ranks.all_gather(status[None]).tolist()
        if any(row[0] for row in all_words):
            self._together(lambda: self._refuse(unknown, failure))
        self._check_same_rows([row[1] for row in all_words])
        used = [0] * len(words)
        for row in all_words:
            used = [word | other for word, other in zip(used, row[2:], strict=True)]
        return tuple(sorted(n for n in self._ids.values() if used[n // _BITS] >> n % _BITS & 1))

    def _check_same_rows(self, rows_of_rank: Sequence[int]) -> None:
        """Ranks that share a batch: those of a tensor-parallel group, and all where no rank brings rows of its own."""
        config = self.groups.config
        for rank, rows in enumerate(rows_of_rank):
            first = config.ep_rank_of(rank) * config.tp if config.data_parallel else 0
            if rows != rows_of_rank[first]:
                raise BatchError(f"ranks {first} and {rank} share their rows, but adapters= differs between them")

    def _refuse(self, unknown: Sequence[str | None], failure: Exception | None) -> tuple[None, None]:
        if failure is not None:
            raise failure
        if unknown:
            loaded = ", ".join(map(repr, self._ids)) or "none"
            raise UnknownAdapterError(f"no adapter {unknown[0]!r} is loaded; loaded: {loaded}")
        return None, None

    def _together(
        self, act: Callable[[], tuple[Any, Any]], *, undo: Callable[[], None] | None = None, quick: bool = False
    ) -> tuple[Any, list[Any]]:
        """(what this rank's act gave, what every rank's act tells the others).

        Where it failed on some rank or a rank is lost: undone here, and the same error everywhere. ``quick``: the acts
        tell nothing, so that one small tensor does while all is well.
        """
        result, told, failure = None, None, None
        try:
            result, told = act()
        except Exception as error:
            failure = error
        try:
            if quick and not self._ranks.all_gather(torch.tensor([failure is not None])[None]).any():
                return result, []
            votes = self._ranks.all_gather_object((_portable(failure), told))
            _raise_first([error for error, _ in votes], failure)
        except BaseException:
            if undo is not None:
                undo()
            raise
        return result, [words for _, words in votes]


def _portable(error: Exception | None) -> tuple[str, str] | None:
    """An error as its class and message: other ranks raise it anew."""
    if error is None:
        return None
    name = type(error).__name__
    if isinstance(error, MoegraftError) and getattr(errors, name, None) is type(error):
        return name, str(error)
    return ParallelError.__name__, f"{name}: {error}"


def _raise_first(failures: Sequence[tuple[str, str] | None], own: Exception | None) -> None:
    """The same error on all ranks: the lowest failed rank's, and which ranks it is of where not of all."""
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if not failed:
        return
    name, message = next(iter(failed.values()))
    alike = [rank for rank, failure in failed.items() if failure == (name, message)]
    if len(alike) < len(failures):
        where = f"rank {alike[0]}" if len(alike) == 1 else f"ranks {', '.join(map(str, alike))}"
        message = f"{where}: {message}"
    raise getattr(errors, name)(message) from own


def _check_same_adapter(told: Sequence[tuple[str, int, str]]) -> None:
    _check_same_names([name for name, _, _ in told])
    if len({number for _, number, _ in told}) > 1:
        raise ParallelError("the ranks do not hold the same adapters; load and unload on all ranks, in the same order")
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, _, digest) in enumerate(told):
        ranks_of.setdefault(digest, []).append(rank)
    if len(ranks_of) > 1:
        found = "; ".join(f"ranks {ranks}: {digest[:12]}" for digest, ranks in ranks_of.items())
        raise AdapterFileError(f"adapter {told[0][0]!r}: its files differ between ranks: {found}")


def _check_same_names(names: Sequence[str]) -> None:
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank}: {name!r}" for rank, name in enumerate(names))
        raise AdapterNameError(f"the ranks name different adapters in one call: {found}")

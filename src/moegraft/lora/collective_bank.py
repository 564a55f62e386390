"""CollectiveBank: the adapter banks of all ranks, changed by all of them together or by none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TypeVar

from moegraft.core.errors import AdapterNameError, BatchError
from moegraft.lora.bank import AdapterBank, AdapterBatch
from moegraft.lora.bank.combination import combine
from moegraft.lora.rows import GroupAdapters
from moegraft.lora.targets import AdapterWeights, finish_dora
from moegraft.parallel.collectives import Agreement, Step
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
        """Whether any rank's rows have one: the same on every rank."""
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
    been evicted; where a rank is lost on the way, the others raise ParallelError and have nothing half-loaded. One
    process is a group of one, whose threads load and unload at once.

    ``fit``: makes the model ready for the adapters of ``bank.handles(coming=True)``; called before one can be named and
    after one has left, from any thread.
    """

    def __init__(self, bank: AdapterBank, groups: ParallelGroups, *, fit: Callable[[], object] = lambda: None) -> None:
        if bank.names():
            raise AdapterNameError("adapters were loaded into the bank of one rank alone; begin with an empty bank")
        self.bank = bank
        self.groups = groups
        self._fit = fit
        self._agreement = Agreement(groups.control, groups.sharing)
        # Ranks meet in one order of acts; a process alone needs none.
        self._order = nullcontext() if self._agreement.is_alone else threading.RLock()

    @property
    def ids(self) -> dict[str, int]:
        """Id of every loaded adapter: the smallest that was free when it came."""
        return {handle.name: handle.number for handle in self.bank.handles()}

    def load(
        self,
        name: str,
        read: Callable[[Step], tuple[AdapterWeights, Report]],
        *,
        source: str | None = None,
        resident: bool = True,
    ) -> Report:
        """Loads an adapter on all ranks. ``read`` gives this rank's slice, and tells the step what its files are.

        ``source``, ``resident``: as of ``AdapterBank.load``. Raises what ``read`` or the bank raised, with the rank, on
        all ranks, and where what ``read`` has said to be the same is not.
        """
        with self._order:
            new, built = None, self._agreement.step()
            try:
                with self._agreement.step() as step:
                    step.same("the adapter that they load", lambda: name, error=AdapterNameError)
                    self.bank.check_new_name(name)
                    step.same("the adapters that they hold: load on all ranks, in the same order", lambda: self.ids)
                    weights, report = read(step)
                with built:
                    new = self.bank.build(name, finish_dora(weights, self.groups), source=source, resident=resident)
                    self._fit()
                self.bank.install(new)
            except BaseException:
                if new is not None and built.agreed:
                    self.bank.install(new)  # an interrupt came behind the vote: the other ranks have it
                elif new is not None:
                    self.bank.discard(new)
                self._fit()
                raise
            return report

    def unload(self, name: str) -> None:
        """Forgets an adapter on all ranks. Raises UnknownAdapterError; AdapterInUseError while a batch has it."""
        with self._order:
            vote = self._agreement.step()
            try:
                with vote:
                    self.bank.check_unused(name)
                    vote.same("the adapter that they unload", lambda: name, error=AdapterNameError)
                self.bank.unload(name)
            except BaseException:
                if vote.agreed and name in self.bank.names() and not self._agreement.is_alone:
                    self.bank.unload(name)
                raise
            finally:
                self._fit()

    def pin(self, name: str) -> None:
        """Makes an adapter resident on all ranks and keeps it so. Raises UnknownAdapterError or AdapterMemoryError."""
        with self._order:
            pinned = None
            try:
                with self._agreement.step() as step:
                    handle = self.bank.get(name)
                    step.same("the adapter that they pin", lambda: name, error=AdapterNameError)
                    pinned = None if handle.pinned else handle
                    self.bank.pin(name)
            except BaseException:
                if pinned is not None:
                    pinned.pinned = False
                raise

    def acquire(self, names: Sequence[str | None]) -> GroupBatch:
        """Holds the adapters of a batch of all ranks; ``names``: one a row of this rank (None = base), maybe no row.

        Raises UnknownAdapterError or AdapterMemoryError on all ranks where one has such an adapter, and BatchError
        where ranks that bring the same rows name different adapters.
        """
        with self._order:
            wanted = self._agree_on_batch(names)
            return self._hold(names, wanted, self._agreement.step() if wanted else nullcontext())

    def acquire_agreed(self, names: Sequence[str | None], all_names: Sequence[str | None]) -> GroupBatch:
        """``acquire`` where the caller has seen to it that the ranks agree: nothing is sent, nobody is waited for.

        ``all_names``: of the rows of all ranks, whose adapters are loaded on all of them and are resident. An adapter
        may be loaded meanwhile, by another thread.
        """
        ids = self.ids
        wanted = sorted({ids[self.bank.get(name).name] for name in all_names if name is not None})
        return self._hold(names, tuple(wanted), nullcontext())

    def _hold(
        self, names: Sequence[str | None], wanted: tuple[int, ...], together: AbstractContextManager[object]
    ) -> GroupBatch:
        """``wanted``: ids of the adapters that any rank names, ascending."""
        name_of = {handle.number: handle.name for handle in self.bank.handles()}
        held: list[AdapterBatch] = []
        try:
            with together:
                # The union first: all at once, so that no eviction for one adapter hits another of the batch.
                held.append(self.bank.acquire([name_of[number] for number in wanted]))
                held.append(self.bank.acquire(names))
            union, own = held
            return GroupBatch(own, union, GroupAdapters(wanted, union.row_slots, self.bank.pool.data.device))
        except BaseException:
            for batch in held:
                batch.release()
            raise

    def refuse(self, failure: Exception) -> None:
        """Takes part in the others' ``acquire`` for a rank whose batch is wrong by itself: all raise ``failure``."""
        with self._order:
            self._agree_on_batch((), failure)

    def _agree_on_batch(self, names: Sequence[str | None], failure: Exception | None = None) -> tuple[int, ...]:
        """Ids of the adapters that any rank names, ascending."""
        ids = self.ids
        with self._agreement.step([0] * (-(-max(ids.values(), default=-1) // _BITS) + 1)) as step:
            if failure is not None:
                raise failure
            mine = [None if name is None else self.bank.get(name).number for name in names]
            for number in {number for number in mine if number is not None}:
                step.words[number // _BITS] |= 1 << number % _BITS
            step.same("adapters=", lambda: mine, error=BatchError, sharing=True)
        used = [0] * len(step.words)
        for words in step.told:
            used = [word | other for word, other in zip(used, words, strict=True)]
        return tuple(sorted(number for number in ids.values() if used[number // _BITS] >> number % _BITS & 1))


class Combinations:
    """Adapters that a row names together, as adapters of their own: built when they are first named, for the versions
    that were loaded then, kept and evicted like others.

    ``most``: how many are kept while no batch uses them. ``lock``: held from ``name_of`` until a batch has them.
    """

    def __init__(self, adapters: CollectiveBank, *, most: int) -> None:
        self.lock = threading.RLock()
        self._adapters = adapters
        self._most = most
        self._names: dict[tuple[tuple[int, float], ...], str] = {}  # the one used last comes last

    def name_of(self, parts: Sequence[tuple[str, float]]) -> str:
        """The bank's name of ``parts`` (name, weight); collective. Raises AdapterError, or what ``combine`` does."""
        bank = self._adapters.bank
        with self.lock:
            key = tuple((bank.get(name).uid, weight) for name, weight in parts)
            found = self._names.pop(key, None)
            if found is None:
                text = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts)
                found = f"[{text}] of versions {', '.join(str(uid) for uid, _ in key)}, weights {[w for _, w in key]}"
                self._adapters.load(found, lambda _: (combine(bank, parts), None), resident=False)
            self._names[key] = found
            self.prune()
            return found

    def prune(self) -> None:
        """Forgets combinations of adapters that were unloaded, and the oldest of too many; collective."""
        bank = self._adapters.bank
        with self.lock:
            uids = {handle.uid for handle in bank.handles()}
            free = [key for key, name in self._names.items() if not bank.get(name).in_use]
            stale = [key for key in free if not uids.issuperset(uid for uid, _ in key)]
            fresh = [key for key in free if key not in stale]
            for key in (*stale, *fresh[: max(0, len(fresh) - self._most)]):
                self._adapters.unload(self._names.pop(key))

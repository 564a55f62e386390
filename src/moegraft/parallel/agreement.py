"""All ranks or none: what every rank does in one step succeeds on all of them, or raises one error on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from moegraft.core import errors
from moegraft.core.errors import MoegraftError, ParallelError
from moegraft.parallel.collectives import Communicator

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

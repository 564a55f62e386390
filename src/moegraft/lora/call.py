"""One batch of adapters while a model runs on it: the rows of every forward pass, the rank bounds of every module."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moegraft.core.errors import BatchError
from moegraft.core.tables import LinearFactor
from moegraft.lora.bank import AdapterBatch
from moegraft.lora.punica.cpu import BatchFactors
from moegraft.lora.rows import AdapterRows, GroupAdapters, RankBounds

if TYPE_CHECKING:
    from moegraft.lora.collective_bank import GroupBatch


class CallMemory:
    """What was derived from the adapters of a batch, kept while the next one has the same in the same places: a decode
    loop derives nothing anew."""

    def __init__(self, key: tuple[object, ...] = ()) -> None:
        self.key = key
        self.factors = BatchFactors()
        self.rows: dict[tuple[int, int], AdapterRows] = {}  # by [B, S]
        self.alike: dict[int, AdapterRows] = {}  # by their number: one adapter for all
        self.experts_bounds: dict[str, RankBounds] = {}
        self.linear_bounds: dict[str, int] = {}

    def of(self, batch: AdapterBatch, union: AdapterBatch, lengths: tuple[int, ...] | None) -> CallMemory:
        """This memory, or an empty one where it is of other adapters, places or rows."""
        places = tuple(handle.residency for handle in (*batch.handles, *union.handles))
        key = (places, batch.row_slots, lengths)
        return self if key == self.key else CallMemory(key)


@dataclass(frozen=True, eq=False)
class ForwardRows:
    """One forward pass over B sequences of S tokens, sequence-major: all tokens of sequence 0, then of sequence 1 ...

    kept: the tokens of each sequence that the head sees: how many of the last ones, or which; None: not known.
    """

    num_sequences: int
    num_tokens: int
    tokens: AdapterRows
    kept: int | torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_sequences, self.num_tokens


class AdapterCall:
    """The adapters of one batch, held, and the rows that layers ask for. Rows are stated, never shared out by guess.

    batch: one entry a sequence, or ``lengths``: entry i serves the next lengths[i] tokens of packed rows · slots_M: a
    buffer of the caller's that has the slot of every token row instead, ``run_length`` of which are alike ·
    rank_bound: what runs must also serve other adapters, of ranks up to this, on any module: rows are read from the
    device whenever a layer, or a graph that captured it, runs · group: the adapters of all ranks' rows, where experts
    see those of other ranks · memory: of the calls before · heads: modules that see the last tokens of each sequence,
    or one row a sequence · modules: where LoRA is launched at all · growth: how many rows of the model one entry may
    stand for; None: any number, all alike.
    """

    def __init__(  # noqa: PLR0913  # what a batch states, each by its name
        self,
        batch: AdapterBatch,
        device: torch.device,
        *,
        lengths: Sequence[int] | None = None,
        slots_M: torch.Tensor | None = None,
        run_length: int = 1,
        rank_bound: int | None = None,
        group: GroupBatch | None = None,
        memory: CallMemory | None = None,
        heads: Collection[str] = (),
        modules: Collection[str] = (),
        growth: Collection[int] | None = None,
    ) -> None:
        if lengths is not None and len(lengths) != len(batch.row_slots):
            raise BatchError(f"lengths= has {len(lengths)} entries, adapters= has {len(batch.row_slots)}")
        self.batch = batch
        self.device = device
        self.lengths = None if lengths is None else tuple(lengths)
        self.slots_M = slots_M
        self._static = None if slots_M is None else AdapterRows.on_device(slots_M, run_length=run_length)
        self.rank_bound = rank_bound
        self.group: GroupAdapters | None = None if group is None else group.group
        self.is_over = False  # its block was left: it must serve no layer any more
        self._bounding = batch if group is None else group.union
        is_fixed = rank_bound is None and slots_M is None
        memory = memory or CallMemory()
        self._memory = (memory if is_fixed else CallMemory()).of(batch, self._bounding, self.lengths)
        self.memory = self._memory if is_fixed else memory  # for the next call: no rows that may change in place
        self.modules = frozenset(modules)
        self._heads, self._growth = heads, growth
        self._forwards: dict[int, list[ForwardRows | None]] = {}
        self._towers: dict[tuple[int, str], Mapping[int, AdapterRows]] = {}
        self._parts: dict[tuple[object, ...], AdapterRows] = {}

    @property
    def is_static(self) -> bool:
        """Whether what layers read of the call never changes but in the device's memory: a graph may be traced from it
        and captured."""
        return self._static is not None and self.rank_bound is not None and self.device.type == "cuda"

    # Rows

    def token_rows(self, num_sequences: int, num_tokens: int) -> AdapterRows:
        """The rows of a forward pass over [B, S] tokens. Raises BatchError where the batch does not state them."""
        key = (num_sequences, num_tokens)
        rows = self._memory.rows.get(key)
        if rows is None:
            rows = self._memory.rows[key] = self._state(num_sequences, num_tokens)
        return rows

    def take_rows(self, later: AdapterCall) -> None:
        """What was captured under this call, which has a ``rank_bound``, now runs with the rows of ``later``.

        Raises BatchError, having changed nothing, as ``check_serves``.
        """
        self.check_serves(later)
        states = [(rows, later.token_rows(*key).slots_M) for key, rows in self._memory.rows.items()]
        for rows, slots_M in states:
            rows.slots_M.copy_(slots_M)

    def check_serves(self, later: AdapterCall) -> None:
        """Raises BatchError where what was captured under this call would lose a delta with the rows of ``later``: of a
        rank beyond the bound, or on a module where no adapter had LoRA when it was captured."""
        if self.rank_bound is None:
            raise BatchError("a call without rank_bound= serves its own adapters only")
        for handle in later.batch.handles:
            missing = sorted(handle.ranks.keys() - self.modules)
            if missing or handle.saved:
                where = missing[0] if missing else sorted(handle.saved)[0][0]
                raise BatchError(
                    f"adapter {handle.name!r} touches {where!r}, where no adapter did when the call was captured; "
                    "capture again"
                )
        if later.rank_bound is None or later.rank_bound > self.rank_bound:
            raise BatchError(f"rank_bound={later.rank_bound}, the captured call has {self.rank_bound}")

    def begin(
        self,
        num_sequences: int,
        num_tokens: int,
        kept: int | torch.Tensor | None = None,
        *,
        is_outermost: bool = False,
    ) -> None:
        """A forward pass over [B, S] tokens begins on this thread; inside another one, a part of it that sees all of
        its sequences. Raises BatchError where the batch does not state its rows."""
        forwards = self._forwards.setdefault(threading.get_ident(), [])
        if is_outermost:
            forwards.clear()  # what an interrupt has left behind
        outer = next((forward for forward in reversed(forwards) if forward is not None), None)
        if outer is not None and outer.num_sequences != num_sequences:
            raise BatchError(
                f"inside a forward pass of {outer.num_sequences} rows the model runs one of {num_sequences}: which "
                "adapter each of them uses cannot be known"
            )
        if outer is None or outer.num_tokens != num_tokens:
            outer = ForwardRows(num_sequences, num_tokens, self.token_rows(num_sequences, num_tokens), kept)
        forwards.append(outer)

    def end(self) -> None:
        """The forward pass that began last on this thread is over."""
        self._forwards[threading.get_ident()].pop()

    @contextmanager
    def part(self, first: int, num_sequences: int, num_tokens: int) -> Iterator[None]:
        """Inside the block layers see [B, S] tokens alone, rows [first, first + B * S) of the pass that runs."""
        places = range(first, first + num_sequences * num_tokens)
        with self._inside(num_sequences, num_tokens, self.rows_at(places)):
            yield

    @contextmanager
    def spread(self, row: int, num_tokens: int) -> Iterator[None]:
        """Inside the block layers see [1, S] tokens, all with the adapter of one row of the pass that runs."""
        rows = self._rows_alike(num_tokens) or _repeated(self.rows_at(range(row, row + 1)), num_tokens)
        with self._inside(1, num_tokens, rows):
            yield

    @contextmanager
    def _inside(self, num_sequences: int, num_tokens: int, rows: AdapterRows) -> Iterator[None]:
        forwards = self._forwards[threading.get_ident()]
        forwards.append(ForwardRows(num_sequences, num_tokens, rows))
        try:
            yield
        finally:
            forwards.pop()

    def rows_at(self, places: Sequence[int]) -> AdapterRows:
        """Some rows of the pass that runs on this thread, by their places."""
        forwards = self._forwards.get(threading.get_ident(), [])
        whole = forwards[-1] if forwards else None
        if whole is None:
            raise BatchError("no forward pass of the model runs whose rows these could be")
        key = (whole, *((places.start, places.stop) if isinstance(places, range) else (None, *places)))
        rows = self._parts.get(key)
        if rows is None:
            rows = self._parts[key] = whole.tokens.at(places)
        return rows

    def touches(self, module: str) -> bool:
        """Whether an adapter of this call has LoRA on a linear map; one with a ``rank_bound``: whether one may."""
        return module in self.modules if self.rank_bound is not None else self.linear_bound(module) > 0

    def rows(self, module: str, shape: Sequence[int]) -> AdapterRows:
        """Rows of a module whose input has these leading dimensions: all tokens of the pass, [B, S] or flattened,
        or what a head sees of them. Raises BatchError for anything else, by the module's name."""
        if self._static is not None and math.prod(shape) == self._static.num_rows:
            return self._static  # without a look at the thread: this path is traced
        forwards = self._forwards.get(threading.get_ident())
        forward = forwards[-1] if forwards else None
        found = tuple(shape)
        if forward is None:
            return self._rows_outside(module, found)
        B, S = forward.num_sequences, forward.num_tokens
        if found in ((B, S), (B * S,)) or _without_ones(found) == _without_ones((B, S)):
            return forward.tokens
        return self._rows_beside(module, found, forward)

    @contextmanager
    def images(self, tower: str, first: Sequence[int], patches: Sequence[int], merge_area: int) -> Iterator[None]:
        """Inside the block a vision tower runs on this thread: image i has so many patches, its tokens begin at place
        ``first[i]`` of the forward pass, and ``merge_area`` patches become one row on the way."""
        slots = self.rows_at(list(first))
        assert slots.host is not None, "a batch that the device alone knows has no images"
        rows = {}
        for area in (1, merge_area):
            lengths = [count // area for count in patches]
            rows[sum(lengths)] = AdapterRows.of(
                slots.host, device=self.device, lengths=lengths, factors=self._memory.factors
            )
        key = (threading.get_ident(), tower)
        self._towers[key] = rows
        try:
            yield
        finally:
            self._towers.pop(key, None)

    def tower_rows(self, tower: str, module: str, shape: Sequence[int]) -> AdapterRows:
        """Rows of a module of a vision tower. Raises BatchError where it is not known whose they are."""
        M = math.prod(shape)
        rows = self._towers.get((threading.get_ident(), tower), {}).get(M) or self._rows_alike(M)
        if rows is None:
            raise BatchError(
                f"{module!r} met {M} rows of images of which it is not known whose they are: adapters on {tower!r} "
                "need the model called as a whole with input_ids and image_grid_thw, or one adapter for all rows"
            )
        return rows

    def rows_along(self, module: str, shape: Sequence[int]) -> tuple[AdapterRows, int]:
        """(rows, the dimension of a module's input along which they stand): sequences or tokens along the first, tokens
        of one packed row along the second. Raises BatchError where they cannot be known."""
        forwards = self._forwards.get(threading.get_ident())
        forward = forwards[-1] if forwards else None
        if forward is not None and shape[0] == forward.num_sequences != forward.tokens.num_rows:
            if self.lengths is None and self.slots_M is None:
                return self.token_rows(forward.num_sequences, 1), 0
            if tuple(shape[:2]) == (1, forward.num_tokens):
                return forward.tokens, 1
        if forward is not None and forward.tokens.num_rows and shape[0] % forward.tokens.num_rows == 0:
            # Norms of heads see several rows a token, one token after the other; a sweep over all models holds that.
            return _repeated(forward.tokens, shape[0] // forward.tokens.num_rows), 0
        return self.rows(module, shape[:1]), 0

    def _state(self, B: int, S: int) -> AdapterRows:
        slots, n = self.batch.row_slots, len(self.batch.row_slots)
        given = f"the model was given {B} rows of {S} tokens"
        if self.slots_M is not None:
            if self.slots_M.shape[0] != B * S:
                raise BatchError(f"slots= has {self.slots_M.shape[0]} rows, {given}")
            assert self._static is not None
            return self._static
        if self.lengths is not None:
            if sum(self.lengths) != B * S:
                raise BatchError(f"lengths={list(self.lengths)} are {sum(self.lengths)} tokens, {given}")
            lengths: int | Sequence[int] = self.lengths
        elif n == B or (n and B and B % n == 0 and (self._growth is None or B // n in self._growth)):
            lengths = B // n * S if n else 0
        else:
            raise BatchError(
                f"adapters= has {n} entries, {given}: expected one row an entry, or as many for each; tokens packed "
                "into one row are said by lengths="
            )
        rows = AdapterRows.of(slots, device=self.device, lengths=lengths, factors=self._memory.factors)
        if self.rank_bound is None:
            return rows
        # What runs now will serve other adapters in these rows: neighbours of one entry are alike, no others.
        run_length = lengths if isinstance(lengths, int) else max(1, B * S // max(1, n))
        return AdapterRows.on_device(rows.slots_M, run_length=run_length)

    def _rows_outside(self, module: str, found: tuple[int, ...]) -> AdapterRows:
        """No forward pass of the model runs: only one row an entry can be meant."""
        M, slots = math.prod(found), self.batch.row_slots
        stated = len(slots) if self.lengths is None else sum(self.lengths)
        stated = stated if self.slots_M is None else self.slots_M.shape[0]
        if stated == M:
            return self.token_rows(M, 1)
        rows = self._rows_alike(M)
        if rows is None:
            raise BatchError(
                f"{module!r} met rows {list(found)} outside of a forward pass of the model, the batch states {stated}: "
                "which adapter a row uses cannot be known"
            )
        return rows

    def _rows_beside(self, module: str, found: tuple[int, ...], forward: ForwardRows) -> AdapterRows:
        """Rows that are not all tokens once."""
        rows = self._rows_alike(math.prod(found))
        if rows is not None:
            return rows
        B, S = forward.shape
        if found[:2] == (B, S):  # several rows a token
            return _repeated(forward.tokens, math.prod(found[2:]))
        if found[0] == B * S:
            return _repeated(forward.tokens, math.prod(found[1:]))
        if module in self._heads and found[0] == B and len(found) <= 2:
            rows = self._rows_kept(math.prod(found[1:]), forward)
        if rows is None:
            raise BatchError(
                f"{module!r} met rows {list(found)}, expected the {B * S} tokens of {B} rows of {S}: it sees a part of "
                "the tokens, or other rows, and which adapter each of them uses cannot be known"
            )
        return rows

    def _rows_alike(self, M: int) -> AdapterRows | None:
        """Where it does not matter which row is which: no row, or one adapter (or the base) for all of them."""
        if M == 0:
            return AdapterRows.of((), device=self.device)
        if self.rank_bound is not None or self.slots_M is not None or len(set(self.batch.row_slots)) != 1:
            return None
        rows = self._memory.alike.get(M)
        if rows is None:
            one = self.batch.row_slots[:1]
            rows = AdapterRows.of(one, device=self.device, lengths=M, factors=self._memory.factors)
            self._memory.alike[M] = rows
        return rows

    def _rows_kept(self, k: int, forward: ForwardRows) -> AdapterRows | None:
        """k rows of each sequence: the tokens that the head keeps, or any where a sequence has one adapter."""
        (B, S), kept = forward.shape, forward.kept
        is_known = kept is not None and (kept == k if isinstance(kept, int) else kept.numel() == k)
        if not is_known and (self.rank_bound is not None or self.slots_M is not None or self.lengths is not None):
            return None
        columns = torch.arange(S)[-k:] if not isinstance(kept, torch.Tensor) else kept.flatten().cpu()
        if not is_known:
            columns = torch.zeros(k, dtype=torch.long)
        tokens = forward.tokens
        if tokens.host is None:
            slots_M = tokens.slots_M.view(B, S)[:, columns.to(tokens.slots_M.device)].flatten()
            return AdapterRows.on_device(slots_M, run_length=k)
        host = tokens.host
        slots = [host[i * S + j] for i in range(B) for j in columns.tolist()]
        return AdapterRows.of(slots, device=self.device, factors=tokens.factors)

    # Ranks

    @property
    def rows_travel(self) -> bool:
        """Whether ranks exchange rows with adapters: then all of them run every layer with LoRA."""
        return self.group is not None and bool(self.group.ids)

    def experts_bounds(self, module: str, num_halves: int) -> RankBounds:
        """Bounds of an experts module with ``num_halves`` halves; zeros where no adapter touches it."""
        bounds = self._memory.experts_bounds.get(module)
        if bounds is None:
            bounds = RankBounds.of(self._bounding.max_ranks(module))
            if self.rank_bound is not None:
                bounds = RankBounds(a13=num_halves * self.rank_bound, a2=self.rank_bound, has_gains=True)
            self._memory.experts_bounds[module] = bounds
        return bounds

    def linear_bound(self, module: str) -> int:
        """Bound of the rank on a linear map or embedding, at least 1 where an adapter touches it; else 0."""
        if self.rank_bound is not None:
            return self.rank_bound
        bound = self._memory.linear_bounds.get(module)
        if bound is None:
            ranks = self.batch.max_ranks(module)
            bound = self._memory.linear_bounds[module] = max(ranks[LinearFactor.A], 1) if ranks else 0
        return bound


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions of one change no row's place: some modules meet tokens as [B, 1, S]."""
    return tuple(size for size in shape if size != 1)


def _repeated(rows: AdapterRows, times: int) -> AdapterRows:
    """Each row ``times`` times."""
    if times == 1:
        return rows
    if rows.host is None:
        return AdapterRows.on_device(rows.slots_M.repeat_interleave(times), run_length=rows.run_length * times)
    return AdapterRows.of(rows.host, device=rows.slots_M.device, lengths=times, factors=rows.factors)

"""Decode steps as CUDA graphs: one a padded size and whether there are adapters, which then serves any of them.

A captured step reads static buffers: token ids, positions, slots to write, pages, lengths, and the adapter slot of each
row, which a call with a ``rank_bound`` keeps on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moegraft.core.errors import BatchError
from moegraft.lora.bank import AdapterBank
from moegraft.lora.call import AdapterCall
from moegraft.serving.batch import DecodeRows, StepBatch
from moegraft.serving.kv_pool import KVPool
from moegraft.serving.scheduler import BASE, StepPlan

Forward = Callable[[StepBatch], torch.Tensor]
"""Logits [T, vocabulary] of a step whose rows all sample."""


class BatchOf(Protocol):
    """Binds the adapters of rows, by lane."""

    def __call__(
        self, lanes: Sequence[int], *, rank_bound: int | None, **stated: Any
    ) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class CapturedStep:
    """``call``: under which it was captured, None without adapters; the graph reads the adapter of each row from
    ``slots_B``."""

    step: StepBatch
    replay: Callable[[], None]
    logits: torch.Tensor
    call: AdapterCall | None
    slots_B: torch.Tensor | None


class DecodeGraphs:
    """Owned by the runner; of the engine's thread."""

    def __init__(
        self, forward: Forward, batch_of: BatchOf, bank: AdapterBank, pool: KVPool, *, sizes: Sequence[int], width: int
    ) -> None:
        """sizes: padded ones, ascending · width: pages of the longest sequence."""
        self.captures = 0
        self._forward, self.batch_of, self._bank, self._pool = forward, batch_of, bank, pool
        self._sizes, self.width = tuple(sizes), width
        self._captured: dict[tuple[int, bool], CapturedStep] = {}
        self._memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._rank_bound = bound_of(0)
        self._rows = _Staging(pool, rows=max(sizes), width=width)

    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits of a plan of decode rows, which the next step overwrites; None where only eager code can serve it:
        more rows than the largest size, or an adapter that replaces parameters. ids: see ``Runner.run``."""
        at = bisect_left(self._sizes, len(plan.chunks))
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        lanes = [chunk.sequence.lane for chunk in plan.chunks] + [BASE] * (size - len(plan.chunks))
        if not any(lane != BASE for lane in lanes):
            step = self._captured.get((size, False)) or self._capture(plan, lanes, None, ids)
            return self._replay(step, plan, ids, ())
        self.fit_rank_bound()
        try:
            with self.batch_of(lanes, rank_bound=self._rank_bound) as call:
                step = self._with_adapters(plan, lanes, call, ids)
                return self._replay(step, plan, ids, call.batch.row_slots)
        except BatchError:
            return None

    def captured(self, size: int, has_adapters: bool) -> CapturedStep | None:
        """The step of a padded size, where it was captured."""
        return self._captured.get((size, has_adapters))

    def _with_adapters(
        self, plan: StepPlan, lanes: list[int], call: AdapterCall, ids: torch.Tensor | None
    ) -> CapturedStep:
        """The captured step; captured anew where the adapters of ``call`` touch more modules."""
        found = self._captured.get((len(lanes), True))
        if found is not None and found.call is not None:
            try:
                found.call.check_serves(call)
                return found
            except BatchError:
                pass
        return self._capture(plan, lanes, call, ids)

    def fit_rank_bound(self) -> int:
        """The largest rank that is loaded; what was captured under a smaller one is given up."""
        needed = max((handle.largest_rank for handle in self._bank.handles()), default=0)
        if needed > self._rank_bound:
            self._rank_bound = bound_of(needed)
            self._captured = {key: step for key, step in self._captured.items() if not key[1]}
        return self._rank_bound

    def _capture(
        self, plan: StepPlan, lanes: list[int], call: AdapterCall | None, ids: torch.Tensor | None
    ) -> CapturedStep:
        size = len(lanes)
        step = _static_step(self._pool, size, self.width)
        self._rows.fill(step, plan, ids)
        if call is None:
            replay, logits = self.record(step, lambda: self.batch_of(lanes, rank_bound=None))
        else:
            replay, logits = self.record(step, nullcontext)
        self.captures += 1
        slots_B = None if call is None else call.token_rows(size, 1).slots_M
        captured = self._captured[size, call is not None] = CapturedStep(step, replay, logits, call, slots_B)
        return captured

    def record(
        self, step: StepBatch, bind: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """(what runs the step again, its logits), under the adapters that ``bind`` binds. Runs it once as it is, for
        what is compiled or allocated on first use."""
        with bind():
            self._forward(step)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Adapters may be loaded by another thread meanwhile, whose copies are none of the graph's.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                logits = self._forward(step)
        return graph.replay, logits

    def _replay(
        self, captured: CapturedStep, plan: StepPlan, ids: torch.Tensor | None, slots: Sequence[int]
    ) -> torch.Tensor:
        self._rows.fill(captured.step, plan, ids, slots, captured.slots_B)
        captured.replay()
        return captured.logits


def bound_of(rank: int) -> int:
    """A power of two from 16 up, so that few ranks capture anew."""
    return 1 << (max(16, rank) - 1).bit_length()


def _static_step(pool: KVPool, size: int, width: int) -> StepBatch:
    device = pool.device
    whole = torch.zeros(3, size, dtype=torch.long, device=device)
    rows = DecodeRows(
        page_table_BN=torch.zeros(size, width, dtype=torch.int32, device=device),
        lengths_B=torch.zeros(size, dtype=torch.int32, device=device),
    )
    return StepBatch(
        ids_T=whole[0],
        positions_T=whole[1],
        slots_T=whole[2],
        lanes=(),
        lengths=(),
        rows_W=None,
        lanes_W=(),
        segments=(),
        decode=rows,
        groups=(),
        pool=pool,
    )


class _Staging:
    """Copies plans of decode rows into the buffers of captured steps, from pinned memory where a device reads it.

    The page table of a row is kept on the host while the row stays: a step then adds at most one page to it.
    """

    DEPTH = 2
    """Steps that may wait for the device at once."""

    def __init__(self, pool: KVPool, *, rows: int, width: int) -> None:
        is_pinned = pool.device.type == "cuda"
        self._page_size = pool.page_size
        self._table_BN = torch.zeros(rows, width, dtype=torch.int32)
        self._pages: list[list[int] | None] = [None] * rows  # a sequence that lost its pages comes back with a new list
        self._known: list[list[int]] = [[] for _ in range(rows)]  # what of each row stands in the table
        self._buffers = [
            (
                torch.zeros(5, rows, dtype=torch.long, pin_memory=is_pinned),
                torch.zeros(rows, width, dtype=torch.int32, pin_memory=is_pinned),
                torch.cuda.Event() if is_pinned else None,
            )
            for _ in range(self.DEPTH)
        ]
        self._turn = 0

    def fill(
        self,
        step: StepBatch,
        plan: StepPlan,
        ids: torch.Tensor | None,
        slots: Sequence[int] = (),
        slots_B: torch.Tensor | None = None,
    ) -> None:
        """Rows of padding write to the scratch page and read nothing. ids: see ``Runner.run`` · slots: the adapter of
        each row, padding included, for ``slots_B``."""
        assert step.decode is not None
        whole, table, event = self._buffers[self._turn]
        self._turn = (self._turn + 1) % self.DEPTH
        if event is not None:
            event.synchronize()  # the step before the last has read it
        size, count, page = step.ids_T.shape[0], len(plan.chunks), self._page_size
        width = 1
        rows: list[tuple[int, int, int, int]] = []
        for i, chunk in enumerate(plan.chunks):
            sequence, at = chunk.sequence, chunk.start
            slot = sequence.pages[at // page] * page + at % page
            rows.append((sequence.tokens[at] if ids is None else 0, at, slot, at + 1))
            self._keep_pages(i, sequence.pages)
            width = max(width, len(sequence.pages))
        whole[:4, :size] = torch.tensor(rows + [(0, 0, 0, 0)] * (size - count)).T
        table[:count, :width] = self._table_BN[:count, :width]
        for i, buffer in enumerate((step.ids_T, step.positions_T, step.slots_T, step.decode.lengths_B)):
            buffer.copy_(whole[i, :size], non_blocking=True)
        if slots_B is not None:
            whole[4, :size] = torch.tensor(slots)
            slots_B.copy_(whole[4, :size], non_blocking=True)
        step.decode.page_table_BN[:count, :width].copy_(table[:count, :width], non_blocking=True)
        if event is not None:
            event.record()
        if ids is not None:
            step.ids_T[:count].copy_(ids)

    def _keep_pages(self, row: int, pages: list[int]) -> None:
        if self._pages[row] is not pages:
            self._pages[row], self._known[row] = pages, []
        known = self._known[row]
        if len(known) == len(pages) and known[-1] == pages[-1]:
            return
        # The last one known may have been replaced by an equal one that others share.
        first = max(0, len(known) - 1)
        self._table_BN[row, first : len(pages)] = torch.tensor(pages[first:], dtype=torch.int32)
        self._known[row] = known[:first] + pages[first:]

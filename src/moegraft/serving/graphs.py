"""Decode steps as CUDA graphs: one a padded size and whether there are adapters, which then serves any of them.

A captured step reads static buffers: token ids, positions, slots to write, pages, lengths, and the adapter slot of each
row, which a call with a ``rank_bound`` keeps on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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

    def __call__(self, lanes: Sequence[int], *, rank_bound: int | None) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class CapturedStep:
    """``call``: whose slots the graph reads; None where it was captured without adapters."""

    step: StepBatch
    replay: Callable[[], None]
    logits: torch.Tensor
    call: AdapterCall | None


class DecodeGraphs:
    """Owned by the runner; of the engine's thread."""

    def __init__(
        self, forward: Forward, batch_of: BatchOf, bank: AdapterBank, pool: KVPool, *, sizes: Sequence[int], width: int
    ) -> None:
        """sizes: padded ones, ascending · width: pages of the longest sequence."""
        self.captures = 0
        self._forward, self._batch_of, self._bank, self._pool = forward, batch_of, bank, pool
        self._sizes, self._width = tuple(sizes), width
        self._captured: dict[tuple[int, bool], CapturedStep] = {}
        self._memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._rank_bound = 0

    def run(self, plan: StepPlan) -> torch.Tensor | None:
        """Logits of a plan of decode rows, which the next step overwrites; None where only eager code can serve it:
        more rows than the largest size, or an adapter that replaces parameters."""
        at = bisect_left(self._sizes, len(plan.chunks))
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        lanes = [chunk.sequence.lane for chunk in plan.chunks] + [BASE] * (size - len(plan.chunks))
        if not any(lane != BASE for lane in lanes):
            step = self._captured.get((size, False)) or self._capture(plan, lanes, None)
            return self._replay(step, plan)
        self._fit_rank_bound()
        try:
            with self._batch_of(lanes, rank_bound=self._rank_bound) as call:
                return self._replay(self._with_adapters(plan, lanes, call), plan)
        except BatchError:
            return None

    def captured(self, size: int, has_adapters: bool) -> CapturedStep | None:
        """The step of a padded size, where it was captured."""
        return self._captured.get((size, has_adapters))

    def _with_adapters(self, plan: StepPlan, lanes: list[int], call: AdapterCall) -> CapturedStep:
        """The captured step, with the slots of ``call``; captured anew where its adapters touch more modules."""
        found = self._captured.get((len(lanes), True))
        if found is not None and found.call is not None:
            try:
                found.call.take_rows(call)
                return found
            except BatchError:
                pass
        return self._capture(plan, lanes, call)

    def _fit_rank_bound(self) -> None:
        """The largest rank that is loaded; what was captured under a smaller one is given up."""
        needed = 16
        for name in self._bank.names():
            for module, ranks in self._bank.get(name).ranks.items():
                needed = max(needed, *(ranks[1:] if module in self._bank.layout.experts else ranks[:2]))
        if needed > self._rank_bound:
            self._rank_bound = 1 << (needed - 1).bit_length()
            self._captured = {key: step for key, step in self._captured.items() if not key[1]}

    def _capture(self, plan: StepPlan, lanes: list[int], call: AdapterCall | None) -> CapturedStep:
        """Runs the step once as it is, for what is compiled or allocated on first use, then captures it."""
        size = len(lanes)
        step = _static_step(self._pool, size, self._width)
        _fill(step, plan, self._pool.page_size)
        if call is None:
            with self._batch_of(lanes, rank_bound=None):
                replay, logits = self._record(step)
        else:
            replay, logits = self._record(step)
        self.captures += 1
        captured = self._captured[size, call is not None] = CapturedStep(step, replay, logits, call)
        return captured

    def _record(self, step: StepBatch) -> tuple[Callable[[], None], torch.Tensor]:
        self._forward(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Adapters may be loaded by another thread meanwhile, whose copies are none of the graph's.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = self._forward(step)
        return graph.replay, logits

    def _replay(self, captured: CapturedStep, plan: StepPlan) -> torch.Tensor:
        _fill(captured.step, plan, self._pool.page_size)
        captured.replay()
        return captured.logits


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


def _fill(step: StepBatch, plan: StepPlan, page_size: int) -> None:
    """Copies a plan of decode rows into the buffers; rows of padding write to the scratch page and read nothing."""
    assert step.decode is not None
    sequences = [chunk.sequence for chunk in plan.chunks]
    at = [chunk.start for chunk in plan.chunks]
    padding = [0] * (step.ids_T.shape[0] - len(at))
    pages = [sequence.pages[start // page_size] for sequence, start in zip(sequences, at, strict=True)]
    slots = [page * page_size + start % page_size for page, start in zip(pages, at, strict=True)]
    ids = [sequence.tokens[start] for sequence, start in zip(sequences, at, strict=True)]
    for buffer, values in ((step.ids_T, ids), (step.positions_T, at), (step.slots_T, slots)):
        buffer.copy_(_staged(values + padding, torch.long, buffer.device), non_blocking=True)
    lengths = [start + 1 for start in at] + padding
    step.decode.lengths_B.copy_(_staged(lengths, torch.int32, step.ids_T.device), non_blocking=True)
    width = max(len(sequence.pages) for sequence in sequences)
    table = [sequence.pages + [0] * (width - len(sequence.pages)) for sequence in sequences]
    rows = step.decode.page_table_BN[: len(table), :width]
    rows.copy_(_staged(table, torch.int32, rows.device), non_blocking=True)


def _staged(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host, pinned where a device is to read it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" else tensor

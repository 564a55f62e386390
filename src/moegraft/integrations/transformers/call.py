"""The batch in flight, reachable from every layer without an argument: transformers' hooks carry none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from moegraft.core.tables import ExpertsFactor, LinearFactor
from moegraft.lora.bank import AdapterBatch
from moegraft.lora.collective_bank import GroupBatch
from moegraft.lora.mapping import AdapterMapping


class ActiveCall:
    """One batch of adapters while the model runs on it; shared by all layers.

    ``fixed_rank``: what runs must also serve batches of other adapters, of ranks up to this, on any module.
    ``group``: the adapters of all ranks' rows, where experts see those of other ranks; ``group_shared``: its scratch.
    """

    def __init__(
        self,
        batch: AdapterBatch,
        device: torch.device,
        shared: dict[str, Any],
        *,
        fixed_rank: int | None = None,
        group: GroupBatch | None = None,
        group_shared: dict[str, Any] | None = None,
    ) -> None:
        self.batch = batch
        self.fixed_rank = fixed_rank
        self.device = device
        self._mappings: dict[int, AdapterMapping] = {}
        self._experts_mappings: dict[int, AdapterMapping] = {}
        self._shared = shared
        self._group = group
        self._group_shared = group_shared

    def mapping(self, num_rows: int) -> AdapterMapping:
        """Slots of ``num_rows`` rows, sequence-major; raises BatchError where the batch does not divide them."""
        mapping = self._mappings.get(num_rows)
        if mapping is None:
            mapping = AdapterMapping.for_rows(self.batch.row_slots, num_rows, self.device, self._shared)
            self._mappings[num_rows] = mapping
        return mapping

    def experts_mapping(self, num_rows: int) -> AdapterMapping:
        """What experts read: where rows travel, with the adapters of all ranks' rows."""
        if self._group is None:
            return self.mapping(num_rows)
        mapping = self._experts_mappings.get(num_rows)
        if mapping is None:
            mapping = self._experts_mappings[num_rows] = self._group.mapping(num_rows, self._group_shared)
        return mapping

    @property
    def rows_travel(self) -> bool:
        """Whether ranks exchange rows with adapters: then all of them run every layer with LoRA."""
        return self._group is not None and self._group.has_adapters

    def touches(self, module: str) -> bool:
        """Whether some adapter that the batch stands for has LoRA on the module."""
        return self.fixed_rank is not None or bool(self.batch.max_ranks(module))

    def experts_ranks(self, module: str, num_halves: int) -> tuple[int, int]:
        """Bounds of the (A13, A2) rows of an experts module with ``num_halves`` halves; zeros where it has no LoRA."""
        if self.fixed_rank is not None:
            return num_halves * self.fixed_rank, self.fixed_rank
        ranks = (self.batch if self._group is None else self._group.union).max_ranks(module)
        return (ranks[ExpertsFactor.A13], ranks[ExpertsFactor.A2]) if ranks else (0, 0)

    def linear_rank(self, module: str) -> int:
        """Bound of the rank on a linear map that the batch touches."""
        return self.batch.max_ranks(module)[LinearFactor.A] if self.fixed_rank is None else self.fixed_rank


class CallState:
    """Which call a layer of one grafted model belongs to.

    A context variable, so that threads (and tasks) that call one model at once keep apart; and a binding that every
    thread sees, for engines that run the forward pass on threads of their own.
    """

    def __init__(self) -> None:
        self._bound: ActiveCall | None = None

    def current(self) -> ActiveCall | None:
        entry = _CURRENT.get()
        if entry is not None and entry[0] is self:
            return entry[1]
        return self._bound

    @contextmanager
    def running(self, call: ActiveCall) -> Iterator[None]:
        """The call of this thread or task inside the block."""
        token = _CURRENT.set((self, call))
        try:
            yield
        finally:
            _CURRENT.reset(token)

    @contextmanager
    def bound(self, call: ActiveCall) -> Iterator[None]:
        """The call of every thread that has none of its own inside the block."""
        previous, self._bound = self._bound, call
        try:
            yield
        finally:
            self._bound = previous


_CURRENT: ContextVar[tuple[CallState, ActiveCall] | None] = ContextVar("moegraft_call", default=None)


class BatchScratch:
    """Scratch of a batch, kept while the next one has the same adapters in the same places (a decode loop)."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def of(self, held: AdapterBatch) -> dict[str, Any]:
        key = tuple(handle.residency for handle in held.handles)
        last = self._last  # read once: another thread may put its own batch there
        if last[0] != key:
            last = self._last = (key, {})
        return last[1]

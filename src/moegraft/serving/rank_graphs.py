"""Decode steps of several ranks as CUDA graphs, their collectives inside: rank 0 decides, the others are told.

Ranks that replayed, captured and ran eagerly at once would wait for each other for ever. What a decision rests on may
differ between them for a moment, while an adapter is loaded or unloaded; so it is rank 0's alone, and nothing is
captured with adapters in that moment.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch

from moegraft.core.errors import BatchError
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.scheduler import BASE, StepPlan

Decision = tuple[int, int | None, bool]
"""(padded size, rank bound or None without adapters, whether the step is captured now)."""


class RankGraphs(DecodeGraphs):
    """See ``DecodeGraphs``. ``bound``: the largest rank of an adapter that was held, on any rank."""

    bound = 16

    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """None: only ``follow`` runs graphs."""
        return None

    def forget(self) -> None:
        """Gives up what was captured."""
        self._captured.clear()

    def decide(self, plan: StepPlan, handles: list[Any], *, may_capture: bool) -> Decision | None:
        """What rank 0 decides for a plan of decode rows; None for an eager step. handles: of the plan's adapters ·
        may_capture: no adapter is being loaded or unloaded on any rank."""
        at = bisect_left(self._sizes, len(plan.chunks))
        if at == len(self._sizes) or any(handle.saved for handle in handles):
            return None
        size = self._sizes[at]
        if not handles:
            return size, None, (size, False) not in self._captured
        found = self._captured.get((size, True))
        call = None if found is None else found.call
        if (
            call is not None
            and (call.rank_bound or 0) >= self.bound
            and all(handle.ranks.keys() <= call.modules for handle in handles)
        ):
            return size, call.rank_bound, False
        if not may_capture or any(handle.saved for handle in self._bank.handles()):
            return None
        return size, self.bound, True

    def follow(self, decision: Decision, plan: StepPlan, ids: torch.Tensor | None) -> torch.Tensor | None:
        """Logits of a plan that all ranks run in the same way; None where only eager code can serve its adapters, which
        all ranks find out at the same place of a capture."""
        size, bound, captures = decision
        lanes = [chunk.sequence.lane for chunk in plan.chunks] + [BASE] * (size - len(plan.chunks))
        if bound is None:
            step = self._capture(plan, lanes, None, ids) if captures else self._captured[size, False]
            return self._replay(step, plan, ids, ())
        if captures:
            try:
                with self.batch_of(lanes, rank_bound=bound) as call:
                    return self._replay(self._capture(plan, lanes, call, ids), plan, ids, call.batch.row_slots)
            except BatchError:
                return None
        # What was captured serves these adapters, as rank 0 has seen. A bound would be refused by a rank that has
        # meanwhile loaded an adapter of another kind, which takes no part.
        with self.batch_of(lanes, rank_bound=None) as call:
            return self._replay(self._captured[size, True], plan, ids, call.batch.row_slots)

"""Steps with chunks of prompts as CUDA graphs, by padded number of tokens: decode rows among them are chunks of one.

As for decode steps, one graph serves any chunks of any sequences and adapters: what differs is read from buffers. Eager
code needs more of the host's time for such a step than the device needs to run it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moegraft.core.errors import BatchError
from moegraft.kernels.paged_prefill import PrefillChunks, blocks_of
from moegraft.lora.call import AdapterCall
from moegraft.serving.batch import StepBatch
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.kv_pool import KVPool
from moegraft.serving.scheduler import BASE, StepPlan

_RUN_LENGTH = 64
"""Neighbouring tokens of one adapter, about: it chooses tiles."""


@dataclass(frozen=True)
class _Captured:
    """``buffers``: as ``_Layout.views`` has them on the device · ``call``: None without adapters."""

    buffers: dict[str, torch.Tensor]
    replay: Callable[[], None]
    logits: torch.Tensor
    call: AdapterCall | None


class ChunkGraphs:
    """Of the engine's thread. ``rows``: chunks and sampled rows of a step, at most · ``tokens``: of a step, at most."""

    def __init__(self, graphs: DecodeGraphs, pool: KVPool, *, rows: int, tokens: int) -> None:
        self.captures = 0
        self._graphs, self._pool, self._rows = graphs, pool, rows
        powers = [64 << i for i in range(20)]
        self._sizes = [size for power in powers for size in (power, power * 3 // 2) if size < tokens] + [tokens]
        self._captured: dict[tuple[int, bool, int], _Captured] = {}
        self._staged: list[tuple[dict[str, torch.Tensor], torch.cuda.Event | None]] = []
        self._turn = 0

    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits [W, vocabulary] of a plan, which the next step overwrites; None where only eager code serves it."""
        at = bisect_left(self._sizes, plan.num_tokens)
        if at == len(self._sizes) or len(plan.chunks) > self._rows or ids is not None:
            return None
        size = self._sizes[at]
        lanes = list(dict.fromkeys(chunk.sequence.lane for chunk in plan.chunks if chunk.sequence.lane != BASE))
        if not lanes:
            return self._replay(plan, self._captured.get((size, False, 0)) or self._capture(plan, size, None, 0), {})
        bound = self._graphs.fit_rank_bound()
        try:
            with self._graphs.batch_of(lanes, rank_bound=bound) as call:
                slots = dict(zip(lanes, call.batch.row_slots, strict=True))
                found = self._captured.get((size, True, bound))
                if found is not None and found.call is not None:
                    try:
                        found.call.check_serves(call)
                    except BatchError:
                        found = None
                return self._replay(plan, found or self._capture(plan, size, slots, bound), slots)
        except BatchError:
            return None

    def _capture(self, plan: StepPlan, size: int, slots: dict[int, int] | None, bound: int) -> _Captured:
        buffers = {name: torch.zeros_like(view, device=self._pool.device) for name, view in self._host(size).items()}
        self._fill(plan, size, buffers, slots or {})
        batch_of, rank_bound = self._graphs.batch_of, None if slots is None else bound
        calls: list[AdapterCall] = []

        @contextmanager
        def bind() -> Iterator[None]:
            with batch_of([BASE], rank_bound=rank_bound, slots=buffers["slots"], run_length=_RUN_LENGTH) as call:
                calls.append(call)
                yield

        def bind_wanted() -> AbstractContextManager[Any]:
            return batch_of([BASE], rank_bound=rank_bound, slots=buffers["wanted_slots"])

        replay, logits = self._graphs.record(self._step(buffers, bind_wanted), bind)
        self.captures += 1
        call = None if slots is None else calls[0]
        captured = self._captured[size, slots is not None, bound] = _Captured(buffers, replay, logits, call)
        return captured

    def _replay(self, plan: StepPlan, captured: _Captured, slots: dict[int, int]) -> torch.Tensor:
        self._fill(plan, captured.buffers["ids"].shape[0], captured.buffers, slots)
        captured.replay()
        return captured.logits

    def _host(self, size: int) -> dict[str, torch.Tensor]:
        """Pinned buffers for a step of ``size`` tokens, which no step reads any more."""
        if not self._staged:
            self._staged = [self._allocate() for _ in range(2)]
        whole, event = self._staged[self._turn]
        if event is not None:
            event.synchronize()
        found = {name: whole[name] for name in ("table", "wanted", "wanted_slots", "rows", "tokens", "contexts")}
        found |= {name: whole[name][:size] for name in ("ids", "positions", "kv_slots", "slots")}
        for per_block in self._pool.prefill_blocks:
            found[f"blocks {per_block}"] = whole[f"blocks {per_block}"][: size // per_block + 1 + self._rows]
        return found

    def _allocate(self) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        is_pinned, most, N = self._pool.device.type == "cuda", self._sizes[-1], self._rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=is_pinned)

        buffers = {name: zeros(most, dtype=torch.long) for name in ("ids", "positions", "kv_slots")}
        buffers |= {name: zeros(N) for name in ("rows", "tokens", "contexts", "wanted_slots")}
        buffers |= {"slots": zeros(most), "wanted": zeros(N, dtype=torch.long), "table": zeros(N, self._graphs.width)}
        for per_block in self._pool.prefill_blocks:
            buffers[f"blocks {per_block}"] = zeros(most // per_block + 1 + N, 2)
        return buffers, torch.cuda.Event() if is_pinned else None

    def _fill(self, plan: StepPlan, size: int, buffers: dict[str, torch.Tensor], slots: dict[int, int]) -> None:
        """A plan into the buffers of a captured step. slots: of each lane; the base has none."""
        host = self._host(size)
        page, row = self._pool.page_size, 0
        for name in ("ids", "positions", "kv_slots", "wanted", "tokens"):
            host[name].zero_()
        host["slots"].fill_(-1)
        host["wanted_slots"].fill_(-1)
        wanted, width = 0, 1
        for n, chunk in enumerate(plan.chunks):
            sequence, stop = chunk.sequence, chunk.start + chunk.count
            pages = torch.tensor(sequence.pages[: -(-stop // page)], dtype=torch.int32)
            places, mine = torch.arange(chunk.start, stop), slice(row, row + chunk.count)
            host["ids"][mine] = torch.tensor(sequence.tokens[chunk.start : stop])
            host["positions"][mine] = places
            host["kv_slots"][mine] = pages[places // page].long() * page + places % page
            host["slots"][mine] = slots.get(sequence.lane, -1)
            host["table"][n, : len(pages)] = pages
            host["rows"][n], host["tokens"][n], host["contexts"][n] = row, chunk.count, stop
            row, width = row + chunk.count, max(width, len(pages))
            if chunk.samples:
                host["wanted"][wanted] = row - 1
                host["wanted_slots"][wanted] = slots.get(sequence.lane, -1)
                wanted += 1
        for per_block in self._pool.prefill_blocks:
            blocks, found = host[f"blocks {per_block}"], blocks_of([chunk.count for chunk in plan.chunks], per_block)
            blocks.fill_(-1)
            blocks[: len(found)] = torch.tensor(found, dtype=torch.int32)
        for name, view in host.items():
            target, source = buffers[name], view
            if name == "table":
                target, source = target[:, :width], source[:, :width]
            target.copy_(source, non_blocking=True)
        self._turn = 1 - self._turn
        event = self._staged[1 - self._turn][1]
        if event is not None:
            event.record()

    def _step(
        self, buffers: dict[str, torch.Tensor], bind_wanted: Callable[[], AbstractContextManager[Any]]
    ) -> StepBatch:
        chunks = PrefillChunks(
            rows_N=buffers["rows"],
            tokens_N=buffers["tokens"],
            contexts_N=buffers["contexts"],
            page_table_NP=buffers["table"],
            blocks={per_block: buffers[f"blocks {per_block}"] for per_block in self._pool.prefill_blocks},
        )
        return StepBatch(
            ids_T=buffers["ids"],
            positions_T=buffers["positions"],
            slots_T=buffers["kv_slots"],
            lanes=(),
            lengths=(),
            rows_W=buffers["wanted"],
            lanes_W=(),
            segments=(),
            prefill=chunks,
            decode=None,
            groups=(),
            pool=self._pool,
            bind_wanted=bind_wanted,
        )

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
_BY_TOKEN = ("ids", "positions", "kv_slots", "slots")
_BLOCKS = "blocks of "


@dataclass(frozen=True)
class _Captured:
    """``call``: under which it was captured, None without adapters."""

    replay: Callable[[], None]
    logits: torch.Tensor
    call: AdapterCall | None


class ChunkGraphs:
    """Owned by the engine's thread. ``rows``: chunks and sampled rows of a step, at most · ``tokens``: its tokens, at
    most."""

    def __init__(self, graphs: DecodeGraphs, pool: KVPool, *, rows: int, tokens: int) -> None:
        self.captures = 0
        self._graphs, self._pool, self._rows = graphs, pool, rows
        powers = [64 << i for i in range(20)]
        self._sizes = [size for power in powers for size in (power, power * 3 // 2) if size < tokens] + [tokens]
        self._captured: dict[tuple[int, bool], _Captured] = {}
        is_pinned = pool.device.type == "cuda"
        # Pinned ones in turns, as the device may be a step behind; what graphs read is one set for all of them.
        self._staged = [self._allocate(torch.device("cpu"), is_pinned=is_pinned) for _ in range(2)]
        self._read = [torch.cuda.Event() for _ in range(2)] if is_pinned else []
        self._buffers = self._allocate(pool.device)
        self._turn = 0

    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits [W, vocabulary] of a plan, which the next step overwrites; None where only eager code serves it."""
        at = bisect_left(self._sizes, plan.num_tokens)
        if at == len(self._sizes) or len(plan.chunks) > self._rows or ids is not None:
            return None
        size = self._sizes[at]
        lanes = list(dict.fromkeys(chunk.sequence.lane for chunk in plan.chunks if chunk.sequence.lane != BASE))
        if not lanes:
            found = self._captured.get((size, False)) or self._capture(plan, size, None, None)
            return self._replay(plan, size, found, {})
        bound = self._graphs.fit_rank_bound()
        try:
            with self._graphs.batch_of(lanes, rank_bound=bound) as call:
                slots = dict(zip(lanes, call.batch.row_slots, strict=True))
                found = self._serving(size, call) or self._capture(plan, size, slots, bound)
                return self._replay(plan, size, found, slots)
        except BatchError:
            return None

    def _serving(self, size: int, call: AdapterCall) -> _Captured | None:
        """The captured step, where it serves the adapters of ``call``."""
        found = self._captured.get((size, True))
        if found is None or found.call is None or found.call.rank_bound != call.rank_bound:
            return None
        try:
            found.call.check_serves(call)
        except BatchError:
            return None
        return found

    def _capture(self, plan: StepPlan, size: int, slots: dict[int, int] | None, rank_bound: int | None) -> _Captured:
        self._fill(plan, size, slots or {})
        batch_of, buffers = self._graphs.batch_of, _views(self._buffers, size)
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
        captured = self._captured[size, slots is not None] = _Captured(replay, logits, call)
        return captured

    def _replay(self, plan: StepPlan, size: int, captured: _Captured, slots: dict[int, int]) -> torch.Tensor:
        self._fill(plan, size, slots)
        captured.replay()
        return captured.logits

    def _allocate(self, device: torch.device, *, is_pinned: bool = False) -> dict[str, torch.Tensor]:
        most, N = self._sizes[-1], self._rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=is_pinned)

        buffers = {name: zeros(most, dtype=torch.long) for name in ("ids", "positions", "kv_slots")}
        buffers |= {name: zeros(N) for name in ("rows", "tokens", "contexts", "wanted_slots")}
        buffers |= {"slots": zeros(most), "wanted": zeros(N, dtype=torch.long), "table": zeros(N, self._graphs.width)}
        for per_block in self._pool.prefill_blocks:
            buffers[_BLOCKS + str(per_block)] = zeros(most // per_block + 1 + N, 2)
        return buffers

    def _fill(self, plan: StepPlan, size: int, slots: dict[int, int]) -> None:
        """A plan into the buffers that captured steps read. slots: of each lane; the base has none."""
        if self._read:
            self._read[self._turn].synchronize()
        host = self._staged[self._turn]
        width = self._write(plan, host, slots)
        for name, source in _views(host, size).items():
            target = _views(self._buffers, size)[name]
            if name == "table":
                target, source = target[:, :width], source[:, :width]
            target.copy_(source, non_blocking=True)
        if self._read:
            self._read[self._turn].record()
        self._turn = 1 - self._turn

    def _write(self, plan: StepPlan, host: dict[str, torch.Tensor], slots: dict[int, int]) -> int:
        """Pages of the longest context. Rows of padding are the base's, write to the scratch page and are read by
        none."""
        page, row, wanted, width = self._pool.page_size, 0, 0, 1
        for name in ("ids", "positions", "kv_slots", "wanted", "tokens"):
            host[name].zero_()
        for name in ("slots", "wanted_slots"):
            host[name].fill_(-1)
        for n, chunk in enumerate(plan.chunks):
            sequence, stop, slot = chunk.sequence, chunk.start + chunk.count, slots.get(chunk.sequence.lane, -1)
            pages = torch.tensor(sequence.pages[: -(-stop // page)], dtype=torch.int32)
            places, mine = torch.arange(chunk.start, stop), slice(row, row + chunk.count)
            host["ids"][mine] = torch.tensor(sequence.tokens[chunk.start : stop])
            host["positions"][mine] = places
            host["kv_slots"][mine] = pages[places // page].long() * page + places % page
            host["slots"][mine] = slot
            host["table"][n, : len(pages)] = pages
            host["rows"][n], host["tokens"][n], host["contexts"][n] = row, chunk.count, stop
            row, width = row + chunk.count, max(width, len(pages))
            if chunk.samples:
                host["wanted"][wanted], host["wanted_slots"][wanted] = row - 1, slot
                wanted += 1
        for per_block in self._pool.prefill_blocks:
            blocks, found = host[_BLOCKS + str(per_block)], blocks_of([chunk.count for chunk in plan.chunks], per_block)
            blocks.fill_(-1)
            blocks[: len(found)] = torch.tensor(found, dtype=torch.int32)
        return width

    def _step(
        self, buffers: dict[str, torch.Tensor], bind_wanted: Callable[[], AbstractContextManager[Any]]
    ) -> StepBatch:
        chunks = PrefillChunks(
            rows_N=buffers["rows"],
            tokens_N=buffers["tokens"],
            contexts_N=buffers["contexts"],
            page_table_NP=buffers["table"],
            blocks={per_block: buffers[_BLOCKS + str(per_block)] for per_block in self._pool.prefill_blocks},
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


def _views(buffers: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """What a step of ``size`` tokens uses of the buffers."""
    found = dict(buffers)
    for name, whole in buffers.items():
        if name in _BY_TOKEN:
            found[name] = whole[:size]
        elif name.startswith(_BLOCKS):
            found[name] = whole[: size // int(name.removeprefix(_BLOCKS)) + 1 + buffers["rows"].shape[0]]
    return found

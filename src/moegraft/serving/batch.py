"""A StepPlan as tensors: what the model, its attention and the head are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.serving.attention import AttentionOptions
from moegraft.serving.attention.gathered import attend_gathered
from moegraft.serving.kv_pool import KVPool
from moegraft.serving.pages import SCRATCH_PAGE
from moegraft.serving.scheduler import BASE, StepPlan


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows [row, row + count) of a step: the last ``count`` tokens of a context of ``context`` tokens in ``pages``."""

    row: int
    count: int
    context: int
    pages: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """T rows, padding included, of which W give logits.

    ids_T, positions_T, slots_T (page * S + offset) int64 · lanes, lengths: the adapter of each chunk and its rows, BASE
    for padding · rows_W: those whose logits are wanted, ``lanes_W`` their adapters; None for all rows ·
    segments: rows by sequence.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    lanes: tuple[int, ...]
    lengths: tuple[int, ...]
    rows_W: torch.Tensor | None
    lanes_W: tuple[int, ...]
    segments: tuple[Segment, ...]
    pool: KVPool

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """See AttentionStep. Rows of padding give zeros."""
        kv = self.pool.layers[layer]
        q_THC = query.squeeze(2)
        kv.write(self.slots_T, key.squeeze(2), value.squeeze(2))
        out_THC = value.new_zeros(q_THC.shape[0], q_THC.shape[1], value.shape[-1])
        for segment in self.segments:
            rows = slice(segment.row, segment.row + segment.count)
            k_LHC = kv.keys[segment.pages].flatten(0, 1)[: segment.context]
            v_LHC = kv.values[segment.pages].flatten(0, 1)[: segment.context]
            out_THC[rows] = attend_gathered(q_THC[rows], k_LHC, v_LHC, options)
        return out_THC


def pack(
    plan: StepPlan, pool: KVPool, *, padded_to: tuple[int, int], device: torch.device, row_by_row: bool = False
) -> StepBatch:
    """The rows of a plan, chunk after chunk, and padding up to ``padded_to`` rows and rows for the head.

    row_by_row: every row is a segment of its own, so that a prompt's attention has the bits of decode steps.
    """
    size = pool.page_size
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lanes_W: list[int] = []
    wanted: list[int] = []
    segments: list[Segment] = []
    for chunk in plan.chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        pages = torch.tensor(sequence.pages[: -(-end // size)], device=device)
        if row_by_row:
            segments += [
                Segment(row=len(ids) + i, count=1, context=at + 1, pages=pages[: at // size + 1])
                for i, at in enumerate(range(chunk.start, end))
            ]
        else:
            segments.append(Segment(row=len(ids), count=chunk.count, context=end, pages=pages))
        ids += sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [sequence.pages[at // size] * size + at % size for at in range(chunk.start, end)]
        if chunk.samples:
            wanted.append(len(ids) - 1)
            lanes_W.append(sequence.lane)
    padding, wanted_padding = padded_to[0] - len(ids), padded_to[1] - len(wanted)
    is_whole = padded_to[0] == padded_to[1] and len(wanted) == len(ids)  # decode rows and their padding
    return StepBatch(
        ids_T=torch.tensor(ids + [0] * padding, device=device),
        positions_T=torch.tensor(positions + [0] * padding, device=device),
        slots_T=torch.tensor(slots + [SCRATCH_PAGE * size] * padding, device=device),
        lanes=tuple(chunk.sequence.lane for chunk in plan.chunks) + (BASE,) * bool(padding),
        lengths=tuple(chunk.count for chunk in plan.chunks) + (padding,) * bool(padding),
        rows_W=None if is_whole else torch.tensor(wanted + [0] * wanted_padding, device=device),
        lanes_W=(*lanes_W, *(BASE,) * wanted_padding),
        segments=tuple(segments),
        pool=pool,
    )

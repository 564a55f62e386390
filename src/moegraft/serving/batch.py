"""A StepPlan as tensors: what the model, its attention and the head are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from moegraft.kernels.paged_prefill import LARGEST_HEAD, PrefillChunks, blocks_of
from moegraft.serving.attention import AttentionOptions
from moegraft.serving.attention.gathered import attend_gathered, attend_together
from moegraft.serving.kv_pool import KVPool, LayerKV
from moegraft.serving.pages import SCRATCH_PAGE
from moegraft.serving.scheduler import BASE, StepPlan
from moegraft.serving.states import StatePiece, pieces_of


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows [row, row + count) of a step: the last ``count`` tokens of a context of ``context`` tokens in ``pages``."""

    row: int
    count: int
    context: int
    pages: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """The first B rows of a step, each the last token of its context: pages int32 [B, N], tokens int32 [B]."""

    page_table_BN: torch.Tensor
    lengths_B: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Rows of one token whose contexts are about as long, gathered together: rows [B], pages [B, N], tokens [B]."""

    rows_B: torch.Tensor
    page_table_BN: torch.Tensor
    lengths_B: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """T rows, padding included, of which W give logits.

    ids_T, positions_T, slots_T (page * S + offset) int64 · lanes, lengths: the adapter of each chunk and its rows, BASE
    for padding · rows_W: those whose logits are wanted, ``lanes_W`` their adapters; None for all rows ·
    decode: rows that the paged kernel takes, where there is one · groups: the same without one · segments: the other
    rows, by sequence · prefill: the same, for the kernel that takes them · states: rows as recurrent mixers see them,
    where the model has such · bind_wanted: binds the adapters of the wanted rows, in place of ``lanes_W``.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    lanes: tuple[int, ...]
    lengths: tuple[int, ...]
    rows_W: torch.Tensor | None
    lanes_W: tuple[int, ...]
    segments: tuple[Segment, ...]
    decode: DecodeRows | None
    groups: tuple[DecodeGroup, ...]
    pool: KVPool
    states: tuple[StatePiece, ...] = ()
    prefill: PrefillChunks | None = None
    bind_wanted: Callable[[], AbstractContextManager[Any]] | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """See AttentionStep. Rows of padding give zeros."""
        kv, latents = self.pool.layers[layer], options.latents
        q_THC, k_THC, v_THC = query.squeeze(2), key.squeeze(2), value.squeeze(2)
        if latents is None:
            kv.write(self.slots_T, k_THC, v_THC)
        else:
            kv.write_latents(self.slots_T, torch.cat([k_THC, v_THC], dim=2))
        decoded_BHC = None if self.decode is None else _decode(q_THC, kv, self.decode, options)
        if decoded_BHC is not None and decoded_BHC.shape[0] == q_THC.shape[0]:
            return decoded_BHC
        out_THC = q_THC.new_zeros(*q_THC.shape[:2], value.shape[-1] if latents is None else latents.value_size)
        if decoded_BHC is not None:
            out_THC[: decoded_BHC.shape[0]] = decoded_BHC
        for group in self.groups:
            out_THC.index_copy_(0, group.rows_B, _attend_group(q_THC[group.rows_B], kv, group, options))
        if self.prefill is not None and latents is None and max(q_THC.shape[2], v_THC.shape[2]) <= LARGEST_HEAD:
            _prefill(out_THC, q_THC, kv, self.prefill, options)
            return out_THC
        for segment in self.segments:
            rows = slice(segment.row, segment.row + segment.count)
            k_LHC, v_LHC = kv.gather(segment.pages, segment.context)
            if latents is not None:
                k_LHC, v_LHC = latents.expand(segment.row, k_LHC[:, 0])
            out_THC[rows] = attend_gathered(q_THC[rows], k_LHC, v_LHC, options)
        return out_THC


def _attend_group(q_BHC: torch.Tensor, kv: LayerKV, group: DecodeGroup, options: AttentionOptions) -> torch.Tensor:
    latents = options.latents
    k_BLHC = kv.keys[group.page_table_BN].flatten(1, 2)
    if latents is None:
        v_BLHC = kv.values[group.page_table_BN].flatten(1, 2)
        return attend_together(q_BHC, k_BLHC, v_BLHC, group.lengths_B, options)
    rows = group.rows_B.tolist()
    if not latents.can_absorb:
        return _attend_expanded(q_BHC, kv, group, rows, options)
    v_BLHC = k_BLHC[..., : latents.latent_size]
    out_BHR = attend_together(latents.absorb(q_BHC, rows), k_BLHC, v_BLHC, group.lengths_B, options)
    return latents.release(out_BHR, rows)


def _attend_expanded(
    q_BHC: torch.Tensor, kv: LayerKV, group: DecodeGroup | DecodeRows, rows: Sequence[int], options: AttentionOptions
) -> torch.Tensor:
    """Row by row: what the adapters in flight do to kv_b_proj cannot be absorbed."""
    assert options.latents is not None
    out = []
    for i, (row, length) in enumerate(zip(rows, group.lengths_B.tolist(), strict=True)):
        k_LC = kv.keys[group.page_table_BN[i]].flatten(0, 1)[:length, 0]
        k_LHC, v_LHC = options.latents.expand(row, k_LC)
        out.append(attend_gathered(q_BHC[i : i + 1], k_LHC, v_LHC, options))
    return torch.cat(out)


def _decode(q_THC: torch.Tensor, kv: LayerKV, rows: DecodeRows, options: AttentionOptions) -> torch.Tensor:
    from moegraft.kernels.paged_decode.host import paged_decode  # needs Triton

    q_BHC, values, latents = q_THC[: rows.lengths_B.shape[0]].contiguous(), kv.values, options.latents
    places = range(q_BHC.shape[0])
    if latents is not None:
        if not latents.can_absorb:
            latents.check_can_expand()
            return _attend_expanded(q_BHC, kv, rows, places, options)
        q_BHC, values = latents.absorb(q_BHC, places), kv.keys
    out_BHC = paged_decode(
        q_BHC,
        kv.keys,
        values,
        rows.page_table_BN,
        rows.lengths_B,
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
        sinks_H=options.sinks_H,
    )
    return out_BHC if latents is None else latents.release(out_BHC[..., : latents.latent_size], places)


def _prefill(
    out_THC: torch.Tensor, q_THC: torch.Tensor, kv: LayerKV, chunks: PrefillChunks, options: AttentionOptions
) -> None:
    from moegraft.kernels.paged_prefill.host import paged_prefill  # needs Triton

    paged_prefill(
        out_THC,
        q_THC.contiguous(),
        kv.keys,
        kv.values,
        chunks,
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
        sinks_H=options.sinks_H,
    )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How plans become rows. row_by_row: every row is a segment, or decode row, of its own, so that a prompt's
    attention has the bits of decode steps · has_kernel: rows that stand alone go to the paged kernel · is_grouped:
    without one, they are gathered together, and a row's bits follow the longest context among them · has_states: the
    model has recurrent mixers."""

    pool: KVPool
    row_by_row: bool
    has_kernel: bool
    is_grouped: bool
    has_states: bool = False


def pack(plan: StepPlan, packing: Packing, *, padded_to: tuple[int, int]) -> StepBatch:
    """The rows of a plan, chunk after chunk, and padding up to ``padded_to`` rows and rows for the head."""
    pool, row_by_row = packing.pool, packing.row_by_row
    device = pool.device
    size = pool.page_size
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lanes_W: list[int] = []
    wanted: list[int] = []
    spans: list[tuple[int, int, int, list[int]]] = []  # of segments: first row, rows, tokens and pages of the context
    alone: list[tuple[list[int], int]] = []  # pages and length of rows of one token, which come first
    has_alone = packing.has_kernel or packing.is_grouped
    for chunk in plan.chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        if has_alone and (row_by_row or chunk.count == 1):
            alone += [(sequence.pages, at + 1) for at in range(chunk.start, end)]
        else:
            starts = range(chunk.start, end) if row_by_row else range(chunk.start, chunk.start + 1)
            for i, at in enumerate(starts):
                stop = at + 1 if row_by_row else end
                spans.append((len(ids) + i, stop - at, stop, sequence.pages[: -(-stop // size)]))
        ids += sequence.tokens[chunk.start : end] or [0]  # not known yet
        positions += range(chunk.start, end)
        slots += [sequence.pages[at // size] * size + at % size for at in range(chunk.start, end)]
        if chunk.samples:
            wanted.append(len(ids) - 1)
            lanes_W.append(sequence.lane)
    padding, wanted_padding = padded_to[0] - len(ids), padded_to[1] - len(wanted)
    if packing.has_kernel and row_by_row:
        alone += [([SCRATCH_PAGE], 0)] * padding  # the kernel's tiles follow the number of rows
    segments, chunks = _segments(spans, pool)
    is_whole = padded_to[0] == padded_to[1] and len(wanted) == len(ids)  # decode rows and their padding
    return StepBatch(
        ids_T=_on(device, ids + [0] * padding),
        positions_T=_on(device, positions + [0] * padding),
        slots_T=_on(device, slots + [SCRATCH_PAGE * size] * padding),
        lanes=tuple(chunk.sequence.lane for chunk in plan.chunks) + (BASE,) * bool(padding),
        lengths=tuple(chunk.count for chunk in plan.chunks) + (padding,) * bool(padding),
        rows_W=None if is_whole else _on(device, wanted + [0] * wanted_padding),
        lanes_W=(*lanes_W, *(BASE,) * wanted_padding),
        segments=segments,
        prefill=chunks if packing.has_kernel and not row_by_row else None,
        decode=_decode_rows(alone, device) if alone and packing.has_kernel else None,
        groups=() if packing.has_kernel else _groups(alone, size, device),
        pool=pool,
        states=pieces_of(plan.chunks, device, padded_to=padded_to[0]) if packing.has_states else (),
    )


def _decode_rows(rows: list[tuple[list[int], int]], device: torch.device) -> DecodeRows:
    width = max(len(pages) for pages, _ in rows)
    table = [pages + [SCRATCH_PAGE] * (width - len(pages)) for pages, _ in rows]
    return DecodeRows(
        page_table_BN=_on(device, table, torch.int32),
        lengths_B=_on(device, [length for _, length in rows], torch.int32),
    )


def _segments(
    spans: Sequence[tuple[int, int, int, list[int]]], pool: KVPool
) -> tuple[tuple[Segment, ...], PrefillChunks | None]:
    """(first row, rows, tokens and pages of the context) of each, as segments and as chunks of the kernel."""
    if not spans:
        return (), None
    device, width = pool.device, max(len(pages) for *_, pages in spans)
    table_NP = _on(device, [pages + [SCRATCH_PAGE] * (width - len(pages)) for *_, pages in spans], torch.int32)
    sizes_3N = _on(device, [list(each) for each in zip(*(span[:3] for span in spans), strict=True)], torch.int32)
    segments = tuple(
        Segment(row=row, count=count, context=context, pages=table_NP[n, : len(pages)])
        for n, (row, count, context, pages) in enumerate(spans)
    )
    chunks = PrefillChunks(
        rows_N=sizes_3N[0],
        tokens_N=sizes_3N[1],
        contexts_N=sizes_3N[2],
        page_table_NP=table_NP,
        blocks={
            size: _on(device, blocks_of([count for _, count, _, _ in spans], size), torch.int32)
            for size in pool.prefill_blocks
        },
    )
    return segments, chunks


def _on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Without waiting for what the device runs."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _groups(rows: list[tuple[list[int], int]], page_size: int, device: torch.device) -> tuple[DecodeGroup, ...]:
    """Rows in the order of their lengths, cut where a context is more than twice the shortest of its group."""
    order = sorted(range(len(rows)), key=lambda row: rows[row][1])
    cuts: list[list[int]] = []
    for row in order:
        if not cuts or rows[row][1] > 2 * rows[cuts[-1][0]][1] + 4 * page_size:
            cuts.append([])
        cuts[-1].append(row)
    groups = []
    for members in cuts:
        width = -(-rows[members[-1]][1] // page_size)
        table = [rows[row][0][:width] + [SCRATCH_PAGE] * (width - len(rows[row][0])) for row in members]
        groups.append(
            DecodeGroup(
                rows_B=torch.tensor(members, device=device),
                page_table_BN=torch.tensor(table, device=device),
                lengths_B=torch.tensor([rows[row][1] for row in members], device=device),
            )
        )
    return tuple(groups)

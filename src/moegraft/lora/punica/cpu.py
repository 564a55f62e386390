"""PunicaWrapperCPU: the primitives in plain torch. Right on every device, made for the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import torch

from moegraft.core.halves import split_halves
from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field, LinearFactor, LinearTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica.base import PunicaWrapperBase, Segments
from moegraft.lora.rows import AdapterRows, distinct_slots, number_slots

FEW_ROWS = 64  # of a decode step: looking for rows that share a segment costs more than it saves


class PunicaWrapperCPU(PunicaWrapperBase):
    """Factors are copied out of their pages, once a segment (experts) or once a batch (linear maps), then multiplied
    in one grouped GEMM."""

    def moe_lora_align_block_size(
        self, expert_N: torch.Tensor, slot_N: torch.Tensor, context: MoELoRAContext, sizes: LayerSizes
    ) -> LoRASegments:
        tables, rows = context.tables, context.rows
        if rows.host is not None and rows.factors is not None:
            slots, factors = rows.factors.segments(rows).slots, rows.factors
        else:
            slots, factors = distinct_slots(slot_N.tolist()), BatchFactors()
        if context.group is not None:  # rows of other ranks too
            slots = context.group.slots
        E, slot_N = tables.expert_index.shape[1], slot_N.long()
        adapter_N = number_slots(slots, slot_N.device)[slot_N]
        is_local_N = (expert_N >= 0) & (expert_N < E) & (adapter_N >= 0)
        position_N = tables.expert_index[slot_N, torch.where(is_local_N, expert_N, 0)]
        rows_L = (is_local_N & (position_N >= 0)).nonzero().squeeze(1)
        if rows_L.shape[0] <= FEW_ROWS:  # every row by itself
            offsets = tuple(range(rows_L.shape[0] + 1))
            return LoRASegments(slots, rows_L, offsets, adapter_N[rows_L], position_N[rows_L].long(), factors)
        key_L, order_L = torch.sort(adapter_N[rows_L] * E + position_N[rows_L], stable=True)
        key_G, count_G = torch.unique_consecutive(key_L, return_counts=True)
        offsets = tuple(accumulate(count_G.tolist(), initial=0))
        return LoRASegments(slots, rows_L[order_L], offsets, key_G // E, key_G % E, factors)

    def add_lora_w13(
        self,
        u_NGF: torch.Tensor,
        x_ND: torch.Tensor,
        segments: Segments,
        tables: ExpertsTables,
        *,
        num_halves: int = 2,
        is_interleaved: bool = False,
    ) -> None:
        assert isinstance(segments, LoRASegments), "segments come from this wrapper"
        v_LR = self._shrink13(x_ND, segments, tables)
        if v_LR is None:
            return
        if num_halves == 2 and not is_interleaved and add_both_halves(u_NGF, v_LR, segments, tables):
            return
        gate_NF, up_NF = split_halves(u_NGF, num_halves=num_halves, is_interleaved=is_interleaved)
        if num_halves == 2:
            add_expanded(gate_NF, v_LR, segments, tables, ExpertsFactor.B_GATE)
        add_expanded(up_NF, v_LR, segments, tables, ExpertsFactor.B_UP)

    def _shrink13(self, x_ND: torch.Tensor, segments: LoRASegments, tables: ExpertsTables) -> torch.Tensor | None:
        """Low-rank rows of all lanes of w13."""
        return shrink_rows(x_ND, segments, tables, ExpertsFactor.A13)

    def add_lora_w2(self, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments, tables: ExpertsTables) -> None:
        assert isinstance(segments, LoRASegments), "segments come from this wrapper"
        v_LR = shrink_rows(h_NF, segments, tables, ExpertsFactor.A2)
        if v_LR is not None:
            add_expanded(y_ND, v_LR, segments, tables, ExpertsFactor.B2)

    def add_lora_linear(
        self,
        y_MO: torch.Tensor,
        x_MI: torch.Tensor,
        rows: AdapterRows,
        tables: LinearTables,
        *,
        rank_bound: int,
        bias_O: torch.Tensor | None = None,
    ) -> None:
        segments = segments_of(rows)
        v_LR = shrink_linear(x_MI, segments, tables)
        v_LR = None if v_LR is None else v_LR.to(x_MI.dtype)
        delta_LO = linear_delta(y_MO, v_LR, segments, tables, bias_O=bias_O)
        if delta_LO is None:
            return
        if segments.is_whole:
            y_MO.add_(delta_LO)
        else:
            add_rows(y_MO, segments.rows_L, delta_LO)

    def add_lora_linears(
        self,
        ys: Sequence[torch.Tensor],
        x_MI: torch.Tensor,
        rows: AdapterRows,
        tables: Sequence[LinearTables],
        *,
        rank_bound: int,
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        segments = segments_of(rows)
        stacked = segments.factors.stacked(tables, x_MI.shape[1], [y.shape[1] for y in ys], segments.slots)
        if stacked is None:
            super().add_lora_linears(ys, x_MI, rows, tables, rank_bound=rank_bound, biases=biases)
            return
        a_SIR, b_SRO = stacked
        x_LI = x_MI if segments.is_whole else x_MI.index_select(0, segments.rows_L)
        v_LR = grouped_mm(x_LI.float(), a_SIR, segments.offsets).to(x_MI.dtype).float()
        first = 0
        for y_MO, each_SRO in zip(ys, b_SRO, strict=True):
            last = first + each_SRO.shape[1]
            delta_LO = grouped_mm(v_LR[:, first:last], each_SRO, segments.offsets)
            first = last
            if segments.is_whole:
                y_MO.add_(delta_LO)
            else:
                add_rows(y_MO, segments.rows_L, delta_LO)


@dataclass(frozen=True)
class LoRASegments:
    """Rows that take part in LoRA, sorted by adapter (and expert): one segment per distinct pair.

    Segment g holds the caller's rows ``rows_L[offsets[g]:offsets[g+1]]``; its adapter has the slot
    ``slots[adapter_G[g]]`` and its expert stands at ``position_G[g]`` among the experts that the adapter holds (None
    where the module has no experts). ``is_whole``: the segments take all rows, in the caller's order. ``factors``: what
    was read of the adapters' pages.

    Example: slots (3, 7); rows 0..4 with (slot, position) = (7,0) base (3,2) (7,0) (3,1) give
    rows_L = [4, 2, 0, 3], offsets = (0, 1, 2, 4), adapter_G = [0, 0, 1], position_G = [1, 2, 0].
    """

    slots: tuple[int, ...]
    rows_L: torch.Tensor
    offsets: tuple[int, ...]
    adapter_G: torch.Tensor
    position_G: torch.Tensor | None
    factors: BatchFactors
    is_whole: bool = False

    @property
    def is_empty(self) -> bool:
        return self.offsets[-1] == 0

    def per_row(self, values_G: torch.Tensor) -> torch.Tensor:
        """Each segment's value (first dimension G) for each of its rows (first dimension L)."""
        if self.offsets[-1] == values_G.shape[0]:  # one row each: the shape of a decode step
            return values_G
        counts = torch.tensor([b - a for a, b in pairwise(self.offsets)], device=values_G.device)
        return values_G.repeat_interleave(counts, dim=0)

    def rows_of_segments(self) -> list[tuple[int, torch.Tensor]]:
        """(slot, rows) of every segment of a map without experts: one an adapter."""
        parts = self.rows_L.split([b - a for a, b in pairwise(self.offsets)])
        return list(zip(self.slots, parts, strict=True))


def segments_of(rows: AdapterRows) -> LoRASegments:
    """The rows with an adapter, one segment an adapter: what a linear map reads. Waits for the device where the host
    does not know them."""
    if rows.host is None or rows.factors is None:
        return _segments(rows.slots_M, rows.host, BatchFactors())
    return rows.factors.segments(rows)


def _segments(slots_M: torch.Tensor, host: tuple[int, ...] | None, factors: BatchFactors) -> LoRASegments:
    slots = distinct_slots(tuple(slots_M.tolist()) if host is None else host)
    adapter_M = number_slots(slots, slots_M.device)[slots_M.long()]
    order_M = torch.sort(adapter_M, stable=True).indices
    counts = torch.bincount(adapter_M + 1, minlength=len(slots) + 1).tolist()
    return LoRASegments(
        slots=slots,
        rows_L=order_M[counts[0] :],
        offsets=tuple(accumulate(counts[1:], initial=0)),
        adapter_G=torch.arange(len(slots), device=slots_M.device),
        position_G=None,
        factors=factors,
        is_whole=counts[0] == 0 and bool((adapter_M[1:] >= adapter_M[:-1]).all()),
    )


@dataclass(frozen=True)
class FactorIndex:
    """One factor of S adapters, ready to be gathered.

    unit_SHR: first unit in the pool of lane r of the expert at position h (H = 1 without experts); lanes past an
    adapter's rank repeat its last row. rank_S and lane_S: Field.RANK and Field.LANE. ``is_uniform``: every adapter
    has rank ``max_rank`` and starts at lane 0.
    """

    unit_SHR: torch.Tensor
    unit: int
    rank_S: torch.Tensor
    lane_S: torch.Tensor
    max_rank: int
    is_uniform: bool

    @classmethod
    def of(
        cls, tables: ExpertsTables | LinearTables, factor: int, row_len: int, slots: Sequence[int]
    ) -> FactorIndex | None:
        """None where no adapter has the factor."""
        device = tables.factors.device
        desc_S = tables.factors[list(slots), factor].long()
        rank_S = desc_S[:, Field.RANK]
        max_rank = int(rank_S.max()) if len(slots) else 0
        if max_rank == 0:
            return None
        positions = tables.expert_index.shape[1] if isinstance(tables, ExpertsTables) else 1
        lane_SR = torch.minimum(torch.arange(max_rank, device=device), (rank_S - 1).clamp(min=0)[:, None])
        row_SHR = torch.arange(positions, device=device)[:, None] * desc_S[:, Field.EXPERT_STRIDE, None, None]
        row_SHR = row_SHR + lane_SR[:, None]
        rows_per_page = tables.page_elems // row_len
        # Positions past those that an adapter holds are never asked for; they only must not leave the table.
        page_SHR = desc_S[:, Field.FIRST_PAGE, None, None] + row_SHR // rows_per_page
        page_SHR = page_SHR.clamp(max=tables.page_table.shape[1] - 1)
        slot_S11 = torch.tensor(slots, device=device)[:, None, None]
        elem_SHR = tables.page_table[slot_S11, page_SHR].long() * tables.page_elems
        elem_SHR += desc_S[:, Field.OFFSET, None, None] + (row_SHR % rows_per_page) * row_len
        # Rows are gathered in units that divide a row, a page and every offset into one: one view of the pool serves
        # any row length. Where the row length does not divide the page, offsets are no multiples of it.
        unit = math.gcd(row_len, tables.page_elems, *desc_S[:, Field.OFFSET].tolist())
        lane_S = desc_S[:, Field.LANE]
        is_uniform = int(rank_S.min()) == max_rank and int(lane_S.max()) == 0
        return cls(elem_SHR // unit, unit, rank_S, lane_S, max_rank, is_uniform)

    def read(
        self,
        tables: ExpertsTables | LinearTables,
        unit_GR: torch.Tensor,
        row_len: int,
        adapter_G: torch.Tensor | slice,
    ) -> torch.Tensor:
        """Rows from ``unit_GR``, copied: [G, max_rank, row_len]; zeros where an adapter lacks the factor."""
        units = unit_GR
        if self.unit != row_len:
            units = unit_GR.unsqueeze(-1) + torch.arange(row_len // self.unit, device=unit_GR.device)
        flat = tables.pool.view(-1, self.unit).index_select(0, units.flatten())
        rows_GRI = flat.view(*unit_GR.shape, row_len)
        if self.is_uniform:
            return rows_GRI
        # Where an adapter lacks the factor its descriptor points at something else's memory, and 0 * NaN is NaN.
        return rows_GRI.masked_fill_((self.rank_S[adapter_G] == 0)[:, None, None], 0)


def _pair(gate: FactorIndex, up: FactorIndex) -> tuple[FactorIndex, int, int] | None:
    rank, lane = gate.max_rank, int(up.lane_S[0])
    is_even = gate.is_uniform and gate.unit == up.unit and bool((up.rank_S == rank).all() & (up.lane_S == lane).all())
    if not is_even:
        return None
    unit_SHR = torch.cat([gate.unit_SHR, up.unit_SHR], dim=2)
    return FactorIndex(unit_SHR, gate.unit, gate.rank_S, gate.lane_S, 2 * rank, is_uniform=True), rank, lane


class BatchFactors:
    """What was derived from the adapters of one batch, once, and is read by every layer call while the batch lives.

    The bank moves no page of an adapter in use, so the indices stay true as long as the batch is held.
    """

    def __init__(self) -> None:
        self._indices: dict[tuple[int, int, tuple[int, ...]], FactorIndex | None] = {}
        self._copies: dict[tuple[int, int, tuple[int, ...]], torch.Tensor] = {}
        self._pairs: dict[tuple[int, ...], tuple[FactorIndex, int, int] | None] = {}
        self._stacked: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]] | None] = {}
        self._segments: WeakKeyDictionary[AdapterRows, LoRASegments] = WeakKeyDictionary()

    def segments(self, rows: AdapterRows) -> LoRASegments:
        """The rows with an adapter, one segment an adapter."""
        segments = self._segments.get(rows)
        if segments is None:
            segments = self._segments[rows] = _segments(rows.slots_M, rows.host, self)
        return segments

    def index(
        self, tables: ExpertsTables | LinearTables, factor: int, row_len: int, slots: tuple[int, ...]
    ) -> FactorIndex | None:
        """The index of a factor of the adapters in ``slots``; None where none of them has it."""
        key = (id(tables), factor, slots)
        if key not in self._indices:
            self._indices[key] = FactorIndex.of(tables, factor, row_len, slots)
        return self._indices[key]

    def pair(self, tables: ExpertsTables, row_len: int, slots: tuple[int, ...]) -> tuple[FactorIndex, int, int] | None:
        """B of gate and up as one factor, its rank in each, and the lane where up's begin; None where the adapters in
        ``slots`` do not all have both, of one rank."""
        key = (id(tables), row_len, *slots)
        if key not in self._pairs:
            gate = self.index(tables, ExpertsFactor.B_GATE, row_len, slots)
            up = self.index(tables, ExpertsFactor.B_UP, row_len, slots)
            self._pairs[key] = None if gate is None or up is None else _pair(gate, up)
        return self._pairs[key]

    def whole(
        self, tables: LinearTables, factor: int, row_len: int, slots: tuple[int, ...]
    ) -> tuple[FactorIndex, torch.Tensor] | None:
        """The factor of every adapter in ``slots`` in float32: [S, max_rank, row_len], copied once a batch.

        float32, since small products in lower precision are several times slower on a CPU.
        """
        index = self.index(tables, factor, row_len, slots)
        if index is None:
            return None
        key = (id(tables), factor, slots)
        if key not in self._copies:
            self._copies[key] = index.read(tables, index.unit_SHR[:, 0], row_len, slice(None)).float()
        return index, self._copies[key]

    def stacked(
        self, tables: Sequence[LinearTables], in_features: int, widths: Sequence[int], slots: tuple[int, ...]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """A of several maps in a row, [S, I, R], and B of each, [S, its R, O], zero past an adapter's rank: float32 and
        copied once a batch. None where one of the maps has a gain (DoRA), or no adapter."""
        key = (*map(id, tables), *slots)
        if key not in self._stacked:
            self._stacked[key] = self._stack(tables, in_features, widths, slots)
        return self._stacked[key]

    def _stack(
        self, tables: Sequence[LinearTables], in_features: int, widths: Sequence[int], slots: tuple[int, ...]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        a_SRI, b_SRO = [], []
        for each, width in zip(tables, widths, strict=True):
            a = self.whole(each, LinearFactor.A, in_features, slots)
            b = self.whole(each, LinearFactor.B, width, slots)
            if a is None or b is None or self.index(each, LinearFactor.GAIN, width, slots) is not None:
                return None
            lane_R = torch.arange(b[0].max_rank, device=b[1].device)
            a_SRI.append(a[1])
            b_SRO.append(b[1].masked_fill((lane_R >= b[0].rank_S[:, None])[..., None], 0))
        return torch.cat(a_SRI, dim=1).transpose(1, 2), b_SRO


def shrink_rows(
    x_NI: torch.Tensor,
    segments: LoRASegments,
    tables: ExpertsTables,
    factor: int,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    """Low-rank rows [L, widest rank]; lanes past a segment's rank hold finite values without meaning.

    ``dtype``: of the products and the result, by default that of x. None where no row has the factor.
    """
    read = _read_factor(segments, tables, factor, x_NI.shape[1])
    if read is None or segments.is_empty:
        return None
    x_LI = x_NI.index_select(0, segments.rows_L).to(dtype or x_NI.dtype)
    return grouped_mm(x_LI, read[1].to(x_LI.dtype).transpose(1, 2), segments.offsets)


def add_expanded(
    y_NO: torch.Tensor,
    v_LR: torch.Tensor,
    segments: LoRASegments,
    tables: ExpertsTables,
    factor: int,
    *,
    row_len: int | None = None,
) -> None:
    """y[rows] += the factor times the low-rank rows. ``row_len``: of the factor, where y has fewer columns."""
    read = _read_factor(segments, tables, factor, row_len or y_NO.shape[1])
    if read is None:
        return
    index, b_GRO = read
    delta_LO = _expand(_select_lanes(v_LR, index, segments), b_GRO, segments)
    add_rows(y_NO, segments.rows_L, delta_LO[:, : y_NO.shape[1]])


def add_both_halves(u_NGF: torch.Tensor, v_LR: torch.Tensor, segments: LoRASegments, tables: ExpertsTables) -> bool:
    """``add_expanded`` of gate and up in one product, where each row is a segment and adapters have one rank; False,
    having done nothing, elsewhere."""
    pair = segments.factors.pair(tables, u_NGF.shape[1] // 2, segments.slots)
    if pair is None or segments.position_G is None or segments.offsets[-1] != len(segments.offsets) - 1:
        return False
    index, rank, up_lane = pair
    unit_GR = index.unit_SHR[segments.adapter_G, segments.position_G]
    b_GRF = index.read(tables, unit_GR, u_NGF.shape[1] // 2, segments.adapter_G)
    v_G2R = torch.stack([v_LR[:, :rank], v_LR[:, up_lane : up_lane + rank]], dim=1)
    delta_LF = torch.bmm(v_G2R.view(-1, 1, rank).float(), b_GRF.view(-1, rank, b_GRF.shape[2]).float())
    add_rows(u_NGF, segments.rows_L, delta_LF.view(-1, u_NGF.shape[1]))
    return True


def _read_factor(
    segments: LoRASegments, tables: ExpertsTables, factor: int, row_len: int
) -> tuple[FactorIndex, torch.Tensor] | None:
    """The factor of every segment's (adapter, expert position), copied: [G, max_rank, row_len]."""
    index = segments.factors.index(tables, factor, row_len, segments.slots)
    if index is None or segments.position_G is None:
        return None
    unit_GR = index.unit_SHR[segments.adapter_G, segments.position_G]
    return index, index.read(tables, unit_GR, row_len, segments.adapter_G)


def shrink_linear(x_MI: torch.Tensor, segments: LoRASegments, tables: LinearTables) -> torch.Tensor | None:
    """Low-rank rows [L, widest rank] of the rows with an adapter, in float32, not rounded; None without an A."""
    read = segments.factors.whole(tables, LinearFactor.A, x_MI.shape[1], segments.slots)
    if read is None:
        return None
    x_LI = x_MI if segments.is_whole else x_MI.index_select(0, segments.rows_L)
    return grouped_mm(x_LI.float(), read[1].transpose(1, 2), segments.offsets)


def linear_delta(
    y_MO: torch.Tensor,
    v_LR: torch.Tensor | None,
    segments: LoRASegments,
    tables: LinearTables,
    *,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """What LoRA and DoRA add to the rows with an adapter: [L, O] in float32, from their low-rank rows."""
    factors, width = segments.factors, y_MO.shape[1]
    delta_LO, read = None, factors.whole(tables, LinearFactor.B, width, segments.slots)
    if v_LR is not None and read is not None:
        index, b_SRO = read
        delta_LO = _expand(_select_lanes(v_LR, index, segments), b_SRO, segments)
    read = factors.whole(tables, LinearFactor.GAIN, width, segments.slots)
    if read is None:
        return delta_LO
    index, gain_S1O = read
    gain_SO = gain_S1O.squeeze(1).masked_fill((index.rank_S == 0)[:, None], 1.0)
    base_LO = y_MO.index_select(0, segments.rows_L).float()
    base_LO = base_LO if bias_O is None else base_LO - bias_O
    dora_LO = (segments.per_row(gain_SO[segments.adapter_G]) - 1) * base_LO
    return dora_LO if delta_LO is None else dora_LO + delta_LO


def _expand(v_LR: torch.Tensor, b_GRO: torch.Tensor, segments: LoRASegments) -> torch.Tensor:
    """Deltas [L, O] in float32: nothing is rounded between the low-rank vector and the sum with the base result."""
    return grouped_mm(v_LR.float(), b_GRO.float(), segments.offsets)


def _select_lanes(v_LR: torch.Tensor, index: FactorIndex, segments: LoRASegments) -> torch.Tensor:
    """The lanes that a B factor reads: [L, max_rank], zero past the rank of a row's adapter."""
    if index.is_uniform:
        return v_LR[:, : index.max_rank]
    lane_R = torch.arange(index.max_rank, device=v_LR.device)
    first_L1 = segments.per_row(index.lane_S[segments.adapter_G])[:, None]
    lanes_LR = v_LR.gather(1, (first_L1 + lane_R).clamp(max=v_LR.shape[1] - 1))
    return lanes_LR.masked_fill_(lane_R >= segments.per_row(index.rank_S[segments.adapter_G])[:, None], 0)


def add_rows(y_NO: torch.Tensor, rows_L: torch.Tensor, delta_LO: torch.Tensor) -> None:
    """y[rows] += delta, each row once: a copy back is several times faster on the CPU than index_add_."""
    y_NO.index_copy_(0, rows_L, (y_NO.index_select(0, rows_L) + delta_LO).to(y_NO.dtype))


def grouped_mm(x_LI: torch.Tensor, w_GIO: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """y[l] = x[l] @ w[g] for offsets[g] <= l < offsets[g+1]: [L, O]."""
    if offsets[-1] == w_GIO.shape[0]:  # one row each
        return torch.bmm(x_LI.unsqueeze(1), w_GIO).squeeze(1)
    if fits_torch_grouped_mm(x_LI, w_GIO):
        ends = torch.tensor(offsets[1:], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x_LI, w_GIO, offs=ends)
    y_LO = x_LI.new_empty(x_LI.shape[0], w_GIO.shape[2])
    for g, (start, end) in enumerate(pairwise(offsets)):
        torch.mm(x_LI[start:end], w_GIO[g], out=y_LO[start:end])
    return y_LO


def fits_torch_grouped_mm(x_LI: torch.Tensor, w_GIO: torch.Tensor) -> bool:
    """torch's grouped GEMM spares a Python loop on the CPU, but wants every stride to be a multiple of 16 bytes."""
    if x_LI.device.type != "cpu" or x_LI.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(size * x_LI.itemsize % 16 == 0 for size in (x_LI.stride(0), *w_GIO.shape[1:]))

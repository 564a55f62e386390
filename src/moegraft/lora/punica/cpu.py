"""PunicaWrapperCPU: the primitives in plain torch. Right on every device, made for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from moegraft.core.halves import split_halves
from moegraft.core.tables import ExpertsFactor, ExpertsTables, LinearFactor, LinearTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.paged import FactorIndex, PagedFactors
from moegraft.lora.punica.base import PunicaWrapperBase, Segments
from moegraft.lora.rows import AdapterRows, LoRASegments, distinct_slots, number_slots

FEW_ROWS = 64  # of a decode step: looking for rows that share a segment costs more than it saves


class PunicaWrapperCPU(PunicaWrapperBase):
    """Factors are copied out of their pages, once a segment (experts) or once a batch (linear maps), then multiplied
    in one grouped GEMM."""

    def moe_lora_align_block_size(
        self, expert_N: torch.Tensor, slot_N: torch.Tensor, context: MoELoRAContext, sizes: LayerSizes
    ) -> LoRASegments:
        tables, rows = context.tables, context.rows
        if context.group is not None:
            slots = context.group.slots
        else:
            slots = distinct_slots(slot_N.tolist() if rows.host is None else rows.host)
        factors = rows.factors if rows.host is not None else PagedFactors()
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
        segments = rows.segments()
        v_LR = shrink_linear(x_MI, segments, tables)
        v_LR = None if v_LR is None else v_LR.to(x_MI.dtype)
        delta_LO = linear_delta(y_MO, v_LR, segments, tables, bias_O=bias_O)
        if delta_LO is None:
            return
        if segments.is_whole:
            y_MO.add_(delta_LO)
        else:
            add_rows(y_MO, segments.rows_L, delta_LO)


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

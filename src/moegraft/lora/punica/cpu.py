"""PunicaWrapperCPU: the primitives in plain torch. Right on every device, made for the CPU."""

from __future__ import annotations

from itertools import accumulate

import torch

from moegraft.core.halves import split_halves
from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field, LinearFactor, LinearTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.mapping import AdapterMapping, LoRASegments
from moegraft.lora.punica.base import PunicaWrapperBase
from moegraft.lora.punica.paged import FactorIndex, PagedFactors, grouped_mm

FEW_ROWS = 64  # of a decode step: looking for rows that share a segment costs more than it saves


class PunicaWrapperCPU(PunicaWrapperBase):
    """Factors are copied out of their pages, once a segment (experts) or once a batch (linear maps), then multiplied
    in one grouped GEMM."""

    def moe_lora_align_block_size(
        self,
        expert_N: torch.Tensor,
        slot_N: torch.Tensor,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        sizes: LayerSizes | None = None,
        ranks: tuple[int, int] | None = None,
    ) -> LoRASegments:
        E = tables.expert_index.shape[1]
        adapter_N = mapping.adapter_of_slot[slot_N]
        is_local_N = (expert_N >= 0) & (expert_N < E) & (adapter_N >= 0)
        position_N = tables.expert_index[slot_N, torch.where(is_local_N, expert_N, 0)]
        rows_L = (is_local_N & (position_N >= 0)).nonzero().squeeze(1)
        if rows_L.shape[0] <= FEW_ROWS:
            return LoRASegments.one_row_each(rows_L, adapter_N[rows_L], position_N[rows_L].long())
        key_L, order_L = torch.sort(adapter_N[rows_L] * E + position_N[rows_L], stable=True)
        key_G, count_G = torch.unique_consecutive(key_L, return_counts=True)
        return LoRASegments(
            rows_L=rows_L[order_L],
            offsets=tuple(accumulate(count_G.tolist(), initial=0)),
            adapter_G=key_G // E,
            position_G=key_G % E,
        )

    def add_lora_w13(
        self,
        u_NGF: torch.Tensor,
        x_ND: torch.Tensor,
        segments: LoRASegments,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        num_halves: int = 2,
        is_interleaved: bool = False,
    ) -> None:
        v_LR = self._shrink13(x_ND, segments, mapping, tables)
        if v_LR is None:
            return
        gate_NF, up_NF = split_halves(u_NGF, num_halves=num_halves, is_interleaved=is_interleaved)
        if num_halves == 2:
            add_expanded(gate_NF, v_LR, segments, mapping, tables, ExpertsFactor.B_GATE)
        add_expanded(up_NF, v_LR, segments, mapping, tables, ExpertsFactor.B_UP)

    def _shrink13(
        self, x_ND: torch.Tensor, segments: LoRASegments, mapping: AdapterMapping, tables: ExpertsTables
    ) -> torch.Tensor | None:
        """Low-rank rows of all lanes of w13."""
        return shrink_rows(x_ND, segments, mapping, tables, ExpertsFactor.A13)

    def add_lora_w2(
        self,
        y_ND: torch.Tensor,
        h_NF: torch.Tensor,
        segments: LoRASegments,
        mapping: AdapterMapping,
        tables: ExpertsTables,
    ) -> None:
        v_LR = shrink_rows(h_NF, segments, mapping, tables, ExpertsFactor.A2)
        if v_LR is not None:
            add_expanded(y_ND, v_LR, segments, mapping, tables, ExpertsFactor.B2)

    def add_lora_linear(
        self,
        y_MO: torch.Tensor,
        x_MI: torch.Tensor,
        mapping: AdapterMapping,
        tables: LinearTables,
        *,
        bias_O: torch.Tensor | None = None,
        rank_bound: int | None = None,
    ) -> None:
        v_LR = shrink_linear(x_MI, mapping, tables)
        v_LR = None if v_LR is None else v_LR.to(x_MI.dtype)
        delta_LO = linear_delta(y_MO, v_LR, mapping, tables, bias_O=bias_O)
        if delta_LO is None:
            return
        if mapping.is_in_order:
            y_MO.add_(delta_LO)
        else:
            add_rows(y_MO, mapping.segments.rows_L, delta_LO)


def factors_of(mapping: AdapterMapping) -> PagedFactors:
    """The factor indices that all layers of a batch share."""
    factors: PagedFactors = mapping.shared.setdefault("paged_factors", PagedFactors(mapping.active_slots))
    return factors


def shrink_rows(
    x_NI: torch.Tensor,
    segments: LoRASegments,
    mapping: AdapterMapping,
    tables: ExpertsTables,
    factor: int,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    """Low-rank rows [L, widest rank]; lanes past a segment's rank hold finite values without meaning.

    ``dtype``: of the products and the result, by default that of x. None where no row has the factor.
    """
    factors = factors_of(mapping)
    index = factors.index(tables, factor, x_NI.shape[1])
    if index is None or segments.is_empty or segments.position_G is None:
        return None
    a_GRI = factors.gather(tables, index, segments.adapter_G, segments.position_G, x_NI.shape[1])
    x_LI = x_NI.index_select(0, segments.rows_L).to(dtype or x_NI.dtype)
    return grouped_mm(x_LI, a_GRI.to(x_LI.dtype).transpose(1, 2), segments.offsets)


def add_expanded(
    y_NO: torch.Tensor,
    v_LR: torch.Tensor,
    segments: LoRASegments,
    mapping: AdapterMapping,
    tables: ExpertsTables,
    factor: int,
    *,
    row_len: int | None = None,
) -> None:
    """y[rows] += the factor times the low-rank rows. ``row_len``: of the factor, where y has fewer columns."""
    factors, row_len = factors_of(mapping), row_len or y_NO.shape[1]
    index = factors.index(tables, factor, row_len)
    if index is None or segments.position_G is None:
        return
    b_GRO = factors.gather(tables, index, segments.adapter_G, segments.position_G, row_len)
    delta_LO = _expand(_select_lanes(v_LR, index, segments), b_GRO, segments)
    add_rows(y_NO, segments.rows_L, delta_LO[:, : y_NO.shape[1]])


def shrink_linear(x_MI: torch.Tensor, mapping: AdapterMapping, tables: LinearTables) -> torch.Tensor | None:
    """Low-rank rows [L, widest rank] of the rows with an adapter, in float32, not rounded; None without an A."""
    a_SRI = factors_of(mapping).whole(tables, LinearFactor.A, x_MI.shape[1])
    if a_SRI is None:
        return None
    x_LI = x_MI if mapping.is_in_order else x_MI.index_select(0, mapping.segments.rows_L)
    return grouped_mm(x_LI.float(), a_SRI.transpose(1, 2), mapping.segments.offsets)


def linear_delta(
    y_MO: torch.Tensor,
    v_LR: torch.Tensor | None,
    mapping: AdapterMapping,
    tables: LinearTables,
    *,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """What LoRA and DoRA add to the rows with an adapter: [L, O] in float32, from their low-rank rows."""
    segments, factors, width = mapping.segments, factors_of(mapping), y_MO.shape[1]
    delta_LO = None
    b_SRO, index = factors.whole(tables, LinearFactor.B, width), factors.index(tables, LinearFactor.B, width)
    if v_LR is not None and b_SRO is not None and index is not None:
        delta_LO = _expand(_select_lanes(v_LR, index, segments), b_SRO, segments)
    gain_SO = factors.whole(tables, LinearFactor.GAIN, width)
    if gain_SO is None:
        return delta_LO
    rank_S = tables.factors[list(mapping.active_slots), LinearFactor.GAIN, Field.RANK]
    gain_SO = gain_SO.squeeze(1).masked_fill((rank_S == 0)[:, None], 1.0)
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

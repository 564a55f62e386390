"""LoRA whose factors are shared out over a tensor-parallel group: in plain torch, and as kernels around an exchange.

Where every rank can add its part of a delta without asking the others (B of w13 and A of w2 cut along F, maps that are
column parallel), the wrappers for one process serve as they are, over local sizes. These are for what needs the group:
fully sharded experts (S-LoRA, arXiv 2311.03285) and maps whose low-rank rows are partial sums. The classes over kernels
ask the host for nothing: a CUDA graph may hold them, NCCL's collectives included.

All ranks of the group bring the same rows and the same adapters, and call together.

Shape letters: N routed rows · L rows with an adapter · M rows · R rank lanes · D hidden size · F local columns of F ·
I, O local input and output features · W ranks of the group
"""

from __future__ import annotations

import torch

from moegraft.core.cuts import cut_tensor, pad_axis
from moegraft.core.errors import BatchError
from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field, LinearFactor, LinearTables
from moegraft.kernels.records import LayerSizes, LoRABatch
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica.base import PunicaWrapperBase, Segments
from moegraft.lora.punica.cpu import (
    FactorIndex,
    LoRASegments,
    PunicaWrapperCPU,
    add_expanded,
    add_rows,
    linear_delta,
    segments_of,
    shrink_linear,
    shrink_rows,
)
from moegraft.lora.punica.gpu import PunicaWrapperGPU, for_kernel
from moegraft.lora.rows import AdapterRows
from moegraft.parallel.collectives import Communicator
from moegraft.parallel.slices import LinearSlice, Shard, shard


class ShardedExpertsPunica(PunicaWrapperCPU):
    """Fully sharded experts: every rank holds a share of the lanes of A of w13 and of the columns D of B of w2.

    w13: each rank shrinks to its lanes, the ranks gather them, each expands to its columns of F. w2: each rank shrinks
    its columns of F to partial low-rank rows, which are summed; each expands them to its columns of D, and the sum of
    the layer's partial outputs puts these together.
    """

    def __init__(self, tp: Communicator, hidden_size: int) -> None:
        self._tp = tp
        self._hidden: Shard = shard(hidden_size, tp.size, tp.rank)

    def _shrink13(self, x_ND: torch.Tensor, segments: LoRASegments, tables: ExpertsTables) -> torch.Tensor | None:
        v_LR = super()._shrink13(x_ND, segments, tables)
        index = segments.factors.index(tables, ExpertsFactor.A13, x_ND.shape[1], segments.slots)
        return None if v_LR is None or index is None else gather_lanes(v_LR, index, segments, self._tp)

    def add_lora_w2(self, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments, tables: ExpertsTables) -> None:
        assert isinstance(segments, LoRASegments), "segments come from this wrapper"
        # Partial sums are added up before the one rounding of the low-rank vector.
        v_LR = shrink_rows(h_NF, segments, tables, ExpertsFactor.A2, dtype=torch.float32)
        if v_LR is None:
            return
        v_LR = self._tp.all_reduce(v_LR.contiguous()).to(h_NF.dtype)
        mine_ND = y_ND.narrow(1, self._hidden.start, self._hidden.size)
        add_expanded(mine_ND, v_LR, segments, tables, ExpertsFactor.B2, row_len=self._hidden.padded)


class ShardedLinearPunica(PunicaWrapperCPU):
    """A linear map of which each rank holds ``mine``.

    ``is_reduced``: y has all output features and is final on every rank (behind the host's own all-reduce or gather);
    the delta is then put together here. Else y is what the rank's own GEMM gave: its columns (column parallel), or a
    partial sum over its inputs (row parallel), which the host adds up afterwards, and with it the delta exactly once.
    """

    def __init__(self, tp: Communicator, mine: LinearSlice, *, is_reduced: bool) -> None:
        self._tp = tp
        self._mine = mine
        self._is_reduced = is_reduced

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
        """See the base class. A partial y is without its bias, and ``bias_O`` None."""
        mine, segments = self._mine, segments_of(rows)
        rows_L = segments.rows_L
        is_wide = mine.outputs is not None and (self._is_reduced or mine.inputs is not None)
        own_MO, own_bias_O = y_MO, bias_O
        if is_wide and mine.outputs is not None:
            own_MO = cut_tensor(y_MO, {1: mine.outputs})
            own_bias_O = None if bias_O is None else cut_tensor(bias_O, {0: mine.outputs})
        v_LR = self._low_rank(x_MI, segments, tables)
        self._check_gain(segments, tables)
        delta_LO = linear_delta(own_MO, v_LR, segments, tables, bias_O=own_bias_O)
        if delta_LO is None:
            return
        if not is_wide or mine.outputs is None:
            add_rows(y_MO, rows_L, delta_LO)
        elif not self._is_reduced:
            own_LO = (own_MO.index_select(0, rows_L) + delta_LO).to(y_MO.dtype)
            start = 0
            for first, last in mine.outputs:
                y_MO[:, first:last].index_copy_(0, rows_L, own_LO[:, start : start + last - first])
                start += last - first
        else:
            own_LO = (own_MO.index_select(0, rows_L) + delta_LO).to(y_MO.dtype)
            y_MO.index_copy_(0, rows_L, gather_columns(own_LO, y_MO.shape[1], self._tp))

    def _low_rank(self, x_MI: torch.Tensor, segments: LoRASegments, tables: LinearTables) -> torch.Tensor | None:
        v_LR = shrink_linear(x_MI, segments, tables)
        index = segments.factors.index(tables, LinearFactor.A, x_MI.shape[1], segments.slots)
        if v_LR is None or index is None:
            return None
        if self._mine.inputs is not None and (self._is_reduced or self._mine.outputs is not None):
            v_LR = self._tp.all_reduce(v_LR.contiguous())
        v_LR = v_LR.to(x_MI.dtype)
        return v_LR if self._mine.lanes is None else gather_lanes(v_LR, index, segments, self._tp)

    def _check_gain(self, segments: LoRASegments, tables: LinearTables) -> None:
        """DoRA scales all columns of a partial y, of which this rank's gain has only some."""
        if self._mine.inputs is None or self._mine.outputs is None or self._is_reduced:
            return
        if tables.factors[list(segments.slots), LinearFactor.GAIN, Field.RANK].any():
            raise BatchError(
                "DoRA on a fully sharded row-parallel map needs the reduced output: apply it behind the all-reduce"
            )


class ShardedExpertsPunicaGPU(PunicaWrapperGPU):
    """``ShardedExpertsPunica`` as kernels: each add is a shrink, the exchange of its low-rank rows, and an expand.

    Low-rank rows of all N routed rows travel, in the order that all ranks have sorted them in.
    """

    def __init__(self, tp: Communicator, hidden_size: int) -> None:
        self._tp = tp
        self._hidden: Shard = shard(hidden_size, tp.size, tp.rank)

    def moe_lora_align_block_size(
        self, expert_N: torch.Tensor, slot_N: torch.Tensor, context: MoELoRAContext, sizes: LayerSizes
    ) -> Segments:
        from moegraft.kernels.lora_expand.host import route_lora_rows

        lora = LoRABatch(
            tables=context.tables,
            token_slots_T=slot_N.to(torch.int32).contiguous(),
            rank13=context.bounds.a13 * self._tp.size,
            rank2=context.bounds.a2,
        )
        return route_lora_rows(expert_N.contiguous(), lora, sizes, w2_columns=self._hidden.padded)

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
        from moegraft.kernels.lora_expand.host import expand_gathered13, shrink_share13

        assert not isinstance(segments, LoRASegments), "segments come from this wrapper"
        v_NV = shrink_share13(for_kernel(x_ND, tables), segments, self._tp.size)
        if v_NV is None:
            return
        v_RNV = self._tp.all_gather(v_NV).view(self._tp.size, *v_NV.shape)
        expand_gathered13(u_NGF, v_RNV, segments, num_halves=num_halves, is_interleaved=is_interleaved)

    def add_lora_w2(self, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments, tables: ExpertsTables) -> None:
        from moegraft.kernels.lora_expand.host import expand_summed2, shrink_partial2

        assert not isinstance(segments, LoRASegments), "segments come from this wrapper"
        v_NW = shrink_partial2(for_kernel(h_NF, tables), segments)
        if v_NW is None:
            return
        v_NW = self._tp.all_reduce(v_NW)
        if self._hidden.size:
            expand_summed2(y_ND.narrow(1, self._hidden.start, self._hidden.size), v_NW, segments)


class ShardedLinearPunicaGPU(PunicaWrapperGPU):
    """``ShardedLinearPunica`` of a y that is final on every rank, as kernels.

    Where ranks have columns of B each, all rows of y are gathered: those without an adapter are the same everywhere.
    """

    def __init__(self, tp: Communicator, mine: LinearSlice) -> None:
        self._tp = tp
        self._mine = mine

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
        from moegraft.kernels.lora_linear.host import expand_linear, shrink_linear

        mine, tp = self._mine, self._tp
        if x_MI.shape[0] == 0 or rank_bound == 0:
            return
        x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
        v_MW = shrink_linear(x_MI, rows.slots_M, tables, rank_bound=rank_bound, run_length=rows.run_length)
        if mine.inputs is not None:
            v_MW = tp.all_reduce(v_MW)
        v_MW = v_MW.to(x_MI.dtype)
        if mine.lanes is not None:
            v_MW = _lanes_in_order(v_MW, rows.slots_M, tables, tp)
        own_MO = y_MO if mine.outputs is None else cut_tensor(y_MO, {1: mine.outputs}).contiguous()
        own_bias_O = bias_O if bias_O is None or mine.outputs is None else cut_tensor(bias_O, {0: mine.outputs})
        if own_MO.shape[1]:
            expand_linear(own_MO, v_MW, rows.slots_M, tables, run_length=rows.run_length, bias_O=own_bias_O)
        if mine.outputs is not None:
            y_MO.copy_(gather_columns(own_MO, y_MO.shape[1], tp))

    # One after the other, with an exchange each: not in the one launch of a wrapper without ranks.
    add_lora_linears = PunicaWrapperBase.add_lora_linears


def _lanes_in_order(v_MW: torch.Tensor, slots_M: torch.Tensor, tables: LinearTables, tp: Communicator) -> torch.Tensor:
    """``gather_lanes`` for rows whose adapters the device knows: [M, ranks * W]."""
    share_M = tables.factors[slots_M.clamp(min=0).long(), LinearFactor.A, Field.RANK]
    return _in_order(_side_by_side(v_MW, tp), share_M, v_MW.shape[1])


def gather_lanes(v_LR: torch.Tensor, index: FactorIndex, segments: LoRASegments, tp: Communicator) -> torch.Tensor:
    """Low-rank rows of all ranks side by side, in the order of each adapter's lanes: [L, W * R].

    ``index`` is of A, whose rank here is the share of a rank. A rank's row is as wide as the widest share of any
    adapter in the batch: lane j of an adapter with shares of r lanes is lane j % r of rank j // r. Worked example: rank
    3 beside rank 8 on 2 ranks, shares of 2 and 4: rows [a0 a1 . . | a2 0 . .], lanes at 0, 1, 4.
    """
    lanes_LV = _side_by_side(v_LR, tp)
    if index.is_uniform:
        return lanes_LV
    return _in_order(lanes_LV, segments.per_row(index.rank_S[segments.adapter_G]), v_LR.shape[1])


def _side_by_side(part_LX: torch.Tensor, tp: Communicator) -> torch.Tensor:
    """[L, ranks * X]: each row's parts, those of rank 0 first."""
    rows, size = part_LX.shape
    gathered_WLX = tp.all_gather(part_LX.contiguous()).view(tp.size, rows, size)
    return gathered_WLX.transpose(0, 1).reshape(rows, tp.size * size)


def _in_order(lanes_LV: torch.Tensor, share_L: torch.Tensor, widest: int) -> torch.Tensor:
    """See ``gather_lanes``; share_L: the lanes that a rank has of each row's adapter."""
    own_L1 = share_L.clamp(min=1)[:, None]
    lane_V = torch.arange(lanes_LV.shape[1], device=lanes_LV.device)
    place_LV = lane_V // own_L1 * widest + lane_V % own_L1
    return lanes_LV.gather(1, place_LV.clamp(max=lanes_LV.shape[1] - 1).long())


def gather_columns(own_LO: torch.Tensor, num_columns: int, tp: Communicator) -> torch.Tensor:
    """[L, num_columns] from every rank's share of the columns, cut by ``slices.shard``."""
    padded = shard(num_columns, tp.size, tp.rank).padded
    return _side_by_side(pad_axis(own_LO, 1, padded), tp)[:, :num_columns]

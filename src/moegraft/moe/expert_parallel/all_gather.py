"""Every rank sees every row, computes what its experts have to do with it, and the sums are scattered back.

Shape letters: T tokens of this rank · M tokens of all ranks · K experts per token · P parts · R ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.lora.context import MoELoRAContext
from moegraft.moe.expert_parallel.exchange import (
    ExpertParallelPrepareAndFinalize,
    ReceivedRows,
    RowCodec,
    exchange_counts,
    join_rows,
    pack_routed_rows,
    slots_of,
    split_rows,
    unpack_routed_rows,
)
from moegraft.moe.layer import ExpertsOutput, PreparedRows, weigh_input, weighted_sum
from moegraft.parallel.slices import NOWHERE


@dataclass(frozen=True, kw_only=True)
class GatheredRows(PreparedRows):
    """The rows of all ranks, part after part and in each part by rank; what ``finalize`` needs to scatter the sums.

    counts: rows of each part by rank, [P][R] · tokens: of this rank, those of each part; None where one part has all.
    """

    counts: tuple[tuple[int, ...], ...]
    tokens: tuple[torch.Tensor, ...] | None


class AllGatherPrepareAndFinalize(ExpertParallelPrepareAndFinalize):
    """Data-parallel rows, any number on each rank: an all-gather before the experts, a reduce-scatter behind them.

    Costs (R - 1) T rows each way whatever the routing; less than an all-to-all where every token needs every rank. The
    partial sums travel in the dtype of the rows and are added in float32, in the order of the ranks.
    """

    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> GatheredRows:
        T, K = topk_ids_TK.shape
        x_TD, weights_TK = weigh_input(x_TD, topk_weights_TK, on_input=self.weight_on_input)
        parts = split_rows(self.codec, T, lora_context, x_TD.device)
        rank_TK, local_TK = self.placement.locate(topk_ids_TK, first_row=self.ep.rank)
        place_TK = torch.where(rank_TK == NOWHERE, NOWHERE, rank_TK * self.most_held + local_TK)
        sizes_P = torch.tensor([T]) if parts.is_in_part_PT is None else parts.is_in_part_PT.sum(1)
        sent, counts, (tokens_R,) = exchange_counts(self.ep, sizes_P[:, None].expand(-1, self.ep.size), parts)
        tokens = None
        if parts.is_in_part_PT is not None:
            tokens = tuple(
                torch.nonzero_static(is_in_T, size=mine[0]).squeeze(1)
                for is_in_T, mine in zip(parts.is_in_part_PT, sent, strict=True)
            )

        def gather(p: int, codec: RowCodec) -> ReceivedRows:
            fields = (x_TD, weights_TK, place_TK, parts.adapter_T)
            mine = fields if tokens is None else tuple(field.index_select(0, tokens[p]) for field in fields)
            packed_MB = self.ep.all_gather(pack_routed_rows(codec, *mine), counts[p])
            return unpack_routed_rows(codec, packed_MB, top_k=K, hidden_size=x_TD.shape[1], dtype=x_TD.dtype)

        rows = join_rows([gather(p, codec) for p, codec in enumerate(parts.codecs)], self.codec, x_TD.dtype)
        first = self.ep.rank * self.most_held
        is_here_MK = (rows.ids_MK >= first) & (rows.ids_MK < first + self.most_held)
        return GatheredRows(
            x_MD=rows.x_MD,
            unquantised_MD=rows.unquantised_MD,
            is_quantised=rows.is_quantised,
            topk_weights_MK=rows.weights_MK,
            topk_ids_MK=torch.where(is_here_MK, rows.ids_MK - first, NOWHERE),
            slots_M=slots_of(rows.adapter_M, lora_context),
            expected_choices=-(-sum(tokens_R) * K // self.ep.size),
            counts=tuple(map(tuple, counts)),
            tokens=tokens,
        )

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        assert isinstance(rows, GatheredRows), "rows come from this pair's prepare"
        partial_MD = weighted_sum(output, rows)
        parts_MD = partial_MD.split([sum(counts_R) for counts_R in rows.counts])
        mine = [self.ep.reduce_scatter(part, counts_R) for part, counts_R in zip(parts_MD, rows.counts, strict=True)]
        if rows.tokens is None:
            return self.tp.all_reduce(mine[0])
        out_TD = partial_MD.new_empty(sum(len(part) for part in mine), partial_MD.shape[1])
        for token_S, part_SD in zip(rows.tokens, mine, strict=True):
            out_TD[token_S] = part_SD
        return self.tp.all_reduce(out_TD)

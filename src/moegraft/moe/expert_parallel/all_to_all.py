"""Rows travel to the ranks of their experts, each row once to a rank, and one partial sum comes back from each.

Shape letters: T tokens · K experts per token · R ranks · S rows sent · M rows received · C ranks a token can need
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.lora.context import MoELoRAContext
from moegraft.moe.expert_parallel.exchange import (
    ExpertParallelPrepareAndFinalize,
    ReceivedRows,
    RowCodec,
    RowParts,
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
class RowRoutes:
    """The rows that a rank sends, sorted by (receiving rank, token).

    counts: rows for each of the R ranks · token_S: token behind each row · rank_S: the rank that it goes to ·
    position_TC: where the rows of a token stand among the S, ascending by rank; S past the ranks that it needs.

    Example: experts of tokens 0..2 on ranks [[1, 0], [1, 1], [0, 0]] give counts (2, 2), token_S [0, 2, 0, 1],
    position_TC [[0, 2], [3, 4], [1, 4]].
    """

    counts: tuple[int, ...]
    token_S: torch.Tensor
    rank_S: torch.Tensor
    position_TC: torch.Tensor

    @property
    def num_rows(self) -> int:
        return sum(self.counts)


def ranks_needed(rank_TK: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[R, T] bool: whether a rank holds an expert of a token. Ids that stand nowhere need none."""
    needed_TR = torch.zeros(rank_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=rank_TK.device)
    # NOWHERE = -1 lands in the column behind the last rank.
    needed_TR.scatter_(1, rank_TK % (num_ranks + 1), True)
    return needed_TR[:, :num_ranks].t().contiguous()


def plan_routes(needed_RT: torch.Tensor, counts: tuple[int, ...], top_k: int) -> RowRoutes:
    """The routes of ``ranks_needed``, whose row sums are ``counts``: known to the host, so that nothing waits here."""
    total = sum(counts)
    pairs_S2 = torch.nonzero_static(needed_RT, size=total)
    position_RT = torch.where(needed_RT, needed_RT.flatten().cumsum(0).view_as(needed_RT) - 1, total)
    return RowRoutes(
        counts=counts,
        token_S=pairs_S2[:, 1],
        rank_S=pairs_S2[:, 0],
        position_TC=position_RT.t().sort(dim=1).values[:, : min(top_k, len(counts))].contiguous(),
    )


def combine_partials(partial_SD: torch.Tensor, position_TC: torch.Tensor) -> torch.Tensor:
    """float32 [T, D]: the sum of each token's partial sums, in the order of the ranks.

    ``partial_SD`` has a row of zeros behind its S rows, for tokens that needed fewer than C ranks.
    """
    out_TD = partial_SD.new_zeros(position_TC.shape[0], partial_SD.shape[1], dtype=torch.float32)
    for position_T in position_TC.unbind(1):
        out_TD += partial_SD.index_select(0, position_T)
    return out_TD


def local_choices(
    rank_TK: torch.Tensor, local_TK: torch.Tensor, weights_TK: torch.Tensor, routes: RowRoutes
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert ids [S, K], router weights [S, K]) as the receiving rank reads them: NOWHERE and 0 for other ranks'."""
    is_here_SK = rank_TK.index_select(0, routes.token_S) == routes.rank_S[:, None]
    ids_SK = local_TK.index_select(0, routes.token_S).masked_fill(~is_here_SK, NOWHERE)
    return ids_SK, weights_TK.index_select(0, routes.token_S).masked_fill(~is_here_SK, 0)


@dataclass(frozen=True, kw_only=True)
class DispatchedRows(PreparedRows):
    """Rows received, part after part and in each part by sender; what ``finalize`` needs to send their sums home.

    sent, received: rows of each part by rank, [P][R] · position_TC: where a token's partial sums stand among the S that
    come back, S for none.
    """

    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]
    position_TC: torch.Tensor


class AllToAllPrepareAndFinalize(ExpertParallelPrepareAndFinalize):
    """Data-parallel rows, any number on each rank. A row is sent once to each rank that holds some of its experts.

    With it go its choices there (local expert ids and router weights) and its adapter's id. The ranks' partial sums
    come back in the dtype of the rows and are added in float32, in the order of the ranks.
    """

    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> DispatchedRows:
        T, K = topk_ids_TK.shape
        x_TD, weights_TK = weigh_input(x_TD, topk_weights_TK, on_input=self.weight_on_input)
        parts = split_rows(self.codec, T, lora_context, x_TD.device)
        # The first row's copy differs by rank, so that single rows of many ranks spread too.
        rank_TK, local_TK = self.placement.locate(topk_ids_TK, first_row=self.ep.rank)
        needed_PRT = ranks_needed(rank_TK, self.ep.size)[None]
        if parts.is_in_part_PT is not None:
            needed_PRT = needed_PRT & parts.is_in_part_PT[:, None]
        sent, received, (tokens_R,) = exchange_counts(self.ep, needed_PRT.sum(2), parts)
        routes = [plan_routes(needed_RT, tuple(rows), K) for needed_RT, rows in zip(needed_PRT, sent, strict=True)]
        rows = join_rows(
            [
                self._send(codec, x_TD, weights_TK, (rank_TK, local_TK), parts, routes[p], received[p])
                for p, codec in enumerate(parts.codecs)
            ],
            self.codec,
            x_TD.dtype,
        )
        return DispatchedRows(
            x_MD=rows.x_MD,
            unquantised_MD=rows.unquantised_MD,
            is_quantised=rows.is_quantised,
            topk_weights_MK=rows.weights_MK,
            topk_ids_MK=rows.ids_MK,
            slots_M=slots_of(rows.adapter_M, lora_context),
            expected_choices=-(-sum(tokens_R) * K // self.ep.size),
            sent=tuple(map(tuple, sent)),
            received=tuple(map(tuple, received)),
            position_TC=_positions(routes, parts),
        )

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        assert isinstance(rows, DispatchedRows), "rows come from this pair's prepare"
        partial_MD = weighted_sum(output, rows)
        start, home = 0, []
        for sent, received in zip(rows.sent, rows.received, strict=True):
            stop = start + sum(received)
            home.append(self.ep.all_to_all(partial_MD[start:stop], received, sent))
            start = stop
        partial_SD = torch.cat([*home, partial_MD.new_zeros(1, partial_MD.shape[1])])
        out_TD = combine_partials(partial_SD, rows.position_TC).to(partial_MD.dtype)
        return self.tp.all_reduce(out_TD)

    def _send(
        self,
        codec: RowCodec,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        places_TK: tuple[torch.Tensor, torch.Tensor],
        parts: RowParts,
        routes: RowRoutes,
        received: list[int],
    ) -> ReceivedRows:
        """One part of the rows, header and activations in one exchange."""
        ids_SK, weights_SK = local_choices(*places_TK, weights_TK, routes)
        packed_SB = pack_routed_rows(
            codec,
            x_TD.index_select(0, routes.token_S),
            weights_SK,
            ids_SK,
            parts.adapter_T.index_select(0, routes.token_S),
        )
        packed_MB = self.ep.all_to_all(packed_SB, routes.counts, received)
        return unpack_routed_rows(
            codec, packed_MB, top_k=weights_TK.shape[1], hidden_size=x_TD.shape[1], dtype=x_TD.dtype
        )


def _positions(routes: list[RowRoutes], parts: RowParts) -> torch.Tensor:
    """position_TC over the rows of all parts, one after the other; a token is in one part."""
    if parts.is_in_part_PT is None:
        return routes[0].position_TC
    first, second = routes
    total = first.num_rows + second.num_rows
    base_TC = torch.where(first.position_TC == first.num_rows, total, first.position_TC)
    return torch.where(parts.is_in_part_PT[1, :, None], second.position_TC + first.num_rows, base_TC)

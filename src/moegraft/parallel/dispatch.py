"""Which rows an all-to-all carries: pure arithmetic over where the experts of each token stand.

A token goes once to each rank that holds at least one of its experts, and one partial sum comes back from each.

Shape letters: T tokens · K experts per token · R ranks · S rows sent · C = min(K, R), ranks that a token can need
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegraft.parallel.expert_map import NOWHERE


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

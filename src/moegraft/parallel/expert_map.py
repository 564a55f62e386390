"""Which rank holds which expert, as plain data, and where a row finds its expert, as device tables.

Shape letters: T tokens · K experts per token · E experts · R ranks · C copies of the expert that has most
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from moegraft.parallel.slices import contiguous_experts, round_robin_experts

NOWHERE = -1
"""Rank and local id of an expert id outside [0, E): such a choice gives nothing, on any rank."""


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """``experts_of_rank[r]``: global ids of the experts on rank r, ascending; an expert's place there is its local id.

    Each expert stands on one rank or, as copies, on several. Raises ValueError where an expert is missing, unknown or
    out of order, or a rank has none.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.experts_of_rank):
            if not experts:
                raise ValueError(f"expert map: rank {rank} holds no expert")
            if any(left >= right for left, right in pairwise(experts)):
                raise ValueError(f"expert map: rank {rank} holds {list(experts)}, expected ascending ids, each once")
            if experts[0] < 0 or experts[-1] >= self.num_experts:
                raise ValueError(
                    f"expert map: rank {rank} holds {list(experts)}, expected ids from 0 to {self.num_experts - 1}"
                )
        missing = set(range(self.num_experts)).difference(*self.experts_of_rank)
        if missing:
            raise ValueError(f"expert map: no rank holds experts {sorted(missing)}")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertMap:
        """Neighbours together; where R does not divide E, the first E % R ranks hold one more."""
        _check_enough(num_experts, num_ranks)
        return cls(
            num_experts=num_experts,
            experts_of_rank=tuple(contiguous_experts(num_experts, num_ranks, rank) for rank in range(num_ranks)),
        )

    @classmethod
    def round_robin(cls, num_experts: int, num_ranks: int) -> ExpertMap:
        """Expert e on rank e % R."""
        _check_enough(num_experts, num_ranks)
        return cls(
            num_experts=num_experts,
            experts_of_rank=tuple(round_robin_experts(num_experts, num_ranks, rank) for rank in range(num_ranks)),
        )

    @classmethod
    def from_owners(cls, owners: Sequence[int], num_ranks: int) -> ExpertMap:
        """Expert e on rank ``owners[e]``."""
        wrong = [rank for rank in owners if not 0 <= rank < num_ranks]
        if wrong:
            raise ValueError(f"expert map: owner {wrong[0]}, expected a rank from 0 to {num_ranks - 1}")
        return cls(
            num_experts=len(owners),
            experts_of_rank=tuple(
                tuple(expert for expert, owner in enumerate(owners) if owner == rank) for rank in range(num_ranks)
            ),
        )

    def with_copies(self, ranks_of_expert: Mapping[int, Iterable[int]]) -> ExpertMap:
        """The map with these experts on these ranks too: copies of hot experts."""
        experts = [set(held) for held in self.experts_of_rank]
        for expert, ranks in ranks_of_expert.items():
            for rank in ranks:
                if not 0 <= rank < self.num_ranks:
                    raise ValueError(
                        f"expert map: a copy of expert {expert} on rank {rank}, expected 0 to {self.num_ranks - 1}"
                    )
                experts[rank].add(expert)
        return ExpertMap(num_experts=self.num_experts, experts_of_rank=tuple(tuple(sorted(held)) for held in experts))

    @property
    def num_ranks(self) -> int:
        return len(self.experts_of_rank)

    @property
    def has_copies(self) -> bool:
        return sum(len(experts) for experts in self.experts_of_rank) > self.num_experts

    def ranks_of(self, expert: int) -> tuple[int, ...]:
        """Ranks that hold an expert, ascending."""
        return tuple(rank for rank, experts in enumerate(self.experts_of_rank) if expert in experts)


def _check_enough(num_experts: int, num_ranks: int) -> None:
    if not 1 <= num_ranks <= num_experts:
        raise ValueError(f"expert map: {num_experts} experts for {num_ranks} ranks, expected at least one expert each")


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """An ``ExpertMap`` as device tables: rank_EC and local_EC (past an expert's copies: its first), copies_E; int64."""

    rank_EC: torch.Tensor
    local_EC: torch.Tensor
    copies_E: torch.Tensor

    @classmethod
    def of(cls, expert_map: ExpertMap, device: torch.device) -> ExpertPlacement:
        """The tables of a map."""
        places: list[list[tuple[int, int]]] = [[] for _ in range(expert_map.num_experts)]
        for rank, experts in enumerate(expert_map.experts_of_rank):
            for local, expert in enumerate(experts):
                places[expert].append((rank, local))
        most = max(map(len, places))
        padded = torch.tensor([held + held[:1] * (most - len(held)) for held in places], device=device)
        return cls(
            rank_EC=padded[:, :, 0].contiguous(),
            local_EC=padded[:, :, 1].contiguous(),
            copies_E=torch.tensor([len(held) for held in places], device=device),
        )

    def locate(self, topk_ids_TK: torch.Tensor, first_row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(rank [T, K], local id [T, K]) of every choice, NOWHERE both for ids outside [0, E).

        Row t takes copy (first_row + t) mod copies: rows spread over the copies, and which one serves a row depends on
        the row's place alone, never on what its neighbours choose.
        """
        is_known_TK = (topk_ids_TK >= 0) & (topk_ids_TK < self.rank_EC.shape[0])
        expert_TK = torch.where(is_known_TK, topk_ids_TK, 0).long()
        rank_TK, local_TK = self.rank_EC[expert_TK, 0], self.local_EC[expert_TK, 0]
        if self.rank_EC.shape[1] > 1:
            row_T1 = torch.arange(first_row, first_row + topk_ids_TK.shape[0], device=topk_ids_TK.device)[:, None]
            copy_TK = row_T1 % self.copies_E[expert_TK]
            rank_TK, local_TK = self.rank_EC[expert_TK, copy_TK], self.local_EC[expert_TK, copy_TK]
        return rank_TK.masked_fill(~is_known_TK, NOWHERE), local_TK.masked_fill(~is_known_TK, NOWHERE)

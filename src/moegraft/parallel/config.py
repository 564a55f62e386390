"""How the ranks of a world share one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dispatch = Literal["all_to_all", "all_gather"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """World = tp * ep ranks; rank = ep_rank * tp + tp_rank: the ranks of one tensor-parallel group are neighbours.

    tp: ranks that share the intermediate size F of every expert · ep: ranks that share the experts ·
    fully_sharded: the low-rank side is shared too (A of w13 along rank, B of w2 along D) · dispatch: how rows reach the
    experts of other ranks · data_parallel: every expert-parallel rank brings a batch of its own ·
    timeout_seconds: after which a collective that a peer has not joined ends in a ParallelError.
    """

    tp: int = 1
    ep: int = 1
    fully_sharded: bool = False
    dispatch: Dispatch = "all_to_all"
    data_parallel: bool = False
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("ep", self.ep)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.dispatch not in ("all_to_all", "all_gather"):
            raise ValueError(f"dispatch is {self.dispatch!r}, expected 'all_to_all' or 'all_gather'")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}, expected more than 0")

    @property
    def world_size(self) -> int:
        return self.tp * self.ep

    def tp_rank_of(self, rank: int) -> int:
        """Which share of F a rank holds."""
        return rank % self.tp

    def ep_rank_of(self, rank: int) -> int:
        """Which share of the experts a rank holds."""
        return rank // self.tp

    def tp_ranks(self, ep_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts."""
        return tuple(ep_rank * self.tp + tp_rank for tp_rank in range(self.tp))

    def ep_ranks(self, tp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same share of F."""
        return tuple(ep_rank * self.tp + tp_rank for ep_rank in range(self.ep))

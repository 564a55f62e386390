"""The slicing law: which part of every axis a rank owns, and what it so holds of a model. Plain data, no tensors.

An axis of ``size`` entries is cut for ``world`` ranks into shares of one length, the size divided by the world and
rounded up to whole granules. The shares follow each other; the last ones may be short or empty, and are padded with
zeros to the common length. Zero columns of w13 and rows of w2 add nothing, nor do zero lanes of a low-rank vector.

Worked example: F = 19 on 4 ranks. Shares of 5: [0, 5), [5, 10), [10, 15) and [15, 19) with one column of padding.
With a granule of 4 (scale groups): shares of 8: [0, 8), [8, 16), [16, 19) with 5 of padding, and [19, 19) with 8.

The loader reads, the bank keeps and the layers apply only what a ``RankSlice`` names.

Shape letters: E experts · D hidden size · F expert intermediate size · G = 2 (gate and up) or 1 (no gate) · r rank
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from moegraft.core.halves import half_intervals

Pieces = tuple[tuple[int, int], ...]
"""Intervals [start, stop) of an axis, in the order in which a rank keeps them."""


@dataclass(frozen=True, slots=True)
class Shard:
    """[start, stop) of an axis, followed by zeros up to a length of ``padded``."""

    start: int
    stop: int
    padded: int

    @property
    def size(self) -> int:
        """Entries of the axis in it, without the padding."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        return self.padded - self.size

    @property
    def pieces(self) -> Pieces:
        """As intervals of the axis; none where the shard is empty."""
        return ((self.start, self.stop),) if self.size else ()


def whole(size: int) -> Shard:
    """The shard of a rank that holds the whole axis."""
    return Shard(0, size, size)


def shard(size: int, world: int, rank: int, *, granule: int = 1) -> Shard:
    """The share of ``rank``, cut at multiples of ``granule``: F of the experts, lanes of a low-rank vector, D, V."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    length = -(-size // (world * granule)) * granule
    start = min(rank * length, size)
    return Shard(start, min(start + length, size), length)


def shards(size: int, world: int, *, granule: int = 1) -> tuple[Shard, ...]:
    """The shares of all ranks."""
    return tuple(shard(size, world, rank, granule=granule) for rank in range(world))


def half_columns(part: Shard, size: int, *, num_halves: int, is_interleaved: bool) -> Pieces:
    """Where a shard of F lies along the stored G*F axis of w13, as intervals in stored order.

    gate rows, then up rows: one interval in each half. Interleaved (g0 u0 g1 u1 ...): one interval of pairs.
    """
    if not part.size:
        return ()
    return half_intervals(part.start, part.stop, size, num_halves=num_halves, is_interleaved=is_interleaved)


def contiguous_experts(num_experts: int, world: int, rank: int) -> tuple[int, ...]:
    """Global ids of the experts of a rank, neighbours together; sizes differ by at most one."""
    base, extra = divmod(num_experts, world)
    start = rank * base + min(rank, extra)
    return tuple(range(start, start + base + (rank < extra)))


def round_robin_experts(num_experts: int, world: int, rank: int) -> tuple[int, ...]:
    """Global ids of the experts of a rank, dealt out one by one."""
    return tuple(range(rank, num_experts, world))


def count(pieces: Pieces) -> int:
    """Entries in some intervals."""
    return sum(stop - start for start, stop in pieces)


@dataclass(frozen=True, slots=True)
class Share:
    """Share ``rank`` of ``world`` equal ones, cut by ``slices.shard``."""

    world: int
    rank: int

    def of(self, size: int) -> Shard:
        """This share of an axis."""
        return shard(size, self.world, self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSlice:
    """What a rank holds of one experts module.

    ``experts``: the global expert behind each local one, None for all of them. ``intermediate``: of F, None for all of
    it; w13 and w2, B of w13 and A of w2 hold these columns. ``low_rank``: the share of a fully sharded rank, of the
    lanes of A of w13 and of the columns D of B of w2; None where it holds all of both.
    """

    experts: tuple[int, ...] | None = None
    intermediate: Shard | None = None
    low_rank: Share | None = None

    def num_experts(self, num_experts: int) -> int:
        """Local experts of a module of ``num_experts``."""
        return num_experts if self.experts is None else len(self.experts)

    def local_experts(self, held: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
        """Local ids, ascending, of this rank's experts among the global ids ``held``, and where each stands in it."""
        if self.experts is None:
            return held, list(range(len(held)))
        position = {expert: index for index, expert in enumerate(held)}
        found = [(local, position[expert]) for local, expert in enumerate(self.experts) if expert in position]
        return tuple(local for local, _ in found), [index for _, index in found]

    def columns(self, intermediate_size: int) -> Shard:
        """The columns of F."""
        return whole(intermediate_size) if self.intermediate is None else self.intermediate

    def hidden(self, hidden_size: int) -> Shard:
        """The columns of D that B of w2 holds."""
        return whole(hidden_size) if self.low_rank is None else self.low_rank.of(hidden_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSlice:
    """What a rank holds of one linear map, router or embedding; None for all of it.

    ``inputs``: of the input features (row parallel), or of the vocabulary of an embedding: A holds these columns.
    ``outputs``: of the output features (column parallel), or of an embedding's dimension: B and DoRA's gain hold
    these. ``lanes``: the share of A's rank rows (fully sharded column parallel).
    """

    inputs: Pieces | None = None
    outputs: Pieces | None = None
    lanes: Share | None = None

    def num_inputs(self, in_features: int) -> int:
        """Local input features."""
        return in_features if self.inputs is None else count(self.inputs)

    def num_outputs(self, out_features: int) -> int:
        """Local output features."""
        return out_features if self.outputs is None else count(self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSlice:
    """What a rank holds of a parameter that an adapter may replace as a whole: ``pieces`` of one axis."""

    axis: int
    pieces: Pieces


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """What one rank holds of every module, by full module name; a module that is not listed is held whole.

    ``linears``: linear maps, routers and embeddings · ``saved``: (module, parameter).
    """

    experts: Mapping[str, ExpertsSlice] = field(default_factory=dict)
    linears: Mapping[str, LinearSlice] = field(default_factory=dict)
    saved: Mapping[tuple[str, str], ParameterSlice] = field(default_factory=dict)


WHOLE_EXPERTS = ExpertsSlice()
WHOLE_LINEAR = LinearSlice()


def column_parallel(out_features: int, share: Share, *, fully_sharded: bool = False) -> LinearSlice:
    """A replicated (fully sharded: cut along rank), B cut along the output."""
    return LinearSlice(outputs=share.of(out_features).pieces, lanes=share if fully_sharded else None)


def row_parallel(in_features: int, out_features: int, share: Share, *, fully_sharded: bool = False) -> LinearSlice:
    """A cut along the input, B replicated (fully sharded: cut along the output)."""
    outputs = share.of(out_features).pieces if fully_sharded else None
    return LinearSlice(inputs=share.of(in_features).pieces, outputs=outputs)


def experts_slice(
    *,
    num_experts: int,
    intermediate_size: int,
    tp: Share,
    ep: Share = Share(1, 0),
    granule: int = 1,
    experts: Sequence[int] | None = None,
    fully_sharded: bool = False,
) -> ExpertsSlice:
    """The slice of a rank in a tp x ep world. ``experts``: its experts, where they are not dealt out in blocks."""
    if experts is None and ep.world > 1:
        experts = contiguous_experts(num_experts, ep.world, ep.rank)
    return ExpertsSlice(
        experts=None if experts is None else tuple(experts),
        intermediate=None if tp.world == 1 else shard(intermediate_size, tp.world, tp.rank, granule=granule),
        low_rank=tp if fully_sharded and tp.world > 1 else None,
    )


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

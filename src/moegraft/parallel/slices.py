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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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

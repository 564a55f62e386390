"""What one rank holds of a model, as plain data: the loader reads, the bank keeps and the layers apply only that.

Shape letters: E experts · D hidden size · F expert intermediate size · G = 2 (gate and up) or 1 (no gate) · r rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moegraft.parallel.slices import Shard, contiguous_experts, count, shard, whole

Pieces = tuple[tuple[int, int], ...]
"""Intervals [start, stop) of an axis, in the order in which a rank keeps them."""


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

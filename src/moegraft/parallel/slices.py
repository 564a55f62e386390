"""The slicing law: which part of every axis a rank owns. Pure arithmetic, no tensors, no processes.

An axis of ``size`` entries is cut for ``world`` ranks into shares of one length, the size divided by the world and
rounded up to whole granules. The shares follow each other; the last ones may be short or empty, and are padded with
zeros to the common length. Zero columns of w13 and rows of w2 add nothing, nor do zero lanes of a low-rank vector.

Worked example: F = 19 on 4 ranks. Shares of 5: [0, 5), [5, 10), [10, 15) and [15, 19) with one column of padding.
With a granule of 4 (scale groups): shares of 8: [0, 8), [8, 16), [16, 19) with 5 of padding, and [19, 19) with 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moegraft.core.halves import half_intervals


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
    def pieces(self) -> tuple[tuple[int, int], ...]:
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


def half_columns(part: Shard, size: int, *, num_halves: int, is_interleaved: bool) -> tuple[tuple[int, int], ...]:
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


def count(pieces: Sequence[tuple[int, int]]) -> int:
    """Entries in some intervals."""
    return sum(stop - start for start, stop in pieces)

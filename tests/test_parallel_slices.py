"""The slicing law: for every world, rank and layout the slices partition the whole, and reassembly is the identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegraft.formats.base import DenseExperts
from moegraft.parallel.slices import (
    Shard,
    contiguous_experts,
    half_columns,
    round_robin_experts,
    shard,
    shards,
    whole,
)

sizes = st.integers(0, 200)
worlds = st.integers(1, 9)
granules = st.integers(1, 40)


def test_documented_example() -> None:
    assert shards(19, 4) == (Shard(0, 5, 5), Shard(5, 10, 5), Shard(10, 15, 5), Shard(15, 19, 5))
    assert shards(19, 4, granule=4) == (Shard(0, 8, 8), Shard(8, 16, 8), Shard(16, 19, 8), Shard(19, 19, 8))
    assert shard(19, 4, 3).padding == 1


@given(size=sizes, world=worlds, granule=granules)
def test_shards_partition_an_axis(size: int, world: int, granule: int) -> None:
    parts = shards(size, world, granule=granule)
    owned = [index for part in parts for index in range(part.start, part.stop)]
    assert owned == list(range(size))
    assert len({part.padded for part in parts}) == 1
    assert all(0 <= part.size <= part.padded and part.start % granule in (0, size % granule) for part in parts)
    # No rank takes more than an equal share, rounded up to whole granules.
    assert parts[0].padded < size / world + granule
    assert [part.pieces for part in parts if not part.size] == [()] * sum(not part.size for part in parts)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_an_error(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of 4"):
        shard(8, 4, rank)


@given(size=st.integers(1, 60), world=worlds, granule=st.integers(1, 8), num_halves=st.sampled_from([1, 2]))
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_half_columns_partition_w13(size: int, world: int, granule: int, num_halves: int, is_interleaved: bool) -> None:
    owned: list[int] = []
    stored = torch.arange(num_halves * size).view(num_halves, size)  # [half, f] -> index along the stored axis
    if is_interleaved:
        stored = torch.arange(num_halves * size).view(size, num_halves).T
    for part in shards(size, world, granule=granule):
        pieces = half_columns(part, size, num_halves=num_halves, is_interleaved=is_interleaved)
        columns = [column for start, stop in pieces for column in range(start, stop)]
        assert sorted(columns) == sorted(stored[:, part.start : part.stop].flatten().tolist())
        owned += columns
    assert sorted(owned) == list(range(num_halves * size))


@given(size=st.integers(1, 24), world=worlds, num_halves=st.sampled_from([1, 2]), data=st.data())
def test_sliced_experts_sum_to_the_whole(size: int, world: int, num_halves: int, data: st.DataObject) -> None:
    """The law and the weight format cut the same columns: partial layers of all ranks put together are the layer."""
    is_transposed, is_interleaved = data.draw(st.booleans()), data.draw(st.booleans())
    w13, w2 = torch.rand(2, num_halves * size, 3), torch.rand(2, 3, size)
    layer = DenseExperts.pack(
        w13, w2, num_halves=num_halves, is_transposed=is_transposed, is_interleaved=is_interleaved
    )
    parts = shards(size, world)
    locals_ = [layer.take_intermediate(part.start, part.stop, padded_to=part.padded) for part in parts]
    assert {local.intermediate_size for local in locals_} == {parts[0].padded}
    pieces13, pieces2 = [], []
    for part, local in zip(parts, locals_, strict=True):
        local13, local2 = local.dequantise(torch.float32)
        pieces13.append(local13.unflatten(1, (num_halves, part.padded))[:, :, : part.size])
        pieces2.append(local2[:, :, : part.size])
        assert not local2[:, :, part.size :].any()
        assert not local13.unflatten(1, (num_halves, part.padded))[:, :, part.size :].any()
    assert torch.equal(torch.cat(pieces13, 2).flatten(1, 2), w13)
    assert torch.equal(torch.cat(pieces2, 2), w2)


@given(num_experts=st.integers(0, 100), world=worlds)
@pytest.mark.parametrize("deal", [contiguous_experts, round_robin_experts])
def test_experts_are_shared_out(deal: object, num_experts: int, world: int) -> None:
    assert callable(deal)
    held = [deal(num_experts, world, rank) for rank in range(world)]
    assert sorted(expert for mine in held for expert in mine) == list(range(num_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert all(list(mine) == sorted(mine) for mine in held)


def test_whole() -> None:
    assert whole(7) == shard(7, 1, 0)

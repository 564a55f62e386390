"""Groups and collectives in real processes; what happens where a peer is late, dead, or was started otherwise."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from moegraft.core.errors import ParallelError
from moegraft.parallel import Communicator, ParallelConfig, ParallelGroups
from moegraft.parallel.collectives import sum_in_order

if TYPE_CHECKING:
    from support.distributed import WorldPool


def _places(config: ParallelConfig) -> dict[str, Any]:
    groups = ParallelGroups.create(config)
    places = {
        "ranks": (groups.rank, groups.tp.rank, groups.ep.rank),
        "tp": groups.tp.ranks,
        "ep": groups.ep.ranks,
        "sum": groups.tp.all_reduce(torch.tensor([1 << groups.rank])).item(),
    }
    groups.close()
    return places


def test_places_in_a_mixed_world(world4: WorldPool) -> None:
    places = world4.run(_places, ParallelConfig(tp=2, ep=2))
    assert [place["ranks"] for place in places] == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    assert [place["tp"] for place in places] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [place["ep"] for place in places] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [place["sum"] for place in places] == [0b0011, 0b0011, 0b1100, 0b1100]


def _exchange_all(dtype: torch.dtype) -> dict[str, Any]:
    groups = ParallelGroups.create(ParallelConfig(tp=dist.get_world_size()))
    comm, rank = groups.tp, groups.rank
    mine = (torch.arange(2 * 3).view(2, 3) + 10 * rank).to(dtype)
    uneven = mine[: 1 + rank % 2]
    counts = [1 + other % 2 for other in range(comm.size)]
    send = [(rank + other) % 3 for other in range(comm.size)]
    receive = [(rank + other) % 3 for other in range(comm.size)]
    rows = torch.full((sum(send), 2), float(rank)).to(dtype)
    result = {
        "gather": comm.all_gather(mine),
        "gather_uneven": comm.all_gather(uneven, counts),
        "a2a": comm.all_to_all(rows, send, receive),
        "a2a_none": comm.all_to_all(rows[:0], [0] * comm.size, [0] * comm.size),
        "objects": comm.all_gather_object({"rank": rank}),
    }
    if dtype.is_floating_point and dtype.itemsize > 1:
        total = sum(counts)
        result["reduce"] = comm.all_reduce(mine.clone())
        result["scatter"] = comm.reduce_scatter((torch.arange(total * 2).view(total, 2) + rank).to(dtype), counts)
        result["scatter_even"] = comm.reduce_scatter(torch.ones(comm.size * 2, 3).to(dtype))
    comm.barrier()
    result["traffic"] = dict(comm.traffic.sent_bytes)
    groups.close()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_collectives(world4: WorldPool, dtype: torch.dtype) -> None:
    n, size = 4, dtype.itemsize
    results = world4.run(_exchange_all, dtype)
    mine = [(torch.arange(6).view(2, 3) + 10 * rank).to(dtype) for rank in range(n)]
    for rank, result in enumerate(results):
        assert _equal(result["gather"], torch.cat(mine))
        assert _equal(result["gather_uneven"], torch.cat([mine[r][: 1 + r % 2] for r in range(n)]))
        sent = [torch.full(((rank + other) % 3, 2), float(other)).to(dtype) for other in range(n)]
        assert _equal(result["a2a"], torch.cat(sent))
        assert result["a2a_none"].shape == (0, 2)
        assert result["objects"] == [{"rank": r} for r in range(n)]
        to_others = sum((rank + other) % 3 for other in range(n) if other != rank)
        assert result["traffic"]["all_to_all"] == to_others * 2 * size
        assert result["traffic"]["all_gather"] == (6 + 3 * (1 + rank % 2)) * size * (n - 1)
        if "reduce" in result:
            assert _equal(result["reduce"], sum_in_order(torch.stack(mine)))
            total = (4 * torch.arange(12).view(6, 2) + sum(range(n))).to(dtype)
            assert _equal(result["scatter"], total.split([1, 2, 1, 2])[rank])
            assert _equal(result["scatter_even"], torch.full((2, 3), 4.0).to(dtype))
            assert result["traffic"]["all_reduce"] == 2 * 6 * size * (n - 1) // n


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


def test_sum_in_order_accumulates_in_float32() -> None:
    parts = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(4, 1)
    assert sum_in_order(parts).item() == 260.0  # 259, rounded once; one by one in bfloat16 it stays 256
    kept = torch.ones(2, 3)
    sum_in_order(kept)
    assert torch.equal(kept, torch.ones(2, 3))


def test_a_group_of_one_sends_nothing() -> None:
    comm, x = Communicator.alone(), torch.rand(3, 2)
    assert comm.all_gather(x) is x
    assert comm.all_reduce(x) is x
    assert comm.reduce_scatter(x) is x
    assert comm.all_to_all(x, [3], [3]) is x
    assert comm.all_gather_object(1) == [1]
    comm.barrier()
    assert comm.traffic.total_bytes == 0
    alone = ParallelGroups.create(ParallelConfig())
    assert (alone.rank, alone.tp.rank, alone.ep.rank, alone.world.size) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 0}, "tp is 0"),
        ({"ep": -1}, "ep is -1"),
        ({"dispatch": "mail"}, "dispatch is 'mail'"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
    ],
)
def test_a_config_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**options)


def test_without_a_world() -> None:
    with pytest.raises(ParallelError, match=r"need 2 processes, but torch\.distributed is not init"):
        ParallelGroups.create(ParallelConfig(tp=2))


def test_a_world_of_another_size(world2: WorldPool) -> None:
    for outcome in world2.outcomes(_places, ParallelConfig(tp=2, ep=2)):
        assert isinstance(outcome.error, ParallelError)
        assert "need 4 processes, but the world of torch.distributed has 2" in str(outcome.error)


def _create_differently(rank_config: ParallelConfig) -> None:
    ParallelGroups.create(rank_config)


def test_ranks_with_different_configs(world2: WorldPool) -> None:
    configs = (ParallelConfig(tp=2), ParallelConfig(tp=2, fully_sharded=True))
    for outcome in world2.outcomes(_create_differently, per_rank=[(config,) for config in configs]):
        assert isinstance(outcome.error, ParallelError)
        assert "the ranks differ in the ParallelConfig that they were started with" in str(outcome.error)


def _meet(victim: int, fault: str) -> list[str]:
    groups = ParallelGroups.create(ParallelConfig(tp=dist.get_world_size(), timeout_seconds=1.0))
    if groups.rank == victim and fault == "dead":
        os._exit(1)
    if groups.rank == victim:
        time.sleep(2.5)
    errors = []
    for _ in range(2):
        try:
            groups.tp.all_reduce(torch.ones(8))
        except ParallelError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("fault", ["dead", "late"])
def test_a_lost_peer_ends_in_an_error_within_the_timeout(world2: WorldPool, fault: str) -> None:
    outcomes = world2.outcomes(_meet, 1, fault)
    world2.close()
    assert outcomes[1].died is (fault == "dead")
    first, second = outcomes[0].result
    assert "rank 0, tensor-parallel group of ranks [0, 1]: all_reduce of 32 bytes failed after" in first
    assert "a peer is dead, late" in first
    assert "all_reduce refused, an earlier collective failed" in second
    assert outcomes[0].seconds < 2.5

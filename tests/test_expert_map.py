"""Expert maps and dispatch plans as pure functions: every choice reaches its expert once, whatever the map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegraft.moe.expert_parallel.all_to_all import combine_partials, local_choices, plan_routes, ranks_needed
from moegraft.parallel.slices import NOWHERE, ExpertMap, ExpertPlacement

CPU = torch.device("cpu")


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    num_ranks = draw(st.integers(1, 6))
    return draw(st.integers(num_ranks, 20)), num_ranks


@st.composite
def expert_maps(draw: st.DrawFn) -> ExpertMap:
    """Contiguous, round-robin and arbitrary maps, with copies of any experts on any ranks."""
    num_experts, num_ranks = draw(sizes())
    kind = draw(st.sampled_from(["contiguous", "round_robin", "arbitrary"]))
    if kind == "arbitrary":
        # Every rank has one; the others stand anywhere.
        anywhere = st.lists(
            st.integers(0, num_ranks - 1), min_size=num_experts - num_ranks, max_size=num_experts - num_ranks
        )
        owners = draw(st.permutations([*range(num_ranks), *draw(anywhere)]))
        expert_map = ExpertMap.from_owners(owners, num_ranks)
    else:
        expert_map = getattr(ExpertMap, kind)(num_experts, num_ranks)
    ranks = st.lists(st.integers(0, num_ranks - 1), max_size=num_ranks)
    return expert_map.with_copies(draw(st.dictionaries(st.integers(0, num_experts - 1), ranks, max_size=4)))


@st.composite
def routings(draw: st.DrawFn, num_experts: int) -> torch.Tensor:
    """topk ids [T, K], some of them outside [0, E)."""
    top_k = draw(st.integers(1, min(4, num_experts)))
    row = st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, max_size=9))
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).reshape(-1, top_k)


@given(sizes())
def test_every_expert_stands_somewhere_and_ranks_are_balanced(size: tuple[int, int]) -> None:
    for kind in (ExpertMap.contiguous, ExpertMap.round_robin):
        expert_map = kind(*size)
        held = [len(experts) for experts in expert_map.experts_of_rank]
        assert sum(held) == size[0] and max(held) - min(held) <= 1 and not expert_map.has_copies
        assert sorted(e for experts in expert_map.experts_of_rank for e in experts) == list(range(size[0]))


def test_the_kinds() -> None:
    assert ExpertMap.contiguous(7, 3).experts_of_rank == ((0, 1, 2), (3, 4), (5, 6))
    assert ExpertMap.round_robin(7, 3).experts_of_rank == ((0, 3, 6), (1, 4), (2, 5))
    owned = ExpertMap.from_owners([2, 0, 2, 1], 3)
    assert owned.experts_of_rank == ((1,), (3,), (0, 2))
    copied = owned.with_copies({0: (0, 2), 3: (0,)})
    assert copied.experts_of_rank == ((0, 1, 3), (3,), (0, 2))
    assert copied.ranks_of(0) == (0, 2) and copied.ranks_of(1) == (0,)
    assert copied.has_copies and not owned.has_copies


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertMap.contiguous(3, 4), "3 experts for 4 ranks"),
        (lambda: ExpertMap.round_robin(3, 0), "3 experts for 0 ranks"),
        (lambda: ExpertMap.from_owners([0, 2], 2), "owner 2, expected a rank from 0 to 1"),
        (lambda: ExpertMap.from_owners([0, 0], 2), "rank 1 holds no expert"),
        (lambda: ExpertMap(num_experts=3, experts_of_rank=((0,), (2,))), r"no rank holds experts \[1\]"),
        (lambda: ExpertMap(num_experts=2, experts_of_rank=((1, 0),)), "ascending"),
        (lambda: ExpertMap(num_experts=2, experts_of_rank=((0, 1, 1),)), "each once"),
        (lambda: ExpertMap(num_experts=2, experts_of_rank=((0, 1, 2),)), "ids from 0 to 1"),
        (lambda: ExpertMap.contiguous(4, 2).with_copies({1: (2,)}), "copy of expert 1 on rank 2"),
    ],
)
def test_bad_maps_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.data())
def test_every_choice_finds_its_expert(data: st.DataObject) -> None:
    expert_map = data.draw(expert_maps())
    ids_TK = data.draw(routings(expert_map.num_experts))
    rank_TK, local_TK = ExpertPlacement.of(expert_map, CPU).locate(ids_TK, data.draw(st.integers(0, 5)))
    for expert, rank, local in zip(*(t.flatten().tolist() for t in (ids_TK, rank_TK, local_TK)), strict=True):
        if 0 <= expert < expert_map.num_experts:
            assert expert_map.experts_of_rank[rank][local] == expert
        else:
            assert (rank, local) == (NOWHERE, NOWHERE)


@given(expert_maps(), st.integers(0, 50))
def test_rows_spread_over_copies_and_their_place_alone_decides(expert_map: ExpertMap, first_row: int) -> None:
    placement = ExpertPlacement.of(expert_map, CPU)
    for expert in range(expert_map.num_experts):
        ranks = expert_map.ranks_of(expert)
        found, _ = placement.locate(torch.full((3 * len(ranks), 1), expert), first_row)
        assert sorted(found.flatten().tolist()) == sorted(3 * ranks)
        # Alone, at the same place, a row goes to the same copy.
        alone, _ = placement.locate(torch.tensor([[expert]]), first_row + 1)
        assert alone.item() == found[1].item()


def test_the_example_of_the_record() -> None:
    rank_TK = torch.tensor([[1, 0], [1, 1], [0, 0]])
    needed_RT = ranks_needed(rank_TK, 2)
    assert needed_RT.tolist() == [[True, False, True], [True, True, False]]
    routes = plan_routes(needed_RT, (2, 2), top_k=2)
    assert routes.token_S.tolist() == [0, 2, 0, 1]
    assert routes.rank_S.tolist() == [0, 0, 1, 1]
    assert routes.position_TC.tolist() == [[0, 2], [3, 4], [1, 4]]


@given(st.data())
def test_rows_arrive_once_and_their_partial_sums_add_up(data: st.DataObject) -> None:
    """What experts would do, with integers: each choice counts weight times (expert + 1), and nothing counts twice."""
    expert_map = data.draw(expert_maps())
    ids_TK = data.draw(routings(expert_map.num_experts))
    T, K = ids_TK.shape
    weights_TK = torch.arange(1, T * K + 1, dtype=torch.float32).view(T, K)
    rank_TK, local_TK = ExpertPlacement.of(expert_map, CPU).locate(ids_TK)
    needed_RT = ranks_needed(rank_TK, expert_map.num_ranks)
    routes = plan_routes(needed_RT, tuple(needed_RT.sum(1).tolist()), K)
    ids_SK, weights_SK = local_choices(rank_TK, local_TK, weights_TK, routes)

    assert routes.num_rows == len(set(zip(routes.rank_S.tolist(), routes.token_S.tolist(), strict=True)))
    assert (ids_SK != NOWHERE).any(dim=1).all()  # no row travels for nothing
    partial_S1 = torch.zeros(routes.num_rows + 1, 1)
    for s, rank in enumerate(routes.rank_S.tolist()):
        for local, weight in zip(ids_SK[s].tolist(), weights_SK[s].tolist(), strict=True):
            if local != NOWHERE:
                partial_S1[s] += weight * (expert_map.experts_of_rank[rank][local] + 1)
    is_known_TK = (ids_TK >= 0) & (ids_TK < expert_map.num_experts)
    expected_T = (weights_TK * (ids_TK + 1) * is_known_TK).sum(1)
    assert combine_partials(partial_S1, routes.position_TC).flatten().tolist() == expected_T.tolist()


def test_partials_are_added_in_float32_and_in_the_order_of_the_ranks() -> None:
    partial_SD = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [0.0]], dtype=torch.bfloat16)
    out = combine_partials(partial_SD, torch.tensor([[0, 1, 2], [1, 3, 3]]))
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == [1 + 2**-8, 2**-9]  # bfloat16 would have lost both

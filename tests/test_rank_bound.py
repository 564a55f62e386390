"""``GraftedModel.batch(rank_bound=...)``: what runs inside also serves adapters that come later."""

from __future__ import annotations

import pytest
import torch
from support.mixed import ROWS, MixedBatch

from moegraft import GraftedModel
from moegraft.core.errors import BatchError
from moegraft.core.tables import ExpertsFactor
from moegraft.lora.rows import RankBounds

pytestmark = pytest.mark.usefixtures("one_thread")


def largest_rank(graft: GraftedModel) -> int:
    return max(max(info.ranks.values()) for info in graft.adapters.values())


def test_a_bound_changes_no_result(graft: GraftedModel, mixed: MixedBatch) -> None:
    ids = mixed.input_ids
    expected = graft(input_ids=ids, adapters=ROWS).logits
    with graft.batch(ROWS, len(ids), rank_bound=largest_rank(graft)), torch.no_grad():
        torch.testing.assert_close(graft.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_bound_stands_for_every_module(graft: GraftedModel) -> None:
    bound, name = largest_rank(graft), next(iter(graft.adapters))
    with graft.batch([name], 1, rank_bound=bound) as call:
        assert call is not None
        for module in graft.bank.layout.experts:
            assert call.experts_bounds(module, 2) == RankBounds(a13=2 * bound, a2=bound)
        assert all(call.linear_bound(m) == bound for m in graft.bank.layout.linears)


def test_without_a_bound_either_factor_has_its_own(graft: GraftedModel) -> None:
    with graft.batch(list(graft.adapters)) as call:
        assert call is not None
        for module in graft.bank.layout.experts:
            ranks = call.batch.max_ranks(module)
            expected = RankBounds(a13=ranks[ExpertsFactor.A13], a2=ranks[ExpertsFactor.A2])
            assert call.experts_bounds(module, 2) == expected


def test_a_larger_rank_is_refused_and_the_batch_is_released(graft: GraftedModel) -> None:
    rank = largest_rank(graft)
    name = next(name for name, info in graft.adapters.items() if max(info.ranks.values()) == rank)
    with (
        pytest.raises(BatchError, match=rf"'{name}' has rank {rank} on .*, rank_bound is {rank - 1}"),
        graft.batch([name], 1, rank_bound=rank - 1),
    ):
        pass
    assert not graft.adapters[name].in_use


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_is_a_rank(graft: GraftedModel, bound: int) -> None:
    with pytest.raises(BatchError, match=f"rank_bound={bound}"), graft.batch([None], 1, rank_bound=bound):
        pass

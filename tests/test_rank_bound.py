"""``GraftedModel.batch(rank_bound=...)``: what runs inside also serves adapters that come later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from support.adapters import save_with_peft
from support.families import build
from support.mixed import KINDS, ROWS, MixedBatch, random_ids

import moegraft
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


KINDS_THAT_FOLLOW = [name for name, config in KINDS.items() if "modules_to_save" not in config]


@pytest.mark.parametrize("kind", KINDS_THAT_FOLLOW)
@torch.no_grad()
def test_slots_that_are_replaced_in_place(mixed: MixedBatch, tmp_path: Path, kind: str) -> None:
    """Begun while all rows are base: every later delta arrives, of every kind, and base rows keep their bits."""
    model, ids = mixed.model, mixed.input_ids[:3]
    save_with_peft(model, LoraConfig(**KINDS[kind]), tmp_path / "one", ids)
    save_with_peft(model, LoraConfig(**{**KINDS[kind], "r": 5}), tmp_path / "two", ids, seed=1)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        for name in ("one", "two"):
            graft.load_adapter(tmp_path / name, name)
        base = graft(input_ids=ids).logits
        with graft.batch([None] * 3, rank_bound=8) as call:
            assert call is not None
            assert torch.equal(graft.model(input_ids=ids).logits, base)
            slots_M = call.token_rows(*ids.shape).slots_M
            for names in (["two", None, "one"], [None, None, None], ["one", "two", "two"]):
                slots = [-1 if name is None else graft.bank.get(name).slot for name in names]
                slots_M.copy_(torch.tensor(slots).repeat_interleave(ids.shape[1]))
                found = graft.model(input_ids=ids).logits
                expected = graft(input_ids=ids, adapters=names).logits
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                for i, name in enumerate(names):
                    assert torch.equal(found[i], base[i]) == (name is None)
                last = graft.model(input_ids=ids, logits_to_keep=1).logits
                torch.testing.assert_close(last, expected[:, -1:], rtol=1e-5, atol=1e-5)


def test_saved_modules_are_refused_when_the_call_is_made(graft: GraftedModel, tmp_path: Path) -> None:
    with graft.batch([None], rank_bound=8):
        pass
    save_with_peft(build("qwen3_moe"), LoraConfig(**KINDS["save lm_head"]), tmp_path / "saved", random_ids())
    with graft.batch([None], rank_bound=8), torch.no_grad():
        graft.load_adapter(tmp_path / "saved", "saved")
        with pytest.raises(BatchError, match=r"'lm_head' .*modules_to_save.*rank_bound= cannot follow"):
            graft.model(input_ids=random_ids(1, 3))
    message = r"adapter 'saved' replaces lm_head.weight \(modules_to_save\), which a batch with rank_bound= cannot"
    with pytest.raises(BatchError, match=message), graft.batch(["fused"], rank_bound=8):
        pass
    assert not graft.adapters["fused"].in_use
    graft.unload_adapter("saved")
    with graft.batch(["fused"], rank_bound=8):
        pass


def test_a_captured_call_takes_the_rows_of_later_batches(graft: GraftedModel, mixed: MixedBatch) -> None:
    """What a CUDA graph does: the modules run under the captured call, whatever block is current."""
    ids = mixed.input_ids
    with graft.batch([None] * len(ids), rank_bound=8) as captured, torch.no_grad():
        assert captured is not None
        read = captured.token_rows(*ids.shape).slots_M
        assert captured.modules >= {module for info in graft.adapters.values() for module in info.ranks}
    with graft.batch(ROWS, rank_bound=8) as later:
        assert later is not None
        captured.take_rows(later)
        assert torch.equal(read, later.token_rows(*ids.shape).slots_M)

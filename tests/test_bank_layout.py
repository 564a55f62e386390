from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from support.bank import (
    HIDDEN,
    expected_factors,
    make_bank,
    make_targets,
    random_weights,
    rows_by_formula,
)

from moegraft.core.errors import (
    AdapterMemoryError,
    MoegraftError,
)
from moegraft.core.tables import ExpertsFactor, Field
from moegraft.lora.bank import AdapterBank, BankLayout, PagePool
from moegraft.lora.bank.layout import choose_page_elems
from moegraft.lora.bank.pool import page_runs
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets


def test_page_runs_cut_at_every_hole_and_turn():
    assert list(page_runs([4, 5, 9, 2, 3])) == [(0, 4, 2), (2, 9, 1), (3, 2, 2)]
    assert list(page_runs([])) == []


def test_pool_prefers_the_shortest_run_that_fits():
    pool = PagePool(capacity_bytes=10 * 16, page_elems=4, dtype=torch.float32, device="cpu")
    assert pool.allocate(10) == tuple(range(10))
    pool.free((1, 2, 3, 4))
    pool.free((7, 8))
    assert pool.allocate(2) == (7, 8)
    assert pool.allocate(0) == ()
    pool.free((7,))
    assert pool.allocate(5) == (1, 2, 3, 4, 7)
    assert pool.num_free == 0
    pool.check_integrity()


def test_pool_refuses_what_is_not_there_and_changes_nothing():
    pool = PagePool(capacity_bytes=4 * 16 + 15, page_elems=4, dtype=torch.float32, device="cpu")
    assert (pool.num_pages, pool.capacity_bytes) == (4, 64)
    pages = pool.allocate(3)
    with pytest.raises(AdapterMemoryError, match="2 pages are needed, 1 of 4"):
        pool.allocate(2)
    for wrong in [(3,), (0, 0), (4,), (-1,)]:
        with pytest.raises(MoegraftError, match="freed twice or lies outside"):
            pool.free(wrong)
    assert pool.free_pages() == [3]
    pool.free(pages)
    assert pool.num_free == 4
    pool.check_integrity()
    with pytest.raises(AdapterMemoryError, match="15 bytes is smaller than one page of 16"):
        PagePool(capacity_bytes=15, page_elems=4, dtype=torch.float32, device="cpu")


def test_freed_pages_are_poisoned():
    pool = PagePool(capacity_bytes=64, page_elems=4, dtype=torch.float32, device="cpu", poison=True)
    pages = pool.allocate(2)
    pool.write(pages, torch.ones(2, 4))
    assert pool.pages[:2].eq(1).all()
    pool.free(pages)
    assert pool.data.isnan().all()


@pytest.mark.parametrize(
    ("row_lens", "target", "expected"),
    [
        ([2048, 768, 4096, 151936], 131072, 13 * 12288),  # all but the vocabulary divide; one vocabulary row fits
        ([2880], 131072, 46 * 2880),
        ([7168, 2048], 131072, 9 * 14336),
        ([4099, 4093], 40000, 8 * 4099),  # no common multiple in reason: the first alone divides
        ([4099, 4093], 8192, 8192),  # nor for the first
        ([65537], 1024, 65544),  # one row is longer than the wish
        ([], 131072, 131072),
    ],
)
def test_page_size(row_lens: list[int], target: int, expected: int):
    page = choose_page_elems(row_lens, target_elems=target, align_elems=8)
    assert page == expected
    assert page % 8 == 0
    assert page >= max(row_lens, default=0)


def test_entries_are_numbered_in_the_order_of_the_contract():
    layout = BankLayout(make_targets(), dtype=torch.bfloat16)
    experts = layout.module_entries("layers.0")
    assert [entry.row_len for entry in layout.entries[experts]] == [HIDDEN, 12, 12, 12, HIDDEN, 12, 12, HIDDEN]
    assert [entry.row_len for entry in layout.entries[layout.module_entries("q")]] == [HIDDEN, 20, 20]
    assert [entry.row_len for entry in layout.entries[layout.module_entries("embed")]] == [33, HIDDEN]
    assert layout.expert_columns("layers.1") == slice(5, 8)
    assert layout.entries[layout.saved_entry("router", "bias").index].row_len == 10  # 5 float32 in a bfloat16 bank
    assert layout.entries[layout.saved_entry("conv", "mask").index].row_len == 2  # 3 bytes, rounded up
    assert layout.page_bytes % 16 == 0
    assert abs(layout.page_bytes - 256 * 1024) < 64 * 1024


def test_one_name_is_one_kind_of_module():
    targets = make_targets()
    with pytest.raises(ValueError, match="'q' is listed as two kinds"):
        BankLayout(replace(targets, embeddings={"q": targets.embeddings["embed"]}), dtype=torch.float32)


def test_documented_example():
    """The numbers of docs/adapter_bank.md."""
    target = ExpertsTarget(name="experts", num_experts=4, hidden_size=8, intermediate_size=12)
    layout = BankLayout(
        ModelTargets(model_type="tiny", experts={"experts": target}), dtype=torch.bfloat16, page_bytes=96
    )
    assert layout.page_elems == 48
    bank = AdapterBank(layout, capacity_bytes=8 * 96, device="cpu", max_slots=4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    def filler(experts: int) -> AdapterWeights:
        lora = ExpertsLoRA(expert_ids=tuple(range(experts)), a13=draw(experts, 6, 8), b_up=draw(1, 4, 12))
        return AdapterWeights(experts={"experts": lora})

    bank.load("x", filler(2))
    bank.load("y", filler(1))
    bank.unload("x")
    lora = ExpertsLoRA(
        expert_ids=(1, 3),
        a13=draw(2, 4, 8),
        b_gate=draw(2, 2, 12),
        b_up=draw(2, 2, 12),
        up_lane=2,
        a2=draw(2, 1, 12),
        b2=draw(2, 1, 8),
    )
    bank.load("z", AdapterWeights(experts={"experts": lora}))
    tables = bank.experts_tables("experts")
    assert tables.expert_index[0].tolist() == [-1, 0, -1, 1]
    assert tables.page_table[0, :5].tolist() == [0, 1, 2, 5, 6]
    assert tables.factors[0, :5, :5].tolist() == [
        [0, 0, 4, 4, 0],
        [2, 0, 2, 2, 0],
        [3, 0, 2, 2, 2],
        [1, 24, 1, 1, 0],
        [4, 0, 1, 1, 0],
    ]
    assert not tables.factors[0, 5:].any()
    assert torch.equal(tables.pool[56:64], lora.a13[1, 3])
    assert torch.equal(tables.pool[84:96], lora.a2[1, 0])
    assert torch.equal(tables.pool[296:304], lora.b2[1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_lie_where_the_formula_says(dtype: torch.dtype):
    rng = random.Random(1)
    bank = make_bank(dtype)
    for index in range(60):
        weights = random_weights(rng, dtype=dtype)
        if index % 3 == 2:
            bank.unload(rng.choice(bank.names()))
        handle = bank.load(f"a{index}", weights)
        for (module, factor), tensor in expected_factors(weights).items():
            entry = bank.layout.factor_entry(module, factor)
            row_len = tensor.shape[-1]
            lora = weights.experts.get(module)
            if lora is None:
                assert (
                    rows_by_formula(bank, slot=handle.slot, entry=entry, row_len=row_len, position=0) == tensor.tolist()
                )
                continue
            tables = bank.experts_tables(module)
            fields = tables.factors[handle.slot, factor]
            assert fields[Field.LANE] == (lora.up_lane if factor == ExpertsFactor.B_UP else 0)
            for expert in range(bank.layout.experts[module].num_experts):
                position = int(tables.expert_index[handle.slot, expert])
                assert (position >= 0) == (expert in lora.expert_ids)
                if position >= 0:
                    rows = rows_by_formula(bank, slot=handle.slot, entry=entry, row_len=row_len, position=position)
                    assert rows == tensor[position if tensor.shape[0] > 1 else 0].tolist()


def test_offsets_let_rows_be_gathered_wherever_the_row_length_divides_the_page():
    rng = random.Random(2)
    bank = make_bank(torch.bfloat16)
    packed = 0
    for index in range(40):
        handle = bank.load(f"a{index}", random_weights(rng, dtype=torch.bfloat16))
        for entry, placement in handle.space.placements.items():
            row_len = bank.layout.entries[entry].row_len
            divides = bank.layout.page_elems % row_len == 0
            assert placement.offset % (row_len if divides else bank.layout.align_elems) == 0
            packed += placement.offset > 0
        bank.unload(handle.name)
    assert packed > 100

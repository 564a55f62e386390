"""Thousands of random calls against a model of the bank that is a dictionary; the whole bank is checked after each."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from support.bank import assert_content, make_bank, random_weights

from moegraft.core.errors import AdapterInUseError, AdapterMemoryError, AdapterNameError, UnknownAdapterError
from moegraft.core.tables import LinearFactor
from moegraft.lora.bank import AdapterBank, AdapterBatch, BankLayout, PagePool
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, LinearLoRA, LinearTarget, ModelTargets

NAMES = tuple("abcdef")
WEIGHTS = tuple(random_weights(random.Random(seed), dtype=torch.bfloat16) for seed in range(24))
PAGE_BYTES = 144  # most factors span pages
PAGES = 16
SLOTS = 4
INDEX = st.integers(0, 59)  # into the loaded names, modulo their number


def state_of(bank: AdapterBank) -> tuple[Any, ...]:
    """Everything that a refused call must leave as it was."""
    handles = [bank.get(name) for name in bank.names()]
    tables = bank.tables
    return (
        [(h.name, h.residency, h.pinned, h.users, h.last_use) for h in handles],
        bank.pool.free_pages(),
        [tensor.tolist() for tensor in (tables.page_table, tables.factors, tables.expert_index)],
        bank.pool.data.view(torch.int16).tolist(),
    )


class BankMachine(RuleBasedStateMachine):
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.bank = make_bank(torch.bfloat16, pages=PAGES, page_bytes=PAGE_BYTES, max_slots=SLOTS)
        self.loaded: dict[str, AdapterWeights] = {}
        self.pinned: set[str] = set()
        self.open: list[AdapterBatch] = []
        tables = self.bank.tables
        self.tensors = (self.bank.pool.data, tables.page_table, tables.factors, tables.expert_index)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def in_use(self) -> set[str]:
        return {handle.name for batch in self.open for handle in batch.handles}

    def pick(self, index: int) -> str:
        return sorted(self.loaded)[index % len(self.loaded)]

    def fits(self, wanted: set[str], new_pages: int | None = None) -> bool:
        """Whether ``wanted`` and what must stay fit into the pool together, with one new adapter or none."""
        stay = {name for name in self.pinned | self.in_use() | wanted if name in self.loaded}
        pages = sum(self.bank.get(name).space.num_pages for name in stay) + (new_pages or 0)
        return pages <= PAGES and len(stay) + (new_pages is not None) <= SLOTS

    def refused(self, error: type[Exception], call: Callable[[], object]) -> None:
        before = state_of(self.bank)
        with pytest.raises(error):
            call()
        assert state_of(self.bank) == before

    @rule(name=st.sampled_from(NAMES), weights=st.sampled_from(WEIGHTS))
    def load(self, name: str, weights: AdapterWeights) -> None:
        if name in self.loaded:
            self.refused(AdapterNameError, lambda: self.bank.load(name, weights))
            return
        probe = make_bank(torch.bfloat16, page_bytes=PAGE_BYTES).load("probe", weights)
        if not self.fits(set(), probe.space.num_pages):
            self.refused(AdapterMemoryError, lambda: self.bank.load(name, weights))
            return
        self.bank.load(name, weights)
        self.loaded[name] = weights

    @rule(name=st.sampled_from(NAMES))
    def name_an_unknown_one(self, name: str) -> None:
        if name not in self.loaded:
            for call in (self.bank.unload, self.bank.evict, self.bank.pin, self.bank.unpin):
                self.refused(UnknownAdapterError, partial(call, name))
            self.refused(UnknownAdapterError, lambda: self.bank.acquire([*self.loaded, name]))

    @precondition(lambda self: self.loaded)
    @rule(index=INDEX)
    def unload(self, index: int) -> None:
        name = self.pick(index)
        if name in self.in_use():
            self.refused(AdapterInUseError, lambda: self.bank.unload(name))
        else:
            self.bank.unload(name)
            del self.loaded[name]
            self.pinned.discard(name)

    @precondition(lambda self: self.loaded)
    @rule(index=INDEX)
    def evict(self, index: int) -> None:
        name = self.pick(index)
        if name in self.in_use() | self.pinned:
            self.refused(AdapterInUseError, lambda: self.bank.evict(name))
        else:
            self.bank.evict(name)
            assert not self.bank.get(name).resident

    @precondition(lambda self: self.loaded)
    @rule(index=INDEX)
    def pin(self, index: int) -> None:
        name = self.pick(index)
        if not self.fits({name}):
            self.refused(AdapterMemoryError, lambda: self.bank.pin(name))
        else:
            self.bank.pin(name)
            self.pinned.add(name)

    @precondition(lambda self: self.pinned)
    @rule(index=INDEX)
    def unpin(self, index: int) -> None:
        name = sorted(self.pinned)[index % len(self.pinned)]
        self.bank.unpin(name)
        self.pinned.discard(name)

    @precondition(lambda self: self.loaded)
    @rule(target=batches, rows=st.lists(st.none() | INDEX, max_size=5))
    def acquire(self, rows: list[int | None]) -> AdapterBatch:
        names = [None if index is None else self.pick(index) for index in rows]
        if not self.fits({name for name in names if name is not None}):
            self.refused(AdapterMemoryError, lambda: self.bank.acquire(names))
            names = [None]
        batch = self.bank.acquire(names)
        assert len(set(batch.row_slots) - {-1}) == len(batch.handles) == len(set(names) - {None})
        self.open.append(batch)
        return batch

    @rule(batch=consumes(batches))
    def release(self, batch: AdapterBatch) -> None:
        batch.release()
        self.open.remove(batch)

    @invariant()
    def everything_is_in_order(self) -> None:
        self.bank.check_integrity()
        assert [tensor.data_ptr() for tensor in self.tensors] == self.addresses
        assert set(self.bank.names()) == set(self.loaded)
        for batch in self.open:
            slots = {handle.name: handle.slot for handle in batch.handles}
            assert batch.row_slots == tuple(-1 if name is None else slots[name] for name in batch.names)
        for name, weights in self.loaded.items():
            handle = self.bank.get(name)
            assert handle.pinned == (name in self.pinned)
            assert handle.in_use == (name in self.in_use())
            assert handle.resident or name not in self.pinned | self.in_use()
            if handle.resident:
                assert_content(self.bank, handle, weights)


TestBankMachine = BankMachine.TestCase
TestBankMachine.settings = settings(max_examples=150, stateful_step_count=60)


@settings(max_examples=200)
@given(sizes=st.lists(st.integers(0, 9), max_size=30), order=st.randoms(use_true_random=False))
def test_pool_pages_are_free_or_owned_once(sizes: list[int], order: random.Random):
    pool = PagePool(capacity_bytes=32 * 16, page_elems=4, dtype=torch.float32, device="cpu")
    owned: list[tuple[int, ...]] = []
    for size in sizes:
        if size > pool.num_free:
            with pytest.raises(AdapterMemoryError):
                pool.allocate(size)
            if owned:
                pool.free(owned.pop(order.randrange(len(owned))))
        else:
            owned.append(pool.allocate(size))
            assert len(owned[-1]) == size
        pool.check_integrity()
        assert sorted([page for pages in owned for page in pages] + pool.free_pages()) == list(range(32))


@settings(max_examples=60)
@given(
    hidden=st.integers(1, 40),
    inter=st.integers(1, 40),
    page_bytes=st.integers(16, 1024),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_any_sizes_fit_any_page(hidden: int, inter: int, page_bytes: int, ranks: tuple[int, int], dtype: torch.dtype):
    targets = ModelTargets(
        model_type="tiny",
        experts={"e": ExpertsTarget(name="e", num_experts=3, hidden_size=hidden, intermediate_size=inter)},
        linears={"l": LinearTarget(name="l", in_features=hidden, out_features=inter)},
    )
    layout = BankLayout(targets, dtype=dtype, page_bytes=page_bytes)
    bank = AdapterBank(layout, capacity_bytes=200 * layout.page_bytes, device="cpu", poison=True)
    rank, down = ranks
    lora = ExpertsLoRA(
        expert_ids=(0, 2),
        a13=torch.randn(1, rank, hidden).to(dtype),
        b_up=torch.randn(2, rank, inter).to(dtype),
        a2=torch.randn(2, down, inter).to(dtype),
        b2=torch.randn(1, down, hidden).to(dtype),
    )
    linear = LinearLoRA(a=torch.randn(down, hidden).to(dtype), b=torch.randn(down, inter).to(dtype))
    weights = AdapterWeights(experts={"e": lora}, linears={"l": linear})
    handle = bank.load("a", weights)
    bank.check_integrity()
    assert_content(bank, handle, weights)
    for entry, placement in handle.space.placements.items():
        row_len = layout.entries[entry].row_len
        if layout.page_elems % row_len == 0 and placement.offset % row_len == 0:
            first = (handle.residency.pages[placement.first_page] * layout.page_elems + placement.offset) // row_len
            rows = bank.pool.data.view(-1, row_len)[first : first + placement.rows]
            assert rows.isnan().sum() == 0
    gain = bank.factor(handle, "l", LinearFactor.GAIN)
    assert gain is None

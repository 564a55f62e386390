"""More adapters than fit, adapters in use, names that come again: the adapter memory of a grafted model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import TensorFactory, write_adapter
from support.families import build
from support.mixed import ROWS, MixedBatch, random_ids
from transformers import PreTrainedModel

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import AdapterInUseError, AdapterMemoryError

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 2


class TestMemory:
    """More adapters than fit: the least recently used wait in host memory and come back."""

    @pytest.fixture
    def crowded(self, tmp_path: Path) -> Iterator[tuple[GraftedModel, list[torch.Tensor]]]:
        """Six adapters of one size in room for three, and what each gives with room for all."""
        model, names = build("mixtral"), [f"a{i}" for i in range(6)]
        paths = [write_linears(model, tmp_path / name, seed=i) for i, name in enumerate(names)]
        ids = random_ids(1)
        with moegraft.attach(model, adapter_memory="8MiB") as graft:
            for path in paths:
                graft.load_adapter(path)
            expected = [graft(input_ids=ids, adapters=[name]).logits for name in names]
            pages, page_bytes = graft.adapters["a0"].num_pages, graft.bank.layout.page_bytes
        with moegraft.attach(model, adapter_memory=3 * pages * page_bytes) as graft:
            for path in paths:
                graft.load_adapter(path)
            yield graft, expected

    def test_each_comes_back_as_it_was(self, crowded: tuple[GraftedModel, list[torch.Tensor]]) -> None:
        graft, expected = crowded
        assert [info.resident for info in graft.adapters.values()] == [False] * 3 + [True] * 3
        for _ in range(2):
            for i in (0, 5, 1, 4, 2, 3):
                assert torch.equal(graft(input_ids=random_ids(1), adapters=[f"a{i}"]).logits, expected[i])
                assert graft.adapters[f"a{i}"].resident
                assert sum(info.resident for info in graft.adapters.values()) == 3
                graft.bank.check_integrity()

    def test_a_batch_that_does_not_fit(self, crowded: tuple[GraftedModel, list[torch.Tensor]]) -> None:
        graft, expected = crowded
        one, pool = graft.adapters["a0"].num_pages * graft.bank.layout.page_bytes, graft.bank.pool.capacity_bytes
        # a3 is resident and stays; what is missing is three more
        message = rf"'a0', 'a1', 'a2' need {3 * one} bytes .*free: 0 of {pool} bytes.*'a3' {one} bytes \(wanted"
        with pytest.raises(AdapterMemoryError, match=message) as error:
            graft(input_ids=random_ids(4), adapters=["a0", "a1", "a2", "a3"])
        assert isinstance(error.value, MemoryError)
        assert not any(info.in_use for info in graft.adapters.values())
        assert torch.equal(graft(input_ids=random_ids(1), adapters=["a0"]).logits, expected[0])

    def test_an_adapter_that_can_never_fit(self, crowded: tuple[GraftedModel, Any], tmp_path: Path) -> None:
        graft, _ = crowded
        big = write_linears(graft.model, tmp_path / "big", seed=9, r=4096)
        before = dict(graft.adapters)
        with pytest.raises(AdapterMemoryError, match=r"adapter 'big' needs \d+ bytes .* has \d+ bytes"):
            graft.load_adapter(big)
        assert {name: replace(info, resident=True) for name, info in graft.adapters.items()} == {
            name: replace(info, resident=True) for name, info in before.items()
        }

    def test_pinned_adapters_stay(self, crowded: tuple[GraftedModel, list[torch.Tensor]]) -> None:
        graft, expected = crowded
        graft.pin_adapter("a0")
        for i in range(1, 6):
            assert torch.equal(graft(input_ids=random_ids(1), adapters=[f"a{i}"]).logits, expected[i])
            assert graft.adapters["a0"].resident
        graft.unpin_adapter("a0")
        for i in range(1, 4):
            graft(input_ids=random_ids(1), adapters=[f"a{i}"])
        assert not graft.adapters["a0"].resident

    def test_a_name_may_be_loaded_again_as_another(
        self, crowded: tuple[GraftedModel, list[torch.Tensor]], tmp_path: Path
    ) -> None:
        """Same name, same slot, same pages, other numbers: nothing of the old adapter is remembered."""
        graft, expected = crowded
        assert torch.equal(graft(input_ids=random_ids(1), adapters=["a5"]).logits, expected[5])
        graft.unload_adapter("a5")
        other = write_linears(graft.model, tmp_path / "other", seed=77)
        graft.load_adapter(other, name="a5")
        changed = graft(input_ids=random_ids(1), adapters=["a5"]).logits
        assert not torch.allclose(changed, expected[5], atol=1e-2)
        graft.unload_adapter("a5")
        graft.load_adapter(tmp_path / "a5", name="a5")
        assert torch.equal(graft(input_ids=random_ids(1), adapters=["a5"]).logits, expected[5])

    def test_more_slots_than_adapters_of_a_batch(self, mixed: MixedBatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB", max_adapters=1) as graft:
            for name, path in mixed.adapters.items():
                graft.load_adapter(path, name=name)
            assert sum(info.resident for info in graft.adapters.values()) == 1
            for i, name in enumerate(ROWS):
                graft(input_ids=mixed.input_ids[i : i + 1], adapters=[name])
            with pytest.raises(AdapterMemoryError, match="1 slots"):
                graft(input_ids=mixed.input_ids[:2], adapters=["fused", "dora"])

    def test_in_use_in_another_thread(self, graft: GraftedModel) -> None:
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with graft.batch(["fused", None]):
                entered.set()
                leave.wait(timeout=30)

        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(timeout=30)
        try:
            assert graft.adapters["fused"].in_use
            with pytest.raises(AdapterInUseError, match="'fused' serves a batch and cannot be unloaded now"):
                graft.unload_adapter("fused")
            graft.unload_adapter("dora")
        finally:
            leave.set()
            thread.join()
        graft.unload_adapter("fused")
        assert list(graft.adapters) == ["per_expert"]


def write_linears(model: PreTrainedModel, folder: Path, *, seed: int, r: int = 4) -> Path:
    """Attention and two experts of every layer."""
    factory = TensorFactory(seed=seed)
    for i in range(NUM_LAYERS):
        factory.linear(f"model.layers.{i}.self_attn.q_proj", 32, 32, r=r)
        for e in (1, 3):
            factory.linear(f"model.layers.{i}.block_sparse_moe.experts.{e}.w1", 32, 24, r=r)
            factory.linear(f"model.layers.{i}.block_sparse_moe.experts.{e}.w2", 24, 32, r=r)
    return write_adapter(folder, factory.tensors, r=r, lora_alpha=r / 8, target_modules=["q_proj", "w1", "w2"])

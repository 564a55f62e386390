"""Adapters that all ranks load, use and forget together, or none of them, in real processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.distributed import Outcome

from moegraft.core.errors import (
    AdapterError,
    AdapterFileError,
    AdapterInUseError,
    AdapterMemoryError,
    AdapterNameError,
    AdapterTensorError,
    BatchError,
    ParallelError,
    UnknownAdapterError,
)
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.collective_bank import CollectiveBank
from moegraft.lora.peft import load_peft_adapter
from moegraft.lora.peft.loader import SAMPLED_TENSORS, adapter_digest
from moegraft.lora.rows import AdapterRows, GroupAdapters
from moegraft.lora.targets import AdapterWeights, ExpertsTarget, ModelTargets, local_targets
from moegraft.parallel import ParallelConfig, ParallelGroups, Step
from moegraft.parallel.slices import RankSlice, Share, experts_slice

if TYPE_CHECKING:
    from support.distributed import WorldPool

EXPERTS = "model.layers.0.mlp.experts"
NUM_EXPERTS, HIDDEN, INTER = 5, 16, 12
TARGETS = ModelTargets(
    model_type="mixtral",
    experts={
        EXPERTS: ExpertsTarget(name=EXPERTS, num_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=INTER)
    },
)
PAGE_BYTES = 512
DATA_PARALLEL = ParallelConfig(ep=2, data_parallel=True)


def save_adapter(folder: Path, *, experts: Sequence[int] = range(NUM_EXPERTS), rank: int = 2, seed: int = 0) -> Path:
    from support.adapters import TensorFactory, write_adapter

    factory = TensorFactory(seed)
    for expert in experts:
        factory.linear(f"{EXPERTS}.{expert}.gate_proj", HIDDEN, INTER, r=rank)
        factory.linear(f"{EXPERTS}.{expert}.down_proj", INTER, HIDDEN, r=rank)
    return write_adapter(folder, factory.tensors, r=rank)


@cache
def groups_of(config: ParallelConfig) -> ParallelGroups:
    return ParallelGroups.create(config)


class Rank:
    """One rank's bank, over its slice of the experts, and what tests look at."""

    def __init__(self, config: ParallelConfig, *, pages: int = 40) -> None:
        self.groups = groups_of(config)
        mine = experts_slice(
            num_experts=NUM_EXPERTS,
            intermediate_size=INTER,
            tp=Share(config.tp, self.groups.tp.rank),
            ep=Share(config.ep, self.groups.ep.rank),
        )
        self.targets = TARGETS
        self.slice = RankSlice(experts={EXPERTS: mine})
        layout = BankLayout(local_targets(TARGETS, self.slice), dtype=torch.float32, page_bytes=PAGE_BYTES)
        self.local = AdapterBank(
            layout, capacity_bytes=pages * layout.page_bytes, device="cpu", max_slots=4, poison=True
        )
        self.bank = CollectiveBank(self.local, self.groups)

    def load(self, path: Path, name: str, **options: Any) -> None:
        def read(step: Step) -> tuple[AdapterWeights, object]:
            step.same(f"the files of adapter {name!r}", lambda: adapter_digest(path), error=AdapterFileError)
            return load_peft_adapter(path, TARGETS, dtype=torch.float32, name=name, rank_slice=self.slice)

        self.bank.load(name, read, **options)

    def refused(self, act: Callable[[], object]) -> tuple[type[BaseException], str]:
        """The error of an act that must fail, and leave this rank's bank as it is."""
        before = self.state()
        with pytest.raises((AdapterError, BatchError, ParallelError, ZeroDivisionError)) as caught:
            act()
        assert self.state() == before
        return caught.type, str(caught.value)

    def state(self) -> tuple[Any, ...]:
        self.local.check_integrity()
        held = {name: self.local.info(name) for name in self.local.names()}
        return held, self.bank.ids, self.local.pool.num_free


def same_error(refusals: Sequence[tuple[type[BaseException], str]]) -> tuple[type[BaseException], str]:
    """The one error that all ranks had."""
    assert len(set(refusals)) == 1, refusals
    return refusals[0]


def _load_and_forget(paths: Sequence[Path]) -> dict[str, Any]:
    rank = Rank(DATA_PARALLEL)
    for i, path in enumerate(paths):
        rank.load(path, f"a{i}")
    first = rank.bank.ids
    rank.bank.unload("a1")
    rank.load(paths[1], "again")
    pages = {name: rank.local.info(name).num_pages for name in rank.local.names()}
    return {"first": first, "then": rank.bank.ids, "pages": pages}


def test_ids_are_the_same_on_all_ranks_and_the_smallest_free(world2: WorldPool, tmp_path: Path) -> None:
    paths = [save_adapter(tmp_path / str(i), experts=held) for i, held in enumerate((range(5), (0,), (3, 4)))]
    found = world2.run(_load_and_forget, paths)
    for rank in found:
        assert rank["first"] == {"a0": 0, "a1": 1, "a2": 2}
        assert rank["then"] == {"a0": 0, "a2": 2, "again": 1}
    # Experts 0, 1, 2 stand on rank 0, 3 and 4 on rank 1.
    assert found[0]["pages"]["a2"] == 0 < found[1]["pages"]["a2"]
    assert found[0]["pages"]["again"] > 0 == found[1]["pages"]["again"]


def _load_own(path: Path) -> tuple[type[BaseException], str]:
    rank = Rank(DATA_PARALLEL)
    rank.load(path.parent / "good", "kept")
    refusal = rank.refused(lambda: rank.load(path, "a"))
    rank.load(path.parent / "good", "a")  # everything still works
    return refusal


@pytest.mark.parametrize("fault", ["missing", "truncated", "nan", "config"])
def test_a_bad_file_on_one_rank_is_refused_by_all(world2: WorldPool, tmp_path: Path, fault: str) -> None:
    good, bad = save_adapter(tmp_path / "good"), save_adapter(tmp_path / "bad")
    weights, config = bad / "adapter_model.safetensors", bad / "adapter_config.json"
    if fault == "missing":
        weights.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif fault == "config":
        config.write_text("{")
    else:
        data = bytearray(weights.read_bytes())
        data[-4:] = b"\xff\xff\xff\x7f"
        weights.write_bytes(data)
    outcomes = world2.outcomes(_load_own, per_rank=[(good,), (bad,)])
    kind, message = same_error([_result(outcome) for outcome in outcomes])
    assert issubclass(kind, AdapterTensorError if fault == "nan" else AdapterError)
    assert message.startswith("rank 1: ")


def _result(outcome: Outcome) -> Any:
    assert outcome.error is None and not outcome.died, outcome.trace
    return outcome.result


@pytest.mark.parametrize("other", [{"rank": 3}, {"seed": 1}], ids=["other rank", "other values"])
def test_files_that_differ_between_ranks_are_refused(world2: WorldPool, tmp_path: Path, other: dict[str, int]) -> None:
    """Both are whole and fit the model: a rank of 2 here and of 3 there, or two steps of one training."""
    paths = save_adapter(tmp_path / "good"), save_adapter(tmp_path / "other", **other)
    outcomes = world2.outcomes(_load_own, per_rank=[(path,) for path in paths])
    kind, message = same_error([_result(outcome) for outcome in outcomes])
    assert kind is AdapterFileError
    assert "the ranks differ in the files of adapter 'a': ranks [0]: " in message
    assert "; ranks [1]: " in message


def test_the_digest_reads_config_headers_and_a_sample_of_values(tmp_path: Path) -> None:
    from support.adapters import TensorFactory, write_adapter

    factory = TensorFactory()
    factory.linear("q", 4, 6)
    tensors = factory.tensors
    plain = adapter_digest(write_adapter(tmp_path / "plain", tensors))
    assert adapter_digest(write_adapter(tmp_path / "same", dict(reversed(tensors.items())))) == plain
    renamed = {name.replace("q.", "k."): tensor for name, tensor in tensors.items()}
    halved = {name: tensor.half() for name, tensor in tensors.items()}
    wider = {name: torch.ones(8, 8) for name in tensors}
    retrained = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    for i, changed in enumerate((renamed, halved, wider, retrained)):
        assert adapter_digest(write_adapter(tmp_path / str(i), changed)) != plain
    assert adapter_digest(write_adapter(tmp_path / "alpha", tensors, lora_alpha=5)) != plain


def test_the_sample_of_a_large_adapter_spans_its_names(tmp_path: Path) -> None:
    from support.adapters import write_adapter

    tensors = {f"base_model.model.{i:04}.lora_A.weight": torch.zeros(1, 1) for i in range(2 * SAMPLED_TENSORS + 5)}
    digests = {adapter_digest(write_adapter(tmp_path / "zeros", tensors))}
    for name in (min(tensors), max(name for i, name in enumerate(tensors) if i % 3 == 0)):  # every third is sampled
        digests.add(adapter_digest(write_adapter(tmp_path / name, {**tensors, name: torch.ones(1, 1)})))
    assert len(digests) == 3


def _fill(path: Path, pages: int) -> Any:
    rank = Rank(DATA_PARALLEL, pages=pages)
    return rank.refused(lambda: rank.load(path, "a"))


def test_a_rank_without_room_for_an_adapter(world2: WorldPool, tmp_path: Path) -> None:
    """The slices are read and rank 0 has installed its own, when rank 1 has to say no."""
    path = save_adapter(tmp_path / "a")
    outcomes = world2.outcomes(_fill, path, per_rank=[(40,), (1,)])
    kind, message = same_error([_result(outcome) for outcome in outcomes])
    assert kind is AdapterMemoryError
    assert message.startswith("rank 1: adapter 'a' needs")


def _install(path: Path, fails: bool) -> Any:
    """A seam cannot be put in; on the rank itself the error is what it was, with its trace."""
    rank = Rank(DATA_PARALLEL)

    def fit() -> None:
        if fails and rank.local.handles(coming=True):
            raise ZeroDivisionError("seam")

    rank.bank = CollectiveBank(rank.local, rank.groups, fit=fit)
    return rank.refused(lambda: rank.load(path, "a"))


def test_an_error_that_nobody_foresaw_reaches_all_ranks(world2: WorldPool, tmp_path: Path) -> None:
    outcomes = world2.outcomes(_install, save_adapter(tmp_path / "a"), per_rank=[(False,), (True,)])
    first, second = (_result(outcome) for outcome in outcomes)
    assert first == (ParallelError, "rank 1: ZeroDivisionError: seam")
    assert second == (ZeroDivisionError, "seam")


def _misuse(path: Path) -> dict[str, Any]:
    rank = Rank(DATA_PARALLEL)
    mine = rank.groups.rank
    found = {"names differ": rank.refused(lambda: rank.load(path, f"a{mine}"))}
    rank.load(path, "a")
    found["taken"] = rank.refused(lambda: rank.load(path, "a"))
    found["unknown on one rank"] = rank.refused(lambda: rank.bank.acquire(["a"] if mine else ["a", "b", None]))
    found["unknown on all"] = rank.refused(lambda: rank.bank.acquire(["b"]))
    found["unload unknown"] = rank.refused(lambda: rank.bank.unload("b"))
    found["unload others"] = rank.refused(lambda: rank.bank.unload("a" if mine else "b"))
    with rank.bank.acquire(["a"]) as batch:
        if mine:
            batch.release()
        found["in use on one rank"] = rank.refused(lambda: rank.bank.unload("a"))
    rank.bank.unload("a")
    assert rank.local.names() == ()
    return found


def test_wrong_calls_end_in_one_error_on_all_ranks(world2: WorldPool, tmp_path: Path) -> None:
    first, second = world2.run(_misuse, save_adapter(tmp_path / "a"))
    found = {what: same_error([first[what], second[what]]) for what in first}
    assert found["names differ"] == (
        AdapterNameError,
        "the ranks differ in the adapter that they load: ranks [0]: 'a0'; ranks [1]: 'a1'",
    )
    assert found["taken"] == (AdapterNameError, "an adapter 'a' is already loaded; unload it first")
    assert found["unknown on one rank"] == (UnknownAdapterError, "rank 0: no adapter 'b' is loaded; loaded: 'a'")
    assert found["unknown on all"] == (UnknownAdapterError, "no adapter 'b' is loaded; loaded: 'a'")
    assert found["unload unknown"] == (UnknownAdapterError, "no adapter 'b' is loaded; loaded: 'a'")
    assert found["unload others"] == (UnknownAdapterError, "rank 0: no adapter 'b' is loaded; loaded: 'a'")
    assert found["in use on one rank"] == (
        AdapterInUseError,
        "rank 0: adapter 'a' serves 2 batches and cannot be unloaded now",
    )


def _pin(path: Path) -> dict[str, Any]:
    """Rank 1 finds no room for an adapter that is to stay, and names another one."""
    rank = Rank(DATA_PARALLEL, pages=80)
    rank.load(path, "a")
    rank.load(path, "other")

    def no_room(name: str) -> None:
        raise AdapterMemoryError(f"no room for {name!r}")

    found: dict[str, Any] = {"unknown": rank.refused(lambda: rank.bank.pin("b"))}
    mine = "other" if rank.groups.rank else "a"
    found["names differ"] = rank.refused(lambda: rank.bank.pin(mine))
    with pytest.MonkeyPatch.context() as patch:
        if rank.groups.rank == 1:
            patch.setattr(rank.local, "pin", no_room)
        found["no room"] = rank.refused(lambda: rank.bank.pin("a"))
    found["before"] = rank.local.info("a").pinned
    rank.bank.pin("a")
    found["after"] = rank.local.info("a").pinned
    return found


def test_an_adapter_is_pinned_on_all_ranks_or_on_none(world2: WorldPool, tmp_path: Path) -> None:
    first, second = world2.run(_pin, save_adapter(tmp_path / "a"))
    assert same_error([first["no room"], second["no room"]]) == (AdapterMemoryError, "rank 1: no room for 'a'")
    assert same_error([first["unknown"], second["unknown"]])[0] is UnknownAdapterError
    assert same_error([first["names differ"], second["names differ"]])[0] is AdapterNameError
    assert [(found["before"], found["after"]) for found in (first, second)] == [(False, True)] * 2


def _lose_track(paths: Sequence[Path]) -> tuple[type[BaseException], str]:
    """Rank 1's bank has given up an id that rank 0 still has."""
    rank = Rank(DATA_PARALLEL)
    rank.load(paths[0], "a")
    if rank.groups.rank == 1:
        rank.local.unload("a")
    return rank.refused(lambda: rank.load(paths[1], "b"))


def test_ranks_that_would_give_an_adapter_different_ids_are_told(world2: WorldPool, tmp_path: Path) -> None:
    """Rows carry ids: ranks that disagree on them would add the delta of another adapter."""
    paths = [save_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    error, message = same_error(world2.run(_lose_track, paths))
    assert error is ParallelError
    assert message.startswith("the ranks differ in the adapters that they hold")


def _share_rows(names: list[str]) -> Any:
    rank = Rank(ParallelConfig(tp=2))
    return rank.refused(lambda: rank.bank.acquire(names))


def test_ranks_with_the_same_rows_must_name_the_same_adapters(world2: WorldPool) -> None:
    outcomes = world2.outcomes(_share_rows, per_rank=[([None],), ([None, None],)])
    kind, message = same_error([_result(outcome) for outcome in outcomes])
    assert kind is BatchError
    assert (
        message == "ranks [0, 1] share their rows, but differ in adapters=: ranks [0]: [None]; ranks [1]: [None, None]"
    )


def _use(paths: Sequence[Path], pages: int, batches: Sequence[Sequence[str | None]]) -> list[Any]:
    rank = Rank(DATA_PARALLEL, pages=pages)
    for i, path in enumerate(paths):
        rank.load(path, f"a{i}")
    found: list[Any] = []
    for names in batches:
        before = rank.state()[1]
        try:
            with rank.bank.acquire(names) as batch:
                used = {name: rank.local.info(name).in_use for name in rank.local.names()}
                rows = AdapterRows.of(batch.own.row_slots, device="cpu", lengths=2)
                ids_T = batch.group.id_of_slot[rows.slots_M.long()]
                found.append((batch.group.ids, used, ids_T.tolist(), batch.has_adapters))
        except AdapterError as error:
            found.append((type(error), str(error)))
        assert rank.state()[1] == before
        assert not any(rank.local.info(name).in_use for name in rank.local.names())
    return found


def test_a_batch_holds_what_any_rank_uses(world2: WorldPool, tmp_path: Path) -> None:
    paths = [save_adapter(tmp_path / str(i), seed=i) for i in range(3)]
    batches = [
        ([["a2", None, "a0"], []]),  # rank 1 has no rows
        ([[None], ["a1"]]),
        ([[None, None], []]),
        ([["a0", "a1"], ["a1", "a2", "a0"]]),
    ]
    outcomes = world2.outcomes(_use, paths, 40, per_rank=[([b[rank] for b in batches],) for rank in range(2)])
    first, second = (_result(outcome) for outcome in outcomes)
    assert [row[0] for row in first] == [(0, 2), (1,), (), (0, 1, 2)]
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert first[0][1] == {"a0": True, "a1": False, "a2": True}
    assert [row[2] for row in first] == [[2, 2, -1, -1, 0, 0], [-1, -1], [-1] * 4, [0, 0, 1, 1]]
    assert [row[2] for row in second] == [[], [1, 1], [], [1, 1, 2, 2, 0, 0]]
    assert [row[3] for row in first] == [row[3] for row in second] == [True, True, False, True]


def test_a_batch_that_does_not_fit_on_one_rank_is_held_by_none(world2: WorldPool, tmp_path: Path) -> None:
    """Each adapter fits; two at once fit into rank 0's pool only."""
    paths = [save_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    batches = [["a0"], ["a1"]], [["a0"], []]
    outcomes = world2.outcomes(_use, paths, per_rank=[(40, [b[0] for b in batches]), (3, [b[1] for b in batches])])
    first, second = (_result(outcome) for outcome in outcomes)
    kind, message = same_error([first[0], second[0]])
    assert kind is AdapterMemoryError and message.startswith("rank 1: adapters ")
    assert first[1][0] == second[1][0] == (0,)


def test_many_adapters_have_ids_beyond_one_word(tmp_path: Path) -> None:
    """A world of one: 130 loaded adapters, the batch names the first and the last."""
    path = save_adapter(tmp_path / "a", experts=(0,), rank=1)
    rank = Rank(ParallelConfig(), pages=8)
    for i in range(130):
        rank.load(path, f"a{i}")
    with rank.bank.acquire(["a129", None, "a0", "a63"]) as batch:
        assert batch.group.ids == (0, 63, 129)
        slots = torch.tensor(batch.own.row_slots)
        assert batch.group.id_of_slot[slots].tolist() == [129, -1, 0, 63]


def test_a_bank_that_one_rank_filled_alone_is_refused(tmp_path: Path) -> None:
    rank = Rank(ParallelConfig())
    rank.load(save_adapter(tmp_path / "a"), "a")
    with pytest.raises(AdapterNameError, match="begin with an empty bank"):
        CollectiveBank(rank.local, rank.groups)


def test_ids_and_slots_of_the_adapters_of_all_ranks() -> None:
    group = GroupAdapters((2, 5, 7), (1, 4, 0), torch.device("cpu"))
    rows = AdapterRows.of((4, -1), device="cpu", lengths=3)
    assert group.id_of_slot[rows.slots_M.long()].tolist() == [5, 5, 5, -1, -1, -1]
    assert group.slot_of_id[torch.tensor([7, -1, 2, 5])].tolist() == [0, -1, 1, 4]
    assert group.id_of_slot[AdapterRows.of((), device="cpu").slots_M.long()].tolist() == []

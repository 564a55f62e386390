"""The loader with a RankSlice: a rank reads the slice of what one process reads, and no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.rank_slices import (
    EMBED,
    EXPERTS,
    HEAD,
    O_PROJ,
    Q_PROJ,
    check_bank_takes,
    load_dora,
    make_rank_slice,
    make_targets,
)
from support.sliced import ADAPTERS
from support.slicing import slice_adapter

from moegraft.core.cuts import cut_tensor
from moegraft.core.errors import AdapterConfigError, ParallelError
from moegraft.files.safetensors import MIN_RUN_BYTES, SafetensorsFile
from moegraft.lora.peft import load_peft_adapter
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ModelTargets, local_targets
from moegraft.parallel import LinearSlice, RankSlice, Share
from moegraft.parallel.slices import round_robin_experts

if TYPE_CHECKING:
    from support.distributed import WorldPool

ONE = Share(1, 0)
STORED: dict[str, dict[str, bool]] = {
    "rows": {},
    "transposed_interleaved": {"is_transposed": True, "is_interleaved": True},
    "no_gate": {"has_gate": False},
}
WORLDS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp4_fully_sharded": {"tp": 4, "fully_sharded": True},
    "ep3": {"ep": 3},
    "ep4_round_robin": {"ep": 4, "round_robin": True},
    "tp2_ep2_fully_sharded": {"tp": 2, "ep": 2, "fully_sharded": True},
}


def rank_slices(targets: ModelTargets, world: dict[str, Any]) -> Iterator[RankSlice]:
    """The slices of every rank."""
    tp, ep = world.get("tp", 1), world.get("ep", 1)
    for ep_rank in range(ep):
        experts = None
        if world.get("round_robin"):
            experts = round_robin_experts(targets.experts[EXPERTS].num_experts, ep, ep_rank)
        for tp_rank in range(tp):
            yield make_rank_slice(
                targets,
                Share(tp, tp_rank),
                Share(ep, ep_rank),
                fully_sharded=world.get("fully_sharded", False),
                experts=experts,
            )


def tensors_of(weights: AdapterWeights) -> dict[str, Any]:
    """Every field by name, for comparison."""
    found: dict[str, Any] = {}
    for group in ("experts", "linears", "embeddings"):
        for module, record in getattr(weights, group).items():
            found |= {f"{group}.{module}.{name}": value for name, value in vars(record).items() if value is not None}
    return found | {f"saved.{m}.{p}": t for m, params in weights.saved.items() for p, t in params.items()}


# Only the fused adapters name no gate projection.
LAYOUTS = [(a, s) for a in ADAPTERS for s in STORED if s != "no_gate" or a.startswith("fused")]


@pytest.mark.parametrize(("adapter", "stored"), LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_reads_the_slice_of_what_one_process_reads(
    tmp_path: Path, adapter: str, world: str, stored: str
) -> None:
    targets = make_targets(**STORED[stored])
    folder = ADAPTERS[adapter](tmp_path / adapter, targets)
    whole, report = load_peft_adapter(folder, targets, dtype=torch.float32)
    assert (
        report.bytes_held
        == whole.num_bytes
        == sum(value.nbytes for value in tensors_of(whole).values() if isinstance(value, torch.Tensor))
    )
    for mine in rank_slices(targets, WORLDS[world]):
        found, local_report = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
        expected = tensors_of(slice_adapter(whole, targets, mine))
        assert tensors_of(found).keys() == expected.keys()
        for name, value in tensors_of(found).items():
            if isinstance(value, torch.Tensor):
                # DoRA divides by norms that come from a GEMM, of fewer rows here.
                tol = 1e-6 if adapter == "dora_and_saved" else 0.0
                torch.testing.assert_close(value, expected[name], rtol=tol, atol=tol, msg=name)
            else:
                assert value == expected[name], name
        assert local_report.tensors_applied + local_report.tensors_elsewhere == report.tensors_in_file
        check_bank_takes(targets, mine, found, local_report.bytes_held)


@pytest.mark.parametrize("stored", ["rows", "transposed_interleaved"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("adapter", ["per_expert_rslora", "partial_mixed_ranks", "fused", "shared_outer"])
def test_slices_of_all_ranks_are_the_adapter(tmp_path: Path, adapter: str, world: str, stored: str) -> None:
    """Put together again by the law, with nothing of the code that cut them."""
    targets = make_targets(**STORED[stored])
    target = targets.experts[EXPERTS]
    folder = ADAPTERS[adapter](tmp_path / adapter, targets)
    whole = load_peft_adapter(folder, targets, dtype=torch.float32)[0].experts[EXPERTS]
    options = WORLDS[world]
    tp = options.get("tp", 1)
    slices = list(rank_slices(targets, options))
    locals_ = [load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)[0] for mine in slices]
    for first in range(0, len(slices), tp):
        group = [weights.experts.get(EXPERTS) for weights in locals_[first : first + tp]]
        held = slices[first].experts[EXPERTS].experts or tuple(range(target.num_experts))
        mine = [expert for expert in held if expert in whole.expert_ids]
        if not mine:
            assert group == [None] * tp
            continue
        assert all(part is not None and [held[e] for e in part.expert_ids] == mine for part in group)
        parts = [part for part in group if part is not None]
        reassembled = reassemble(parts, target.hidden_size, target.intermediate_size, options.get("fully_sharded"))
        positions = [whole.expert_ids.index(expert) for expert in mine]
        for name, value in reassembled.items():
            expected = getattr(whole, name)
            expected = expected if expected.shape[0] == 1 else expected[positions]
            assert torch.equal(value[:, : expected.shape[1]], expected), name
            assert not value[:, expected.shape[1] :].any(), name


def reassemble(
    parts: list[ExpertsLoRA], hidden: int, inter: int, fully_sharded: bool | None
) -> dict[str, torch.Tensor]:
    def join(name: str, axis: int, size: int | None = None) -> torch.Tensor:
        return (
            torch.cat([getattr(part, name) for part in parts], axis).narrow(axis, 0, size)
            if size
            else torch.cat([getattr(part, name) for part in parts], axis)
        )

    joined = {}
    for name in ("b_gate", "b_up", "a2"):
        if getattr(parts[0], name) is not None:
            joined[name] = join(name, 2, inter)
    for name, axis, size in (("a13", 1, None), ("b2", 2, hidden)):
        if getattr(parts[0], name) is None:
            continue
        if fully_sharded:
            joined[name] = join(name, axis, size)
        else:
            assert all(torch.equal(getattr(part, name), getattr(parts[0], name)) for part in parts)
            joined[name] = getattr(parts[0], name)
    return joined


@pytest.mark.parametrize("adapter", ["per_expert_rslora", "fused", "fused_old", "shared_outer"])
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_a_rank_holds_and_reads_its_share(tmp_path: Path, adapter: str, fully_sharded: bool) -> None:
    """Sizes at which slices make long runs. A of w13 and B of w2 are on every rank, unless fully sharded."""
    world, E, D, F = 4, 4, 512, 1024
    targets = make_targets(num_experts=E, hidden=D, inter=F)
    folder = ADAPTERS[adapter](tmp_path / adapter, targets)
    whole, report = load_peft_adapter(folder, targets, dtype=torch.float32)
    assert report.bytes_read == whole.num_bytes
    lora = whole.experts[EXPERTS]
    replicated = 0 if fully_sharded else lora.a13.nbytes + lora.b2.nbytes
    # 3 or 6 lanes of A13 on 4 ranks: one or two of them each.
    lanes = lora.a13.shape[1]
    rounded_up = lora.a13.nbytes * (-(-lanes // world) * world - lanes) // lanes if fully_sharded else 0
    for rank in range(world):
        mine = make_rank_slice(targets, Share(world, rank), ONE, fully_sharded=fully_sharded)
        weights, local = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
        share = (whole.num_bytes - replicated + rounded_up) // world + replicated
        assert weights.num_bytes == local.bytes_held == share
        is_rank_major_input = adapter == "fused_old" and fully_sharded  # lanes of A lie as columns of 12 entries
        if not is_rank_major_input:
            assert local.bytes_read <= share


def test_experts_of_other_ranks_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bytes_read`` is a count; what the file is asked for is counted here, and is no more than that and headers."""
    asked, fill = [], SafetensorsFile._fill

    def counted(file: SafetensorsFile, view: memoryview, offset: int) -> None:
        asked.append(len(view))
        fill(file, view, offset)

    monkeypatch.setattr(SafetensorsFile, "_fill", counted)
    targets = make_targets(num_experts=8, hidden=256, inter=256)
    folder = ADAPTERS["per_expert_rslora"](tmp_path / "a", targets)
    whole, report = load_peft_adapter(folder, targets, dtype=torch.float32)
    mine = make_rank_slice(targets, ONE, Share(4, 2))
    asked.clear()
    weights, local = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
    header = report.bytes_in_file - report.bytes_read
    assert local.bytes_read <= sum(asked) <= local.bytes_read + header
    assert weights.experts[EXPERTS].expert_ids == (0, 1)
    assert local.bytes_held == local.bytes_read == whole.num_bytes // 4 == report.bytes_read // 4
    assert (local.tensors_applied, local.tensors_elsewhere) == (12, 36)


def test_an_adapter_of_other_ranks_experts_leaves_this_rank_empty(tmp_path: Path) -> None:
    targets = make_targets()
    folder = ADAPTERS["partial_mixed_ranks"](tmp_path / "a", targets)
    mine = make_rank_slice(targets, ONE, ONE, experts=(5, 2))
    weights, report = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
    assert not weights.experts
    assert (report.tensors_applied, report.bytes_read, report.tensors_elsewhere) == (0, 0, report.tensors_in_file)


def test_experts_in_any_order_and_twice(tmp_path: Path) -> None:
    """An expert map may hold copies of a hot expert: each copy gets the adapter."""
    targets = make_targets()
    folder = ADAPTERS["partial_mixed_ranks"](tmp_path / "a", targets)
    whole, _ = load_peft_adapter(folder, targets, dtype=torch.float32)
    mine = make_rank_slice(targets, ONE, ONE, experts=(4, 2, 1, 0))
    weights, _ = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
    lora, all_of_it = weights.experts[EXPERTS], whole.experts[EXPERTS]
    assert lora.expert_ids == (0, 2, 3)
    for local, expert in ((0, 4), (2, 1), (3, 0)):
        for name in ("a13", "b_gate", "b_up", "a2", "b2"):
            found = getattr(lora, name)[lora.expert_ids.index(local)]
            assert torch.equal(found, getattr(all_of_it, name)[all_of_it.expert_ids.index(expert)]), name


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_dora_where_ranks_have_only_their_part_of_the_base_weight(
    tmp_path: Path, world2: WorldPool, world4: WorldPool, fully_sharded: bool
) -> None:
    """Column parallel, the rows of a rank suffice; row parallel, the norm of a row takes the columns of all ranks."""
    targets = make_targets()
    folder = ADAPTERS["dora_and_saved"](tmp_path / "a", targets)
    whole, _ = load_peft_adapter(folder, targets, dtype=torch.float32)
    results = [*world2.run(load_dora, folder, fully_sharded), *world4.run(load_dora, folder, fully_sharded)]
    for rank, (found, exchanges) in enumerate(results):
        mine = make_rank_slice(targets, Share(2, rank % 2), ONE, fully_sharded=fully_sharded)
        expected = slice_adapter(whole, targets, mine)
        assert exchanges == 1
        assert found.linears.keys() == expected.linears.keys()
        for module, lora in expected.linears.items():
            for name in ("a", "b", "gain"):
                torch.testing.assert_close(
                    getattr(found.linears[module], name), getattr(lora, name), rtol=1e-6, atol=1e-6
                )


def test_dora_on_a_part_that_is_neither_rows_nor_columns(tmp_path: Path) -> None:
    targets = make_targets()
    folder = ADAPTERS["dora_and_saved"](tmp_path / "a", targets)
    mine = make_rank_slice(targets, Share(2, 1), ONE)
    linears = {**targets.linears, O_PROJ: replace(targets.linears[O_PROJ], weight=lambda: torch.ones(5, 7))}
    with pytest.raises(AdapterConfigError, match=r"o_proj as \[10, 14\] or \[10, 7\]; this rank has \[5, 7\]"):
        load_peft_adapter(folder, replace(targets, linears=linears), dtype=torch.float32, rank_slice=mine)


def test_a_saved_parameter_that_equals_the_base_is_left_out(tmp_path: Path) -> None:
    targets = make_targets()
    folder = ADAPTERS["dora_and_saved"](tmp_path / "a", targets)
    saved = load_peft_adapter(folder, targets, dtype=torch.float32)[0].saved[HEAD]["weight"]
    targets.saveable[HEAD]["weight"].copy_(saved)
    mine = make_rank_slice(targets, Share(2, 1), ONE)
    weights, report = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
    assert not weights.saved
    assert any("equals the base model's" in note for note in report.notes)


def test_a_rank_that_would_hold_nothing_is_an_error() -> None:
    targets = make_targets()
    with pytest.raises(ParallelError, match=r"no output features of .*q_proj"):
        local_targets(make_targets(), RankSlice(linears={Q_PROJ: LinearSlice(outputs=())}))
    local = local_targets(targets, RankSlice(linears={EMBED: LinearSlice(inputs=((3, 8), (9, 10)))}))
    assert local.embeddings[EMBED].num_embeddings == 6


@given(data=st.data())
def test_any_cut_of_a_tensor_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    shape[-1] *= data.draw(st.sampled_from([1, 40]))  # short runs and long ones
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    cuts = {}
    for axis in data.draw(st.sets(st.integers(0, len(shape) - 1))):
        bounds = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=6, unique=True)))
        cuts[axis] = tuple(zip(bounds[::2], bounds[1::2], strict=False))
    path = tmp_path_factory.mktemp("cut") / "t.safetensors"
    save_file({"before": torch.ones(3), "t": tensor}, path)
    with SafetensorsFile(path.name, FileIO(path)) as file:
        found = file.read("t", cuts)
        expected = cut_tensor(tensor, cuts)
        assert torch.equal(found, expected)
        # What is read beyond the cut lies in runs too short to be skipped.
        last = max(cuts, default=0)
        run = (
            sum(b - a for a, b in cuts.get(last, ())) / max(len(cuts.get(last, ())), 1) * tensor[(0,) * last][0].nbytes
        )
        if not cuts or run >= MIN_RUN_BYTES:
            assert file.bytes_read == expected.nbytes
        assert file.bytes_read <= tensor.nbytes

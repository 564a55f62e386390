"""LoRA on linear maps that ranks share, in real processes: column and row parallel, partial and reduced outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from support.linear import MODULE, LinearCase, make_linear_case
from support.slicing import slice_linear

from moegraft.core.cuts import cut_tensor
from moegraft.core.errors import BatchError
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.punica.sharded import ShardedLinearPunica, ShardedLinearPunicaGPU
from moegraft.lora.rows import AdapterRows
from moegraft.lora.targets import AdapterWeights, LinearTarget, ModelTargets, local_targets
from moegraft.parallel import (
    LinearSlice,
    ParallelConfig,
    ParallelGroups,
    RankSlice,
    Share,
    column_parallel,
    half_columns,
    row_parallel,
)
from moegraft.testing import assert_close, poison_allocations

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS = (3, 16, 1, 7, 0)
PICKS = (0, -1, 1, 2, 1, 3, 4, -1, 0)
TOL = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # bfloat16: the delta is read from a rounded output


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a map lies over the ranks, and what its host does with the output."""

    style: str  # column, packed (gate and up in one map), row
    is_reduced: bool
    fully_sharded: bool = False
    kernels: bool = False

    def slice_of(self, share: Share, in_features: int, out_features: int) -> LinearSlice:
        if self.style == "row":
            return row_parallel(in_features, out_features, share, fully_sharded=self.fully_sharded)
        if self.style == "packed":
            half = out_features // 2
            pieces = half_columns(share.of(half), half, num_halves=2, is_interleaved=False)
            return LinearSlice(outputs=pieces, lanes=share if self.fully_sharded else None)
        return column_parallel(out_features, share, fully_sharded=self.fully_sharded)


LAYOUTS = {
    "column": Layout(style="column", is_reduced=False),
    "column, gathered": Layout(style="column", is_reduced=True),
    "packed": Layout(style="packed", is_reduced=False),
    "row": Layout(style="row", is_reduced=False),
    "row, reduced": Layout(style="row", is_reduced=True),
}


def layouts() -> list[tuple[str, Layout]]:
    sharded = [(f"{name}, fully sharded", replace(layout, fully_sharded=True)) for name, layout in LAYOUTS.items()]
    return [*LAYOUTS.items(), *sharded]


@cache
def groups() -> ParallelGroups:
    return ParallelGroups.create(ParallelConfig(tp=dist.get_world_size()))


def run_rank(layout: Layout, case_args: dict[str, object]) -> tuple[torch.Tensor, int]:
    """What this rank has of y afterwards, and the bytes of its adapters."""
    case = make_linear_case(**case_args)  # type: ignore[arg-type]
    tp = groups().tp
    in_features, out_features = case.x_MI.shape[1], case.y_MO.shape[1]
    mine = layout.slice_of(Share(tp.size, tp.rank), in_features, out_features)
    target = LinearTarget(name=MODULE, in_features=in_features, out_features=out_features)
    targets = ModelTargets(model_type="tiny", linears={MODULE: target})
    local = local_targets(targets, RankSlice(linears={MODULE: mine}))
    bank = AdapterBank(
        BankLayout(local, dtype=case.x_MI.dtype, page_bytes=1024), capacity_bytes=1 << 20, device="cpu", poison=True
    )
    names: dict[int, str] = {}
    for slot, lora in case.loras.items():
        names[slot] = f"a{slot}"
        bank.load(names[slot], AdapterWeights(linears={MODULE: slice_linear(lora, mine)}))
    rows = [names.get(slot) for slot in case.slots_M.tolist()]
    x_MI = case.x_MI if mine.inputs is None else cut_tensor(case.x_MI, {1: mine.inputs})
    y_MO, bias_O = own_output(case, layout, mine, tp.rank)
    punica = (
        ShardedLinearPunicaGPU(tp, mine)
        if layout.kernels
        else ShardedLinearPunica(tp, mine, is_reduced=layout.is_reduced)
    )
    with bank.acquire(rows) as batch, poison_allocations():
        stated = AdapterRows.of(batch.row_slots, device="cpu")
        punica.add_lora_linear(y_MO, x_MI, stated, bank.linear_tables(MODULE), rank_bound=64, bias_O=bias_O)
    if mine.inputs is not None and not layout.is_reduced:
        y_MO = tp.all_reduce(y_MO.float()).to(y_MO.dtype)
    return y_MO, sum(bank.info(name).num_bytes for name in names.values())


def own_output(
    case: LinearCase, layout: Layout, mine: LinearSlice, rank: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y as the host hands it over on one rank: its columns, a part of the sum, or all of it."""
    if layout.is_reduced:
        return case.y_MO.clone(), case.bias_O
    if mine.inputs is None:
        assert mine.outputs is not None
        return cut_tensor(case.y_MO, {1: mine.outputs}).clone(), cut_tensor(case.bias_O, {0: mine.outputs})
    # Parts that add up to y, without a bias, and exactly, in whatever order.
    return case.y_MO * [2.0, -1.0, 0.0, 0.0][rank], None


def check(pool: WorldPool, layout: Layout, **case_args: object) -> list[int]:
    case_args = {"ranks": RANKS, "picks": PICKS, "in_features": 38, "out_features": 46, "device": "cpu"} | case_args
    case = make_linear_case(**case_args)  # type: ignore[arg-type]
    results = pool.run(run_rank, layout, case_args)
    expected = case.expected(with_bias=layout.style != "row" or layout.is_reduced)
    base = case.slots_M < 0
    for rank, (found, _) in enumerate(results):
        truth, before = expected, case.y_MO
        if layout.style != "row" and not layout.is_reduced:
            mine = layout.slice_of(Share(pool.size, rank), case.x_MI.shape[1], case.y_MO.shape[1])
            assert mine.outputs is not None
            truth, before = (cut_tensor(t, {1: mine.outputs}) for t in (expected, case.y_MO))
        assert torch.equal(found[base], before[base]), "a base row was changed"
        delta, true_delta = found[~base].double() - before[~base].double(), truth[~base] - before[~base].double()
        assert_close(delta, true_delta, TOL[case.x_MI.dtype] * 4, what=f"delta of rank {rank}")
        assert found.dtype == case.y_MO.dtype
    return [num_bytes for _, num_bytes in results]


@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize(("name", "layout"), layouts(), ids=lambda value: value if isinstance(value, str) else "")
def test_ranks_equal_one_process(
    world2: WorldPool, world4: WorldPool, name: str, layout: Layout, dtype: torch.dtype
) -> None:
    """Sizes and ranks that no world divides; rows of several ranks, of none, and of an adapter that is elsewhere."""
    for pool in (world2, world4):
        check(pool, layout, dtype=dtype)
        check(pool, layout, dtype=dtype, picks=(), ranks=(3,))
        check(pool, layout, dtype=dtype, picks=(0,), ranks=(3,))
        check(pool, layout, dtype=dtype, picks=(-1, -1), ranks=(3,))


@pytest.mark.parametrize(
    ("name", "layout"),
    [item for item in layouts() if item[0] != "row, fully sharded"],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dora(world2: WorldPool, name: str, layout: Layout) -> None:
    check(world2, layout, gains=(0, 3))


def test_dora_on_a_partial_output_of_which_the_rank_scales_only_some_columns_is_refused(world2: WorldPool) -> None:
    layout = Layout(style="row", is_reduced=False, fully_sharded=True)
    case = {"ranks": RANKS, "picks": PICKS, "in_features": 38, "out_features": 46, "device": "cpu", "gains": (0,)}
    for outcome in world2.outcomes(run_rank, layout, case):
        assert isinstance(outcome.error, BatchError)
        assert "needs the reduced output" in str(outcome.error)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", ["column, gathered", "row, reduced"])
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_kernels_equal_one_process(world2: WorldPool, name: str, fully_sharded: bool) -> None:
    layout = replace(LAYOUTS[name], fully_sharded=fully_sharded, kernels=True)
    check(world2, layout, gains=(0, 3))


def test_each_rank_holds_its_share(world4: WorldPool) -> None:
    sizes = {"in_features": 64, "out_features": 128, "ranks": (8,), "picks": (0, -1)}
    a, b = 4 * 8 * 64, 4 * 8 * 128
    assert check(world4, LAYOUTS["column"], **sizes) == [a + b // 4] * 4
    assert check(world4, LAYOUTS["row, reduced"], **sizes) == [a // 4 + b] * 4
    for name in ("column", "row, reduced"):
        assert check(world4, replace(LAYOUTS[name], fully_sharded=True), **sizes) == [(a + b) // 4] * 4

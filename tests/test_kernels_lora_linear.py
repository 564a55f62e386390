"""LoRA on linear maps in Triton's interpreter (or on the GPU): against merged weights and the torch reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE
from support.linear import LinearCase, make_group_case, make_linear_case

import moegraft.kernels.lora_linear.host as lora_linear
from moegraft.build import punica_for
from moegraft.kernels.lora_linear.host import (
    add_lora_linear,
    add_lora_linears,
    choose_tile,
    run_lora_linear,
    run_lora_linears,
)
from moegraft.kernels.lora_linear.reference import add_lora_linear_reference
from moegraft.lora.punica import PunicaWrapperCPU, PunicaWrapperGPU
from moegraft.lora.rows import AdapterRows
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.testing.poison import poison_allocations

# Sums of at most 400 terms in another order. On the GPU small float32 dots run on the same units, as "ieee".
TOL = 3e-6


def run(case: LinearCase, *, rank_bound: int, run_length: int = 1, with_bias: bool = False) -> torch.Tensor:
    """The op's own implementation, so that its scratch memory is poisoned as well."""
    y_MO, tables = case.y_MO.clone(), case.tables
    bias_O = case.bias_O if with_bias else None
    with poison_allocations():
        run_lora_linear(
            y_MO, case.x_MI, case.slots_M, tables.pool, tables.page_table, tables.factors, bias_O, tables.page_elems,
            rank_bound, run_length,
        )  # fmt: skip
    return y_MO


def check(case: LinearCase, y_MO: torch.Tensor, *, with_bias: bool = False) -> None:
    expected = case.expected(with_bias=with_bias)
    assert_close_delta(y_MO, case.y_MO, expected, case.y_MO, TOL)
    is_base = torch.tensor([slot not in case.loras for slot in case.slots_M.tolist()], dtype=torch.bool)
    assert torch.equal(y_MO[is_base], case.y_MO[is_base])


def shuffled(num_rows: int, num_adapters: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(-1, num_adapters) for _ in range(num_rows)]


@pytest.mark.parametrize("rank", [1, 3, 7, 8, 16, 64, 200])
def test_rank(rank: int) -> None:
    case = make_linear_case([rank, rank], [0, -1, 1, 0, 1], in_features=400 if rank == 16 else 37)
    check(case, run(case, rank_bound=rank))


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("run_length", [1, 3])
def test_mixed_ranks_in_any_order(num_rows: int, run_length: int) -> None:
    ranks = [1, 3, 7, 8, 16, 64, 0]
    case = make_linear_case(ranks, shuffled(num_rows, len(ranks)))
    check(case, run(case, rank_bound=64, run_length=run_length))


@pytest.mark.parametrize("run_length", [16, 50, 130])
def test_long_runs_and_a_wrong_guess(run_length: int) -> None:
    """Tiles that straddle runs; and rows in no order at all where the caller promised runs."""
    ranks = [5, 16, 2]
    runs = [adapter for adapter in (0, 2, -1, 1, 0) for _ in range(run_length)][:150]
    for picks in (runs, shuffled(len(runs), 3)):
        case = make_linear_case(ranks, picks, in_features=20, out_features=24)
        check(case, run(case, rank_bound=16, run_length=run_length))


def test_programs_that_walk_several_column_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What thousands of rows get, at a size for the interpreter: the last program's last block lies outside."""
    tile = choose_tile(4096, 2048, 4096, 16, 512)
    assert tile.expand_steps > 1
    small = replace(tile, shrink_k=16, expand_n=16)
    monkeypatch.setattr(lora_linear, "choose_tile", lambda *sizes: small)
    runs = [adapter for adapter in (0, 2, -1, 1) for _ in range(50)]
    case = make_linear_case([5, 16, 2], runs, in_features=20, out_features=90, gains=[1])
    check(case, run(case, rank_bound=16, run_length=50, with_bias=True), with_bias=True)


@pytest.mark.parametrize("picks", [[], [-1], [-1] * 20, [0] * 33, list(range(17))])
def test_degenerate_batches(picks: list[int]) -> None:
    case = make_linear_case([4] * 17, picks, in_features=24, out_features=8)
    check(case, run(case, rank_bound=4))


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (5, 3), (16, 300), (257, 16), (64, 64)])
def test_odd_sizes(in_features: int, out_features: int) -> None:
    case = make_linear_case([2, 9], [1, 0, -1, 0], in_features=in_features, out_features=out_features)
    check(case, run(case, rank_bound=9))


@pytest.mark.parametrize("with_bias", [False, True])
def test_dora_gain(with_bias: bool) -> None:
    case = make_linear_case([4, 7, 3], shuffled(21, 3), gains=[0, 2])
    check(case, run(case, rank_bound=7, with_bias=with_bias), with_bias=with_bias)


def test_bound_above_every_rank_changes_no_bit_of_a_small_batch() -> None:
    """What a captured graph runs with: room for adapters that are not there yet."""
    case = make_linear_case([3, 16], [0, 1, -1, 1])
    check(case, run(case, rank_bound=150))


def test_splits_are_added_in_order_and_rounded_once() -> None:
    assert choose_tile(3, 2048, 64, 16, 1).splits > 1
    case = make_linear_case([16, 5], [0, 1, 0], in_features=2048, out_features=64, page_bytes=1 << 14)
    y_MO = run(case, rank_bound=16)
    check(case, y_MO)
    assert torch.equal(y_MO, run(case, rank_bound=16))


@pytest.mark.parametrize("y_dtype", [torch.float16, torch.float32])
def test_low_precision_agrees_with_the_reference(y_dtype: torch.dtype) -> None:
    """A router's logits stay float32 over a 16-bit model. float16: the interpreter's dot takes no bfloat16."""
    case = make_linear_case([8, 16, 3], shuffled(19, 3), dtype=torch.float16, y_dtype=y_dtype, gains=[1])
    expected = case.y_MO.clone()
    add_lora_linear_reference(expected, case.x_MI, case.slots_M, case.tables, bias_O=case.bias_O)
    y_MO = run(case, rank_bound=16, with_bias=True)
    # v and y are rounded to 11 bits on both sides, from sums in another order: now and then to a neighbour.
    assert_close_delta(y_MO, case.y_MO, expected, case.y_MO, 5e-4)


def test_reference_matches_merged_weights() -> None:
    case = make_linear_case([3, 40], shuffled(9, 2), gains=[1])
    y_MO = case.y_MO.clone()
    add_lora_linear_reference(y_MO, case.x_MI, case.slots_M, case.tables, bias_O=case.bias_O)
    assert_close(y_MO, case.expected(with_bias=True), TOL)


def test_strided_rows() -> None:
    """x and y may be columns of larger tensors, as the parts of a fused projection are."""
    case = make_linear_case([4, 6], [1, 0, -1])
    wide_y, wide_x = torch.randn(3, 100, device=DEVICE), torch.randn(3, 90, device=DEVICE)
    y_view, x_view = wide_y[:, 10:55], wide_x[:, 3:40]
    y_view.copy_(case.y_MO)
    x_view.copy_(case.x_MI)
    before = wide_y.clone()
    add_lora_linear(y_view, x_view, case.slots_M, case.tables, rank_bound=6)
    assert torch.equal(y_view, run(case, rank_bound=6))
    assert torch.equal(wide_y[:, :10], before[:, :10]) and torch.equal(wide_y[:, 55:], before[:, 55:])


def test_op_passes_opcheck() -> None:
    case = make_linear_case([4, 6], [1, 0, -1], gains=[0])
    tables = case.tables
    torch.library.opcheck(
        torch.ops.moegraft.add_lora_linear.default,
        (
            case.y_MO, case.x_MI, case.slots_M, tables.pool, tables.page_table, tables.factors, case.bias_O,
            tables.page_elems, 6, 1,
        ),
    )  # fmt: skip


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_linear_case([4], [0, 0])
    with pytest.raises(ValueError, match=r"y \[1, 45\]"):
        add_lora_linear(case.y_MO[:1], case.x_MI, case.slots_M, case.tables, rank_bound=4)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        add_lora_linear(case.y_MO, case.x_MI.bfloat16(), case.slots_M, case.tables, rank_bound=4)
    for slots_M in (case.slots_M.long(), case.slots_M[:1], case.slots_M.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match=r"token_slots .*expected \[2\] torch\.int32, contiguous"):
            add_lora_linear(case.y_MO, case.x_MI, slots_M, case.tables, rank_bound=4)


@pytest.mark.parametrize(("sequences", "repeats"), [(6, 1), (4, 9), (3, 40)])
@pytest.mark.parametrize("rank_bound", [16, 20])
def test_wrapper_agrees_with_torch(sequences: int, repeats: int, rank_bound: int) -> None:
    """The two punica wrappers on the rows of a call: sequence-major, with DoRA and a bias."""
    picks = shuffled(sequences, 3, seed=4)
    case = make_linear_case([4, 7, 16], [pick for pick in picks for _ in range(repeats)], gains=[0, 2])
    slots = [int(slot) for slot in case.slots_M[::repeats]]
    rows = AdapterRows.of(slots, device=case.x_MI.device, lengths=repeats)
    expected, y_MO = case.y_MO.clone(), case.y_MO.clone()
    for wrapper, y in ((PunicaWrapperCPU(), expected), (PunicaWrapperGPU(), y_MO)):
        wrapper.add_lora_linear(y, case.x_MI, rows, case.tables, bias_O=case.bias_O, rank_bound=rank_bound)
    assert_close_delta(y_MO, case.y_MO, expected, case.y_MO, TOL)
    check(case, y_MO, with_bias=True)


def test_wrapper_of_a_device() -> None:
    assert type(punica_for(torch.device("cpu"))) is PunicaWrapperCPU
    assert (type(punica_for(torch.device(DEVICE))) is PunicaWrapperGPU) == (DEVICE == "cuda")


@pytest.mark.parametrize(("num_rows", "run_length"), [(1, 1), (17, 1), (70, 40)])
@pytest.mark.parametrize("widths", [(45, 16), (130, 16, 37), (16, 300, 45, 16)])
def test_maps_that_read_the_same_input(widths: tuple[int, ...], num_rows: int, run_length: int) -> None:
    """Ranks, gains and biases by map; the bits are those of one map after the other."""
    picks = shuffled(num_rows, 3)
    ranks = [[3, 16, 1], [20, 0, 2], [5, 5, 5], [0, 9, 4]][: len(widths)]
    case = make_group_case(ranks, picks, widths=widths, gains=(1,))
    expected = [y.clone() for y in case.ys]
    for y, tables, bias in zip(expected, case.tables, case.biases, strict=True):
        add_lora_linear(y, case.x_MI, case.slots_M, tables, rank_bound=20, run_length=run_length, bias_O=bias)
    with poison_allocations():
        run_lora_linears(
            case.ys, case.x_MI, case.slots_M, case.tables[0].pool, case.tables[0].page_table,
            [each.factors for each in case.tables], case.biases, case.tables[0].page_elems, 20, run_length,
        )  # fmt: skip
    for found, wanted in zip(case.ys, expected, strict=True):
        assert torch.equal(found, wanted)


def test_groups_that_do_not_fit_are_refused() -> None:
    case = make_group_case([[3], [3]], [0], widths=(16, 16))
    with pytest.raises(ValueError, match="expected 2 to 4"):
        add_lora_linears(case.ys[:1], case.x_MI, case.slots_M, case.tables[:1], rank_bound=3, biases=[None])
    with pytest.raises(ValueError, match="expected 2 to 4"):
        add_lora_linears(case.ys, case.x_MI, case.slots_M, case.tables, rank_bound=3, biases=[None])

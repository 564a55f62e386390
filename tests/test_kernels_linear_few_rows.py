"""Linear maps of few rows with LoRA inside, in Triton's interpreter (or on the GPU): against merged weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE
from support.linear import make_group_case, make_linear_case

from moegraft.kernels.linear_few_rows.host import MAX_ROWS, FewRowsTile, choose_tile, linear_few_rows
from moegraft.kernels.linear_few_rows.reference import linear_few_rows_reference
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.testing.poison import poison_allocations

# Sums of at most 400 terms in another order.
TOL = 3e-6


def weights_of(widths: Sequence[int], length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, length, generator=generator) / length**0.5).to(DEVICE, dtype) for n in widths]


def picks_of(num_rows: int, num_adapters: int) -> list[int]:
    rng = random.Random(num_rows)
    return [rng.randrange(-1, num_adapters) for _ in range(num_rows)]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 16, 17, 32])
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
def test_one_map_of_mixed_ranks(num_rows: int, rank: int) -> None:
    """Adapter 2 does not touch the map, adapter 1 has a gain; base rows keep the bits of a batch without adapters."""
    case = make_linear_case([rank, 2, 0], picks_of(num_rows, 3), gains=[1])
    (weight,) = weights_of([45], 37)
    with poison_allocations():
        (base_MO,) = linear_few_rows(case.x_MI, [weight], [None])
        (y_MO,) = linear_few_rows(
            case.x_MI, [weight], [None], token_slots_M=case.slots_M, tables=[case.tables], rank_bound=rank
        )
    plain_MO = case.x_MI @ weight.T
    assert_close(base_MO, plain_MO, TOL)
    expected_MO = replace(case, y_MO=plain_MO).expected()
    assert_close_delta(y_MO, base_MO, expected_MO, plain_MO, TOL)
    is_base = torch.tensor([slot not in case.loras for slot in case.slots_M.tolist()], dtype=torch.bool)
    assert torch.equal(y_MO[is_base], base_MO[is_base])


@pytest.mark.parametrize("widths", [[40], [64, 16], [40, 24, 23], [16, 8, 64, 33]])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_maps_of_one_input(widths: list[int], num_rows: int) -> None:
    """Every second map has a bias, the first a gain; adapter 1 touches not all of them."""
    ranks = [[2 + place, 0 if place % 2 else 5, 17] for place in range(len(widths))]
    case = make_group_case(ranks, picks_of(num_rows, 3), widths=widths, gains=[0])
    weights = weights_of(widths, 37)
    with poison_allocations():
        found = linear_few_rows(
            case.x_MI, weights, case.biases, token_slots_M=case.slots_M, tables=case.tables, rank_bound=32
        )
    expected = linear_few_rows_reference(case.x_MI, weights, case.biases, case.slots_M, case.tables)
    for y_MO, right_MO in zip(found, expected, strict=True):
        assert_close(y_MO, right_MO, TOL)


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_a_rows_bits_depend_on_its_own_adapter_alone(block_n: int) -> None:
    tile = FewRowsTile(block_n=block_n, block_k=32, slots=2, block_r=8)
    case = make_linear_case([5, 16], [0, 1, -1, 0, 1, 0], in_features=96, out_features=80)
    weights = weights_of([80], 96)

    def run(slots_M: torch.Tensor) -> torch.Tensor:
        options = {"token_slots_M": slots_M, "tables": [case.tables], "rank_bound": 16, "tile": tile}
        return linear_few_rows(case.x_MI, weights, [None], **options)[0]

    together_MO = run(case.slots_M)
    for row in range(6):
        alone = torch.full_like(case.slots_M, -1)
        alone[row] = case.slots_M[row]
        assert torch.equal(run(alone)[row], together_MO[row])


def test_tiles_fill_the_device() -> None:
    assert choose_tile(8, 5120, 2048).block_n == 32
    assert choose_tile(8, 2048, 4096).block_n == 16
    assert choose_tile(8, 151936, 2048).block_n == 64
    assert all(choose_tile(rows, 45, 37).block_k == 64 for rows in (1, 32))


def test_what_does_not_fit_is_refused() -> None:
    x_MI, (weight,) = torch.randn(MAX_ROWS + 1, 37, device=DEVICE), weights_of([45], 37)
    with pytest.raises(ValueError, match="rows at most"):
        linear_few_rows(x_MI, [weight], [None])
    with pytest.raises(ValueError, match=r"weights torch\.float32 \[45, 36\]"):
        linear_few_rows(x_MI[:2], [weight[:, :36]], [None])
    with pytest.raises(ValueError, match="0 tables of 1 maps"):
        linear_few_rows(x_MI[:2], [weight], [None], token_slots_M=torch.zeros(2, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("widths", [[4096, 512, 512], [2048]])
def test_sizes_of_real_models(num_rows: int, widths: list[int]) -> None:
    x_MI = torch.randn(num_rows, 2048, device="cuda", dtype=torch.bfloat16)
    for weight, y_MO in zip(
        weights := weights_of(widths, 2048, torch.bfloat16),
        linear_few_rows(x_MI, weights, [None] * len(widths)),
        strict=True,
    ):
        # One rounding of a sum of 2048 products.
        assert_close(y_MO.float(), x_MI.float() @ weight.float().T, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "num_rows"), [([16] * 8, 8), ([4, 64, 16], 1), ([8] * 20, 32), ([64] * 5, 32)])
def test_adapters_of_real_sizes(ranks: list[int], num_rows: int) -> None:
    """More adapters than one product takes, and more lanes."""
    picks = [row % (len(ranks) + 1) - 1 for row in range(num_rows, 0, -1)]
    sizes = {"in_features": 2048, "out_features": 1024, "dtype": torch.bfloat16, "page_bytes": 1 << 16}
    case = make_linear_case(ranks, picks, **sizes)
    (weight,) = weights_of([1024], 2048, torch.bfloat16)
    options = {"token_slots_M": case.slots_M, "tables": [case.tables], "rank_bound": max(ranks)}
    (y_MO,) = linear_few_rows(case.x_MI, [weight], [None], **options)
    (base_MO,) = linear_few_rows(case.x_MI, [weight], [None])
    expected_MO = replace(case, y_MO=case.x_MI.double() @ weight.double().T).expected()
    assert_close(y_MO.double(), expected_MO, 1e-2)  # v and y are rounded to bfloat16
    is_base = torch.tensor([slot not in case.loras for slot in case.slots_M.tolist()], dtype=torch.bool)
    assert torch.equal(y_MO[is_base], base_MO[is_base])

"""Norms, rotary embeddings, routers' choices and writes into pages, in Triton's interpreter (or on the GPU)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE

from moegraft.kernels.paged_decode.host import write_pages
from moegraft.kernels.rms_norm.host import rms_norm
from moegraft.kernels.rms_norm.reference import rms_norm_reference
from moegraft.kernels.rotary.host import can_turn, rotary
from moegraft.kernels.rotary.reference import rotary_reference
from moegraft.kernels.router_topk.host import router_topk
from moegraft.kernels.router_topk.reference import router_topk_reference
from moegraft.testing.errors import assert_close
from moegraft.testing.poison import poison_allocations

ROUNDS = DEVICE == "cuda"
"""Triton's interpreter cuts bfloat16 off, where the device rounds."""
TOL_BFLOAT16 = 5e-3 if ROUNDS else 4e-2

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 1, 5, 24), (7, 1, 2000), (2, 2048)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    for w, adds_one, rounds_first in ((weight, False, True), (weight, True, False), (None, False, False)):
        expected = rms_norm_reference(x, w, 1e-6, adds_one=adds_one, rounds_first=rounds_first)
        with poison_allocations():
            found = rms_norm(x, w, 1e-6, adds_one=adds_one, rounds_first=rounds_first)
        assert found.dtype == dtype
        assert found.shape == x.shape
        # Sums in another order: one step of bfloat16 where that moves a rounding.
        assert_close(found, expected, tol=1e-6 if dtype == torch.float32 else TOL_BFLOAT16)
        if ROUNDS and dtype == torch.bfloat16 and x.numel():
            assert (found == expected).float().mean() > 0.98


def test_the_bits_of_a_norm_are_of_its_row_alone() -> None:
    x, weight = draw(9, 48), draw(48, seed=1)
    whole = rms_norm(x, weight, 1e-6)
    for row in range(9):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], whole[row])
    assert torch.equal(rms_norm(x[::2], weight, 1e-6), whole[::2])  # rows that lie apart


@DTYPES
@pytest.mark.parametrize(("heads", "size", "turned"), [((1, 1), 2, 2), ((5, 2), 24, 8), ((16, 4), 64, 64)])
@pytest.mark.parametrize("has_half", [False, True])
def test_rotary(heads: tuple[int, int], size: int, turned: int, has_half: bool, dtype: torch.dtype) -> None:
    """Bit for bit; queries and keys are views, as models make them."""
    for rows in (0, 1, 6):
        q = draw(rows, 1, heads[0], size, dtype=dtype).transpose(1, 2)
        k = draw(rows, 1, heads[1], size, dtype=dtype, seed=1).transpose(1, 2)
        cos, sin = (draw(rows, 1, turned // (1 + has_half), dtype=dtype, seed=seed) for seed in (2, 3))
        assert can_turn(q, k, cos, sin, has_half=has_half)
        with poison_allocations():
            found = rotary(q, k, cos, sin, has_half=has_half)
        for mine, expected in zip(found, rotary_reference(q, k, cos, sin, has_half=has_half), strict=True):
            if dtype == torch.bfloat16 and ROUNDS:
                assert torch.equal(mine, expected)
            else:  # in float32, a product and a sum may be one instruction
                assert_close(mine, expected, tol=1e-6 if dtype == torch.float32 else TOL_BFLOAT16)


def test_what_rotary_does_not_take() -> None:
    q, k, cos = draw(3, 4, 1, 8), draw(3, 2, 1, 8), draw(3, 1, 8)
    assert can_turn(q, k, cos, cos)
    wrong = {
        "several tokens a row": (draw(3, 4, 2, 8), draw(3, 2, 2, 8), draw(3, 2, 8)),
        "one angle for all rows": (q, k, draw(1, 1, 8)),
        "more angles than elements": (q, k, draw(3, 1, 12)),
        "another dtype": (q, k, cos.bfloat16()),
        "elements that lie apart": (draw(3, 4, 1, 16)[..., ::2], k, cos),
    }
    for what, (q, k, angles) in wrong.items():
        assert not can_turn(q, k, angles, angles), what


@DTYPES
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (12, 3), (128, 8), (513, 4)])
def test_choice_of_experts(experts: int, top_k: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 7):
        logits = draw(rows, experts + 3, dtype=dtype)[:, :experts]
        for of_all, is_summed in ((True, False), (True, True), (False, True)):
            options = {"of_all": of_all, "is_summed": is_summed, "dtype": torch.float32}
            expected = router_topk_reference(logits, top_k, **options)
            with poison_allocations():
                weights, ids = router_topk(logits, top_k, **options)
            assert torch.equal(ids, expected[1])
            assert_close(weights, expected[0], tol=1e-6)


def test_choice_among_equal_and_broken_logits() -> None:
    options = {"of_all": True, "is_summed": True, "dtype": torch.float32}
    weights, ids = router_topk(torch.zeros(2, 9, device=DEVICE), 4, **options)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert weights.tolist() == [[0.25] * 4] * 2
    weights, ids = router_topk(torch.full((1, 9), float("nan"), device=DEVICE), 4, **options)
    assert weights.isnan().all()
    assert ((ids >= 0) & (ids < 9)).all()  # an id beyond the experts would read foreign memory


@DTYPES
def test_writes_into_pages(dtype: torch.dtype) -> None:
    for rows in (0, 1, 5):
        keys, values = draw(6, 4, 2, 24, dtype=dtype), draw(6, 4, 2, 8, dtype=dtype)
        k, v = draw(rows, 2, 24, dtype=dtype, seed=1), draw(rows, 2, 16, dtype=dtype, seed=2)[..., ::2]
        slots = torch.tensor([23, 0, 9, 14, 3], device=DEVICE)[:rows]
        expected = keys.clone(), values.clone()
        expected[0].flatten(0, 1)[slots], expected[1].flatten(0, 1)[slots] = k, v
        write_pages(keys, values, k, v, slots)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])

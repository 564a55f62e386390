"""Dense expert weights: an orientation is an object with an inverse, and nothing is copied to serve it."""

from __future__ import annotations

import itertools

import pytest
import torch

from moegraft.formats.base import DenseExperts

E, D, F = 3, 6, 5
LAYOUTS = list(itertools.product([1, 2], [False, True], [False, True]))


def canonical(num_halves: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13_EGFD = torch.randn(E, num_halves * F, D, generator=generator)
    return w13_EGFD, torch.randn(E, D, F, generator=generator)


@pytest.mark.parametrize(("num_halves", "is_transposed", "is_interleaved"), LAYOUTS)
def test_pack_and_dequantise_are_inverse(num_halves: int, is_transposed: bool, is_interleaved: bool) -> None:
    w13_EGFD, w2_EDF = canonical(num_halves)
    packed = DenseExperts.pack(
        w13_EGFD, w2_EDF, num_halves=num_halves, is_transposed=is_transposed, is_interleaved=is_interleaved
    )
    assert packed.w13.shape == ((E, D, num_halves * F) if is_transposed else (E, num_halves * F, D))
    assert packed.w2.shape == ((E, F, D) if is_transposed else (E, D, F))
    assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == (E, D, F)
    for found, expected in zip(packed.dequantise(torch.float32), (w13_EGFD, w2_EDF), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [(0, 6, 5), (3, 0, 5), (3, 6, 0)], ids=str)
@pytest.mark.parametrize(("num_halves", "is_transposed", "is_interleaved"), LAYOUTS)
def test_zero_sized_and_meta(
    sizes: tuple[int, int, int], num_halves: int, is_transposed: bool, is_interleaved: bool
) -> None:
    layout = {"num_halves": num_halves, "is_transposed": is_transposed, "is_interleaved": is_interleaved}
    for e, d, f in (sizes, (E, D, F)):
        w13, w2 = torch.randn(e, num_halves * f, d), torch.randn(e, d, f)
        real, meta = (DenseExperts.pack(w13.to(device), w2.to(device), **layout) for device in ("cpu", "meta"))
        assert (real.num_experts, real.hidden_size, real.intermediate_size) == (e, d, f)
        for found, expected in zip(real.dequantise(torch.float32), (w13, w2), strict=True):
            assert torch.equal(found, expected)
        assert meta.device.type == "meta" and meta.num_bytes == real.num_bytes
        assert [t.shape for t in meta.dequantise(torch.float32)] == [w13.shape, w2.shape]
        cuts = [one.take_experts(range(e)[::-1]).take_intermediate(0, f, padded_to=f + 1) for one in (real, meta)]
        assert cuts[0].intermediate_size == f + 1
        assert [t.shape for t in cuts[0].tensors] == [t.shape for t in cuts[1].tensors]


def test_interleaved_rows_alternate() -> None:
    w13_EGFD, w2_EDF = canonical(2)
    packed = DenseExperts.pack(w13_EGFD, w2_EDF, num_halves=2, is_transposed=False, is_interleaved=True)
    assert torch.equal(packed.w13[:, 0], w13_EGFD[:, 0])  # gate row 0
    assert torch.equal(packed.w13[:, 1], w13_EGFD[:, F])  # up row 0
    assert torch.equal(packed.w13[:, 2], w13_EGFD[:, 1])  # gate row 1


@pytest.mark.parametrize("is_transposed", [False, True])
def test_serving_copies_nothing(is_transposed: bool) -> None:
    w13_EGFD, w2_EDF = canonical(2)
    packed = DenseExperts.pack(w13_EGFD, w2_EDF, num_halves=2, is_transposed=is_transposed, is_interleaved=False)
    assert packed.w13_in_out.data_ptr() == packed.w13.data_ptr()
    assert packed.w2_in_out.data_ptr() == packed.w2.data_ptr()
    assert packed.w13_in_out.shape == (E, D, 2 * F)
    assert packed.w2_in_out.shape == (E, F, D)
    assert torch.equal(packed.w13_in_out.mT, w13_EGFD)
    assert torch.equal(packed.w2_in_out.mT, w2_EDF)


@pytest.mark.parametrize(("num_halves", "is_transposed", "is_interleaved"), LAYOUTS)
def test_a_cut_of_the_intermediate_axis_is_the_cut_of_both_halves(
    num_halves: int, is_transposed: bool, is_interleaved: bool
) -> None:
    w13_EGFD, w2_EDF = canonical(num_halves)
    packed = DenseExperts.pack(
        w13_EGFD, w2_EDF, num_halves=num_halves, is_transposed=is_transposed, is_interleaved=is_interleaved
    )
    w13, w2 = packed.take_experts([2, 0]).take_intermediate(1, 4, padded_to=5).dequantise(torch.float32)
    expected = torch.zeros(2, num_halves, 5, D)
    expected[:, :, :3] = w13_EGFD[[2, 0]].unflatten(1, (num_halves, F))[:, :, 1:4]
    assert torch.equal(w13, expected.flatten(1, 2))
    assert torch.equal(w2[:, :, :3], w2_EDF[[2, 0], :, 1:4]) and not w2[:, :, 3:].any()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"w13": (E, 2 * F, D + 1)}, "w13"),
        ({"w13": (E + 1, 2 * F, D)}, "w13"),
        ({"w2": (E, D, F + 1)}, "w2"),
        ({"w13": (E, D, 2 * F)}, "w13"),  # transposed, and not said so
        ({"b13": (E, F)}, "b13"),
        ({"b2": (E, 2 * D)}, "b2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(tensors: dict[str, tuple[int, ...]], named: str) -> None:
    shapes = {"w13": (E, 2 * F, D), "w2": (E, D, F), "b13": (E, 2 * F), "b2": (E, D)} | tensors
    with pytest.raises(ValueError, match=rf"{named}.*expected"):
        DenseExperts(**{name: torch.zeros(shape) for name, shape in shapes.items()})

"""The order of gate and up, told by a tensor whose elements say which half and which column they are."""

from __future__ import annotations

import pytest
import torch

from moegraft.core.halves import (
    cut_halves,
    half_intervals,
    half_strides,
    join_halves,
    split_halves,
)

ORDERS = {
    (1, False): ["g0", "g1", "g2"],
    (1, True): ["g0", "g1", "g2"],
    (2, False): ["g0", "g1", "g2", "u0", "u1", "u2"],
    (2, True): ["g0", "u0", "g1", "u1", "g2", "u2"],
}
CODES = {f"{half}{column}": 10.0 * (half == "u") + column for half in "gu" for column in range(8)}
each_order = pytest.mark.parametrize(("num_halves", "is_interleaved"), ORDERS)


def stored(order: tuple[int, bool], axis: int) -> torch.Tensor:
    """[2, ..., G*F, ..., 3] with the order along ``axis``."""
    codes = torch.tensor([CODES[name] for name in ORDERS[order]])
    shape = [2, 3]
    shape.insert(axis, len(codes))
    return codes.view([-1 if at == axis else 1 for at in range(3)]).expand(shape).contiguous()


@each_order
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_halves_are_split_and_joined(num_halves: int, is_interleaved: bool, axis: int) -> None:
    order = (num_halves, is_interleaved)
    tensor = stored(order, axis)
    gate, up = split_halves(tensor, axis, num_halves=num_halves, is_interleaved=is_interleaved)
    assert gate.movedim(axis, -1)[0, 0].tolist() == [0, 1, 2]
    assert up.movedim(axis, -1)[0, 0].tolist() == ([10, 11, 12] if num_halves == 2 else [0, 1, 2])
    assert gate.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    halves = (gate, up)[:num_halves]
    assert torch.equal(join_halves(halves, axis, is_interleaved=is_interleaved), tensor)
    assert all(
        map(
            torch.equal,
            split_halves(tensor.movedim(axis, -1), num_halves=num_halves, is_interleaved=is_interleaved),
            (h.movedim(axis, -1) for h in (gate, up)),
        )
    )


@each_order
@pytest.mark.parametrize("columns", [(0, 3), (1, 3), (1, 2), (3, 3)])
@pytest.mark.parametrize("extra", [0, 2])
def test_cuts_keep_the_order(num_halves: int, is_interleaved: bool, columns: tuple[int, int], extra: int) -> None:
    options = {"num_halves": num_halves, "is_interleaved": is_interleaved}
    tensor = stored((num_halves, is_interleaved), 1)
    cut = cut_halves(tensor, 1, columns, extra, fill=7.0, **options)
    kept = [float(column) for column in range(*columns)]
    gate, up = split_halves(cut[0, :, 0], **options)
    assert gate.tolist() == [*kept, *[7.0] * extra]
    if num_halves == 2:
        assert up.tolist() == [*(10 + column for column in kept), *[7.0] * extra]
    assert cut.is_contiguous()

    intervals = half_intervals(*columns, 3, **options)
    pieces = torch.cat([tensor[0, start:stop, 0] for start, stop in intervals])
    assert torch.equal(pieces, cut_halves(tensor, 1, columns, **options)[0, :, 0])


@each_order
def test_strides_lead_to_the_columns(num_halves: int, is_interleaved: bool) -> None:
    flat = stored((num_halves, is_interleaved), 1).flatten()  # the stride of the axis is 3
    stride, up = half_strides(3, 3, num_halves=num_halves, is_interleaved=is_interleaved)
    assert [flat[f * stride].item() for f in range(3)] == [0, 1, 2]
    assert [flat[up + f * stride].item() for f in range(3)] == ([10, 11, 12] if num_halves == 2 else [0, 1, 2])


def test_an_empty_axis_has_empty_halves() -> None:
    gate, up = split_halves(torch.empty(4, 0), num_halves=2, is_interleaved=True)
    assert gate.shape == up.shape == (4, 0)

"""Every way in which a router may multiply with its weight: the product gets the delta, or the call is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.sites.router_weight import RouterWeight

T, D, E, B = 6, 8, 5, 2
Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Delta:
    """y += x @ change^T, and a check of the bias."""

    name = "gate"

    def __init__(self, change_ED: torch.Tensor, *, is_wanted: bool = True) -> None:
        self.change_ED = change_ED
        self.is_wanted = is_wanted
        self.calls = 0

    def __call__(self, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        y.view(-1, E).add_(x.reshape(-1, D) @ self.change_ED.to(x.dtype).T)
        self.calls += 1


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


BIAS, GRID = _draw(E), _draw(T, E)
PRODUCTS: dict[str, Op] = {
    "linear": functional.linear,
    "linear with bias": lambda x, w: functional.linear(x, w, BIAS),
    "linear by name": lambda x, w: functional.linear(input=x, weight=w, bias=BIAS),
    "linear of a cast": lambda x, w: functional.linear(x.float(), w.float()),
    "linear of a type": lambda x, w: functional.linear(x.float(), w.type(torch.float32)),
    "linear of the data": lambda x, w: functional.linear(x, w.data),
    "linear of a copy": lambda x, w: functional.linear(x, w.detach().clone().contiguous()),
    "linear of two transposes": lambda x, w: functional.linear(x, w.t().contiguous().t()),
    "mm t": lambda x, w: torch.mm(x, w.t()),
    "method mm T": lambda x, w: x.mm(w.T),
    "mm mT by name": lambda x, w: torch.mm(x, mat2=w.mT),
    "matmul transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "matmul transpose from behind": lambda x, w: x.matmul(w.transpose(-1, -2)),
    "matmul permute": lambda x, w: torch.matmul(x, w.permute(1, 0)),
    "matmul permute tuple": lambda x, w: torch.matmul(x, torch.permute(w, (1, 0))),
    "@": lambda x, w: x @ w.T,
    "@ of a cast transpose": lambda x, w: x.float() @ w.T.float(),
    "weight @ x": lambda x, w: (w @ x.T).T,
    "weight mm x": lambda x, w: torch.mm(w, x.t()).t(),
    "weight mv x": lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
    "x @ weight of one row": lambda x, w: torch.stack([row @ w.T for row in x]),
    "in three dimensions": lambda x, w: (x.view(B, T // B, D) @ w.T).view(T, E),
    "weight @ x in three dimensions": lambda x, w: (w @ x.view(B, T // B, D).mT).mT.reshape(T, E),
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
    "bmm unsqueeze": lambda x, w: torch.bmm(x.unsqueeze(0), w.unsqueeze(0).transpose(1, 2))[0],
    "bmm expand": lambda x, w: torch.bmm(x.view(B, T // B, D), w.T.expand(B, D, E)).view(T, E),
    "addmm": lambda x, w: torch.addmm(BIAS, x, w.t()),
    "method addmm": lambda x, w: GRID.addmm(x, w.t()),
    "addmm scaled": lambda x, w: torch.addmm(BIAS, x, w.t(), beta=0.5, alpha=2.0),
    "addmm from the left": lambda x, w: torch.addmm(GRID.T, w, x.T).T,
    "baddbmm": lambda x, w: torch.baddbmm(GRID[None], x[None], w.T[None], alpha=3.0)[0],
    "inner": torch.inner,
    "einsum": lambda x, w: torch.einsum("td,ed->te", x, w),
    "einsum turned": lambda x, w: torch.einsum("ed, td -> et", w, x).T,
    "einsum of a transpose": lambda x, w: torch.einsum("td,de->te", x, w.T),
    "einsum with dots": lambda x, w: torch.einsum("...d,ed->...e", x.view(B, T // B, D), w).reshape(T, E),
    "einsum of a batch": lambda x, w: torch.einsum("btd,ed->bet", x.view(B, T // B, D), w).mT.reshape(T, E),
    "einsum of a list": lambda x, w: torch.einsum("td,ed->te", [x, w]),
}
LOST: dict[str, Op] = {
    "sum of products": lambda x, w: (x[:, None] * w).sum(-1),
    "wrong side": lambda x, w: x @ w.T @ w @ w.T,
    "norm": lambda x, w: x @ functional.normalize(w, dim=-1).T,
    "scaled": lambda x, w: functional.linear(x, 2 * w),
    "rows in another order": lambda x, w: functional.linear(x, w[torch.arange(E)]),
    "part": lambda x, w: functional.linear(x, w[:3]),
    "stacked": lambda x, w: functional.linear(x, torch.cat([w, w])),
    "split": lambda x, w: torch.cat([functional.linear(x, half) for half in w.split(3)], -1),
    "einsum without output": lambda x, w: torch.einsum("td,ed", x, w),
    "einsum that sums": lambda x, w: torch.einsum("td,ed->e", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [1])),
    "bilinear": lambda x, w: functional.bilinear(GRID, x, w[None].expand(3, E, D)),
    "spread rows": lambda x, w: x @ w.T.expand(3, D, E),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w.T]),
    "a product out of sight": lambda x, w: torch.ops.aten.mm(x, w.T),
}


def _run(op: Op, *, is_wanted: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result through the seam, of the changed weight, and of the plain one."""
    x_TD, weight, change_ED = _draw(T, D), nn.Parameter(_draw(E, D), requires_grad=False), 0.1 * _draw(E, D + 1)[:, :D]
    seam = RouterWeight.over(weight, _Delta(change_ED, is_wanted=is_wanted))
    return op(x_TD, seam), op(x_TD, weight + change_ED), op(x_TD, weight)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_gets_the_delta(name: str) -> None:
    found, expected, plain = _run(PRODUCTS[name])
    assert (expected - plain).abs().max() > 0.1
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOST)
def test_what_the_seam_cannot_follow_is_an_error(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"router 'gate' uses its weight in .*, where its LoRA would be lost"
    ):
        _run(LOST[name])


@pytest.mark.parametrize("name", [*PRODUCTS, *LOST])
def test_without_lora_the_weight_is_a_plain_tensor(name: str) -> None:
    op = {**PRODUCTS, **LOST}[name]
    found, _, plain = _run(op, is_wanted=False)
    assert type(found) is torch.Tensor
    assert torch.equal(found, plain)


def test_sizes_and_kinds_of_a_weight_are_no_products() -> None:
    seam = RouterWeight.over(nn.Parameter(_draw(E, D)), _Delta(_draw(E, D)))
    assert isinstance(seam, nn.Parameter)
    assert (tuple(seam.shape), seam.dtype, seam.device.type, seam.is_cuda, seam.dim()) == (
        (E, D),
        torch.float64,
        "cpu",
        False,
        2,
    )
    assert seam.T.shape == (D, E)

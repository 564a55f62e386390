"""Paged decode attention in Triton's interpreter (or on the GPU) against plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE
from torch.nn import functional

import moegraft.kernels.paged_decode.host as paged_decode_host
from moegraft.kernels.paged_decode.host import DecodeTile, choose_tile, paged_decode, run_paged_decode
from moegraft.kernels.paged_decode.reference import paged_decode_reference
from moegraft.testing.errors import assert_close
from moegraft.testing.poison import poison_allocations

TOL = 3e-6  # float32 sums in another order


@dataclass(frozen=True, kw_only=True)
class Case:
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    sinks: torch.Tensor


def make(
    lengths: list[int], *, heads: tuple[int, int] = (4, 2), sizes: tuple[int, int] = (16, 16), page: int = 4,
    seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Pages in a random order; what no row owns, and what lies behind a row's end, is NaN. Unused entries of the table
    point far outside of the pool."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, -(-max(lengths) // page))
    num_pages = sum(-(-length // page) for length in lengths) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    keys = torch.full((num_pages, page, heads[1], sizes[0]), float("nan"))
    values = torch.full((num_pages, page, heads[1], sizes[1]), float("nan"))
    table = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for at in range(length):
            if at % page == 0:
                table[row, at // page] = order.pop()
            where = (int(table[row, at // page]), at % page)
            keys[where] = torch.randn(heads[1], sizes[0], generator=generator)
            values[where] = torch.randn(heads[1], sizes[1], generator=generator)
    q = torch.randn(len(lengths), heads[0], sizes[0], generator=generator)
    return Case(
        q=q.to(DEVICE, dtype),
        keys=keys.to(DEVICE, dtype),
        values=values.to(DEVICE, dtype),
        page_table=table.to(DEVICE),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        sinks=torch.randn(heads[0], generator=generator).to(DEVICE, dtype),
    )


def run(case: Case, **options: Any) -> torch.Tensor:
    given = {"scale": 0.3, "window": 0, "softcap": 0.0, "sinks_H": None, **options}
    with poison_allocations():
        return run_paged_decode(case.q, case.keys, case.values, case.page_table, case.lengths, **given)


def check(case: Case, tol: float = TOL, **options: Any) -> None:
    named = {"scale": 0.3, **options}
    expected = paged_decode_reference(case.q, case.keys, case.values, case.page_table, case.lengths, **named)
    found = run(case, **{key: value for key, value in named.items() if value is not None})
    assert found.shape == expected.shape
    assert_close(found, expected, tol)
    is_empty = case.lengths == 0
    assert (found[is_empty] == 0).all()


def test_reference_is_torchs_attention() -> None:
    case = make([7])
    k, v = (case.__getattribute__(name)[case.page_table[0].long()].flatten(0, 1)[:7] for name in ("keys", "values"))
    expected = functional.scaled_dot_product_attention(
        case.q[0][None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=0.3, enable_gqa=True
    )
    found = paged_decode_reference(case.q, case.keys, case.values, case.page_table, case.lengths, scale=0.3)
    assert_close(found[0], expected[0, :, 0], TOL)


@pytest.mark.parametrize("lengths", [[1], [4], [5, 1, 9], [0, 3, 0], [63, 64, 65, 130]])
def test_lengths(lengths: list[int]) -> None:
    check(make(lengths))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts are empty, which short rows leave."""
    tile = DecodeTile(block_l=16, block_g=16, splits=splits)
    monkeypatch.setattr(paged_decode_host, "choose_tile", lambda *sizes: tile)
    check(make([1, 15, 16, 17, 90, 0]))
    check(make([1, 15, 16, 17, 90, 0]), window=20)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1), (40, 2), (70, 1)])
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    check(make([9, 17], heads=heads))


@pytest.mark.parametrize("sizes", [(8, 8), (24, 16), (40, 96), (192, 128), (576, 512)])
def test_head_sizes(sizes: tuple[int, int]) -> None:
    check(make([5, 33], sizes=sizes), tol=1e-5)  # sums of up to 576 terms


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_page_sizes(page: int) -> None:
    check(make([5, 65, 1], page=page))


@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_window(window: int) -> None:
    check(make([1, 4, 5, 6, 40]), window=window)


def test_softcap_and_sinks() -> None:
    case = make([1, 8, 40, 0])
    check(case, softcap=0.7)
    assert (run(case, softcap=0.7) - run(case)).abs().max() > 0.01
    check(case, sinks_H=case.sinks)
    assert (run(case, sinks_H=case.sinks) - run(case)).abs().max() > 0.01
    check(case, softcap=2.0, sinks_H=case.sinks, window=9)


def test_large_scores_do_not_overflow() -> None:
    case = make([40])
    check(case, scale=300.0, tol=1e-4)  # exp of rounded scores in the hundreds
    check(case, scale=300.0, softcap=50.0, tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make([5, 70], dtype=dtype), tol=2e-2)  # the weights are rounded to the dtype of the values


def test_a_row_does_not_see_the_others() -> None:
    """Under one size of the batch and of the table."""
    case = make([30, 7, 61, 12])
    found = run(case)
    for row in range(4):
        alone = torch.zeros_like(case.lengths)
        alone[row] = case.lengths[row]
        again = run_paged_decode(case.q, case.keys, case.values, case.page_table, alone, 0.3, 0, 0.0, None)
        assert torch.equal(again[row], found[row])


def test_op() -> None:
    case = make([5, 9])
    args = (case.q, case.keys, case.values, case.page_table, case.lengths, 0.3, 0, 0.0, None)
    torch.library.opcheck(torch.ops.moegraft.paged_decode.default, args)
    traced = torch.compile(lambda q: paged_decode(q * 2, *args[1:5], scale=0.3), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(case.q), run_paged_decode(case.q * 2, *args[1:]))


@pytest.mark.gpu
def test_one_graph_serves_other_lengths_and_pages() -> None:
    case = make([30, 7, 61, 12])
    call = lambda: paged_decode(case.q, case.keys, case.values, case.page_table, case.lengths, scale=0.3)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([3, 0, 20, 1], [30, 7, 61, 12]):
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert_close(out, call(), 0)


@pytest.mark.parametrize(("capability", "kib"), [(89, 99), (90, 227)])
def test_compiles_within_the_shared_memory(capability: int, kib: int, tmp_path: Path) -> None:
    """For GPUs that need not be here; without the interpreter, so in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).parent / "support" / "compile_paged_decode.py"
    args = [sys.executable, str(script), str(capability), str(kib * 1024)]
    done = subprocess.run(args, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in found} == {"decode", "sum"}
    assert len(found) == 4
    assert max(each["shared"] for each in found) <= kib * 1024


def test_tiles_follow_the_batch() -> None:
    assert choose_tile(1024, 8, 4096, 128).splits == 1
    assert choose_tile(4, 8, 4096, 128).splits == 32
    assert choose_tile(4, 8, 256, 128).splits == 2
    assert choose_tile(4, 8, 100, 128).splits == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "3 query heads"),
        ({"q": torch.zeros(2, 4, 8)}, "4 query heads of 8"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.bfloat16)}, "bfloat16"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths \[3\]"),
        ({"page_table": torch.zeros(2, dtype=torch.int32)}, "page_table"),
        ({"keys": torch.zeros(3, 4, 2, 16)}, "expected"),
        ({"q": torch.zeros(4, 2, 16).transpose(0, 1)}, "contiguous"),
    ],
)
def test_refused(change: dict[str, torch.Tensor], message: str) -> None:
    case = make([5, 9])
    given = {"q": case.q, "keys": case.keys, "values": case.values, "page_table": case.page_table,
             "lengths": case.lengths} | {name: tensor.to(DEVICE) for name, tensor in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        paged_decode(*given.values(), scale=1.0)

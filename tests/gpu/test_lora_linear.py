"""LoRA on linear maps on the device, in bfloat16: sizes of real models, one CUDA graph for any mix, same bits."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.linear import MODULE, LinearCase, make_linear_case

from moegraft.kernels.lora_linear.host import add_lora_linear
from moegraft.kernels.lora_linear.reference import add_lora_linear_reference
from moegraft.lora.targets import AdapterWeights
from moegraft.testing.errors import assert_close_delta

pytestmark = pytest.mark.gpu

# x A and y are rounded to 8 bits, and the delta is about as large as the y that it is taken from.
BF16_TOL = 6e-3


def run(case: LinearCase, *, rank_bound: int, run_length: int = 1) -> torch.Tensor:
    y_MO = case.y_MO.clone()
    add_lora_linear(y_MO, case.x_MI, case.slots_M, case.tables, rank_bound=rank_bound, run_length=run_length)
    return y_MO


def check(case: LinearCase, y_MO: torch.Tensor) -> None:
    assert_close_delta(y_MO, case.y_MO, case.expected(), case.y_MO, BF16_TOL)
    is_base = case.slots_M < 0
    assert torch.equal(y_MO[is_base], case.y_MO[is_base])


def picks_of(num_rows: int, num_adapters: int, run_length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [pick for _ in range(-(-num_rows // run_length)) for pick in [rng.randrange(-1, num_adapters)] * run_length][
        :num_rows
    ]


@pytest.mark.parametrize(("in_features", "out_features"), [(2048, 4096), (4096, 2048), (2880, 512), (2048, 128)])
@pytest.mark.parametrize(("num_rows", "run_length"), [(1, 1), (8, 1), (128, 1), (200, 40), (700, 333)])
def test_sizes_of_real_models(num_rows: int, run_length: int, in_features: int, out_features: int) -> None:
    picks = picks_of(num_rows, 5, run_length)
    picks[0] = 4
    case = make_linear_case(
        [16, 64, 3, 8, 24], picks, in_features=in_features, out_features=out_features, dtype=torch.bfloat16,
        gains=[2], page_bytes=1 << 16, device="cuda",
    )  # fmt: skip
    y_MO = run(case, rank_bound=64, run_length=run_length)
    check(case, y_MO)
    assert torch.equal(y_MO, run(case, rank_bound=64, run_length=run_length))


@pytest.mark.parametrize("rank", [1, 7, 16, 64, 200])
def test_rank_and_float16(rank: int) -> None:
    case = make_linear_case(
        [rank], [0, -1, 0], in_features=1024, out_features=768, dtype=torch.float16, page_bytes=1 << 16, device="cuda"
    )
    check(case, run(case, rank_bound=rank))


def test_float32_logits_over_a_bfloat16_model() -> None:
    case = make_linear_case(
        [8, 16], [0, 1, -1, 0], in_features=2048, out_features=128, dtype=torch.bfloat16, y_dtype=torch.float32,
        page_bytes=1 << 16, device="cuda",
    )  # fmt: skip
    y_MO, expected = run(case, rank_bound=16), case.y_MO.clone()
    add_lora_linear_reference(expected, case.x_MI, case.slots_M, case.tables)
    assert_close_delta(y_MO, case.y_MO, expected, case.y_MO, 2e-3)


def test_one_graph_serves_any_mix() -> None:
    """Captured with one mix, replayed after other rows chose other adapters and another adapter took a slot."""
    case = make_linear_case(
        [4, 64, 16], [0] * 32, in_features=2048, out_features=1024, dtype=torch.bfloat16, page_bytes=1 << 16,
        device="cuda",
    )  # fmt: skip
    y_MO = case.y_MO.clone()
    run(case, rank_bound=64)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_lora_linear(y_MO, case.x_MI, case.slots_M, case.tables, rank_bound=64)
    other = make_linear_case(
        [33], [0], in_features=2048, out_features=1024, dtype=torch.bfloat16, device="cuda", seed=9
    )
    (replacement,) = other.loras.values()
    slots = list(case.loras)
    for round_number in range(3):
        if round_number == 2:
            case.bank.unload("a1")
            slot = case.bank.load("new", AdapterWeights(linears={MODULE: replacement})).slot
            del case.loras[slots[1]]
            case.loras[slot] = replacement
        rng = random.Random(round_number)
        rows = [rng.choice([*case.loras, -1]) for _ in range(32)]
        case.slots_M.copy_(torch.tensor(rows, dtype=torch.int32))
        case.x_MI.normal_()
        y_MO.copy_(case.y_MO)
        graph.replay()
        check(case, y_MO)
        assert torch.equal(y_MO, run(case, rank_bound=64))

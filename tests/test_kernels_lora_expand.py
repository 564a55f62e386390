"""The separate form on the output of someone else's GEMM, against its reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.kernels import DEVICE, make_lora_batch

from moegraft.core.config import MoEConfig
from moegraft.kernels.lora_expand.host import add_lora_w2, add_lora_w13, route_lora_rows
from moegraft.kernels.lora_expand.reference import add_lora_w2_reference, add_lora_w13_reference
from moegraft.kernels.records import LayerSizes, LoRABatch
from moegraft.testing.cases import LoRASpec, MoECase, make_inputs
from moegraft.testing.errors import assert_close
from moegraft.testing.poison import poison_allocations
from moegraft.tuning.tiles import GemmTile, MoETiles, ShrinkTile

CONFIG = MoEConfig(num_experts=5, top_k=1, hidden_size=37, intermediate_size=19)
CASE = MoECase(
    name="separate",
    config=CONFIG,
    num_tokens=29,
    adapters=(LoRASpec(r_gate=3, r_up=20, r2=5), LoRASpec(shared_a13=True), LoRASpec(expert_ids=(0, 3), r2=0)),
)


SIZES = LayerSizes(num_experts=5, hidden_size=37, intermediate_size=19)
EXPAND = GemmTile(block_n=16, block_l=16)


def split_tiles(splits: int) -> MoETiles:
    shrink = ShrinkTile(block_r=16, block_k=16, splits=splits)
    return MoETiles(shrink13=shrink, shrink2=shrink)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_separate_form_adds_the_delta(is_interleaved: bool, splits: int) -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    lora = make_lora_batch(CASE, inputs)
    expert_N = inputs.topk_ids_TK.flatten()
    generator = torch.Generator().manual_seed(1)
    u_NGF, h_NF, y_ND = (torch.randn(29, n, generator=generator).to(DEVICE) for n in (38, 19, 37))
    with poison_allocations():
        rows = route_lora_rows(expert_N, lora, SIZES, tiles=split_tiles(splits), expand=EXPAND)
    given = expert_N.tolist(), lora.token_slots_T.tolist(), lora.tables

    out, expected = u_NGF.clone(), u_NGF.clone()
    add_lora_w13(out, inputs.x_TD, rows, is_interleaved=is_interleaved)
    add_lora_w13_reference(expected, inputs.x_TD, *given, num_halves=2, is_interleaved=is_interleaved)
    assert_close(out - u_NGF, expected - u_NGF, 1e-5)
    is_base = lora.token_slots_T < 0
    assert torch.equal(out[is_base], u_NGF[is_base])

    out, expected = y_ND.clone(), y_ND.clone()
    add_lora_w2(out, h_NF, rows)
    add_lora_w2_reference(expected, h_NF, *given)
    assert_close(out - y_ND, expected - y_ND, 1e-5)
    assert torch.equal(out[is_base], y_ND[is_base])


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_were_routed_once_serve_many_adds(splits: int) -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    lora, expert_N = make_lora_batch(CASE, inputs), inputs.topk_ids_TK.flatten()
    rows = route_lora_rows(expert_N, lora, SIZES, tiles=split_tiles(splits), expand=EXPAND)
    given = expert_N.tolist(), lora.token_slots_T.tolist(), lora.tables
    for x_ND in (inputs.x_TD, inputs.x_TD.flip(0)):
        out, expected = torch.zeros(29, 38, device=DEVICE), torch.zeros(29, 38, device=DEVICE)
        add_lora_w13(out, x_ND, rows)
        add_lora_w13_reference(expected, x_ND, *given, num_halves=2, is_interleaved=False)
        assert_close(out, expected, 1e-5)


def test_arguments_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    lora, expert_N = make_lora_batch(CASE, inputs), inputs.topk_ids_TK.flatten()

    def with_slots(slots_N: torch.Tensor) -> LoRABatch:
        return replace(lora, token_slots_T=slots_N)

    with pytest.raises(ValueError, match=r"expert ids \[29\], expected \[N\], contiguous"):
        route_lora_rows(expert_N.repeat_interleave(2)[::2], lora, SIZES)
    with pytest.raises(ValueError, match=r"token_slots .* strides \[2\], expected \[29\] torch.int32, contiguous"):
        route_lora_rows(expert_N, with_slots(lora.token_slots_T.repeat_interleave(2)[::2]), SIZES)
    with pytest.raises(ValueError, match=r"29 rows with \d+ low-rank columns, expected fewer than 2\^31"):
        route_lora_rows(expert_N, replace(lora, rank13=2**27), SIZES)
    rows = route_lora_rows(expert_N, lora, SIZES)
    u_NGF, h_NF, y_ND = (torch.zeros(29, n, device=DEVICE) for n in (38, 19, 37))
    with pytest.raises(ValueError, match=r"add_lora_w13: rows \[29, 37\] and output \[29, 37\], expected"):
        add_lora_w13(y_ND, inputs.x_TD, rows)
    with pytest.raises(ValueError, match=r"add_lora_w2: rows \[28, 19\]"):
        add_lora_w2(y_ND, h_NF[1:], rows)
    with pytest.raises(ValueError, match=r"add_lora_w13: rows are torch.float32 with strides \[1, 29\]"):
        add_lora_w13(u_NGF, inputs.x_TD.T.contiguous().T, rows)
    with pytest.raises(ValueError, match=r"add_lora_w2: rows are torch.float64"):
        add_lora_w2(y_ND, h_NF.double(), rows)

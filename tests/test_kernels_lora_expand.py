"""The separate form on the output of someone else's GEMM, against its reference."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, make_lora_batch

from moegraft.core.config import MoEConfig
from moegraft.kernels.lora_expand.host import add_lora_w2, add_lora_w13, route_lora_rows
from moegraft.kernels.lora_expand.reference import add_lora_w2_reference, add_lora_w13_reference
from moegraft.kernels.records import LayerSizes
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


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_separate_form_adds_the_delta(is_interleaved: bool, splits: int) -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    lora = make_lora_batch(CASE, inputs)
    shrink, expand = ShrinkTile(block_r=16, block_k=16, splits=splits), GemmTile(block_n=16, block_l=16)
    sizes = LayerSizes(num_experts=5, hidden_size=37, intermediate_size=19)
    expert_N = inputs.topk_ids_TK.flatten()
    generator = torch.Generator().manual_seed(1)
    u_NGF, h_NF, y_ND = (torch.randn(29, n, generator=generator).to(DEVICE) for n in (38, 19, 37))
    with poison_allocations():
        tiles = MoETiles(shrink13=shrink, shrink2=shrink)
        rows = route_lora_rows(expert_N, lora, sizes, tiles=tiles, expand=expand)
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

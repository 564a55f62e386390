"""Blocks of 128 rows, of which the last of an expert may be computed as one of 64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE, make_lora_batch, make_weights

from moegraft.core.config import MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.testing.cases import LoRASpec, MoECase, make_inputs
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.testing.moe_reference import moe_reference
from moegraft.testing.poison import poison_allocations
from moegraft.tuning.tiles import GemmTile, MoETiles

CONFIG = MoEConfig(num_experts=1, top_k=1, hidden_size=32, intermediate_size=24)
ADAPTERS = (LoRASpec(r_gate=3, r_up=20, r2=5), LoRASpec(shared_a13=True))
TILE = GemmTile(block_n=32, block_k=32, num_warps=8)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128, 129, 192, 193])
def test_any_rest_of_rows(num_tokens: int) -> None:
    case = MoECase(name="rest", config=CONFIG, adapters=ADAPTERS, num_tokens=num_tokens)
    inputs = make_inputs(case, device=DEVICE)
    lora, weights = make_lora_batch(case, inputs), make_weights(case, inputs)
    args = (inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK)
    tiles = MoETiles(block_m=128, gemm13=TILE, gemm2=TILE)
    with poison_allocations():
        base, out = fused_moe_lora(*args, tiles=tiles), fused_moe_lora(*args, lora=lora, tiles=tiles)

    def truth(slots_T: torch.Tensor | None) -> torch.Tensor:
        given = (inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, inputs.weights, CONFIG)
        return moe_reference(*given, adapters=inputs.adapters, token_slots_T=slots_T, dtype=torch.float32)

    if (inputs.token_slots_T >= 0).any():
        assert_close_delta(out, base, truth(inputs.token_slots_T), truth(None), 1e-5)
    # Base rows come first in an expert, so that adapters move them between blocks. Their bits: tests/gpu.
    is_base = inputs.token_slots_T < 0
    assert_close(out[is_base], base[is_base], 1e-6)

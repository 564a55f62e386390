"""Routing and shrink of a single token in one launch: the layer gives what it gives in two."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE, make_lora_batch, make_weights

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.moe_forward import host
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.testing.cases import LoRASpec, MoECase, Routing, make_inputs
from moegraft.testing.errors import assert_close
from moegraft.testing.poison import poison_allocations
from moegraft.tuning.tiles import MoETiles

CONFIG = MoEConfig(num_experts=6, top_k=3, hidden_size=40, intermediate_size=24)
UNGATED = replace(CONFIG, activation=Activation(kind=ActivationKind.RELU2, gated=False))
ADAPTERS = (
    LoRASpec(r_gate=3, r_up=20, r2=5),
    LoRASpec(shared_a13=True),
    LoRASpec(expert_ids=(0, 3), r2=0),
    LoRASpec(r_gate=0, r_up=0, r2=40),
)
TWO_LAUNCHES, ONE_LAUNCH = MoETiles(), MoETiles(route_token=True)


@pytest.mark.parametrize("slot", range(-1, len(ADAPTERS)))
@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("config", [CONFIG, UNGATED], ids=["gated", "ungated"])
def test_one_launch_gives_what_two_give(config: MoEConfig, routing: Routing, slot: int) -> None:
    case = MoECase(name="token", config=config, adapters=ADAPTERS, num_tokens=1, routing=routing)
    inputs = make_inputs(case, device=DEVICE)
    lora = make_lora_batch(case, inputs)
    lora.token_slots_T.fill_(slot)
    weights = make_weights(case, inputs)

    def layer(tiles: MoETiles) -> torch.Tensor:
        with poison_allocations():
            return fused_moe_lora(
                inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora, tiles=tiles
            )

    expected = layer(TWO_LAUNCHES)
    with patch.object(host, "lora_shrink13", side_effect=AssertionError("a launch of its own")):
        found = layer(ONE_LAUNCH)
    if slot < 0:
        assert torch.equal(found, expected)
    assert_close(found, expected, 1e-6)


def test_more_than_one_token_takes_two_launches() -> None:
    case = MoECase(name="tokens", config=CONFIG, adapters=ADAPTERS, num_tokens=2)
    inputs = make_inputs(case, device=DEVICE)
    lora, weights = make_lora_batch(case, inputs), make_weights(case, inputs)
    args = (inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK)
    assert torch.equal(
        fused_moe_lora(*args, lora=lora, tiles=ONE_LAUNCH), fused_moe_lora(*args, lora=lora, tiles=TWO_LAUNCHES)
    )

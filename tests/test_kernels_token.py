"""A single token's own kernels against merged weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.four_bit import quantised_case
from support.kernels import DEVICE, make_lora_batch, make_weights, reference, run_poisoned

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.moe_token import host
from moegraft.testing.cases import LoRASpec, MoECase, Routing, make_inputs
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.tuning.tiles import MoETiles, TokenTile, TokenTiles

CONFIG = MoEConfig(num_experts=6, top_k=3, hidden_size=40, intermediate_size=24)
CONFIGS = {
    "gated": CONFIG,
    "ungated": replace(CONFIG, activation=Activation(kind=ActivationKind.RELU2, gated=False)),
    "bias": replace(CONFIG, has_bias=True, activation=Activation(kind=ActivationKind.SWIGLU_OAI)),
    "one choice, weight on input": replace(CONFIG, top_k=1, apply_router_weight_on_input=True),
}
ADAPTERS = (
    LoRASpec(r_gate=3, r_up=20, r2=5),
    LoRASpec(shared_a13=True),
    LoRASpec(expert_ids=(0, 3), r2=0),
    LoRASpec(r_gate=0, r_up=0, r2=40),
)
TILES = MoETiles(token=TokenTiles(w13=TokenTile(block_n=16, block_k=16), w2=TokenTile(block_n=16, block_k=16)))


@pytest.mark.parametrize("slot", range(-1, len(ADAPTERS)))
@pytest.mark.parametrize("name", CONFIGS)
def test_dense(name: str, slot: int) -> None:
    config = CONFIGS[name]
    routing = list(Routing)[(slot + list(CONFIGS).index(name)) % len(Routing)]
    case = MoECase(name="token", config=config, adapters=ADAPTERS, num_tokens=1, routing=routing)
    inputs = make_inputs(case, device=DEVICE)
    lora, weights = make_lora_batch(case, inputs), make_weights(case, inputs)
    lora.token_slots_T.fill_(slot)
    on_input = config.apply_router_weight_on_input
    base, found = (run_poisoned(inputs, weights, batch, TILES, weight_on_input=on_input) for batch in (None, lora))
    assert_close(base, reference(case, inputs, None), 1e-5)
    assert_close(found, reference(case, inputs, lora.token_slots_T), 1e-5)
    if slot < 0:
        assert torch.equal(found, base)


def test_more_lanes_than_a_program_has_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MAX_LANES", 16)
    case = MoECase(name="token", config=CONFIG, adapters=ADAPTERS[:1], num_tokens=1, base_share=0.0)
    inputs = make_inputs(case, device=DEVICE)
    found = run_poisoned(inputs, make_weights(case, inputs), make_lora_batch(case, inputs), TILES)
    assert_close(found, reference(case, inputs, inputs.token_slots_T), 1e-5)


@pytest.mark.parametrize("format", ["int4 g128", "int4 g32 zeros", "int4 channel zeros", "mxfp4"])
def test_four_bits(format: str) -> None:
    config = replace(CONFIG, hidden_size=300, intermediate_size=136)
    specs = (LoRASpec(r_gate=3, r_up=20, r2=5),)
    case = MoECase(name="token", config=config, adapters=specs, num_tokens=1, base_share=0.0)
    case, inputs, weights = quantised_case(case, format, device=DEVICE)
    tiles = MoETiles(token=TokenTiles(w13=TokenTile(block_n=16, block_k=256), w2=TokenTile(block_n=64, block_k=128)))
    lora = make_lora_batch(case, inputs, pages=1600)
    base, found = (run_poisoned(inputs, weights, batch, tiles) for batch in (None, lora))
    base_reference = reference(case, inputs, None)
    assert_close(base, base_reference, 1e-5)
    assert_close_delta(found, base, reference(case, inputs, inputs.token_slots_T), base_reference, 2e-5)

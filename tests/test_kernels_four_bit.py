"""Layers over 4-bit weights in Triton's interpreter (or on the GPU), against merged dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.four_bit import FORMATS, quantised_case
from support.kernels import DEVICE, make_lora_batch, reference, run_poisoned
from support.thinned import thinned

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.testing.cases import LoRASpec, MoECase, MoEInputs, Routing
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.tuning.heuristic import heuristic_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

SMALL = MoEConfig(num_experts=3, top_k=2, hidden_size=160, intermediate_size=96)
RANKS = tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 16, 20))
CASES = {
    "plain": MoECase(name="plain", config=SMALL, num_tokens=6, adapters=RANKS, routing=Routing.SENTINELS),
    "whole_granules": MoECase(
        name="whole_granules", config=replace(SMALL, hidden_size=256, intermediate_size=128), num_tokens=4
    ),
    "odd_sizes": MoECase(name="odd_sizes", config=replace(SMALL, hidden_size=37, intermediate_size=19), num_tokens=5),
    "gpt_oss": MoECase(
        name="gpt_oss",
        config=replace(SMALL, activation=Activation(kind=ActivationKind.SWIGLU_OAI), has_bias=True),
        num_tokens=6,
        adapters=(LoRASpec(expert_ids=(1, 2), r_up=0), LoRASpec(shared_outer=True), LoRASpec(r2=0)),
    ),
    "no_gate": MoECase(
        name="no_gate",
        config=replace(SMALL, activation=Activation(kind=ActivationKind.RELU2, gated=False)),
        num_tokens=4,
    ),
    "no_tokens": MoECase(name="no_tokens", config=SMALL, num_tokens=0),
    "one_token": MoECase(name="one_token", config=SMALL, num_tokens=1, base_share=0.0),
    "one_hot_expert": MoECase(
        name="one_hot_expert", config=replace(SMALL, top_k=1), num_tokens=21, routing=Routing.HOT
    ),
    "weight_on_input": MoECase(
        name="weight_on_input", config=replace(SMALL, apply_router_weight_on_input=True), num_tokens=4
    ),
}
TILES = {
    "left_to_right": GemmTile(block_n=128, block_k=128),
    "swapped": GemmTile(block_n=128, block_k=256, swapped=True),
}


def run(
    case: MoECase, inputs: MoEInputs, weights: MoEWeights, lora: LoRABatch | None, tiles: MoETiles | None = None
) -> torch.Tensor:
    on_input = case.config.apply_router_weight_on_input
    return run_poisoned(inputs, weights, lora, tiles, weight_on_input=on_input)


def check(name: str, format: str, tiles: MoETiles | None = None) -> None:
    case, inputs, weights = quantised_case(CASES[name], format, device=DEVICE)
    lora = make_lora_batch(case, inputs, pages=1600)
    base, out = run(case, inputs, weights, None, tiles), run(case, inputs, weights, lora, tiles)
    base_ref = reference(case, inputs, None)
    assert_close(base, base_ref, 1e-5, what="base")
    assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, 2e-5)
    if DEVICE == "cuda":  # the interpreter's matrix product gives a row other bits at another place of a tile
        is_base = inputs.token_slots_T < 0
        assert torch.equal(out[is_base], base[is_base])


@pytest.mark.parametrize(("name", "format"), thinned(CASES, ("int4 g128", "mxfp4"), keep_one_in=2))
def test_layer_matches_merged_weights(name: str, format: str) -> None:
    check(name, format)


@pytest.mark.parametrize(("format", "order", "block_m"), thinned(FORMATS, TILES, (16, 64), keep_one_in=2))
def test_every_format_in_either_order(format: str, order: str, block_m: int) -> None:
    """Both orders of the operands; scales on the sums (small blocks) and on the weights; steps of two granules."""
    shape = TuningShape(num_tokens=6, num_experts=3, top_k=2, hidden_size=160, intermediate_size=96)
    tiles = replace(heuristic_tiles(shape), block_m=block_m, gemm13=TILES[order], gemm2=TILES[order])
    check("plain", format, tiles)

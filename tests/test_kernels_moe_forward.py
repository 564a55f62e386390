"""The whole MoE path with LoRA inside its GEMMs, in Triton's interpreter (or on the GPU), against merged weights."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, make_lora_batch, make_weights

from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.moe_forward.reference import fused_moe_lora_reference
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.testing.cases import MOE_CASES, MoECase, MoEInputs, make_inputs
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.testing.moe_reference import moe_reference
from moegraft.testing.poison import poison_allocations


def run(case: MoECase, inputs: MoEInputs, weights: MoEWeights, lora: LoRABatch | None) -> torch.Tensor:
    with poison_allocations():
        return fused_moe_lora(
            inputs.x_TD,
            weights,
            inputs.topk_ids_TK,
            inputs.topk_weights_TK,
            lora=lora,
            apply_router_weight_on_input=case.config.apply_router_weight_on_input,
        )


def reference(case: MoECase, inputs: MoEInputs, *, with_lora: bool) -> torch.Tensor:
    return moe_reference(
        inputs.x_TD,
        inputs.topk_ids_TK,
        inputs.topk_weights_TK,
        inputs.weights,
        case.config,
        adapters=inputs.adapters if with_lora else (),
        token_slots_T=inputs.token_slots_T if with_lora else None,
    )


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_torch_reference_matches_merged_weights(case: MoECase) -> None:
    inputs = make_inputs(case, device=DEVICE)
    weights, batch = make_weights(case, inputs), make_lora_batch(case, inputs)
    base, out = (
        fused_moe_lora_reference(
            inputs.x_TD,
            weights,
            inputs.topk_ids_TK,
            inputs.topk_weights_TK,
            lora=lora,
            apply_router_weight_on_input=case.config.apply_router_weight_on_input,
        )
        for lora in (None, batch)
    )
    base_ref = reference(case, inputs, with_lora=False)
    assert_close(base, base_ref, 1e-5, what="base")
    assert_close_delta(out, base, reference(case, inputs, with_lora=True), base_ref, 2e-5)


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_layer_matches_merged_weights(case: MoECase) -> None:
    inputs = make_inputs(case, device=DEVICE)
    weights, lora = make_weights(case, inputs), make_lora_batch(case, inputs)
    base, out = run(case, inputs, weights, None), run(case, inputs, weights, lora)
    base_ref = reference(case, inputs, with_lora=False)
    assert_close(base, base_ref, 1e-5, what="base")
    assert_close_delta(out, base, reference(case, inputs, with_lora=True), base_ref, 2e-5)
    if DEVICE == "cuda":  # the interpreter's matrix product gives a row other bits at another place of a tile
        is_base = inputs.token_slots_T < 0
        assert torch.equal(out[is_base], base[is_base])

"""fp8 and int8 weights on a GPU: half precision, bits, a CUDA graph, the custom op, rows in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.formats import PACKS
from support.kernels import make_lora_batch, reference, run_invariant, run_poisoned
from support.layers import dense_weights, dequantised

from moegraft.core.config import MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora, op_args
from moegraft.kernels.records import LoRABatch, MoEWeights, WeightFormat
from moegraft.kernels.weights import kernel_weights
from moegraft.testing.cases import LoRASpec, MoECase, MoEInputs, Routing, make_inputs
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.tuning.heuristic import batch_invariant_tiles

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=384, intermediate_size=192, dtype=torch.bfloat16)
RANKS = tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 8, 24, 64))
NAMES = ("int8", "fp8 block", "fp8 channel", "fp8 static")
# The schema test of opcheck compares arguments by multiplying them, which torch cannot with fp8.
OP_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Two outputs rounded to half precision, their difference as large as each of them. Where rows are quantised, one number
# in thirty lies near the edge of two codes and goes over it in the kernel or in the reference alone.
TOL = {"int8": 1e-2, "fp8": 5e-2}


def make_case(num_tokens: int) -> MoECase:
    return MoECase(
        name="gpu", config=CONFIG, adapters=RANKS, num_tokens=num_tokens, routing=Routing.SENTINELS, base_share=0.3
    )


def make(name: str, num_tokens: int) -> tuple[MoECase, MoEInputs, MoEWeights, LoRABatch]:
    """A case over weights in one of ``NAMES``; its inputs have what these dequantise to."""
    case = make_case(num_tokens)
    inputs = make_inputs(case, device=DEVICE)
    pack = PACKS[name].pack
    assert pack is not None
    weights = pack(dense_weights(case, inputs))
    lora = make_lora_batch(case, inputs, pages=800, page_bytes=65536)
    records = kernel_weights(weights, case.config.activation, case.config.dtype)
    return case, replace(inputs, weights=dequantised(weights)), records, lora


@pytest.mark.parametrize("num_tokens", [1, 7, 70, 200, 900])
@pytest.mark.parametrize("name", NAMES)
def test_layer_matches_merged_weights(name: str, num_tokens: int) -> None:
    case, inputs, weights, lora = make(name, num_tokens)
    base, out = run_poisoned(inputs, weights, None), run_poisoned(inputs, weights, lora)
    base_ref = reference(case, inputs, None)
    tol = TOL[weights.format.value]
    assert_close(base, base_ref, tol)
    is_base = inputs.token_slots_T < 0
    if not bool(is_base.all()):
        assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, tol)
    assert torch.equal(out[is_base], base[is_base])
    assert torch.equal(out, run_poisoned(inputs, weights, lora))


@pytest.mark.parametrize("name", NAMES)
def test_graph_opcheck_and_compile(name: str) -> None:
    _, inputs, weights, lora = make(name, 40)
    expected = run_poisoned(inputs, weights, lora)
    args = (weights, inputs.topk_ids_TK, inputs.topk_weights_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused_moe_lora(inputs.x_TD, *args, lora=lora)
    graph.replay()
    assert torch.equal(out_TD, expected)
    slots_T = lora.token_slots_T.clone()
    lora.token_slots_T.fill_(-1)
    graph.replay()
    assert torch.equal(out_TD, run_poisoned(inputs, weights, None)) and not torch.equal(out_TD, expected)
    lora.token_slots_T.copy_(slots_T)
    check_op(inputs, weights, lora)


def check_op(inputs: MoEInputs, weights: MoEWeights, lora: LoRABatch) -> None:
    """What torch.compile sees, with rows of LoRA's own where the base's are quantised."""
    args = (weights, inputs.topk_ids_TK, inputs.topk_weights_TK)

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        return fused_moe_lora(x_TD * 2, *args, lora=lora) + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs.x_TD), layer(inputs.x_TD))
    for batch in (lora, replace(lora, x_TD=inputs.x_TD * 2), None):
        plain = op_args(inputs.x_TD, *args, batch, weight_on_input=False)
        checks = OP_CHECKS if weights.format is WeightFormat.FP8 else ("test_schema", *OP_CHECKS)
        torch.library.opcheck(torch.ops.moegraft.fused_moe_lora.default, plain, test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_batch_invariant_tiles_give_a_row_the_same_bits_in_any_company(name: str) -> None:
    case, inputs, weights, lora = make(name, 300)
    together = run_invariant(inputs, weights, lora)
    expected, base_ref = reference(case, inputs, inputs.token_slots_T), reference(case, inputs, None)
    base = run_poisoned(inputs, weights, None, batch_invariant_tiles())
    assert_close_delta(together, base, expected, base_ref, TOL[weights.format.value])

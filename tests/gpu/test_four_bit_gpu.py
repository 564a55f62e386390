"""4-bit weights on a GPU: every format in both half precisions and orders, bits, a CUDA graph, the custom op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.four_bit import FORMATS, quantised_case
from support.kernels import make_lora_batch, reference, run_poisoned

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora, op_args
from moegraft.testing.cases import LoRASpec, MoECase, Routing
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.tuning.heuristic import heuristic_tiles
from moegraft.tuning.tiles import TuningShape

pytestmark = pytest.mark.gpu

CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=320, intermediate_size=192, dtype=torch.bfloat16)
GPT_OSS = replace(CONFIG, activation=Activation(kind=ActivationKind.SWIGLU_OAI), has_bias=True)
RANKS = tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 8, 24, 64))
TOL = 1e-2  # two outputs rounded to half precision, their difference as large as each of them
BANK = {"pages": 800, "page_bytes": 65536}


def make_case(format: str, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> MoECase:
    config = replace(GPT_OSS if format == "mxfp4" else CONFIG, dtype=dtype)
    return MoECase(
        name=format, config=config, adapters=RANKS, num_tokens=num_tokens, routing=Routing.SENTINELS, base_share=0.3
    )


def check(case: MoECase, format: str, *, is_swapped: bool | None = None) -> None:
    case, inputs, weights = quantised_case(case, format, device="cuda")
    lora = make_lora_batch(case, inputs, **BANK)
    tiles = None
    if is_swapped is not None:
        config = case.config
        shape = TuningShape(
            num_tokens=case.num_tokens, num_experts=config.num_experts, top_k=config.top_k,
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, num_slots=lora.num_slots,
            rank13=lora.rank13, rank2=lora.rank2, weight_format=weights.format.value,
        )  # fmt: skip
        tiles = heuristic_tiles(shape)
        gemm13, gemm2 = (replace(tile, swapped=is_swapped) for tile in (tiles.gemm13, tiles.gemm2))
        tiles = replace(tiles, gemm13=gemm13, gemm2=gemm2)
    base, out = run_poisoned(inputs, weights, None, tiles), run_poisoned(inputs, weights, lora, tiles)
    base_ref = reference(case, inputs, None)
    assert_close(base, base_ref, TOL)
    assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, TOL)
    is_base = inputs.token_slots_T < 0
    assert torch.equal(out[is_base], base[is_base])
    assert torch.equal(out, run_poisoned(inputs, weights, lora, tiles))


@pytest.mark.parametrize("num_tokens", [1, 7, 70, 200, 900])
@pytest.mark.parametrize("format", FORMATS)
def test_layer_matches_merged_weights(format: str, num_tokens: int) -> None:
    check(make_case(format, num_tokens), format)


@pytest.mark.parametrize("num_tokens", [7, 900])
@pytest.mark.parametrize("format", ["int4 g128", "int4 g32 zeros", "mxfp4"])
def test_weights_as_the_right_operand(format: str, num_tokens: int) -> None:
    check(make_case(format, num_tokens), format, is_swapped=False)


@pytest.mark.parametrize("format", ["int4 g128", "int4 g64", "int4 channel zeros"])
@pytest.mark.parametrize("num_tokens", [7, 900])
def test_float16(format: str, num_tokens: int) -> None:
    check(make_case(format, num_tokens, torch.float16), format)


@pytest.mark.parametrize("format", ["int4 g128", "mxfp4"])
def test_no_gate_and_odd_sizes(format: str) -> None:
    odd = replace(CONFIG, hidden_size=200, intermediate_size=72)
    no_gate = replace(odd, activation=Activation(kind=ActivationKind.RELU2, gated=False))
    for config in (odd, no_gate):
        for num_tokens in (5, 300):
            check(MoECase(name="odd", config=config, adapters=RANKS, num_tokens=num_tokens), format)


@pytest.mark.parametrize("format", ["int4 g32 zeros", "mxfp4"])
def test_graph_opcheck_and_compile(format: str) -> None:
    case, inputs, weights = quantised_case(make_case(format, 40), format, device="cuda")
    lora = make_lora_batch(case, inputs, **BANK)
    expected = run_poisoned(inputs, weights, lora)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused_moe_lora(inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora)
    lora.token_slots_T.fill_(-1)
    graph.replay()
    assert torch.equal(out_TD, run_poisoned(inputs, weights, None)) and not torch.equal(out_TD, expected)

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        return fused_moe_lora(x_TD * 2, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora) + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs.x_TD), layer(inputs.x_TD))
    args = op_args(inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora, weight_on_input=False)
    torch.library.opcheck(torch.ops.moegraft.fused_moe_lora.default, args)

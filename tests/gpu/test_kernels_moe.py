"""The MoE path on a GPU: half precision, every tile regime, bits, CUDA graphs over a changing bank, the custom op."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.kernels import (
    MODULE,
    load,
    make_bank,
    make_lora_batch,
    make_weights,
    reference,
    run_invariant,
    run_poisoned,
)

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import LoRABatch
from moegraft.testing.cases import LoRASpec, MoECase, Routing, make_inputs, make_lora
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.testing.workloads import Popularity

pytestmark = pytest.mark.gpu

QWEN = MoEConfig(num_experts=16, top_k=4, hidden_size=256, intermediate_size=192, dtype=torch.bfloat16)
GPT_OSS = replace(QWEN, activation=Activation(kind=ActivationKind.SWIGLU_OAI), has_bias=True, dtype=torch.float16)
NEMOTRON = replace(QWEN, activation=Activation(kind=ActivationKind.RELU2, gated=False), hidden_size=264)
STEP = replace(QWEN, activation=Activation(kind=ActivationKind.CLAMPED_SILU, limit=0.5))
RANKS = tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 4, 8, 16, 24, 64, 256))
TOL = 1e-2  # two outputs rounded to half precision, their difference as large as each of them
BANK = {"pages": 800, "page_bytes": 65536}


def case(config: MoEConfig, num_tokens: int, **options: object) -> MoECase:
    return MoECase(name="gpu", config=config, adapters=RANKS, num_tokens=num_tokens, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "num_tokens"),
    [
        *itertools.product(("qwen", "gpt_oss", "nemotron"), (1, 7, 70, 150, 470, 700, 1500)),
        *itertools.product(("step",), (1, 70, 700)),
    ],
)
def test_layer_matches_merged_weights(layout: str, num_tokens: int) -> None:
    config = {"qwen": QWEN, "gpt_oss": GPT_OSS, "nemotron": NEMOTRON, "step": STEP}[layout]
    transposed = layout == "gpt_oss"
    problem = case(config, num_tokens, is_transposed=transposed, is_interleaved=transposed, routing=Routing.SENTINELS)
    inputs = make_inputs(problem, device="cuda")
    weights, lora = make_weights(problem, inputs), make_lora_batch(problem, inputs, **BANK)
    base, out = run_poisoned(inputs, weights, None), run_poisoned(inputs, weights, lora)
    base_ref = reference(problem, inputs, None)
    assert_close(base, base_ref, TOL)
    if (inputs.token_slots_T >= 0).any():
        assert_close_delta(out, base, reference(problem, inputs, inputs.token_slots_T), base_ref, TOL)
    is_base = inputs.token_slots_T < 0
    assert torch.equal(out[is_base], base[is_base])
    assert torch.equal(out, run_poisoned(inputs, weights, lora))


@pytest.mark.parametrize("num_tokens", [1, 40, 700])
@pytest.mark.parametrize("layout", ["qwen", "nemotron"])
@pytest.mark.parametrize("touched", ["w13", "w2"])
def test_adapters_on_one_projection_only(touched: str, layout: str, num_tokens: int) -> None:
    """No shrink stands before the other GEMM, which must wait for the kernel that writes its rows."""
    config = {"qwen": QWEN, "nemotron": NEMOTRON}[layout]
    specs = tuple(
        LoRASpec(
            r_gate=r * (touched == "w13") * config.activation.gated,
            r_up=r * (touched == "w13"),
            r2=r * (touched == "w2"),
        )
        for r in (3, 16, 64)
    )
    problem = replace(case(config, num_tokens), adapters=specs)
    inputs = make_inputs(problem, device="cuda")
    inputs = replace(inputs, token_slots_T=torch.arange(num_tokens, device="cuda", dtype=torch.int32) % 4 - 1)
    if num_tokens == 1:
        inputs.token_slots_T.zero_()
    weights, lora = make_weights(problem, inputs), make_lora_batch(problem, inputs, **BANK)
    base_ref, ref = reference(problem, inputs, None), reference(problem, inputs, inputs.token_slots_T)
    for _ in range(20):  # a race shows now and then
        base, out = run_poisoned(inputs, weights, None), run_poisoned(inputs, weights, lora)
        assert_close_delta(out, base, ref, base_ref, TOL)


def test_one_graph_serves_a_changing_bank() -> None:
    problem = case(QWEN, 40, popularity=Popularity.DISTINCT)
    inputs = make_inputs(problem, device="cuda")
    weights, bank = make_weights(problem, inputs), make_bank(QWEN, max_slots=4, **BANK)
    lora = LoRABatch(
        tables=bank.experts_tables(MODULE),
        token_slots_T=torch.full((40,), -1, dtype=torch.int32, device="cuda"),
        rank13=512,
        rank2=256,
    )
    run_poisoned(inputs, weights, lora)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = fused_moe_lora(inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora)
    base_ref = reference(problem, inputs, None)
    generator = torch.Generator().manual_seed(3)
    slots: dict[int, int] = {}
    for step, spec in enumerate((RANKS[3], RANKS[6], RANKS[0], LoRASpec(r_gate=0, r_up=5, r2=0), RANKS[5], RANKS[4])):
        if len(slots) == 3:  # unload the oldest: its slot and its pages go to the next one
            bank.unload(f"adapter{min(slots)}")
            del slots[min(slots)]
        factors = make_lora(spec, QWEN, generator=generator, device="cuda")
        slots[step] = load(bank, f"adapter{step}", factors)
        adapters = list(inputs.adapters)
        adapters[slots[step]] = factors
        inputs = replace(inputs, adapters=tuple(adapters))
        choices = torch.tensor([-1, *slots.values()], dtype=torch.int32)
        token_slots = choices[torch.randint(len(choices), (40,), generator=generator)].cuda()
        lora.token_slots_T.copy_(token_slots)
        inputs.topk_ids_TK.copy_(torch.rand(40, 16, generator=generator).topk(4).indices)
        graph.replay()
        base_ref = reference(problem, inputs, None)
        base = run_poisoned(inputs, weights, None)
        assert_close_delta(out_TD, base, reference(problem, inputs, token_slots), base_ref, TOL)
        assert torch.equal(out_TD[token_slots < 0], base[token_slots < 0])


def test_opcheck_and_compile() -> None:
    problem = case(QWEN, 9)
    inputs = make_inputs(problem, device="cuda")
    weights, lora = make_weights(problem, inputs), make_lora_batch(problem, inputs, **BANK)
    t = lora.tables
    args = (
        inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, weights.w13, weights.w2, None, None, "silu", True,
        1.702, 7.0, False, False, False, lora.token_slots_T, t.pool, t.page_table, t.factors, t.expert_index,
        t.page_elems, lora.rank13, lora.rank2,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moegraft.fused_moe_lora.default, args)

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        return fused_moe_lora(x_TD * 2, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora) + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs.x_TD), layer(inputs.x_TD))


def test_batch_invariant_tiles_give_a_row_the_same_bits_in_any_company() -> None:
    problem = case(QWEN, 300)
    inputs = make_inputs(problem, device="cuda")
    weights, lora = make_weights(problem, inputs), make_lora_batch(problem, inputs, **BANK)
    run_invariant(inputs, weights, lora)

"""What engines build on: the custom op, traced layers, and one captured call that serves a bank which goes on changing.

In Triton's interpreter, or on the GPU: there the call is a CUDA graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.kernels import DEVICE, MODULE, load, make_bank, make_lora_batch, make_weights

from moegraft.core.config import MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora, tuning_shape
from moegraft.kernels.records import LoRABatch
from moegraft.kernels.workspace import Workspace
from moegraft.lora.bank import AdapterBank
from moegraft.testing.cases import LoRASpec, MoECase, make_inputs, make_lora
from moegraft.testing.errors import assert_close_delta
from moegraft.testing.moe_reference import ExpertsFactors, moe_reference
from moegraft.tuning.table import choose_tiles

CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=24, intermediate_size=16)
T = 9
CASE = MoECase(
    name="contract", config=CONFIG, num_tokens=T, adapters=(LoRASpec(r_gate=3, r_up=5, r2=4), LoRASpec(r2=0))
)
TOL = 2e-5  # float32; two outputs whose difference is as large as each of them


def test_op_passes_opcheck() -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    weights, lora = make_weights(CASE, inputs), make_lora_batch(CASE, inputs)
    t = lora.tables
    args = (
        inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, weights.w13, weights.w2, None, None, "silu", True,
        1.702, 7.0, False, False, False, lora.token_slots_T, t.pool, t.page_table, t.factors, t.expert_index,
        t.page_elems, lora.rank13, lora.rank2,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moegraft.fused_moe_lora.default, args)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_layer_is_traced_without_a_graph_break(with_lora: bool) -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    weights = make_weights(CASE, inputs)
    lora = make_lora_batch(CASE, inputs) if with_lora else None

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        return fused_moe_lora(x_TD * 2, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, lora=lora) + 1

    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(inputs.x_TD), layer(inputs.x_TD), rtol=0, atol=0)


def test_the_result_goes_where_the_caller_says() -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    weights, lora, x_TD = make_weights(CASE, inputs), make_lora_batch(CASE, inputs), inputs.x_TD.clone()
    arguments = (weights, inputs.topk_ids_TK, inputs.topk_weights_TK)
    expected = fused_moe_lora(x_TD, *arguments, lora=lora)
    wide = torch.full((T, 2 * CONFIG.hidden_size), torch.nan, device=DEVICE)
    half = wide[:, : CONFIG.hidden_size]
    assert fused_moe_lora(x_TD, *arguments, lora=lora, out_TD=half) is half
    assert torch.equal(half, expected) and wide[:, CONFIG.hidden_size :].isnan().all()
    assert fused_moe_lora(x_TD, *arguments, lora=lora, out_TD=x_TD) is x_TD  # nothing reads x once the sum is written
    assert torch.equal(x_TD, expected)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.empty(T, 23), "expected [9, 24] torch.float32"),
        (torch.empty(T, 24, dtype=torch.float16), "out is [9, 24] torch.float16"),
        (torch.empty(24, T).T, "expected contiguous rows"),
    ],
)
def test_another_place_is_refused(out: torch.Tensor, words: str) -> None:
    inputs, out = make_inputs(CASE, device=DEVICE), out.to(DEVICE)
    weights = make_weights(CASE, inputs)
    with pytest.raises(ValueError, match=re.escape(words)):
        fused_moe_lora(inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, out_TD=out)


def captured(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A replay of the call's CUDA graph; without a GPU, the call itself."""
    if DEVICE == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def test_one_captured_call_serves_loads_unloads_and_evictions() -> None:
    """Everything that the call holds is made once: record, tables, workspace (NaN before every run), rank bounds."""
    specs = (
        LoRASpec(r_gate=3, r_up=3, r2=6), LoRASpec(r_gate=16, r_up=7, r2=0), LoRASpec(r_gate=0, r_up=5, r2=1),
        LoRASpec(shared_a13=True), LoRASpec(expert_ids=(1, 3)), LoRASpec(r_gate=24, r_up=24, r2=20),
    )  # fmt: skip
    inputs = make_inputs(CASE, device=DEVICE)
    weights, bank = make_weights(CASE, inputs), make_bank(CONFIG, max_slots=2, pages=80)
    lora = LoRABatch(
        tables=bank.experts_tables(MODULE),
        token_slots_T=torch.full((T,), -1, dtype=torch.int32, device=DEVICE),
        rank13=48,
        rank2=24,
    )
    shape = tuning_shape(inputs.x_TD, weights, inputs.topk_ids_TK, lora)
    workspace = Workspace.for_layer(shape, choose_tiles(shape), inputs.x_TD.dtype, DEVICE)
    arguments = (inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK)
    replay = captured(lambda: fused_moe_lora(*arguments, lora=lora, workspace=workspace))

    generator = torch.Generator().manual_seed(5)
    loaded: dict[str, ExpertsFactors] = {}
    evicted = 0
    for step, spec in enumerate((*specs, *specs)):
        loaded[f"adapter{step}"] = make_lora(spec, CONFIG, generator=generator, device=DEVICE)
        load(bank, f"adapter{step}", loaded[f"adapter{step}"])
        if step % 4 == 3:
            oldest = next(iter(loaded))
            bank.unload(oldest)
            del loaded[oldest]
        before = resident(bank)
        names = [list(loaded)[int(torch.randint(len(loaded), (), generator=generator))] for _ in range(2)]
        with bank.acquire([*names, None]) as batch:
            evicted += len(before - resident(bank))
            picks = torch.randint(3, (T,), generator=generator)
            slots = torch.tensor(batch.row_slots, dtype=torch.int32)[picks]
            lora.token_slots_T.copy_(slots)
            inputs.topk_ids_TK.copy_(torch.rand(T, CONFIG.num_experts, generator=generator).topk(2).indices)
            workspace.memory.fill_(255)  # NaN in every float, -1 in every index
            out = replay().clone()
        held = list(dict.fromkeys(names))
        index_of = {slot: held.index(name) for name, slot in zip(names, batch.row_slots[:2], strict=True)}
        mapped = torch.tensor([index_of.get(int(slot), -1) for slot in slots], dtype=torch.int32, device=DEVICE)
        here = [loaded[name] for name in held]
        base_ref, ref = (
            moe_reference(
                inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, inputs.weights, CONFIG, adapters=here,
                token_slots_T=slots_T,
            )
            for slots_T in (torch.full_like(mapped, -1), mapped)
        )  # fmt: skip
        base = fused_moe_lora(*arguments)
        if bool((mapped >= 0).any()):
            assert_close_delta(out, base, ref, base_ref, TOL)
    assert evicted > 3


def resident(bank: AdapterBank) -> set[str]:
    return {name for name in bank.names() if bank.info(name).resident}


def test_a_workspace_that_is_too_small_is_refused() -> None:
    inputs = make_inputs(CASE, device=DEVICE)
    weights = make_weights(CASE, inputs)
    shape = replace(tuning_shape(inputs.x_TD, weights, inputs.topk_ids_TK, None), num_tokens=T - 8)
    workspace = Workspace.for_layer(shape, choose_tiles(shape), inputs.x_TD.dtype, DEVICE)
    with pytest.raises(ValueError, match=r"the workspace has \d+ bytes, a call of .* needs \d+"):
        fused_moe_lora(inputs.x_TD, weights, inputs.topk_ids_TK, inputs.topk_weights_TK, workspace=workspace)

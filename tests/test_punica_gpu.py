"""PunicaWrapperGPU: the separate form of the experts' LoRA as kernels, behind GEMMs that are not ours.

In Triton's interpreter on the CPU, and on a CUDA device where there is one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.layers import MODULE, BuiltLayer, build_layer, check_layer

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.records import LayerSizes
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica import PunicaWrapperCPU, PunicaWrapperGPU
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.moe.layer import FusedMoEWithLoRA
from moegraft.testing.cases import LoRASpec, MoECase, Routing
from moegraft.testing.errors import assert_close_delta
from moegraft.testing.poison import poison_allocations

SMALL = MoEConfig(num_experts=5, top_k=2, hidden_size=40, intermediate_size=24, dtype=torch.float32)
GPT_OSS = replace(SMALL, activation=Activation(kind=ActivationKind.SWIGLU_OAI), has_bias=True)
UNGATED = replace(SMALL, activation=Activation(kind=ActivationKind.RELU2, gated=False))
ADAPTERS = (
    LoRASpec(r_gate=3, r_up=20, r2=5),
    LoRASpec(shared_a13=True),
    LoRASpec(expert_ids=(0, 3), r2=0),
    LoRASpec(r_gate=0, r_up=0, r2=7),
)
BIG = replace(SMALL, num_experts=8, top_k=4, hidden_size=256, intermediate_size=192, dtype=torch.bfloat16)
BIG_ADAPTERS = tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 8, 24, 100))


def on_kernels(layer: BuiltLayer) -> BuiltLayer:
    """The layer with the kernels behind its own GEMMs, whatever the device."""
    assert layer.base.method.experts.__class__.__name__ == "TorchExperts"
    with_lora = FusedMoEWithLoRA(layer.base, layer.with_lora.tables, PunicaWrapperGPU())
    return replace(layer, with_lora=with_lora)


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("config", [SMALL, GPT_OSS, UNGATED], ids=["gated", "interleaved", "ungated"])
def test_behind_torch_experts(config: MoEConfig, routing: Routing) -> None:
    is_oai = config is GPT_OSS
    case = MoECase(
        name="separate", config=config, adapters=ADAPTERS, num_tokens=9, routing=routing, is_transposed=is_oai,
        is_interleaved=is_oai,
    )  # fmt: skip
    check_layer(on_kernels(build_layer(case)))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_rows(num_tokens: int) -> None:
    check_layer(on_kernels(build_layer(MoECase(name="few", config=SMALL, adapters=ADAPTERS, num_tokens=num_tokens))))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 70, 700])
@pytest.mark.parametrize("adapters", [BIG_ADAPTERS, ADAPTERS], ids=["ranks", "kinds"])
def test_behind_torch_experts_on_the_gpu(adapters: tuple[LoRASpec, ...], num_tokens: int) -> None:
    case = MoECase(name="gpu", config=BIG, adapters=adapters, num_tokens=num_tokens, routing=Routing.SENTINELS)
    layer = build_layer(case, backend="TorchExperts", device="cuda", page_bytes=8192)
    assert isinstance(layer.with_lora.punica, PunicaWrapperGPU)
    check_layer(layer)


@pytest.mark.gpu
def test_one_graph_serves_other_rows_and_slots() -> None:
    """Captured once; expert ids, slots and rows change in place, and rows agree with the torch wrapper."""
    case = MoECase(name="graph", config=BIG, adapters=BIG_ADAPTERS, num_tokens=48)
    layer = build_layer(case, backend="TorchExperts", device="cuda", page_bytes=8192)
    tables, N, (D, F) = layer.with_lora.tables, 48, (BIG.hidden_size, BIG.intermediate_size)
    sizes = LayerSizes(num_experts=BIG.num_experts, hidden_size=D, intermediate_size=F)
    with layer.bank.acquire([f"a{i}" for i in range(len(BIG_ADAPTERS))]) as batch:
        bounds = RankBounds.of(batch.max_ranks(MODULE))
        expert_N = torch.zeros(N, dtype=torch.int32, device="cuda")
        slot_N = torch.full((N,), -1, dtype=torch.int32, device="cuda")
        x_ND, h_NF = (torch.randn(N, n, device="cuda", dtype=torch.bfloat16) for n in (D, F))
        u_NGF, y_ND = (torch.zeros(N, n, device="cuda", dtype=torch.bfloat16) for n in (2 * F, D))
        punica = PunicaWrapperGPU()
        rows = AdapterRows.of(batch.row_slots, device=u_NGF.device)
        context = MoELoRAContext(tables=tables, rows=rows, bounds=bounds, punica=punica)

        def add() -> None:
            segments = punica.moe_lora_align_block_size(expert_N, slot_N, context, sizes)
            punica.add_lora_w13(u_NGF, x_ND, segments, tables)
            punica.add_lora_w2(y_ND, h_NF, segments, tables)

        add()
        graph = torch.cuda.CUDAGraph()
        with poison_allocations(), torch.cuda.graph(graph):
            add()
        truth = PunicaWrapperCPU()
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            expert_N.copy_(torch.randint(BIG.num_experts, (N,), generator=generator))
            slot_N.copy_(torch.randint(-1, len(BIG_ADAPTERS), (N,), generator=generator))
            u_NGF.normal_()
            y_ND.normal_()
            before = u_NGF.clone(), y_ND.clone()
            graph.replay()
            expected = u_NGF.float(), y_ND.float()
            for right, start in zip(expected, before, strict=True):
                right.copy_(start)
            right_segments = truth.moe_lora_align_block_size(expert_N.long(), slot_N.long(), context, sizes)
            truth.add_lora_w13(expected[0], x_ND, right_segments, tables)
            truth.add_lora_w2(expected[1], h_NF, right_segments, tables)
            for out, right, start in zip((u_NGF, y_ND), expected, before, strict=True):
                assert_close_delta(out, start, right, start, 1e-2)
                assert torch.equal(out[slot_N < 0], start[slot_N < 0])

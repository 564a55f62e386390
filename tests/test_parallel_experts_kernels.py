"""Fully sharded LoRA on experts: its kernels give on every rank what plain torch gives there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="needs triton")

from support.slicing import slice_adapter

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.records import LayerSizes
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica.sharded import ShardedExpertsPunica, ShardedExpertsPunicaGPU
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets, local_targets
from moegraft.parallel import ParallelConfig, ParallelGroups
from moegraft.parallel.slices import RankSlice, Share, experts_slice
from moegraft.testing import LoRASpec, assert_close, make_lora, poison_allocations

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = "experts"
CONFIG = MoEConfig(num_experts=3, top_k=1, hidden_size=37, intermediate_size=22)
"""Sizes that two ranks do not divide evenly."""
ADAPTERS = (
    LoRASpec(r_gate=3, r_up=20, r2=5),
    LoRASpec(shared_a13=True, r_gate=17, r_up=17),
    LoRASpec(expert_ids=(0, 2), r_gate=1, r_up=0, r2=0),
    LoRASpec(r_gate=0, r_up=0, r2=33),
)
Results = tuple[torch.Tensor, torch.Tensor]


@cache
def groups() -> ParallelGroups:
    return ParallelGroups.create(ParallelConfig(tp=dist.get_world_size(), fully_sharded=True))


def run_rank(gated: bool, num_rows: int) -> tuple[Results, Results]:
    """(w13, w2) of plain torch and of the kernels."""
    config = CONFIG if gated else replace(CONFIG, activation=Activation(kind=ActivationKind.RELU2, gated=False))
    tp, (D, F) = groups().tp, (config.hidden_size, config.intermediate_size)
    target = ExpertsTarget(
        name=MODULE, num_experts=config.num_experts, hidden_size=D, intermediate_size=F, has_gate=gated
    )
    targets = ModelTargets(model_type="tiny", experts={MODULE: target})
    mine = experts_slice(
        num_experts=config.num_experts, intermediate_size=F, tp=Share(tp.size, tp.rank), fully_sharded=True
    )
    part = RankSlice(experts={MODULE: mine})
    layout = BankLayout(local_targets(targets, part), dtype=torch.float32, page_bytes=1024)
    bank = AdapterBank(layout, capacity_bytes=1 << 20, device="cpu", poison=True)
    generator = torch.Generator().manual_seed(0)
    for i, spec in enumerate(ADAPTERS):
        whole = AdapterWeights(experts={MODULE: ExpertsLoRA(**vars(make_lora(spec, config, generator=generator)))})
        bank.load(f"a{i}", slice_adapter(whole, targets, part))
    picks = torch.randint(-1, len(ADAPTERS), (num_rows,), generator=generator).tolist()
    expert_N = torch.randint(-1, config.num_experts, (num_rows,), generator=generator)
    columns = mine.columns(F)
    assert columns is not None
    x_ND, h_NF, u_NGF, y_ND = (
        torch.randn(num_rows, size, generator=generator)
        for size in (D, columns.padded, (1 + gated) * columns.padded, D)
    )
    sizes = LayerSizes(num_experts=config.num_experts, hidden_size=D, intermediate_size=columns.padded, gated=gated)
    tables = bank.experts_tables(MODULE)
    results = []
    with bank.acquire([None if pick < 0 else f"a{pick}" for pick in picks]) as batch, poison_allocations():
        rows = AdapterRows.of(batch.row_slots, device="cpu")
        for punica in (ShardedExpertsPunica(tp, D), ShardedExpertsPunicaGPU(tp, D)):
            context = MoELoRAContext(
                tables=tables, rows=rows, bounds=RankBounds.of(batch.max_ranks(MODULE)), punica=punica
            )
            u, y = u_NGF.clone(), y_ND.clone()
            segments = punica.moe_lora_align_block_size(expert_N, rows.slots_M, context, sizes)
            punica.add_lora_w13(u, x_ND, segments, tables, num_halves=1 + gated)
            punica.add_lora_w2(y, h_NF, segments, tables)
            assert not torch.equal(u, u_NGF)
            assert not torch.equal(y, y_ND)
            results.append((u, y))
    return results[0], results[1]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_kernels_equal_plain_torch(world2: WorldPool, gated: bool) -> None:
    for plain, kernels in world2.run(run_rank, gated, 24):
        for expected, found in zip(plain, kernels, strict=True):
            assert_close(found, expected, 1e-6)

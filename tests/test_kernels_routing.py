"""The routing build against its reference: order, segments, blocks, tiles, lanes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kernels import DEVICE, make_lora_batch

from moegraft.core.config import MoEConfig
from moegraft.core.routing import Block, Count, MoERouting, Tile
from moegraft.core.tables import ExpertsFactor
from moegraft.kernels.moe_routing import host
from moegraft.kernels.moe_routing.host import route_rows
from moegraft.kernels.moe_routing.reference import ReferenceRouting, route_rows_reference
from moegraft.kernels.records import LayerSizes, LoRABatch
from moegraft.kernels.reference_lib import read_factor
from moegraft.kernels.workspace import Workspace
from moegraft.testing.cases import LoRASpec, MoECase, MoEInputs, Routing, make_inputs
from moegraft.testing.poison import poison_allocations
from moegraft.testing.workloads import Popularity
from moegraft.tuning.tiles import MoETiles, TuningShape

CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=32, intermediate_size=16)
ADAPTERS = (LoRASpec(), LoRASpec(r_gate=20, r_up=3, r2=17), LoRASpec(expert_ids=(1, 4)), LoRASpec(r_gate=0, r_up=0))
CASES = (
    MoECase(name="one_token", config=CONFIG, adapters=ADAPTERS, num_tokens=1, base_share=0.0),
    MoECase(name="mixed", config=CONFIG, adapters=ADAPTERS, num_tokens=40),
    MoECase(name="only_base_rows", config=CONFIG, adapters=ADAPTERS, num_tokens=9, base_share=1.0),
    MoECase(name="hot", config=CONFIG, adapters=ADAPTERS, num_tokens=50, routing=Routing.HOT),
    MoECase(name="sentinels", config=CONFIG, adapters=ADAPTERS, num_tokens=21, routing=Routing.SENTINELS),
    MoECase(name="one_adapter", config=CONFIG, adapters=ADAPTERS, num_tokens=64, popularity=Popularity.IDENTICAL),
)


def route(
    inputs: MoEInputs, lora: LoRABatch | None, *, num_experts: int = 6, block_m: int = 16, tile_m: int = 16
) -> MoERouting:
    T, K = inputs.topk_ids_TK.shape
    sizes = LayerSizes(num_experts=num_experts, hidden_size=32, intermediate_size=16)
    shape = TuningShape(
        num_tokens=T,
        num_experts=num_experts,
        top_k=K,
        hidden_size=32,
        intermediate_size=16,
        num_slots=0 if lora is None else lora.num_slots,
        rank13=0 if lora is None else lora.rank13,
        rank2=0 if lora is None else lora.rank2,
    )
    tiles = MoETiles(block_m=block_m, tile_m=tile_m)
    with poison_allocations():
        workspace = Workspace.for_layer(shape, tiles, torch.float32, DEVICE)
        buffers = workspace.carve(shape, tiles, torch.float32, num_halves=2)
        return route_rows(inputs.topk_ids_TK, sizes, lora, buffers.routing, block_m=block_m, tile_m=tile_m)


def blocks_of(routing: MoERouting) -> list[list[int]]:
    rows = routing.blocks[: int(routing.counts[Count.BLOCKS])].tolist()
    return sorted((row for row in rows if row[Block.FIRST] < row[Block.END]), key=lambda row: row[Block.FIRST])


def check(routing: MoERouting, reference: ReferenceRouting, lora: LoRABatch | None) -> None:
    assert routing.order.tolist()[: len(reference.order)] == reference.order
    blocks = blocks_of(routing)
    assert [tuple(block[: Block.END + 1]) for block in blocks] == reference.blocks
    if lora is None:
        return
    assert routing.segment.tolist()[: len(reference.order)] == reference.segment
    tiles = routing.tiles[: int(routing.counts[Count.TILES])].tolist()
    live = sorted((tuple(t[: Tile.END + 1]) for t in tiles if t[Tile.FIRST] < t[Tile.END]), key=lambda t: t[Tile.FIRST])
    assert live == reference.tiles
    lanes13 = [block[Block.LANE13_END] - block[Block.LANE13_FIRST] for block in blocks]
    lanes2 = [block[Block.LANE2_END] - block[Block.LANE2_FIRST] for block in blocks]
    assert list(zip(lanes13, lanes2, strict=True)) == reference.block_lanes


PATHS = {
    "few of a batch": {"FEW_ROWS": 128},
    "few of an expert": {},
    "many": {"FEW_ROWS": 1, "SORT_ROWS": 8},
    "bounds": {"DENSE_ROWS": 0},
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_routing_matches_reference(case: MoECase, with_lora: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATHS[path].items():
        monkeypatch.setattr(host, name, value)
    inputs = make_inputs(case, device=DEVICE)
    lora = make_lora_batch(case, inputs) if with_lora else None
    routing = route(inputs, lora)
    check(routing, route_rows_reference(inputs.topk_ids_TK, lora, num_experts=6, block_m=16, tile_m=16), lora)


@pytest.mark.parametrize("path", ["few of a batch", "few of an expert", "many"])
def test_lanes_point_at_the_rows_of_b(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATHS[path].items():
        monkeypatch.setattr(host, name, value)
    case = CASES[1]
    inputs = make_inputs(case, device=DEVICE)
    lora = make_lora_batch(case, inputs)
    routing = route(inputs, lora)
    assert routing.lanes13 is not None and routing.lanes2 is not None
    row_slots = [lora.token_slots_T.tolist()[n // 2] for n in routing.order.tolist()]
    checked = 0
    for block in blocks_of(routing):
        for lanes, factors, first, row_len in (
            (routing.lanes13, (ExpertsFactor.B_GATE, ExpertsFactor.B_UP), Block.LANE13_FIRST, 16),
            (routing.lanes2, (ExpertsFactor.B2,), Block.LANE2_FIRST, 32),
        ):
            span = slice(block[first], block[first + 1])
            for f, factor in enumerate(factors):
                elements = lanes.element[f, span].tolist()
                segments = lanes.segment[span].tolist()
                found = [lora.tables.pool[e : e + row_len] for e in elements if e >= 0]
                slots = sorted({row_slots[s] for s in segments})
                rows = [row for s in slots for row in read_factor(lora.tables, s, block[Block.EXPERT], factor, row_len)]
                assert len(found) == len(rows)
                assert all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))
                checked += len(found)
    assert checked > 0


@pytest.mark.parametrize(("num_experts", "num_slots"), [(1, 1), (1, 70), (1024, 70)])
def test_numbers_of_experts_and_slots(num_experts: int, num_slots: int) -> None:
    """All adapters touch the first expert, one the last too."""
    config = replace(CONFIG, num_experts=num_experts, top_k=1)
    adapters = (
        LoRASpec(expert_ids=(0, num_experts - 1) if num_experts > 1 else (0,)),
        *(LoRASpec(r_gate=1, r_up=1, r2=1, expert_ids=(0,)) for _ in range(num_slots - 1)),
    )
    case = MoECase(name="sizes", config=config, adapters=adapters, num_tokens=40, base_share=0.2)
    inputs = make_inputs(case, device=DEVICE)
    lora = make_lora_batch(case, inputs, pages=4000)
    routing = route(inputs, lora, num_experts=num_experts)
    reference = route_rows_reference(inputs.topk_ids_TK, lora, num_experts=num_experts, block_m=16, tile_m=16)
    check(routing, reference, lora)


@st.composite
def drawn_cases(draw: st.DrawFn) -> MoECase:
    num_experts = draw(st.sampled_from([1, 2, 5, 17]))
    rank = st.sampled_from([0, 1, 8, 17, 40])
    adapters = []
    for _ in range(draw(st.integers(1, 6))):
        held = draw(st.none() | st.sets(st.integers(0, num_experts - 1), min_size=1))
        r_w13, r_w2 = draw(rank), draw(rank)
        if r_w13 or r_w2:
            expert_ids = None if held is None else tuple(sorted(held))
            adapters.append(LoRASpec(r_gate=r_w13, r_up=r_w13, r2=r_w2, expert_ids=expert_ids))
    return MoECase(
        name="drawn",
        config=replace(CONFIG, num_experts=num_experts, top_k=draw(st.integers(1, min(3, num_experts)))),
        adapters=tuple(adapters) or (LoRASpec(),),
        num_tokens=draw(st.integers(1, 70)),
        base_share=draw(st.sampled_from([0.0, 0.3, 1.0])),
        routing=draw(st.sampled_from(list(Routing))),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases(), few=st.sampled_from([1, 4, 32]), block_m=st.sampled_from([16, 32]), seed=st.integers(0, 99))
def test_drawn_batches(case: MoECase, few: int, block_m: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FEW_ROWS", few)
    inputs = make_inputs(case, seed=seed, device=DEVICE)
    lora = make_lora_batch(case, inputs, pages=3000)
    sizes = {"num_experts": case.config.num_experts, "block_m": block_m, "tile_m": 16}
    check(route(inputs, lora, **sizes), route_rows_reference(inputs.topk_ids_TK, lora, **sizes), lora)

"""Drawn layers on drawn layouts, in real processes: equal to one process, deltas compared, base rows to the bit."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from support.expert_parallel import ParallelCase, check_parallel, run_cases
from support.formats import PACKS

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.parallel import ParallelConfig
from moegraft.parallel.slices import ExpertMap
from moegraft.testing import LoRASpec, MoECase, Popularity, Routing

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CASES = {2: 60, 4: 50}
CASES_A_RUN = 10
# A scale of a row of h is that of the rank's own columns: other numbers than one process has (docs/numerics.md).
SCALED_BY_ROWS_OF_H = ("fp8 channel", "fp8 tensor")
GROUPED_BY_32 = ("int4", "int4 symmetric", "mxfp4")


def draw_layout(rng: random.Random, world: int) -> ParallelConfig:
    tp = rng.choice([size for size in range(1, world + 1) if world % size == 0])
    return ParallelConfig(
        tp=tp,
        ep=world // tp,
        fully_sharded=rng.random() < 0.5,
        data_parallel=rng.random() < 0.7,
        dispatch=rng.choice(["all_to_all", "all_gather"]),
    )


def draw_map(rng: random.Random, num_experts: int, ep: int) -> ExpertMap:
    """Neighbours, dealt out or at random; sometimes with copies."""
    owners = [*range(ep), *(rng.randrange(ep) for _ in range(num_experts - ep))]
    rng.shuffle(owners)
    found = rng.choice(
        [
            ExpertMap.contiguous(num_experts, ep),
            ExpertMap.round_robin(num_experts, ep),
            ExpertMap.from_owners(owners, ep),
        ]
    )
    if rng.random() < 0.4:
        hot = rng.sample(range(num_experts), min(num_experts, rng.randint(1, 3)))
        found = found.with_copies({e: [rng.randrange(ep) for _ in range(rng.randint(1, ep))] for e in hot})
    return found


def draw_packing(rng: random.Random, tp: int) -> str:
    packing = rng.choice(["dense"] * len(PACKS) + list(PACKS))
    return "fp8 static" if tp > 1 and packing in SCALED_BY_ROWS_OF_H else packing


def draw_config(rng: random.Random, ep: int, packing: str) -> MoEConfig:
    """Sizes that no world divides, groups of scales cut short, every activation."""
    num_experts = max(ep, rng.choice([ep, ep + 1, ep + rng.randint(0, 6), 9]))
    hidden, inter = [3, 8, 17, 32, 48], [1, 2, 5, 16, 19, 24]
    if packing in GROUPED_BY_32:
        hidden, inter = [32, 64], [24, 32, 64, 80, 96, 160]
    elif packing == "nvfp4":
        hidden, inter = [16, 48, 128], [16, 64, 256]
    elif packing != "dense":
        hidden, inter = [16, 48, 130], [16, 130, 256, 300]
    kind = rng.choice(list(ActivationKind))
    top_k = rng.randint(1, min(num_experts, 5))
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=rng.choice(hidden),
        intermediate_size=rng.choice(inter),
        # In bfloat16 another order of a sum moves activations to other codes of fp8, each by 2^-3 of itself.
        dtype=torch.float32 if packing.startswith("fp8") else dtype,
        activation=Activation(kind=kind, gated=kind.needs_gate or rng.random() < 0.8),
        has_bias=rng.random() < 0.4,
        apply_router_weight_on_input=top_k == 1 and rng.random() < 0.3,
    )


def draw_adapter(rng: random.Random, config: MoEConfig) -> LoRASpec:
    rank, is_shared_outer = rng.choice([1, 2, 3, 7, 16, 33]), rng.random() < 0.25
    shares_a13 = rng.random() < 0.3
    r_gate, r_up = (rank if shares_a13 or rng.random() < 0.85 else 0 for _ in range(2))
    if not config.activation.gated:
        r_gate = 0
    r2 = rng.choice([0, rank, 1, 5])
    experts = None
    if not is_shared_outer and rng.random() < 0.5:
        experts = tuple(sorted(rng.sample(range(config.num_experts), rng.randint(1, config.num_experts))))
    return LoRASpec(
        r_gate=r_gate,
        r_up=r_up,
        r2=r2 if r_gate or r_up or r2 else 2,
        shared_a13=shares_a13,
        shared_outer=is_shared_outer,
        expert_ids=experts,
    )


def draw_rows(rng: random.Random, num_tokens: int, ep: int) -> tuple[int, ...]:
    """Tokens of each rank, which may be none."""
    cuts = sorted(rng.randint(0, num_tokens) for _ in range(ep - 1))
    return tuple(stop - start for start, stop in pairwise([0, *cuts, num_tokens]))


def draw_case(seed: int, world: int) -> ParallelCase:
    rng = random.Random(1000 * seed + world)
    layout = draw_layout(rng, world)
    packing = draw_packing(rng, layout.tp)
    config = draw_config(rng, layout.ep, packing)
    num_tokens = rng.choice([0, 1, 2, 5, 13, 40])
    is_dense = packing == "dense"
    case = MoECase(
        name=f"seed {seed}",
        config=config,
        num_tokens=num_tokens,
        adapters=tuple(draw_adapter(rng, config) for _ in range(rng.randint(0, 5))),
        popularity=rng.choice(list(Popularity)),
        base_share=rng.choice([0.0, 0.3, 0.9, 1.0]),
        routing=rng.choice(list(Routing)),
        is_transposed=is_dense and rng.random() < 0.4,
        is_interleaved=is_dense and config.activation.gated and rng.random() < 0.3,
    )
    return ParallelCase(
        case=case,
        config=layout,
        expert_map=draw_map(rng, config.num_experts, layout.ep),
        rows=draw_rows(rng, num_tokens, layout.ep) if layout.data_parallel else None,
        packing=packing,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("world", "first"), [(world, first) for world, count in NUM_CASES.items() for first in range(0, count, CASES_A_RUN)]
)
def test_drawn_layers_on_drawn_layouts(world2: WorldPool, world4: WorldPool, world: int, first: int) -> None:
    cases = [draw_case(seed, world) for seed in range(first, first + CASES_A_RUN)]
    by_rank = (world2 if world == 2 else world4).run(run_cases, cases)
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        try:
            check_parallel(case, results)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error

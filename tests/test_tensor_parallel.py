"""F of every expert on several ranks, in real processes: equal to one process, base rows to the bit, memory shared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from support.expert_parallel import ParallelCase, RankResult, run_cases, whole_layer
from support.layers import DELTA_TOL
from support.thinned import thinned
from test_expert_parallel import PACKINGS, case_of, check_cases, proof_cases

from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.moe.experts import TorchExperts, TritonExperts
from moegraft.oracle import select_experts
from moegraft.parallel import ParallelConfig
from moegraft.parallel.slices import ExpertMap, shards
from moegraft.testing import LoRASpec, MoECase, assert_close, assert_close_delta
from moegraft.testing.cases import MOE_CASES

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = pytest.mark.usefixtures("one_thread")


GROUPED = ("int4", "int4 symmetric", "mxfp4", "fp8 block", "int8")


def tensor_parallel(case: MoECase, tp: int, *, fully_sharded: bool, packing: str = "dense") -> ParallelCase:
    return ParallelCase(
        case=case,
        config=ParallelConfig(tp=tp, fully_sharded=fully_sharded),
        expert_map=ExpertMap.contiguous(case.config.num_experts, 1),
        packing=packing,
    )


def in_world(tp: int, world2: WorldPool, world4: WorldPool) -> WorldPool:
    return {2: world2, 4: world4}[tp]


@pytest.mark.parametrize(("packing", "tp", "fully_sharded"), thinned(PACKINGS, (2, 4), (False, True), keep_one_in=2))
def test_ranks_equal_one_process(
    world2: WorldPool, world4: WorldPool, packing: str, tp: int, fully_sharded: bool
) -> None:
    """Per-expert, fused, shared-outer, partial and mixed-rank adapters, all of them in one batch, and base rows."""
    config = ParallelConfig(tp=tp, fully_sharded=fully_sharded)
    layout = (config, ExpertMap.contiguous(case_of("all").config.num_experts, 1), None)
    check_cases(in_world(tp, world2, world4), proof_cases(layout, packing))


@pytest.mark.parametrize(
    ("packing", "tp", "fully_sharded"),
    thinned(GROUPED, (2, 4), (False, True), keep_one_in=2),
)
def test_formats_are_cut_between_their_groups(
    world2: WorldPool, world4: WorldPool, packing: str, tp: int, fully_sharded: bool
) -> None:
    """Shares of unequal length, and ranks behind the last column, which may end inside a group.

    160 columns in groups of 32: shares of 96 and 64, or of 64, 64, 32 and none. 24 columns are one group cut short, and
    so are 300 of groups of 128: the last ranks get [24, 24) and [300, 300), which are no multiples of a group.
    """
    widths = (24, 300) if packing == "fp8 block" else (24, 48, 80, 160)
    case = case_of("all", torch.bfloat16)
    cases = [
        replace(case, config=replace(case.config, hidden_size=64, intermediate_size=width, has_bias=True))
        for width in widths
    ]
    check_cases(
        in_world(tp, world2, world4),
        [tensor_parallel(case, tp, fully_sharded=fully_sharded, packing=packing) for case in cases],
    )


@pytest.mark.parametrize(("tp", "fully_sharded"), thinned((2, 4), (False, True), keep_one_in=2))
def test_every_kind_of_layer(world2: WorldPool, world4: WorldPool, tp: int, fully_sharded: bool) -> None:
    """No tokens, one token, sizes and ranks that no world divides, every activation and stored layout, biases."""
    cases = [tensor_parallel(case, tp, fully_sharded=fully_sharded) for case in MOE_CASES]
    check_cases(in_world(tp, world2, world4), cases)


@pytest.mark.parametrize(
    ("dispatch", "packing"), thinned(("replicated", "all_gather", "all_to_all"), PACKINGS, keep_one_in=2)
)
def test_fully_sharded_inside_expert_parallel(world4: WorldPool, dispatch: str, packing: str) -> None:
    config = ParallelConfig(tp=2, ep=2, fully_sharded=True)
    rows = None
    if dispatch != "replicated":
        config, rows = replace(config, data_parallel=True, dispatch=dispatch), (5, 21)
    expert_map = ExpertMap.round_robin(case_of("all").config.num_experts, 2)
    check_cases(world4, proof_cases((config, expert_map, rows), packing))


@pytest.mark.parametrize(("tp", "fully_sharded"), thinned((2, 4), (False, True), keep_one_in=2))
def test_static_scales_need_no_granule(world2: WorldPool, world4: WorldPool, tp: int, fully_sharded: bool) -> None:
    """fp8 with static scales of x and h, which are the same on every rank whatever its columns."""
    case = case_of("all")
    case = replace(case, config=replace(case.config, has_bias=True))
    check_cases(
        in_world(tp, world2, world4), [tensor_parallel(case, tp, fully_sharded=fully_sharded, packing="fp8 static")]
    )


@pytest.mark.parametrize(
    ("packing", "tp", "fully_sharded"), thinned(["fp8 channel", "fp8 tensor"], (2, 4), (False, True), keep_one_in=2)
)
def test_a_scale_of_a_row_of_h_is_of_the_columns_of_a_rank(
    world2: WorldPool, world4: WorldPool, packing: str, tp: int, fully_sharded: bool
) -> None:
    """Not what one process computes: each rank quantises its columns of h by themselves, and so does this oracle."""
    parallel = tensor_parallel(case_of("all"), tp, fully_sharded=fully_sharded, packing=packing)
    found, *others = (results for (results,) in in_world(tp, world2, world4).run(run_cases, [parallel]))
    assert all(torch.equal(found.found, other.found) for other in others)
    layer = whole_layer(parallel)
    whole = layer.inputs.weights.quantise_input
    assert whole is not None

    def by_rank(x_MI: torch.Tensor, *, of_w2: bool = False) -> torch.Tensor:
        if not of_w2:
            return whole(x_MI)
        cuts = [part.size for part in shards(x_MI.shape[1], tp)]
        return torch.cat([whole(mine, of_w2=True) for mine in x_MI.split(cuts, dim=1)], dim=1)

    layer = replace(layer, inputs=replace(layer.inputs, weights=replace(layer.inputs.weights, quantise_input=by_rank)))
    expected, expected_base = layer.reference(), layer.reference(with_adapters=False)
    tol = DELTA_TOL[torch.float32]
    assert_close(found.without, expected_base, tol)
    changed_T = ((expected - expected_base).abs() > 1e-12).any(dim=1)
    assert changed_T.any() and not changed_T.all()
    assert torch.equal(found.found[~changed_T], found.without[~changed_T])
    # A delta is a difference of outputs, and its error relative to theirs.
    weight = max(1.0, float(expected.norm() / (expected - expected_base).norm()))
    assert_close_delta(found.found, found.without, expected, expected_base, tol * weight)


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_fewer_columns_than_ranks(world4: WorldPool, fully_sharded: bool) -> None:
    """Ranks with padding only, of F, of D and of the low-rank lanes."""
    tiny = MoEConfig(num_experts=2, top_k=1, hidden_size=3, intermediate_size=2)
    adapters = (LoRASpec(r_gate=1, r_up=1, r2=1), LoRASpec(r_gate=0, r_up=1, r2=0), LoRASpec(shared_a13=True, r2=3))
    case = MoECase(name="tiny", config=tiny, num_tokens=9, adapters=adapters)
    check_cases(world4, [tensor_parallel(case, 4, fully_sharded=fully_sharded)])


def test_each_rank_holds_its_share_of_an_adapter(world4: WorldPool) -> None:
    """Pages of 1 KiB. A of w13 and B of w2 lie on every rank, unless fully sharded."""
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=128)
    case = MoECase(name="shares", config=config, adapters=(LoRASpec(),))
    pages = {}
    for fully_sharded in (False, True):
        ((*results,),) = check_cases(world4, [tensor_parallel(case, 4, fully_sharded=fully_sharded)])
        assert len({result.adapter_pages for result in results}) == 1
        pages[fully_sharded] = results[0].adapter_pages[0]
    floats_13, floats_2 = 4 * 16 * 64, 4 * 8 * 64  # A of w13, of gate and up; B of w2
    floats_f = 3 * 4 * 8 * 128  # B of gate and of up, A of w2
    assert pages[False] == (floats_13 + floats_2 + floats_f // 4) * 4 // 1024
    assert pages[True] == (floats_13 + floats_2 + floats_f) // 4 * 4 // 1024


def sent(result: RankResult) -> tuple[int, int]:
    return sum(result.base_bytes.values()), sum(result.lora_bytes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adapters_add_to_the_traffic(world2: WorldPool, dtype: torch.dtype) -> None:
    """Nothing where factors are cut along F; the low-rank rows of the rows with an adapter where fully sharded.

    Partial sums, of outputs and of low-rank rows of w2, travel in float32 whatever the dtype of the rows: their bytes
    tell, since one rounding too many is too small for a tolerance to see.
    """
    config = MoEConfig(num_experts=3, top_k=2, hidden_size=48, intermediate_size=24, dtype=dtype)
    case = MoECase(name="traffic", config=config, num_tokens=10, adapters=(LoRASpec(),), base_share=0.4)
    plain, sharded = check_cases(world2, [tensor_parallel(case, 2, fully_sharded=fs) for fs in (False, True)])
    all_reduce = 2 * (10 * 48 * 4) // 2
    assert sent(plain[0]) == (all_reduce, all_reduce)
    base, lora = sent(sharded[0])
    # 8 of 16 lanes of A of w13 gathered, in the dtype of the rows; 8 lanes of A2 summed.
    with_adapter = int((whole_layer(tensor_parallel(case, 2, fully_sharded=True)).inputs.token_slots_T >= 0).sum())
    assert 0 < with_adapter < 10
    assert (base, lora - base) == (all_reduce, 2 * with_adapter * (8 * dtype.itemsize + 8 * 4))  # to 2 experts each


def test_backends_that_add_deltas_inside_their_gemms_are_refused_when_fully_sharded() -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32)
    gpu = DeviceTarget(kind="cuda", capability=(9, 0), has_triton=True)
    request = BackendRequest(config=replace(config, dtype=torch.bfloat16), device=gpu, tp_size=2)
    assert select_experts(request).experts_cls is TritonExperts
    decision = select_experts(replace(request, fully_sharded=True))
    assert decision.experts_cls is TorchExperts
    (why,) = [r.reason for r in decision.rejections if r.backend == "TritonExperts"]
    assert "adds deltas inside its GEMMs" in why
    with pytest.raises(NoBackendError, match="cannot exchange low-rank rows"):
        select_experts(replace(request, fully_sharded=True), backend="TritonExperts")
    without_lora = replace(request, fully_sharded=True, lora=False)
    assert select_experts(without_lora).experts_cls is TritonExperts

"""Experts on several ranks, in real processes: equal to one process, base rows to the bit, whatever the routing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.expert_parallel import (
    ParallelCase,
    RankResult,
    build_rank_layer,
    check_parallel,
    groups_of,
    run_cases,
    whole_layer,
)
from support.formats import PACKS
from support.layers import MODULE
from support.thinned import thinned

from moegraft.build import build_fused_moe_with_lora
from moegraft.core.config import MoEConfig
from moegraft.core.errors import BatchError
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights
from moegraft.moe.experts import TritonExperts, torch_experts
from moegraft.moe.layer import FusedMoE, FusedMoEModularMethod
from moegraft.parallel import ParallelConfig
from moegraft.parallel.groups import Dispatch
from moegraft.parallel.slices import ExpertMap
from moegraft.testing import LoRASpec, MoECase, Popularity, Routing, assert_close, assert_close_delta
from moegraft.testing.cases import MOE_CASES

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = pytest.mark.usefixtures("one_thread")

E, K, T = 7, 3, 26
CONFIG = MoEConfig(num_experts=E, top_k=K, hidden_size=48, intermediate_size=24)
ADAPTERS = {
    "per_expert": (LoRASpec(), LoRASpec(r_gate=4, r_up=4, r2=4)),
    "fused": (LoRASpec(shared_a13=True), LoRASpec(shared_a13=True, r_gate=3, r_up=3, r2=3)),
    "shared_outer": (LoRASpec(shared_outer=True), LoRASpec(shared_outer=True, shared_a13=True)),
    "partial": (LoRASpec(expert_ids=(1, 4)), LoRASpec(expert_ids=(6,)), LoRASpec(r_gate=0, r_up=0)),
    "mixed_ranks": tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 3, 7, 16, 33)),
}
ADAPTERS["all"] = tuple(spec for specs in ADAPTERS.values() for spec in specs)
PACKINGS = {
    "fp32": ("dense", torch.float32),
    "bf16": ("dense", torch.bfloat16),
    "fp8": ("fp8 block", torch.bfloat16),
    "int8": ("int8", torch.float32),
}
# With copies of hot experts, some next to each other, some on all ranks.
COPIED = ExpertMap.from_owners([0, 0, 1, 1, 0, 1, 1], 2).with_copies({0: (1,), 3: (0,)})
COPIED4 = ExpertMap.round_robin(E, 4).with_copies({0: (1, 2, 3), 5: (0,)})


def case_of(adapters: str, dtype: torch.dtype = torch.float32) -> MoECase:
    return MoECase(
        name=adapters,
        config=replace(CONFIG, dtype=dtype),
        num_tokens=T,
        adapters=ADAPTERS[adapters],
        popularity=Popularity.UNIFORM,
        base_share=0.3,
    )


def data_parallel(ep: int, dispatch: Dispatch = "all_to_all", tp: int = 1) -> ParallelConfig:
    return ParallelConfig(tp=tp, ep=ep, dispatch=dispatch, data_parallel=True)


# Layout -> config, map, tokens of each rank.
LAYOUTS_OF_2: dict[str, tuple[ParallelConfig, ExpertMap, tuple[int, ...] | None]] = {
    "replicated": (ParallelConfig(ep=2), ExpertMap.contiguous(E, 2), None),
    "replicated, copies": (ParallelConfig(ep=2), COPIED, None),
    "all-gather": (data_parallel(2, "all_gather"), ExpertMap.contiguous(E, 2), (13, 13)),
    "all-gather, uneven": (data_parallel(2, "all_gather"), ExpertMap.round_robin(E, 2), (25, 1)),
    "all-to-all": (data_parallel(2), ExpertMap.contiguous(E, 2), (13, 13)),
    "all-to-all, copies": (data_parallel(2), COPIED, (9, 17)),
    "all-to-all, no rows": (data_parallel(2), ExpertMap.round_robin(E, 2), (0, T)),
}
LAYOUTS_OF_4: dict[str, tuple[ParallelConfig, ExpertMap, tuple[int, ...] | None]] = {
    "replicated": (ParallelConfig(ep=4), ExpertMap.contiguous(E, 4), None),
    "replicated, copies": (ParallelConfig(ep=4), COPIED4, None),
    "all-gather": (data_parallel(4, "all_gather"), ExpertMap.round_robin(E, 4), (7, 0, 12, 7)),
    "all-gather, copies": (data_parallel(4, "all_gather"), COPIED4, (0, 20, 1, 5)),
    "all-to-all": (data_parallel(4), ExpertMap.contiguous(E, 4), (7, 7, 6, 6)),
    "all-to-all, copies": (data_parallel(4), COPIED4, (0, 20, 1, 5)),
    "tp x replicated": (ParallelConfig(tp=2, ep=2), ExpertMap.contiguous(E, 2), None),
    "tp x all-gather": (data_parallel(2, "all_gather", tp=2), COPIED, (13, 13)),
    "tp x all-to-all": (data_parallel(2, tp=2), ExpertMap.round_robin(E, 2), (4, 22)),
}


def check_cases(pool: WorldPool, cases: Sequence[ParallelCase]) -> list[list[RankResult]]:
    """Runs all cases in one go; results by case and rank."""
    by_rank = pool.run(run_cases, list(cases))
    by_case = [list(results) for results in zip(*by_rank, strict=True)]
    for case, results in zip(cases, by_case, strict=True):
        check_parallel(case, results)
    return by_case


def proof_cases(
    layout: tuple[ParallelConfig, ExpertMap, tuple[int, ...] | None], packing_name: str
) -> list[ParallelCase]:
    config, expert_map, rows = layout
    packing, dtype = PACKINGS[packing_name]
    cases = [case_of(adapters, dtype) for adapters in ADAPTERS]
    if config.tp > 1 and packing == "fp8 block":  # F is cut between blocks of scales
        cases = [replace(case, config=replace(case.config, intermediate_size=256)) for case in cases]
    return [ParallelCase(case=case, config=config, expert_map=expert_map, rows=rows, packing=packing) for case in cases]


@pytest.mark.parametrize(("layout", "packing"), thinned(LAYOUTS_OF_2, PACKINGS, keep_one_in=2))
def test_two_ranks_equal_one_process(world2: WorldPool, layout: str, packing: str) -> None:
    check_cases(world2, proof_cases(LAYOUTS_OF_2[layout], packing))


@pytest.mark.parametrize(("layout", "packing"), thinned(LAYOUTS_OF_4, PACKINGS, keep_one_in=2))
def test_four_ranks_equal_one_process(world4: WorldPool, layout: str, packing: str) -> None:
    check_cases(world4, proof_cases(LAYOUTS_OF_4[layout], packing))


DISPATCHES = {
    "replicated": (ParallelConfig(ep=2), None),
    "all-gather": (data_parallel(2, "all_gather"), (10, 14)),
    "all-to-all": (data_parallel(2), (10, 14)),
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_kind_of_layer(world2: WorldPool, dispatch: str) -> None:
    """Layouts, activations, biases, sentinels, weights on the input: the shipped table, where a rank can have rows."""
    config, rows = DISPATCHES[dispatch]
    cases = []
    for case in MOE_CASES:
        if case.config.num_experts < 2:
            continue
        tokens = case.num_tokens
        shares = None if rows is None else (tokens // 3, tokens - tokens // 3)
        expert_map = ExpertMap.contiguous(case.config.num_experts, 2)
        cases.append(ParallelCase(case=case, config=config, expert_map=expert_map, rows=shares))
    check_cases(world2, cases)


@pytest.mark.parametrize("rows", [(10, 14), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all"])
def test_every_weight_format(world2: WorldPool, dispatch: str, rows: tuple[int, int]) -> None:
    config, _ = DISPATCHES[dispatch]
    case = replace(case_of("partial"), num_tokens=sum(rows))
    case = replace(case, config=replace(CONFIG, hidden_size=128, intermediate_size=128))
    expert_map = ExpertMap.round_robin(E, 2)
    check_cases(
        world2,
        [
            ParallelCase(case=case, config=config, expert_map=expert_map, rows=rows, packing=packing)
            for packing in PACKS
        ],
    )


@pytest.mark.parametrize("layout", LAYOUTS_OF_4)
def test_four_bits_on_four_ranks(world4: WorldPool, layout: str) -> None:
    config, expert_map, rows = LAYOUTS_OF_4[layout]
    case = case_of("all", torch.bfloat16)
    case = replace(case, config=replace(case.config, hidden_size=64, intermediate_size=80, has_bias=True))
    check_cases(
        world4,
        [
            ParallelCase(case=case, config=config, expert_map=expert_map, rows=rows, packing=packing)
            for packing in ("int4", "mxfp4")
        ],
    )


@pytest.mark.parametrize("layout", ["tp x replicated", "tp x all-gather", "tp x all-to-all"])
def test_every_kind_of_layer_on_four_ranks(world4: WorldPool, layout: str) -> None:
    config, _, rows = LAYOUTS_OF_4[layout]
    cases = []
    for case in MOE_CASES:
        if case.config.num_experts < 2:
            continue
        shares = None if rows is None else (case.num_tokens // 3, case.num_tokens - case.num_tokens // 3)
        expert_map = ExpertMap.round_robin(case.config.num_experts, 2)
        cases.append(ParallelCase(case=case, config=config, expert_map=expert_map, rows=shares))
    check_cases(world4, cases)


def adversarial(ids: Sequence[Sequence[int]], *, slots: Sequence[int] | None = None, **changes: object) -> ParallelCase:
    top_k = len(ids[0])
    case = replace(case_of("all"), config=replace(CONFIG, top_k=top_k), num_tokens=len(ids))
    found = ParallelCase(
        case=case,
        config=data_parallel(2),
        expert_map=ExpertMap.contiguous(E, 2),
        rows=(len(ids) // 2, len(ids) - len(ids) // 2),
        ids=tuple(map(tuple, ids)),
        slots=None if slots is None else tuple(slots),
    )
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_adversarial_routing(world2: WorldPool, dispatch: str) -> None:
    config, rows = DISPATCHES[dispatch]
    anywhere = [[t % E, (t + 3) % E] for t in range(8)]
    cases = [
        adversarial([[5]] * 9),  # all tokens to one expert
        adversarial([[0, 1]] * 5 + [[2, 3]] * 5),  # all experts of rank 1 idle
        adversarial([[-1, E]] * 6),  # no token to any expert
        adversarial([[2, 4], [-1, 0], [6, E + 5]], rows=(0, 3)),  # zero tokens on a rank
        adversarial(anywhere, rows=(8, 0), slots=[-1] * 8),  # and no adapter anywhere
        adversarial(anywhere, rows=(4, 4), slots=[-1] * 4 + [0, 1, 5, 6]),  # adapters on rank 1's rows alone
        adversarial(anywhere, rows=(8, 0), slots=[7] * 8),  # an adapter that touches one expert, of rank 1
        adversarial([[6, 0]], rows=(1, 0), slots=[2]),  # one token
    ]
    if rows is None:
        cases = [replace(case, rows=None) for case in cases]
    packed = [replace(case, packing="fp8 block") for case in cases]
    check_cases(world2, [replace(case, config=config) for case in cases + packed])


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("tp", [1, 2])
def test_adversarial_routing_on_four_ranks(world4: WorldPool, dispatch: Dispatch, tp: int) -> None:
    ep = 4 // tp
    anywhere = [[t % E, (t + 3) % E] for t in range(8)]
    cases = [
        adversarial([[5]] * 9, rows=(4, 0, 5, 0)),  # all tokens to one expert
        adversarial([[0, 1]] * 8, rows=(2, 2, 2, 2)),  # all experts of three ranks idle
        adversarial([[-1, E]] * 6, rows=(0, 6, 0, 0)),  # no token to any expert
        adversarial(anywhere, rows=(0, 0, 8, 0), slots=[7] * 8),  # an adapter that touches one expert, of another rank
        adversarial(anywhere, rows=(1, 7, 0, 0), slots=[-1] * 7 + [0]),  # one row with an adapter
        adversarial([[6, 0]], rows=(0, 0, 0, 1), slots=[2]),  # one token
    ]
    config, expert_map = data_parallel(ep, dispatch, tp), ExpertMap.contiguous(E, ep)
    if ep == 2:
        cases = [replace(case, rows=(sum(case.rows[:2]), sum(case.rows[2:]))) for case in cases if case.rows]
    check_cases(world4, [replace(case, config=config, expert_map=expert_map) for case in cases])


def test_a_hot_expert_with_copies(world4: WorldPool) -> None:
    """All tokens choose one expert that every rank has: nothing needs to travel far, and each copy gets its share."""
    everywhere = ExpertMap.contiguous(E, 4).with_copies({5: range(4)})
    case = adversarial([[5]] * 16, expert_map=everywhere, config=data_parallel(4), rows=(4, 4, 4, 4))
    (results,) = check_cases(world4, [case])
    # A quarter of every rank's rows stays; the rest goes round, and back comes one sum for each.
    row = 4 * CONFIG.hidden_size
    header = 8 * 1 + 4
    counts = 3 * 4 * 8
    assert [result.base_bytes["all_to_all"] for result in results] == [3 * (row + header) + 3 * row + counts] * 4


@pytest.mark.parametrize("packing", ["dense", "fp8 block"])
@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all"])
def test_bits_of_base_rows_do_not_follow_the_routing_of_others(world2: WorldPool, dispatch: str, packing: str) -> None:
    """In deeper layers adapters change where their rows go, and with it how many rows each rank gets."""
    config, _ = DISPATCHES[dispatch]
    base = [[0, 5], [6, 1], [2, 4], [3, 5]]
    slots = [-1] * 4 + [0, 1, 3, 5, 7, 9, 2, 4] * 2
    # On rank 0, few enough rows for one form of its GEMMs, and so many that by themselves they would take the other.
    calm, hot = [[4, 5]] * 16, [[0, 1]] * 16
    cases = [
        adversarial(base + others, slots=slots, config=config, rows=(10, 10), packing=packing) for others in (calm, hot)
    ]
    calm_results, hot_results = check_cases(world2, cases)
    assert torch.equal(calm_results[0].found[:4], hot_results[0].found[:4])
    assert not torch.equal(calm_results[0].found[4:], hot_results[0].found[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all"])
def test_copies_take_base_rows_whatever_others_choose(world2: WorldPool, dispatch: str, dtype: torch.dtype) -> None:
    """A base row meets the same copies, in whose partial sums it is rounded, wherever its neighbours go."""
    config, _ = DISPATCHES[dispatch]
    base = [[0, 5], [6, 3], [3, 4], [3, 5], [0, 3]]
    slots = [-1] * 5 + [0, 1, 3, 5, 7, 9, 2, 4] * 2
    cases = []
    for others in ([[4, 5]] * 16, [[0, 4]] * 16):
        case = adversarial(base + others, slots=slots, config=config, rows=(10, 11), expert_map=COPIED)
        cases.append(replace(case, case=replace(case.case, config=replace(case.case.config, dtype=dtype))))
    (first, _), (second, _) = check_cases(world2, cases)
    assert torch.equal(first.found[:5], second.found[:5])
    assert not torch.equal(first.found[5:], second.found[5:])


def _count_planned_rows(parallel: ParallelCase) -> int:
    """Rows that the rank's GEMMs compute, padding aside."""
    layer = build_rank_layer(parallel, groups_of(parallel.config))
    plan_rows, planned = torch_experts._plan_rows, []

    def spy(*args: Any) -> Any:
        plan = plan_rows(*args)
        planned.append(len(plan.token_P) - len(plan.padding))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_experts, "_plan_rows", spy)
        layer.run(None)
    return sum(planned)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_choices_that_stand_elsewhere_are_not_computed(world2: WorldPool, dispatch: str) -> None:
    config, rows = DISPATCHES[dispatch]
    ids = [[0, 5], [4, 6], [0, 1]] * 8
    case = adversarial(ids, config=config, rows=rows)
    assert world2.run(_count_planned_rows, case) == [8 * 3, 8 * 3]  # experts 0 to 3 and 4 to 6
    assert world2.run(_count_planned_rows, replace(case, ids=tuple([(0, 1)] * 24))) == [48, 0]


def demanded_bytes(parallel: ParallelCase, packed: int) -> int:
    """What all ranks together have to send, token by token: a row to each other rank that it needs, and a sum back.

    ``packed``: bytes of a base row. With the header of each row, and the counts that each pair of ranks exchanges.
    """
    layer, ranks = whole_layer(parallel), range(parallel.config.ep)
    plain = CONFIG.hidden_size * parallel.case.config.dtype.itemsize
    home = [rank for rank in ranks for _ in range((parallel.rows or ())[rank])]
    total = len(ranks) * (len(ranks) - 1) * 4 * 8
    for token, ids in enumerate(layer.inputs.topk_ids_TK.tolist()):
        needed = {r for r in ranks if set(ids) & set(parallel.expert_map.experts_of_rank[r])} - {home[token]}
        row = packed if layer.inputs.token_slots_T[token] < 0 else plain
        total += len(needed) * (row + 8 * len(ids) + 4 + plain)
    return total


@pytest.mark.parametrize("packing", ["dense", "fp8 block"])
def test_an_all_to_all_sends_what_the_routing_demands(world4: WorldPool, packing: str) -> None:
    """At most 1.1 times that and the headers, as the layout promises; and an all-gather sends more."""
    case = case_of("all", torch.bfloat16)
    case = replace(case, config=replace(case.config, top_k=1))
    parallel = ParallelCase(
        case=case,
        config=data_parallel(4),
        expert_map=ExpertMap.round_robin(E, 4),
        rows=(9, 0, 13, 4),
        packing=packing,
    )
    gathered = replace(parallel, config=data_parallel(4, "all_gather"))
    demanded = demanded_bytes(parallel, CONFIG.hidden_size * 2 if packing == "dense" else CONFIG.hidden_size + 4)
    to_some, to_all = (
        sum(sum(result.lora_bytes.values()) for result in results)
        for results in check_cases(world4, [parallel, gathered])
    )
    assert demanded <= to_some <= 1.1 * demanded < to_all


def test_rows_with_an_adapter_travel_unquantised_and_the_others_packed(world2: WorldPool) -> None:
    """The bytes of one rank's rows: D + scales for a base row in fp8, 2 D where LoRA reads it."""
    D = CONFIG.hidden_size
    ids = [[4], [5], [6], [4]] + [[0]] * 4  # rank 0's rows all go to rank 1; rank 1's to rank 0
    config = replace(CONFIG, dtype=torch.bfloat16, top_k=1)
    case = adversarial(ids, slots=[-1, 0, -1, -1, 0, 0, -1, -1], packing="fp8 block", rows=(4, 4))
    case = replace(case, case=replace(case.case, config=config))
    ((first, second),) = check_cases(world2, [case])
    header, back, counts = 8 + 4, 4 * 2 * D, 4 * 8
    packed, plain = D + 4 + header, 2 * D + header
    assert first.base_bytes == {"all_to_all": 4 * packed + back + counts}
    assert first.lora_bytes["all_to_all"] == 3 * packed + plain + back + counts
    assert second.lora_bytes["all_to_all"] == 2 * packed + 2 * plain + back + counts


def test_each_rank_keeps_its_own_experts_pages_only(world2: WorldPool) -> None:
    """Adapters of experts 1 and 4, of 6, and of all: pages by rank, not everything everywhere."""
    specs = (LoRASpec(expert_ids=(1, 2)), LoRASpec(expert_ids=(6,)), LoRASpec())
    case = replace(case_of("partial"), adapters=specs)
    parallel = ParallelCase(case=case, config=data_parallel(2), expert_map=ExpertMap.contiguous(E, 2), rows=(13, 13))
    ((first, second),) = check_cases(world2, [parallel])
    assert first.adapter_pages[0] > 0 and second.adapter_pages[0] == 0
    assert first.adapter_pages[1] == 0 and second.adapter_pages[1] > 0
    assert first.adapter_pages[2] > second.adapter_pages[2] > 0  # 4 experts and 3


def test_routing_of_sentinels_sends_nothing(world2: WorldPool) -> None:
    case = replace(case_of("all"), routing=Routing.SENTINELS)
    check_cases(
        world2,
        [ParallelCase(case=case, config=data_parallel(2), expert_map=ExpertMap.contiguous(E, 2), rows=(20, 6))],
    )
    nowhere = adversarial([[-1, E]] * 6)
    ((first, _),) = check_cases(world2, [nowhere])
    assert first.base_bytes == {"all_to_all": 4 * 8}  # the counts, and not a row


def _disagree(parallel: ParallelCase) -> str:
    """Rank 0 runs its batch, rank 1 forgets to pass its context."""
    layer = build_rank_layer(parallel, groups_of(parallel.config))
    with_lora = build_fused_moe_with_lora(layer.base, layer.bank.bank.experts_tables(MODULE))
    x, weights, ids = layer.inputs.x_TD, layer.inputs.topk_weights_TK, layer.inputs.topk_ids_TK
    with layer.bank.acquire(layer.names) as batch, pytest.raises(BatchError) as caught:
        rows = AdapterRows.of(batch.own.row_slots, device=x.device)
        context = with_lora.lora_context(rows, RankBounds(a13=64, a2=64), batch.group)
        context = None if groups_of(parallel.config).rank else context
        layer.base.apply_experts(x, weights, ids, context)
    return str(caught.value)


def over_triton(layer: FusedMoE) -> FusedMoE:
    """The same layer over TritonExperts, which the oracle would not take on a CPU."""
    weights, pair = layer.method.experts.weights, layer.method.prepare_finalize
    method = FusedMoEModularMethod(layer.config, weights, TritonExperts, pair)
    return FusedMoE(layer.config, method)


@contextmanager
def fp8_as_the_hardware_rounds() -> Iterator[None]:
    """Inside the block, in Triton's interpreter."""
    from support.fp8_interpreter import round_fp8_exactly  # imports Triton

    with pytest.MonkeyPatch.context() as patch:
        round_fp8_exactly(patch)
        yield


def _run_triton(parallel: ParallelCase) -> tuple[torch.Tensor, torch.Tensor]:
    layer = build_rank_layer(parallel, groups_of(parallel.config))
    layer = replace(layer, base=over_triton(layer.base))
    with fp8_as_the_hardware_rounds():
        return layer.run(None), layer.run(layer.names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its ranks are on the CPU, where kernels need the interpreter")
@pytest.mark.parametrize("packing", ["dense", "fp8 block"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_kernels_take_dispatched_rows(world2: WorldPool, dispatch: str, packing: str) -> None:
    """Rows with a stride, choices that stand elsewhere, rows that came quantised beside rows that did not."""
    pytest.importorskip("triton", reason="needs triton")
    config, rows = DISPATCHES[dispatch]
    case = replace(case_of("partial"), num_tokens=24)
    parallel = ParallelCase(case=case, config=config, expert_map=ExpertMap.contiguous(E, 2), rows=rows, packing=packing)
    one = whole_layer(parallel)
    one = replace(one, base=over_triton(one.base))
    results = world2.run(_run_triton, parallel)[: 1 if rows is None else 2]
    without, found = (torch.cat(parts) for parts in zip(*results, strict=True))
    with fp8_as_the_hardware_rounds():
        one_found, one_without = one.run(), one.run_with(None)
    assert_close(without, one_without, 1e-5)
    assert_close_delta(found, without, one_found, one_without, 1e-5)


def _load_while_layers_run(parallel: ParallelCase) -> bool:
    """Adapters come and go on one thread while another runs steps of a batch; ranks are in step on each of the two."""
    layer = build_rank_layer(parallel, groups_of(parallel.config))
    with_lora = build_fused_moe_with_lora(layer.base, layer.bank.bank.experts_tables(MODULE))
    x, weights, ids = layer.inputs.x_TD, layer.inputs.topk_weights_TK, layer.inputs.topk_ids_TK
    expected, loads = layer.run(layer.names), 0

    def come_and_go() -> None:
        nonlocal loads
        for _ in range(20):
            layer.bank.load("other", lambda step: (AdapterWeights(), None))
            layer.bank.unload("other")
            loads += 1

    with layer.bank.acquire(layer.names) as batch:
        rows = AdapterRows.of(batch.own.row_slots, device=x.device)
        context = with_lora.lora_context(rows, RankBounds(a13=64, a2=64), batch.group)
        thread = threading.Thread(target=come_and_go)
        thread.start()
        outputs = [layer.base.apply_experts(x, weights, ids, context) for _ in range(30)]
        thread.join()
    return loads == 20 and all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_adapters_come_and_go_while_layers_run(world2: WorldPool, dispatch: str) -> None:
    config, rows = DISPATCHES[dispatch]
    case = replace(case_of("partial"), num_tokens=24)
    parallel = ParallelCase(case=case, config=config, expert_map=ExpertMap.contiguous(E, 2), rows=rows)
    assert world2.run(_load_while_layers_run, parallel) == [True, True]


@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all"])
def test_ranks_that_disagree_about_adapters_are_told(world2: WorldPool, dispatch: str) -> None:
    config, rows = DISPATCHES[dispatch]
    case = replace(case_of("partial"), num_tokens=24)
    parallel = ParallelCase(case=case, config=config, expert_map=ExpertMap.contiguous(E, 2), rows=rows)
    first, second = world2.run(_disagree, parallel)
    assert first.startswith("ranks [1] run a batch without adapters, rank 0 one with; acquire it on all ranks together")
    assert second.startswith("ranks [0] run a batch with adapters, rank 1 one without; ")

"""One experts layer on several ranks: what a rank builds and runs of a case, and how its results are judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from moegraft.build import build_fused_moe_with_lora, build_parallel_moe, take_slice
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.collective_bank import CollectiveBank
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ModelTargets, local_targets
from moegraft.moe.layer import FusedMoE
from moegraft.parallel import ParallelConfig, ParallelGroups
from moegraft.parallel.slices import ExpertMap, RankSlice, Share, experts_slice
from moegraft.testing import MoECase, MoEInputs, assert_close, assert_close_delta, make_inputs, poison_allocations
from support.formats import PACKS
from support.layers import DELTA_TOL, MODULE, BuiltLayer, build_layer, dense_weights, experts_target, fields_of
from support.slicing import slice_adapter

POOL_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class ParallelCase:
    """A layer's case on the ranks of ``config``.

    ``rows``: tokens of each expert-parallel rank, where each brings its own · ``ids``, ``slots``: topk ids and adapters
    of the rows, in place of the case's.
    """

    case: MoECase
    config: ParallelConfig
    expert_map: ExpertMap
    rows: tuple[int, ...] | None = None
    packing: str = "dense"
    ids: tuple[tuple[int, ...], ...] | None = None
    slots: tuple[int, ...] | None = None
    seed: int = 0

    def inputs(self, inputs: MoEInputs) -> MoEInputs:
        """With the ids and slots of this case."""
        if self.ids is not None:
            inputs = replace(inputs, topk_ids_TK=torch.tensor(self.ids, dtype=torch.int32))
        if self.slots is not None:
            inputs = replace(inputs, token_slots_T=torch.tensor(self.slots, dtype=torch.int32))
        return inputs

    def tokens(self, ep_rank: int) -> slice:
        """The rows that a rank brings."""
        if self.rows is None:
            return slice(0, self.case.num_tokens)
        assert sum(self.rows) == self.case.num_tokens
        start = sum(self.rows[:ep_rank])
        return slice(start, start + self.rows[ep_rank])


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """The rank's own rows: out [T, D] without and with adapters; what it sent meanwhile; what its bank holds."""

    without: torch.Tensor
    found: torch.Tensor
    base_bytes: dict[str, int]
    lora_bytes: dict[str, int]
    adapter_pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankLayer:
    """The layer of one rank, with the rows that it brings."""

    base: FusedMoE
    bank: CollectiveBank
    inputs: MoEInputs
    groups: ParallelGroups

    def run(self, names: Sequence[str | None] | None) -> torch.Tensor:
        """The rank's rows with the adapters of their names; None: a call without a context."""
        x, weights, ids = self.inputs.x_TD, self.inputs.topk_weights_TK, self.inputs.topk_ids_TK
        if names is None:
            return self.base.apply_experts(x, weights, ids)
        with_lora = build_fused_moe_with_lora(self.base, self.bank.bank.experts_tables(MODULE), self.groups)
        with self.bank.acquire(names) as batch:
            rows = AdapterRows.of(batch.own.row_slots, device=x.device)
            bounds = RankBounds.of(batch.union.max_ranks(MODULE))
            return with_lora.apply_experts(x, weights, ids, rows, bounds, group=batch.group)

    @property
    def names(self) -> list[str | None]:
        return [None if slot < 0 else f"a{slot}" for slot in self.inputs.token_slots_T.tolist()]


@cache
def groups_of(config: ParallelConfig) -> ParallelGroups:
    """Made once in a process: after a failed case the pool starts its processes anew."""
    return ParallelGroups.create(config)


def rank_slice(case: MoECase, expert_map: ExpertMap, config: ParallelConfig, rank: int, granule: int) -> RankSlice:
    mine = experts_slice(
        num_experts=case.config.num_experts,
        intermediate_size=case.config.intermediate_size,
        tp=Share(config.tp, config.tp_rank_of(rank)),
        ep=Share(config.ep, config.ep_rank_of(rank)),
        granule=granule,
        experts=expert_map.experts_of_rank[config.ep_rank_of(rank)],
        fully_sharded=config.fully_sharded,
    )
    return RankSlice(experts={MODULE: mine})


def build_rank_layer(parallel: ParallelCase, groups: ParallelGroups) -> RankLayer:
    case = parallel.case
    inputs = make_inputs(case, seed=parallel.seed)
    weights: ExpertsWeights = dense_weights(case, inputs)
    if (pack := PACKS[parallel.packing].pack) is not None:
        weights = pack(weights)
    mine = rank_slice(case, parallel.expert_map, groups.config, groups.rank, weights.intermediate_granule)
    weights = take_slice(weights, mine.experts[MODULE], adds_bias=groups.tp.rank == 0)
    base, _ = build_parallel_moe(case.config, weights, groups, parallel.expert_map)

    targets = ModelTargets(model_type="plain", experts={MODULE: experts_target(case)})
    layout = BankLayout(local_targets(targets, mine), dtype=case.config.dtype, page_bytes=1024)
    bank = CollectiveBank(
        AdapterBank(layout, capacity_bytes=POOL_BYTES, device="cpu", max_slots=len(inputs.adapters) + 1, poison=True),
        groups,
    )
    for i, factors in enumerate(inputs.adapters):
        whole = AdapterWeights(experts={MODULE: ExpertsLoRA(**fields_of(factors))})  # type: ignore[arg-type]
        bank.load(f"a{i}", lambda step, whole=whole: (slice_adapter(whole, targets, mine), None))
    if groups.rank % 2:
        # As adapters come and go, their slots come to differ between ranks.
        for name in bank.ids:
            bank.bank.evict(name)
        bank.bank.ensure_resident(reversed(bank.ids))
    tokens = parallel.tokens(groups.ep.rank)
    inputs = parallel.inputs(inputs)
    mine_only = replace(
        inputs,
        x_TD=inputs.x_TD[tokens],
        topk_ids_TK=inputs.topk_ids_TK[tokens],
        topk_weights_TK=inputs.topk_weights_TK[tokens],
        token_slots_T=inputs.token_slots_T[tokens],
    )
    return RankLayer(base=base, bank=bank, inputs=mine_only, groups=groups)


def run_cases(cases: Sequence[ParallelCase]) -> list[RankResult]:
    """In every rank: each case without and with its adapters."""
    return [_run_case(case) for case in cases]


def _run_case(parallel: ParallelCase) -> RankResult:
    groups = groups_of(parallel.config)
    layer = build_rank_layer(parallel, groups)
    traffic = [comm.traffic for comm in (groups.ep, groups.tp, groups.world)]

    def counted(names: list[str | None] | None) -> tuple[torch.Tensor, dict[str, int]]:
        for counter in traffic:
            counter.reset()
        with poison_allocations():
            out = layer.run(names)
        return out, dict(sum((Counter(counter.sent_bytes) for counter in traffic), Counter()))

    without, base_bytes = counted(None)
    found, lora_bytes = counted(layer.names)
    layer.bank.bank.check_integrity()
    pages = tuple(layer.bank.bank.info(name).num_pages for name in layer.bank.bank.names())
    return RankResult(without=without, found=found, base_bytes=base_bytes, lora_bytes=lora_bytes, adapter_pages=pages)


def whole_layer(parallel: ParallelCase) -> BuiltLayer:
    """The same layer and batch in one process."""
    layer = build_layer(parallel.case, seed=parallel.seed, pack=PACKS[parallel.packing].pack)
    return replace(layer, inputs=parallel.inputs(layer.inputs))


def check_parallel(parallel: ParallelCase, results: Sequence[RankResult], *, tol: float | None = None) -> None:
    """Against one process and the oracle; base rows against the base run of the same ranks, bit for bit."""
    layer, config = whole_layer(parallel), parallel.config
    tol = tol or DELTA_TOL[parallel.case.config.dtype]
    for rank, result in enumerate(results):
        twin = results[config.ep_rank_of(rank) * config.tp if config.data_parallel else 0]
        assert torch.equal(result.found, twin.found), f"rank {rank} differs from a rank with the same rows"
    firsts = [results[config.tp * ep] for ep in range(config.ep)] if config.data_parallel else results[:1]
    found, without = (torch.cat([getattr(r, what) for r in firsts]) for what in ("found", "without"))
    one_found, one_without = layer.run(), layer.run_with(None)
    assert found.dtype == one_found.dtype and found.shape == one_found.shape
    assert_close(without, one_without, tol, what="base, against one process")
    assert_close(found, one_found, tol, what="with adapters, against one process")

    expected, expected_base = layer.reference(), layer.reference(with_adapters=False)
    changed_T = ((expected - expected_base).abs() > 1e-12).any(dim=1)
    assert torch.equal(found[~changed_T], without[~changed_T]), "a row that no adapter changes has other bits"
    found, without, expected, expected_base = (out[changed_T] for out in (found, without, expected, expected_base))
    weight = max(1.0, float(expected.norm() / (expected - expected_base).norm())) if changed_T.any() else 1.0
    assert_close_delta(found, without, expected, expected_base, tol * weight)

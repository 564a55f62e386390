"""How a grafted model lies over the ranks: what a plan of transformers has shared out, and what attach shares out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moegraft.core.errors import ParallelError, UnsupportedModelError
from moegraft.integrations.transformers.host.dtensors import has_plan, is_sharded, whole
from moegraft.integrations.transformers.host.storage import HostExperts
from moegraft.integrations.transformers.parallel.plan import ModelPlan, read_plan
from moegraft.lora.targets import ExpertsTarget, ModelTargets, local_targets
from moegraft.parallel import Agreement, ExpertsSlice, ParallelConfig, ParallelGroups, RankSlice, Share, experts_slice
from moegraft.parallel.slices import ExpertMap


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What ``attach`` was asked for; see there."""

    config: ParallelConfig | None = None
    expert_maps: Mapping[str, ExpertMap] | None = None
    device: torch.device | str | None = None


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """What this rank holds of a model, and the ranks that it shares the rest with.

    ``mine``: of every module · ``expert_maps``: of the experts modules that attach cuts to the rank's slice itself;
    those that a plan of transformers has cut are not among them · ``plan``: that plan, None where there is none.
    """

    groups: ParallelGroups
    mine: RankSlice = field(default_factory=RankSlice)
    expert_maps: Mapping[str, ExpertMap] = field(default_factory=dict)
    plan: ModelPlan | None = None

    @property
    def is_parallel(self) -> bool:
        return self.groups.world.size > 1

    @property
    def rows_travel(self) -> bool:
        """Whether experts see rows of other ranks."""
        return self.groups.config.data_parallel and bool(self.expert_maps)

    def local_targets(self, targets: ModelTargets) -> ModelTargets:
        """The sizes that this rank's adapters have."""
        return local_targets(targets, self.mine) if self.is_parallel else targets


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What one rank finds out about its model by itself. ``experts``: of ``targets`` · ``device``, ``dtype``: of the
    experts · ``top_k``: experts a token · ``plan``: of transformers; None where the model was loaded whole."""

    targets: ModelTargets
    experts: Mapping[str, HostExperts]
    device: torch.device
    dtype: torch.dtype
    top_k: int
    plan: ModelPlan | None


def agree_on_layout(
    model: PreTrainedModel,
    options: RankOptions,
    examine: Callable[[], ModelFacts],
    options_of_attach: Mapping[str, object],
) -> tuple[ModelFacts, RankLayout]:
    """The layout of a model that was loaded whole, or with a parallel plan of transformers; changes nothing.

    Collective where there are several ranks: ``examine`` may raise on some of them, and all raise then.
    ``options_of_attach``: what else all ranks must have been given alike. Raises what ``examine`` raised,
    UnsupportedModelError where ``options`` and the plan do not go together, ParallelError where torch.distributed does
    not fit them or the ranks differ.
    """
    facts: ModelFacts | None = None
    failure: Exception | None = None
    try:
        facts = examine()
    except Exception as error:
        failure = error
    groups = _groups_of(model, options.config, facts, failure)
    try:
        with Agreement(groups.control).step() as step:
            if facts is None:
                raise cast("Exception", failure)
            layout = _lay_out(options, facts, groups)
            step.same("their models", lambda: _description(facts))
            step.same("expert_maps", lambda: sorted(layout.expert_maps.items()))
            for option, value in options_of_attach.items():
                step.same(option, lambda value=value: value)  # type: ignore[misc]
    except BaseException:
        groups.close()
        raise
    return facts, layout


def _groups_of(
    model: PreTrainedModel, config: ParallelConfig | None, facts: ModelFacts | None, failure: Exception | None
) -> ParallelGroups:
    """Collective where there are several ranks, of which one may have found no ``facts``."""
    if config is None and not has_plan(model):
        return ParallelGroups.alone()  # a process of some other world may graft a model of its own
    device = facts.device if facts is not None else getattr(model, "device", torch.device("cpu"))
    try:
        return ParallelGroups.create(_config_of_groups(config, None if facts is None else facts.plan), device)
    except ParallelError as error:
        if failure is not None:
            raise failure from error
        raise


def _lay_out(options: RankOptions, facts: ModelFacts, groups: ParallelGroups) -> RankLayout:
    layout = RankLayout(groups=groups)
    if facts.plan is not None:
        layout = replace(layout, mine=facts.plan.slice, plan=facts.plan)
    # A plan may leave the experts whole (gpt-oss): attach shares them out where it is asked to.
    cuts = options.config is not None and layout.is_parallel and not layout.mine.experts
    return _with_cuts(facts, layout, facts.targets.experts if cuts else {}, options.expert_maps or {})


def planned(model: PreTrainedModel, targets: ModelTargets, config: ParallelConfig | None) -> ModelPlan | None:
    """The plan of transformers that a model was loaded with. Raises UnsupportedModelError where ``config`` is not what
    it does, or LoRA cannot follow it."""
    if not has_plan(model):
        return None
    plan = read_plan(model, targets)
    _check_plan(model, plan, config)
    return plan


def _config_of_groups(config: ParallelConfig | None, plan: ModelPlan | None) -> ParallelConfig:
    """A plan of transformers has its own: all ranks are one tensor-parallel group, and no rows travel."""
    if config is not None and (plan is None or not plan.slice.experts):
        return config
    timeout = ParallelConfig().timeout_seconds if config is None else config.timeout_seconds
    return ParallelConfig(tp=dist.get_world_size() if plan is None else plan.size, timeout_seconds=timeout)


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank would keep of one unquantised experts module: ids of experts, columns [start, stop) of F, bytes."""

    rank: int
    layer: str
    experts: tuple[int, ...]
    columns: tuple[int, int]
    num_bytes: int


def rank_shares(targets: Iterable[ExpertsTarget], config: ParallelConfig, itemsize: int) -> list[RankShare]:
    """What ``attach(parallel=config)`` would leave on every rank, without biases. Raises UnsupportedModelError."""
    shares = []
    for target in targets:
        expert_map = _contiguous(target.name, target, config)
        halves = 2 if target.has_gate else 1
        for rank in range(config.world_size):
            experts = expert_map.experts_of_rank[config.ep_rank_of(rank)]
            part = Share(config.tp, config.tp_rank_of(rank)).of(target.intermediate_size)
            size = len(experts) * (halves + 1) * part.padded * target.hidden_size * itemsize
            shares.append(
                RankShare(
                    rank=rank,
                    layer=target.name,
                    experts=experts,
                    columns=(part.start, part.stop),
                    num_bytes=size,
                )
            )
    return shares


def with_whole_parameters(targets: ModelTargets) -> ModelTargets:
    """Where adapters may replace a parameter that a plan has sharded: all of it, in host memory. Collective.

    PEFT saves embeddings and heads along with LoRA, unchanged: what an adapter brings is compared with what is there.
    """
    return replace(
        targets,
        saveable={
            module: {param: whole(tensor).cpu() if is_sharded(tensor) else tensor for param, tensor in params.items()}
            for module, params in targets.saveable.items()
        },
    )


def _check_plan(model: PreTrainedModel, plan: ModelPlan, config: ParallelConfig | None) -> None:
    """What was asked for must be what the plan does."""
    if config is None:
        return
    found = f"{type(model).__name__} was loaded with a plan for {plan.size} ranks"
    if config.world_size != plan.size or config.data_parallel:
        raise UnsupportedModelError(f"{found} that bring the same rows; it cannot be attached with {config}")
    if not plan.slice.experts and plan.slice.linears.keys() - plan.whole_rows and config.ep > 1:
        raise UnsupportedModelError(
            f"{found} that shares linear maps out and leaves experts whole: attach with tp={plan.size}, "
            f"not with {config}"
        )
    if plan.slice.experts:
        by_experts = any(mine.experts is not None for mine in plan.slice.experts.values())
        does = {"tp": 1, "ep": plan.size} if by_experts else {"tp": plan.size, "ep": 1}
        if (config.tp, config.ep, config.fully_sharded) != (*does.values(), False):
            raise UnsupportedModelError(
                f"{found} that shares its experts out with tp={does['tp']} and ep={does['ep']}; attach without "
                f"parallel=, or load the model whole; it cannot be attached with {config}"
            )


def _with_cuts(
    facts: ModelFacts,
    layout: RankLayout,
    to_cut: Mapping[str, ExpertsTarget],
    expert_maps: Mapping[str, ExpertMap],
) -> RankLayout:
    unknown = sorted(expert_maps.keys() - to_cut.keys())
    if unknown:
        raise UnsupportedModelError(f"expert_maps names {unknown[0]!r}, which is no experts module that is shared out")
    maps, slices = {}, dict(layout.mine.experts)
    for name, target in to_cut.items():
        maps[name] = expert_maps.get(name) or _contiguous(name, target, layout.groups.config)
        granule = facts.experts[name].weights().intermediate_granule
        slices[name] = _slice_of(target, granule, maps[name], layout.groups)
    return replace(layout, mine=replace(layout.mine, experts=slices), expert_maps=maps)


def _contiguous(name: str, target: ExpertsTarget, config: ParallelConfig) -> ExpertMap:
    try:
        return ExpertMap.contiguous(target.num_experts, config.ep)
    except ValueError as error:
        raise UnsupportedModelError(f"experts module {name!r}: {error}") from None


def _slice_of(target: ExpertsTarget, granule: int, expert_map: ExpertMap, groups: ParallelGroups) -> ExpertsSlice:
    config = groups.config
    return experts_slice(
        num_experts=target.num_experts,
        intermediate_size=target.intermediate_size,
        tp=Share(config.tp, groups.tp.rank),
        ep=Share(config.ep, groups.ep.rank),
        granule=granule,
        experts=expert_map.experts_of_rank[groups.ep.rank] if config.ep > 1 else None,
        fully_sharded=config.fully_sharded,
    )


def _description(facts: ModelFacts) -> object:
    """Modules, sizes and numbers: ranks that loaded different models must not go on."""
    targets = facts.targets
    return (
        (targets.model_type, [*targets.experts.values()], facts.dtype, facts.top_k),
        [(t.name, t.in_features, t.out_features) for t in targets.linears.values()],
        [*targets.embeddings.values()],
    )

"""Degenerate and odd cases of one experts layer as a table, and random inputs for a case.

Shape letters: T tokens · K experts per token · E experts · D hidden size · F expert intermediate size ·
G = 2 (gate and up) or 1 (no gate) · h experts that an adapter holds · r rank
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.testing.moe_reference import ExpertsFactors, ExpertsWeights
from moegraft.testing.workloads import Popularity, draw_adapters

ODD_RANKS = (1, 3, 7, 8, 16, 64)


class Routing(enum.StrEnum):
    """Which experts the tokens of a case choose; the K experts of a token are distinct."""

    RANDOM = "random"
    HOT = "hot"  # every token chooses experts 0..K-1
    SENTINELS = "sentinels"  # random, then every other choice is an id outside [0, E): -1 or E


@dataclass(frozen=True, kw_only=True)
class LoRASpec:
    """What one adapter holds. A rank of 0 leaves the projection out.

    ``shared_a13``: gate and up read one A. ``shared_outer``: one A of w13 and one B of w2 serve all experts.
    ``expert_ids``: None holds all experts.
    """

    r_gate: int = 8
    r_up: int = 8
    r2: int = 8
    shared_a13: bool = False
    shared_outer: bool = False
    expert_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MoECase:
    """A layer, its adapters and a batch. Row t asks for an adapter by ``popularity`` and ``base_share``."""

    name: str
    config: MoEConfig
    num_tokens: int = 12
    adapters: tuple[LoRASpec, ...] = (LoRASpec(), LoRASpec(r_gate=4, r_up=4, r2=4), LoRASpec())
    popularity: Popularity = Popularity.UNIFORM
    base_share: float = 0.25
    routing: Routing = Routing.RANDOM
    is_transposed: bool = False
    is_interleaved: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class MoEInputs:
    """Tensors of a case in its dtype: ``x_TD``, ``topk_ids_TK`` int32, ``topk_weights_TK`` float32 in [0.1, 1.1),
    ``token_slots_T`` int32 (index into ``adapters``, -1 = none), weights and adapters.
    """

    x_TD: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    token_slots_T: torch.Tensor
    weights: ExpertsWeights
    adapters: tuple[ExpertsFactors, ...]


def make_inputs(case: MoECase, *, seed: int = 0, device: torch.device | str = "cpu") -> MoEInputs:
    """Random inputs of a case, the same on every device. Base output and delta are of like size."""
    config, generator = case.config, torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(case.num_tokens, config.num_experts, generator=generator)
    if case.routing == Routing.HOT:
        logits_TE -= 100.0 * torch.arange(config.num_experts)
    topk_ids_TK = logits_TE.topk(config.top_k, dim=1).indices
    if case.routing == Routing.SENTINELS:
        topk_ids_TK.view(-1)[::4] = -1
        topk_ids_TK.view(-1)[2::4] = config.num_experts
    token_slots_T = torch.full((case.num_tokens,), -1, dtype=torch.int32)
    if case.adapters:
        token_slots_T = draw_adapters(
            case.popularity, case.num_tokens, len(case.adapters), base_share=case.base_share, seed=seed
        )
    return MoEInputs(
        x_TD=_randn(generator, case.num_tokens, config.hidden_size).to(device, config.dtype),
        topk_ids_TK=topk_ids_TK.to(device, torch.int32),
        topk_weights_TK=(torch.rand(topk_ids_TK.shape, generator=generator) + 0.1).to(device),
        token_slots_T=token_slots_T.to(device),
        weights=_make_weights(case, generator, device),
        adapters=tuple(make_lora(spec, config, generator=generator, device=device) for spec in case.adapters),
    )


def make_lora(
    spec: LoRASpec, config: MoEConfig, *, generator: torch.Generator, device: torch.device | str = "cpu"
) -> ExpertsFactors:
    """Random factors of one adapter in the layout of ``ExpertsFactors``; without a gate ``r_gate`` is ignored."""
    expert_ids = tuple(range(config.num_experts)) if spec.expert_ids is None else spec.expert_ids
    held, outer = len(expert_ids), 1 if spec.shared_outer else len(expert_ids)
    hidden, width = config.hidden_size, config.intermediate_size
    r_gate = spec.r_gate if config.activation.gated else 0
    up_lane = 0 if spec.shared_a13 else r_gate
    r13 = max(r_gate, up_lane + spec.r_up)

    def factor(leading: int, rank: int, row_len: int, fan_in: int) -> torch.Tensor | None:
        if rank == 0:
            return None
        return (_randn(generator, leading, rank, row_len) / fan_in**0.5).to(device, config.dtype)

    return ExpertsFactors(
        expert_ids=expert_ids,
        a13=factor(outer, r13, hidden, hidden),
        b_gate=factor(held, r_gate, width, r_gate),
        b_up=factor(held, spec.r_up, width, spec.r_up),
        up_lane=up_lane if spec.r_up else 0,
        a2=factor(held, spec.r2, width, width),
        b2=factor(outer, spec.r2, hidden, spec.r2),
    )


def _make_weights(case: MoECase, generator: torch.Generator, device: torch.device | str) -> ExpertsWeights:
    config = case.config
    experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
    w13 = _randn(generator, experts, config.activation.num_halves * width, hidden) / hidden**0.5
    w2 = _randn(generator, experts, hidden, width) / width**0.5
    if case.is_transposed:
        w13, w2 = w13.mT.contiguous(), w2.mT.contiguous()
    b13 = b2 = None
    if config.has_bias:
        b13 = _randn(generator, experts, config.activation.num_halves * width).to(device, config.dtype)
        b2 = _randn(generator, experts, hidden).to(device, config.dtype)
    return ExpertsWeights(
        w13=w13.to(device, config.dtype),
        w2=w2.to(device, config.dtype),
        b13=b13,
        b2=b2,
        is_transposed=case.is_transposed,
        is_interleaved=case.is_interleaved,
    )


def _randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


_SMALL = MoEConfig(num_experts=6, top_k=2, hidden_size=32, intermediate_size=16)
_ODD = MoEConfig(num_experts=5, top_k=3, hidden_size=37, intermediate_size=19)


def _with_activation(kind: ActivationKind, *, gated: bool = True) -> MoEConfig:
    return replace(_SMALL, activation=Activation(kind=kind, gated=gated))


MOE_CASES: tuple[MoECase, ...] = (
    MoECase(name="no_tokens", config=_SMALL, num_tokens=0),
    MoECase(name="one_token", config=_SMALL, num_tokens=1, base_share=0.0),
    MoECase(name="one_base_token", config=_SMALL, num_tokens=1, base_share=1.0),
    MoECase(name="no_adapters_loaded", config=_SMALL, adapters=()),
    MoECase(name="no_adapters_used", config=_SMALL, base_share=1.0),
    MoECase(name="only_adapters", config=_SMALL, base_share=0.0),
    MoECase(name="one_adapter", config=_SMALL, popularity=Popularity.IDENTICAL, base_share=0.0),
    MoECase(name="an_adapter_per_token", config=_SMALL, adapters=(LoRASpec(),) * 12, popularity=Popularity.DISTINCT),
    MoECase(name="one_hot_expert", config=replace(_SMALL, top_k=1), num_tokens=33, routing=Routing.HOT),
    MoECase(name="one_expert", config=replace(_SMALL, num_experts=1, top_k=1)),
    MoECase(name="all_experts", config=replace(_SMALL, top_k=6)),
    MoECase(name="odd_sizes", config=_ODD, num_tokens=13),
    MoECase(name="many_tokens", config=_SMALL, num_tokens=67, popularity=Popularity.ZIPF),
    MoECase(name="sentinels", config=_SMALL, routing=Routing.SENTINELS),
    MoECase(
        name="mixed_ranks",
        config=_ODD,
        adapters=tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in ODD_RANKS),
        popularity=Popularity.DISTINCT,
        num_tokens=16,
    ),
    MoECase(
        name="ranks_differ_by_projection",
        config=_ODD,
        adapters=(LoRASpec(r_gate=1, r_up=7, r2=16), LoRASpec(r_gate=3, r_up=64, r2=1)),
    ),
    MoECase(
        name="single_projections",
        config=_SMALL,
        adapters=(LoRASpec(r_up=0, r2=0), LoRASpec(r_gate=0, r2=0), LoRASpec(r_gate=0, r_up=0), LoRASpec(r2=0)),
        popularity=Popularity.DISTINCT,
    ),
    MoECase(
        name="some_experts",
        config=_SMALL,
        adapters=(LoRASpec(expert_ids=(1, 4)), LoRASpec(expert_ids=(0,)), LoRASpec()),
        num_tokens=24,
    ),
    MoECase(name="shared_a13", config=_SMALL, adapters=(LoRASpec(shared_a13=True), LoRASpec())),
    MoECase(name="shared_outer", config=_SMALL, adapters=(LoRASpec(shared_outer=True), LoRASpec())),
    MoECase(
        name="shared_outer_shared_a13", config=_SMALL, adapters=(LoRASpec(shared_outer=True, shared_a13=True, r_up=3),)
    ),
    MoECase(name="bias", config=replace(_SMALL, has_bias=True)),
    MoECase(name="transposed", config=_ODD, is_transposed=True),
    MoECase(name="interleaved", config=_ODD, is_interleaved=True),
    MoECase(
        name="gpt_oss",
        config=replace(_with_activation(ActivationKind.SWIGLU_OAI), has_bias=True),
        is_transposed=True,
        is_interleaved=True,
    ),
    MoECase(name="gelu", config=_with_activation(ActivationKind.GELU)),
    MoECase(name="gelu_tanh", config=_with_activation(ActivationKind.GELU_TANH)),
    MoECase(name="silu_clamped", config=_with_activation(ActivationKind.SILU_CLAMPED)),
    MoECase(name="silu_softcapped", config=_with_activation(ActivationKind.SILU_SOFTCAPPED)),
    MoECase(name="clamped_silu", config=_with_activation(ActivationKind.CLAMPED_SILU)),
    MoECase(name="relu2_without_gate", config=_with_activation(ActivationKind.RELU2, gated=False)),
    MoECase(name="weight_on_input", config=replace(_SMALL, top_k=1, apply_router_weight_on_input=True)),
)

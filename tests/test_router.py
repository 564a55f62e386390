"""The router functions against loops over tokens, and against the routers of transformers' own model files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moegraft.moe.router import GroupScore, RouterConfig, Scoring, route

NUM_TOKENS, NUM_EXPERTS, HIDDEN = 37, 8, 16
TOL = {"rtol": 1e-6, "atol": 1e-7}  # the same float32 formula in another order


def loop_reference(
    logits_TE: torch.Tensor, config: RouterConfig, bias_E: torch.Tensor | None
) -> tuple[list[list[float]], list[list[int]]]:
    """Token by token, in Python floats: scores, groups, choice, weights."""
    weights, ids = [], []
    for logits_E in logits_TE.double():
        match config.scoring:
            case Scoring.SIGMOID:
                scores = logits_E.sigmoid().tolist()
            case Scoring.SOFTMAX:
                scores = logits_E.softmax(0).tolist()
            case Scoring.SOFTMAX_TOPK:
                scores = logits_E.exp().tolist()
        bias = [0.0] * NUM_EXPERTS if bias_E is None else bias_E.tolist()
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
        allowed = set(range(NUM_EXPERTS))
        if config.num_groups > 1:
            size = NUM_EXPERTS // config.num_groups
            groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
            best_n = 1 if config.group_score is GroupScore.MAX else 2
            worth = [sum(sorted((choice[e] for e in group), reverse=True)[:best_n]) for group in groups]
            best = sorted(range(config.num_groups), key=lambda g: -worth[g])[: config.top_groups]
            allowed = {e for g in best for e in groups[g]}
        chosen = sorted(allowed, key=lambda e: -choice[e])[: config.top_k]
        row = [scores[e] for e in chosen]
        if config.renormalize or config.scoring is Scoring.SOFTMAX_TOPK:
            row = [weight / sum(row) for weight in row]
        weights.append([weight * config.scale for weight in row])
        ids.append(chosen)
    return weights, ids


CONFIGS = {
    "softmax": RouterConfig(top_k=2),
    "softmax, renormalised": RouterConfig(top_k=3, renormalize=True),
    "softmax of the chosen": RouterConfig(top_k=2, scoring=Scoring.SOFTMAX_TOPK),
    "sigmoid": RouterConfig(top_k=2, scoring=Scoring.SIGMOID),
    "sigmoid, renormalised, scaled": RouterConfig(top_k=2, scoring=Scoring.SIGMOID, renormalize=True, scale=2.5),
    "one expert": RouterConfig(top_k=1, scoring=Scoring.SIGMOID, renormalize=True),
    "all experts": RouterConfig(top_k=NUM_EXPERTS, renormalize=True),
    "groups by their best": RouterConfig(top_k=2, num_groups=4, top_groups=2, group_score=GroupScore.MAX),
    "groups by their two best": RouterConfig(
        top_k=3, scoring=Scoring.SIGMOID, renormalize=True, scale=1.5, num_groups=2, top_groups=1
    ),
    "groups of one": RouterConfig(top_k=2, num_groups=NUM_EXPERTS, top_groups=3),
    "all groups": RouterConfig(top_k=4, scoring=Scoring.SIGMOID, num_groups=4, top_groups=4),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_tokens(name: str, has_bias: bool) -> None:
    config = CONFIGS[name]
    has_bias = has_bias and config.scoring is not Scoring.SOFTMAX_TOPK
    generator = torch.Generator().manual_seed(1)
    logits_TE = 2 * torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    bias_E = torch.randn(NUM_EXPERTS, generator=generator) if has_bias else None

    weights_TK, ids_TK = route(logits_TE, config, bias_E)
    expected_weights, expected_ids = loop_reference(logits_TE, config, bias_E)

    assert weights_TK.dtype == torch.float32
    assert ids_TK.tolist() == expected_ids
    torch.testing.assert_close(weights_TK, torch.tensor(expected_weights), **TOL)


def test_what_a_choice_by_logits_cannot_do() -> None:
    logits_TE, config = torch.zeros(1, NUM_EXPERTS), CONFIGS["softmax of the chosen"]
    with pytest.raises(ValueError, match="correction bias"):
        route(logits_TE, config, torch.zeros(NUM_EXPERTS))
    with pytest.raises(ValueError, match="groups"):
        route(logits_TE, replace(config, num_groups=2))


def test_no_tokens() -> None:
    weights_TK, ids_TK = route(torch.empty(0, NUM_EXPERTS), CONFIGS["groups by their two best"])
    assert weights_TK.shape == ids_TK.shape == (0, 3)


def test_scores_are_float32_whatever_the_logits_are() -> None:
    logits_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(2)).bfloat16()
    for config in CONFIGS.values():
        weights_TK, _ = route(logits_TE, config)
        torch.testing.assert_close(weights_TK, route(logits_TE.float(), config)[0], rtol=0, atol=0)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias_E = torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights_TK, ids_TK = route(logits_TE, RouterConfig(top_k=1, scoring=Scoring.SIGMOID), bias_E)
    assert ids_TK.tolist() == [[3]]
    assert weights_TK.item() == pytest.approx(torch.tensor(-1.0).sigmoid().item())


_SIZES = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_experts_per_tok": 3}
_GROUPS = {"n_routed_experts": NUM_EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_SIGMOID_GROUPS = RouterConfig(
    top_k=3, scoring=Scoring.SIGMOID, renormalize=True, scale=2.5, num_groups=4, top_groups=2
)
# Each router of transformers: how to build it, and our description of it.
TRANSFORMERS_ROUTERS: dict[str, tuple[Callable[[], nn.Module], RouterConfig]] = {
    "mixtral": (
        lambda: MixtralTopKRouter(MixtralConfig(**_SIZES, num_local_experts=NUM_EXPERTS)),
        RouterConfig(top_k=3, scoring=Scoring.SOFTMAX_TOPK),
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**_SIZES, num_experts=NUM_EXPERTS, norm_topk_prob=True)),
        RouterConfig(top_k=3, renormalize=True),
    ),
    "qwen3_moe, not renormalised": (
        lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**_SIZES, num_experts=NUM_EXPERTS, norm_topk_prob=False)),
        RouterConfig(top_k=3),
    ),
    "gpt_oss": (
        lambda: GptOssTopKRouter(GptOssConfig(**_SIZES, num_local_experts=NUM_EXPERTS)),
        RouterConfig(top_k=3, scoring=Scoring.SOFTMAX_TOPK),
    ),
    "deepseek_v2": (
        lambda: DeepseekV2TopkRouter(DeepseekV2Config(**_SIZES, **_GROUPS, topk_method="group_limited_greedy")),
        RouterConfig(top_k=3, scale=2.5, num_groups=4, top_groups=2, group_score=GroupScore.MAX),
    ),
    "deepseek_v3": (
        lambda: DeepseekV3TopkRouter(DeepseekV3Config(**_SIZES, **_GROUPS, norm_topk_prob=True)),
        _SIGMOID_GROUPS,
    ),
    "glm4_moe": (lambda: Glm4MoeTopkRouter(Glm4MoeConfig(**_SIZES, **_GROUPS, norm_topk_prob=True)), _SIGMOID_GROUPS),
}


def by_expert(weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """[T, E]: some routers do not sort their choice."""
    dense_TE: Any = torch.zeros(weights_TK.shape[0], NUM_EXPERTS, dtype=weights_TK.dtype)
    return dense_TE.scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("name", TRANSFORMERS_ROUTERS)
@torch.no_grad()
def test_equals_transformers(name: str) -> None:
    build, config = TRANSFORMERS_ROUTERS[name]
    router = build()
    generator = torch.Generator().manual_seed(3)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    x_TD = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)

    logits_TE, weights_TK, ids_TK = router(x_TD)
    found = by_expert(*route(logits_TE, config, getattr(router, "e_score_correction_bias", None)))
    expected = by_expert(weights_TK, ids_TK)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, **TOL)

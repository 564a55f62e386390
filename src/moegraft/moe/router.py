"""Router functions: from logits [T, E] to (weights [T, K], expert ids [T, K])."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class Scoring(enum.StrEnum):
    """How logits become scores."""

    SOFTMAX = "softmax"  # over all experts, then top-k (Qwen3-MoE, DeepSeek-V2)
    SOFTMAX_TOPK = "softmax_topk"  # top-k of the logits, then softmax over the chosen (Mixtral, gpt-oss)
    SIGMOID = "sigmoid"  # each expert by itself (DeepSeek-V3, GLM-4-MoE, MiniMax-M2)


class GroupScore(enum.StrEnum):
    """How good a group of experts is."""

    MAX = "max"  # DeepSeek-V2
    TOP2_SUM = "top2_sum"  # DeepSeek-V3


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How experts are chosen. ``num_groups`` > 1: only experts of the best ``top_groups`` groups may be chosen.

    The weights are the scores of the chosen experts *without* the correction bias, divided by their sum where
    ``renormalize``, then multiplied by ``scale``.
    """

    top_k: int
    scoring: Scoring = Scoring.SOFTMAX
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.TOP2_SUM


def route(
    logits_TE: torch.Tensor, config: RouterConfig, correction_bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] float32, ids [T, K] int64); scores are computed in float32.

    Source of the bias-corrected, group-limited choice: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2.
    """
    logits_TE = logits_TE.float()
    if config.scoring is Scoring.SOFTMAX_TOPK:
        if correction_bias_E is not None or config.num_groups > 1:
            raise ValueError("softmax_topk chooses by logits: it has no scores for a correction bias or for groups")
        chosen_TK, ids_TK = logits_TE.topk(config.top_k, dim=-1)
        return chosen_TK.softmax(dim=-1) * config.scale, ids_TK
    scores_TE = logits_TE.sigmoid() if config.scoring is Scoring.SIGMOID else logits_TE.softmax(dim=-1)
    choice_TE = scores_TE if correction_bias_E is None else scores_TE + correction_bias_E
    if config.num_groups > 1:
        choice_TE = choice_TE.masked_fill(~_allowed_by_group(choice_TE, config), float("-inf"))
    ids_TK = choice_TE.topk(config.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if config.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * config.scale, ids_TK


def _allowed_by_group(choice_TE: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    T, E = choice_TE.shape
    grouped = choice_TE.view(T, config.num_groups, E // config.num_groups)
    if config.group_score is GroupScore.MAX:
        score_TG = grouped.amax(dim=-1)
    else:
        score_TG = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    best_TG = score_TG.topk(config.top_groups, dim=-1).indices
    allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best_TG, True)
    return allowed_TG.repeat_interleave(E // config.num_groups, dim=1)

"""Prepare and finalize: the two ends of a layer, where rows leave for their experts and come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from moegraft.core.config import MoEConfig
from moegraft.lora.context import MoELoRAContext


@dataclass(frozen=True, kw_only=True)
class PreparedRows:
    """What experts read. M rows are on this rank (M = T where nothing is dispatched).

    x [M, D] as the GEMM wants it (quantised where the format asks for it) · unquantised [M, D], what LoRA reads ·
    topk_ids [M, K], ids outside [0, E) belong to other ranks · topk_weights [M, K] float32 ·
    slots [M] int32: adapter slot of each row, -1 = base; None where the call has no context.
    expected_choices: None = M*K. Where M follows the routing, how many of the M*K choices a batch of this size brings
    on average: what decides between forms of a GEMM looks at it, or a row's bits would follow its neighbours' routing.
    """

    x_MD: torch.Tensor
    unquantised_MD: torch.Tensor
    topk_ids_MK: torch.Tensor
    topk_weights_MK: torch.Tensor
    slots_M: torch.Tensor | None
    expected_choices: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsOutput:
    """y [M, K, D] not yet weighted, or, where ``is_reduced``, [M, D] weighted and summed over K."""

    y: torch.Tensor
    is_reduced: bool


class FusedMoEPrepareAndFinalize(ABC):
    """A pair: ``finalize`` takes back what ``prepare`` gave out."""

    @abstractmethod
    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> PreparedRows: ...

    @abstractmethod
    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        """out [T, D] in the dtype of the layer's input."""


class NoDispatchPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """One process holds all experts: rows stay where they are."""

    def __init__(self, config: MoEConfig) -> None:
        self.weight_on_input = weighs_input(config)

    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> PreparedRows:
        x_TD, weights_TK = weigh_input(x_TD, topk_weights_TK, on_input=self.weight_on_input)
        return PreparedRows(
            x_MD=x_TD,
            unquantised_MD=x_TD,
            topk_ids_MK=topk_ids_TK,
            topk_weights_MK=weights_TK,
            slots_M=None if lora_context is None else lora_context.mapping.token_slots,
        )

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        return weighted_sum(output, rows)


def weighs_input(config: MoEConfig) -> bool:
    """Whether router weights multiply the input. Raises ValueError where that has no meaning."""
    if config.apply_router_weight_on_input and config.top_k != 1:
        raise ValueError(f"apply_router_weight_on_input needs top_k = 1, found {config.top_k}")
    return config.apply_router_weight_on_input


def weigh_input(
    x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, *, on_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, float32 weights that are still to be applied)."""
    weights_TK = topk_weights_TK.float()
    if not on_input:
        return x_TD, weights_TK
    return (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)


def weighted_sum(output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
    """[M, D]: the sum over K, in the dtype of the experts' output."""
    if output.is_reduced:
        return output.y
    return weighted_sum_float32(output, rows).to(output.y.dtype)


def weighted_sum_float32(output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
    """[M, D] float32 of an output that is not reduced: one batched product, with a fixed order over K."""
    return torch.bmm(rows.topk_weights_MK.unsqueeze(1), output.y.float()).squeeze(1)

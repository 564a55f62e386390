"""FusedMoEModularMethod: what a layer does with its weights, whatever format they are in."""

from __future__ import annotations

import torch

from moegraft.core.config import MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.context import MoELoRAContext
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.kernel import FusedMoEKernel
from moegraft.moe.prepare_finalize import FusedMoEPrepareAndFinalize


class FusedMoEModularMethod:
    """Binds an experts class to weights and puts it behind a prepare/finalize pair."""

    def __init__(
        self,
        config: MoEConfig,
        weights: ExpertsWeights,
        experts_cls: type[FusedMoEExpertsModular],
        prepare_finalize: FusedMoEPrepareAndFinalize,
    ) -> None:
        self.config = config
        self.kernel = FusedMoEKernel(prepare_finalize, experts_cls(config, weights))

    @property
    def experts(self) -> FusedMoEExpertsModular:
        return self.kernel.experts

    def supports_lora(self) -> bool:
        return not self.experts.is_monolithic and self.experts.supports_lora()

    def apply(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
    ) -> torch.Tensor:
        return self.kernel.apply(x_TD, topk_weights_TK, topk_ids_TK, lora_context)

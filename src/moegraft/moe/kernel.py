"""FusedMoEKernel: prepare, experts, finalize, in this order and nothing else."""

from __future__ import annotations

import torch

from moegraft.lora.context import MoELoRAContext
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.prepare_finalize import FusedMoEPrepareAndFinalize


class FusedMoEKernel:
    """A prepare/finalize pair joined to an experts class."""

    def __init__(self, prepare_finalize: FusedMoEPrepareAndFinalize, experts: FusedMoEExpertsModular) -> None:
        if experts.is_monolithic:
            raise ValueError(f"{type(experts).__name__} is monolithic: it has no rows to prepare or finalize")
        self.prepare_finalize = prepare_finalize
        self.experts = experts

    def apply(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
    ) -> torch.Tensor:
        """out [T, D]."""
        rows = self.prepare_finalize.prepare(x_TD, topk_weights_TK, topk_ids_TK, lora_context)
        output = self.experts.apply(rows, lora_context)
        return self.prepare_finalize.finalize(output, rows)

"""TritonExperts: grouped GEMMs with the adapters' deltas inside them. The backend of dense weights on CUDA."""

from __future__ import annotations

import torch

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.formats.dense import DenseExperts
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.mixin import LoRAExpertsMixin
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.prepare_finalize import ExpertsOutput, PreparedRows

MIN_CAPABILITY = (8, 0)
"""Ampere: bfloat16 matrix units and asynchronous copies, which the kernels' tiles count on."""


class TritonExperts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """Rows sorted by (expert, adapter), two grouped GEMMs that walk the lanes of the adapters behind their own K.

    Weights are read where the checkpoint put them, by strides. Buffers of a call come from torch's caching allocator
    in one piece: streams and threads do not share them, and a captured CUDA graph keeps its own. A call without
    adapters launches the base kernels only. Needs Triton when it is called, not when it is imported.
    """

    def __init__(self, config: MoEConfig, weights: DenseExperts) -> None:
        super().__init__(config, weights)
        self._kernel_weights = MoEWeights(
            w13=weights.w13,
            w2=weights.w2,
            b13=weights.b13,
            b2=weights.b2,
            activation=config.activation,
            is_transposed=weights.is_transposed,
            is_interleaved=weights.is_interleaved,
        )

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        device, dtype = request.device, request.config.dtype
        if request.format_name != "dense":
            return False, f"weights are {request.format_name}, TritonExperts reads dense weights only"
        if device.kind != "cuda":
            return False, f"it runs on CUDA devices, the layer is on {device}"
        if not device.has_triton:
            return False, "triton cannot be imported; install moegraft[gpu]"
        if device.capability is None or device.capability < MIN_CAPABILITY:
            return False, f"it needs compute capability 8.0, the device is {device}"
        if dtype not in (torch.bfloat16, torch.float16):
            # The kernels compute float32 exactly (as the tests' interpreter does), which no matrix unit offers.
            return False, f"weights are {dtype}, its tiles are made for the matrix units of bfloat16 and float16"
        return True, ""

    def apply(self, rows: PreparedRows, lora_context: MoELoRAContext | None = None) -> ExpertsOutput:
        from moegraft.kernels.moe_forward.host import fused_moe_lora

        out_MD = fused_moe_lora(
            rows.x_MD.contiguous(),
            self._kernel_weights,
            rows.topk_ids_MK.contiguous(),
            rows.topk_weights_MK.contiguous(),
            lora=self._lora_batch(rows, self.active_context(lora_context)),
        )
        return ExpertsOutput(y=out_MD, is_reduced=True)

    def _lora_batch(self, rows: PreparedRows, context: MoELoRAContext | None) -> LoRABatch | None:
        if context is None:
            return None
        slots_M = context.mapping.token_slots if rows.slots_M is None else rows.slots_M
        return LoRABatch(tables=context.tables, token_slots_T=slots_M, rank13=context.rank_bound, rank2=context.rank2)

"""UnfusedOAITritonExperts: mxfp4 weights, 16-bit activations, in the kernels of TritonExperts. gpt-oss's backend."""

from __future__ import annotations

import torch

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.mxfp4 import MXFP4Experts
from moegraft.kernels.four_bit_product.weights import four_bit_weights
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.experts.marlin_experts import runs_four_bit
from moegraft.moe.experts.triton_experts import TritonExperts


class UnfusedOAITritonExperts(TritonExperts):
    """As TritonExperts, over e2m1 numbers and their block scales; number times scale is exact in bfloat16."""

    def __init__(self, config: MoEConfig, weights: ExpertsWeights) -> None:
        if not isinstance(weights, MXFP4Experts):
            raise TypeError(f"UnfusedOAITritonExperts: found {weights.format_name} weights, expected mxfp4")
        FusedMoEExpertsModular.__init__(self, config, weights)
        self._kernel_weights = four_bit_weights(weights, config.activation, config.dtype)

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        if request.format_name != "mxfp4":
            return False, f"weights are {request.format_name}, it reads mxfp4"
        return runs_four_bit(request, (torch.bfloat16,))

"""MarlinExperts: int4 weights, 16-bit activations, in the kernels of TritonExperts. The backend of GPTQ and AWQ."""

from __future__ import annotations

import torch

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.int4 import Int4Experts
from moegraft.kernels.four_bit_product.weights import four_bit_weights
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.experts.triton_experts import MIN_CAPABILITY, TritonExperts


class MarlinExperts(TritonExperts):
    """As TritonExperts, over int4 weights that were packed once, at load, in the order in which a tile reads them.

    Codes become bfloat16 or float16 in registers. Scales are rounded to the dtype of the rows, as Marlin's are.
    """

    def __init__(self, config: MoEConfig, weights: ExpertsWeights) -> None:
        if not isinstance(weights, Int4Experts):
            raise TypeError(f"MarlinExperts: found {weights.format_name} weights, expected int4")
        FusedMoEExpertsModular.__init__(self, config, weights)
        self._kernel_weights = four_bit_weights(weights, config.activation, config.dtype)

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        if request.format_name != "int4":
            return False, f"weights are {request.format_name}, it reads int4"
        return runs_four_bit(request, (torch.bfloat16, torch.float16))


def runs_four_bit(request: BackendRequest, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether the device runs the kernels of 4-bit weights in the request's dtype."""
    device, dtype = request.device, request.config.dtype
    if device.kind != "cuda":
        return False, f"it runs on CUDA devices, the layer is on {device}"
    if not device.has_triton:
        return False, "triton cannot be imported; install moegraft[gpu]"
    if device.capability is None or device.capability < MIN_CAPABILITY:
        return False, f"it needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, the device is {device}"
    if dtype not in dtypes:
        return False, f"it would compute in {dtype}, it unpacks to {' or '.join(str(d).split('.')[1] for d in dtypes)}"
    return True, ""

"""Experts classes, one a file."""

from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.experts.marlin_experts import MarlinExperts
from moegraft.moe.experts.oai_triton_experts import UnfusedOAITritonExperts
from moegraft.moe.experts.torch_experts import TorchExperts
from moegraft.moe.experts.triton_experts import TritonExperts

__all__ = ["FusedMoEExpertsModular", "MarlinExperts", "TorchExperts", "TritonExperts", "UnfusedOAITritonExperts"]

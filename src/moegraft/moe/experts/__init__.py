"""Experts classes, one a file."""

from moegraft.moe.experts.marlin_experts import MarlinExperts
from moegraft.moe.experts.oai_triton_experts import UnfusedOAITritonExperts
from moegraft.moe.experts.torch_experts import TorchExperts
from moegraft.moe.experts.triton_experts import TritonExperts
from moegraft.moe.layer import FusedMoEExpertsModular

__all__ = ["FusedMoEExpertsModular", "MarlinExperts", "TorchExperts", "TritonExperts", "UnfusedOAITritonExperts"]

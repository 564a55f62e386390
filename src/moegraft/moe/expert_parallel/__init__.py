"""Experts shared out to ranks: three ways in which rows meet them, one class a file."""

from moegraft.moe.expert_parallel.all_gather import AllGatherPrepareAndFinalize
from moegraft.moe.expert_parallel.all_to_all import AllToAllPrepareAndFinalize
from moegraft.moe.expert_parallel.exchange import ExpertParallelPrepareAndFinalize
from moegraft.moe.expert_parallel.replicated import ReplicatedPrepareAndFinalize

__all__ = [
    "AllGatherPrepareAndFinalize",
    "AllToAllPrepareAndFinalize",
    "ExpertParallelPrepareAndFinalize",
    "ReplicatedPrepareAndFinalize",
]

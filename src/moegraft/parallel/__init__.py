"""Several processes, one model: groups, collectives, and the law that says which slice of every tensor a rank owns."""

from moegraft.parallel.collectives import Agreement, Communicator, Step, Traffic
from moegraft.parallel.groups import ParallelConfig, ParallelGroups, backend_of
from moegraft.parallel.slices import (
    ExpertsSlice,
    LinearSlice,
    ParameterSlice,
    RankSlice,
    Shard,
    Share,
    column_parallel,
    experts_slice,
    half_columns,
    row_parallel,
    shard,
    shards,
)

__all__ = [
    "Agreement",
    "Communicator",
    "ExpertsSlice",
    "LinearSlice",
    "ParallelConfig",
    "ParallelGroups",
    "ParameterSlice",
    "RankSlice",
    "Shard",
    "Share",
    "Step",
    "Traffic",
    "backend_of",
    "column_parallel",
    "experts_slice",
    "half_columns",
    "row_parallel",
    "shard",
    "shards",
]

"""Several processes, one model: groups, collectives, and the law that says which slice of every tensor a rank owns."""

from moegraft.parallel.collectives import Communicator, Traffic
from moegraft.parallel.config import ParallelConfig
from moegraft.parallel.groups import ParallelGroups
from moegraft.parallel.slices import Shard, half_columns, shard, shards

__all__ = [
    "Communicator",
    "ParallelConfig",
    "ParallelGroups",
    "Shard",
    "Traffic",
    "half_columns",
    "shard",
    "shards",
]

"""Quantised checkpoints of transformers models, read by moegraft."""

from moegraft.integrations.transformers.checkpoint.build import plain_config
from moegraft.integrations.transformers.checkpoint.load import (
    CheckpointStructure,
    is_quantised,
    load_quantised,
    read_structure,
)

__all__ = ["CheckpointStructure", "is_quantised", "load_quantised", "plain_config", "read_structure"]

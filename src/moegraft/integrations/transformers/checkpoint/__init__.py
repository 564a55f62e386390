"""Quantised checkpoints of transformers models, read by moegraft."""

from moegraft.integrations.transformers.checkpoint.build import auto_class, hollow_structure, plain_config
from moegraft.integrations.transformers.checkpoint.load import (
    CheckpointStructure,
    check_method,
    is_quantised,
    load_quantised,
    read_structure,
)

__all__ = [
    "CheckpointStructure",
    "auto_class",
    "check_method",
    "hollow_structure",
    "is_quantised",
    "load_quantised",
    "plain_config",
    "read_structure",
]

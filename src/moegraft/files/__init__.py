"""Checked readers of untrusted files. Adapters and base checkpoints are their clients, each with errors of its own."""

from moegraft.files.folder import Folder, shorten
from moegraft.files.safetensors import TensorInfo, WeightFiles, WeightFolder

__all__ = ["Folder", "TensorInfo", "WeightFiles", "WeightFolder", "shorten"]

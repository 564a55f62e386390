"""The files of a model's checkpoint, read under the same rules as an adapter's: safetensors only, none outside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moegraft.core.errors import CheckpointError, FileError
from moegraft.files import Folder, WeightFiles, WeightFolder, limits
from moegraft.files.safetensors import DTYPES
from moegraft.integrations.transformers.checkpoint.scheme import quantisation_fields

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

# What quantised checkpoints store beside the dtypes of plain weights, by safetensors' names.
_STORED: Mapping[str, torch.dtype] = {
    **DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_FILES = WeightFiles(
    weights="model.safetensors",
    pickles=("pytorch_model.bin", "pytorch_model.bin.index.json"),
    advice="pickles can run code when they are opened, so they are not read; save the model as safetensors",
    dtypes=_STORED,
)


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """What the readers of files refuse, as an error of the checkpoint."""
    try:
        yield
    except FileError as error:
        raise CheckpointError(str(error)) from error


class Checkpoint(Folder):
    """The open folder of a checkpoint; a context manager. Raises CheckpointError where there is none, or no config."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            super().__init__(path)
        except FileError:
            found = "is a file" if os.path.lexists(path) else "does not exist; download a hub repository first"
            raise CheckpointError(f"{Path(path)}: {found}, expected the folder that holds {CONFIG_FILE}") from None
        if not self.has(CONFIG_FILE):
            self.close()
            raise CheckpointError(f"{self.path}: {CONFIG_FILE} is missing")

    def config(self) -> dict[str, Any]:
        """``config.json``, with what modelopt says of quantisation beside it. Raises CheckpointError."""
        with as_checkpoint_error():
            config = self.read_object(CONFIG_FILE, max_bytes=limits.MAX_CONFIG_BYTES)
            if quantisation_fields(config) is None and self.has(MODELOPT_FILE):
                found = self.read_object(MODELOPT_FILE, max_bytes=limits.MAX_CONFIG_BYTES).get("quantization")
                if isinstance(found, dict) and found.get("quant_algo"):
                    config["quantization_config"] = {"quant_method": "modelopt", **found}
            return config

    def generation_config(self) -> dict[str, Any] | None:
        """``generation_config.json``, None where there is none. Raises CheckpointError."""
        if not self.has(GENERATION_CONFIG_FILE):
            return None
        with as_checkpoint_error():
            return self.read_object(GENERATION_CONFIG_FILE, max_bytes=limits.MAX_GENERATION_CONFIG_BYTES)

    def tensors(self) -> WeightFolder:
        """All tensors, headers checked; a context manager. Raises CheckpointError."""
        with as_checkpoint_error():
            return WeightFolder(self, _FILES)

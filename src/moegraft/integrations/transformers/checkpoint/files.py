"""The files of a model's checkpoint, read under the rules of the adapter loader: safetensors only, none outside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from moegraft.core.errors import AdapterError, CheckpointError
from moegraft.lora.peft.folder import FolderTensors, WeightFiles, file_inside, read_small_file
from moegraft.lora.peft.safetensors_file import DTYPES, TensorInfo
from moegraft.lora.peft.strict_json import StrictJSONError, parse_object

CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 64 * 2**20

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
    """The readers that are shared with the adapter loader raise AdapterError; here the same words mean a checkpoint."""
    try:
        yield
    except AdapterError as error:
        raise CheckpointError(str(error)) from error


def open_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder. Raises CheckpointError where there is none, or no config in it."""
    folder = Path(path)
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "does not exist; download a hub repository first"
        raise CheckpointError(f"{folder}: {found}, expected the folder that holds {CONFIG_FILE}")
    with as_checkpoint_error():
        file_inside(folder, CONFIG_FILE)
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One object. Raises CheckpointError."""
    with as_checkpoint_error():
        data = read_small_file(folder, name, max_bytes=MAX_JSON_BYTES)
    try:
        return parse_object(data)
    except StrictJSONError as error:
        raise CheckpointError(f"{folder / name}: {error}") from None


class CheckpointTensors:
    """All tensors of a checkpoint, from one file or from shards; use as a context manager.

    Raises CheckpointError: no weights, a pickle, a header that lies, or an index that disagrees with its shards.
    """

    def __init__(self, folder: Path) -> None:
        with as_checkpoint_error():
            self._tensors = FolderTensors(folder, _FILES)
        self.infos: Mapping[str, TensorInfo] = self._tensors.infos
        self.unread = set(self.infos)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored. Raises CheckpointError where a value is NaN or infinite."""
        with as_checkpoint_error():
            tensor = self._tensors.read(name)
        self.unread.discard(name)
        return tensor

    def __enter__(self) -> Self:
        self._tensors.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors.__exit__(*error)

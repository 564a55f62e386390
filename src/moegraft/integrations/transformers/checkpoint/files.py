"""The files of a model's checkpoint, read under the rules of the adapter loader: safetensors only, none outside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from moegraft.core.errors import AdapterError, CheckpointError
from moegraft.lora.peft.folder import file_inside, read_small_file
from moegraft.lora.peft.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from moegraft.lora.peft.strict_json import StrictJSONError, parse_object, shorten

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
        self._stack = ExitStack()
        index = _weight_map(folder)
        names = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
        self._file_of: dict[str, SafetensorsFile] = {}
        try:
            with as_checkpoint_error():
                for name in names:
                    file = SafetensorsFile(file_inside(folder, name), dtypes=_STORED)
                    self._add(self._stack.enter_context(file), index)
            for tensor, name in (index or {}).items():
                if tensor not in self._file_of:
                    raise CheckpointError(f"{INDEX_FILE}: tensor {shorten(tensor)} is not in {name}")
        except BaseException:
            self._stack.close()
            raise
        self.infos: Mapping[str, TensorInfo] = {name: file.tensors[name] for name, file in self._file_of.items()}
        self.unread = set(self.infos)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored. Raises CheckpointError where a value is NaN or infinite."""
        with as_checkpoint_error():
            tensor = self._file_of[name].read(name)
        self.unread.discard(name)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, file: SafetensorsFile, index: Mapping[str, str] | None) -> None:
        for name, info in file.tensors.items():
            if name in self._file_of:
                raise CheckpointError(f"{info.where}: also in {self._file_of[name].path.name}")
            if index is not None and index.get(name) != file.path.name:
                raise CheckpointError(f"{info.where}: {INDEX_FILE} places it in {shorten(index.get(name))}")
            self._file_of[name] = file


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """Tensor name -> shard, or None where there is one file."""
    has_weights, has_index = (os.path.lexists(folder / name) for name in (WEIGHTS_FILE, INDEX_FILE))
    if has_weights and has_index:
        raise CheckpointError(f"{folder}: both {WEIGHTS_FILE} and {INDEX_FILE}; expected one of them")
    if has_weights:
        return None
    if not has_index:
        raise CheckpointError(
            f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}; other formats (pickles, GGUF) are not read"
        )
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: weight_map is {shorten(weight_map)}, expected an object of file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE}: tensor {shorten(tensor)}: {shorten(name)} is no safetensors file")
    return weight_map

"""The files of an adapter: which may be read, which are refused, and that none of them lies outside its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from moegraft.core.errors import AdapterFileError
from moegraft.lora.peft.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from moegraft.lora.peft.strict_json import StrictJSONError, parse_object, shorten
from moegraft.lora.slicing import Cuts

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.bin.index.json", "adapter_model.pt", "adapter_model.pth")
MAX_INDEX_BYTES = 64 * 2**20

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONVERT = (
    "pickles can run code when they are opened, so they are not read; load the adapter with PEFT where you trust it "
    "and save it again with save_pretrained(..., safe_serialization=True)"
)


def open_folder(path: str | os.PathLike[str]) -> Path:
    """The adapter's folder. Raises AdapterFileError where it is missing, a file, or the id of a hub repository."""
    folder = Path(path)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise AdapterFileError(f"{folder}: is a file; expected the folder that holds {CONFIG_FILE}")
    hint = ""
    if _HUB_ID.fullmatch(os.fspath(path)):
        hint = "; ids of hub repositories are not supported: download it first and pass the folder"
    raise AdapterFileError(f"{folder}: no such folder{hint}")


def read_small_file(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """A file inside the folder, whole. Raises AdapterFileError where it is missing, outside, or too large."""
    file = file_inside(folder, name)
    try:
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise AdapterFileError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > max_bytes:
        raise AdapterFileError(f"{name}: larger than {max_bytes} bytes")
    return data


def file_inside(folder: Path, name: str) -> Path:
    """``folder / name``, where it is a regular file of that folder. A link may only lead to another file in the
    folder, or, in the cache of huggingface_hub (``models--*/snapshots/<revision>``), to ``models--*/blobs``."""
    if name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise AdapterFileError(f"{folder}: {shorten(name)} is not a plain file name")
    file = folder / name
    if not os.path.isfile(file):  # unlike Path.is_file, false for names that no file can have
        found = "is not a regular file" if os.path.lexists(file) else "is missing"
        raise AdapterFileError(f"{folder}: {shorten(name)} {found}")
    real, home = file.resolve(), folder.resolve()
    allowed = {home}
    if home.parent.name == "snapshots":
        allowed.add(home.parent.parent / "blobs")
    if real.parent not in allowed:
        raise AdapterFileError(f"{folder}: {shorten(name)} is a link that leaves the folder")
    return file


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """How the weights of a folder are called. ``pickles``: what is refused in their stead, with ``advice``."""

    weights: str
    pickles: tuple[str, ...]
    advice: str
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)

    @property
    def index(self) -> str:
        """The file that says which tensor is in which shard."""
        return f"{self.weights}.index.json"


ADAPTER_FILES = WeightFiles(weights=WEIGHTS_FILE, pickles=PICKLE_FILES, advice=_CONVERT)


class FolderTensors:
    """All tensors of an adapter (or of what else has ``names``), from one file or from shards; a context manager.

    Raises:
        AdapterFileError: no weights, only pickles, or an index that disagrees with its shards.
        AdapterTensorError: a dtype that is not served; while reading, values that are not finite.
    """

    def __init__(self, folder: Path, names: WeightFiles = ADAPTER_FILES) -> None:
        self._names = names
        self._stack = ExitStack()
        try:
            index = _weight_map(folder, names)
            shards = sorted(set(index.values())) if index is not None else [names.weights]
            self.files = [
                self._stack.enter_context(SafetensorsFile(file_inside(folder, shard), dtypes=names.dtypes))
                for shard in shards
            ]
            self._file_of: dict[str, SafetensorsFile] = {}
            for file in self.files:
                self._add(file, index)
            self._check_index_complete(index)
        except BaseException:
            self._stack.close()
            raise
        self.infos: Mapping[str, TensorInfo] = {name: file.tensors[name] for name, file in self._file_of.items()}

    @property
    def nbytes(self) -> int:
        """Size of the weight files, headers included."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self.files)

    def read(self, name: str, cuts: Cuts | None = None) -> torch.Tensor:
        """One tensor or ``cuts`` of it, on the CPU, in the file's dtype, finite."""
        return self._file_of[name].read(name, cuts)

    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes of a tensor as they are stored; all of a smaller one."""
        return self._file_of[name].read_start(name, nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, file: SafetensorsFile, index: Mapping[str, str] | None) -> None:
        for name, info in file.tensors.items():
            if name in self._file_of:
                raise AdapterFileError(f"{info.where}: also in {self._file_of[name].path.name}")
            if index is not None and index.get(name) != file.path.name:
                raise AdapterFileError(f"{info.where}: {self._names.index} places it in {shorten(index.get(name))}")
            self._file_of[name] = file

    def _check_index_complete(self, index: Mapping[str, str] | None) -> None:
        for name, file in (index or {}).items():
            if name not in self._file_of:
                raise AdapterFileError(f"{self._names.index}: tensor {shorten(name)} is not in {file}")


def _weight_map(folder: Path, names: WeightFiles) -> Mapping[str, str] | None:
    """Tensor name -> shard, or None where there is one file."""
    has_weights, has_index = (os.path.lexists(folder / name) for name in (names.weights, names.index))
    if has_weights and has_index:
        raise AdapterFileError(f"{folder}: both {names.weights} and {names.index}; expected one of them")
    if has_weights:
        return None
    if not has_index:
        pickles = [name for name in names.pickles if os.path.lexists(folder / name)]
        if pickles:
            raise AdapterFileError(f"{folder}: {pickles[0]}: {names.advice}")
        raise AdapterFileError(f"{folder}: neither {names.weights} nor {names.index}")
    try:
        index = parse_object(read_small_file(folder, names.index, max_bytes=MAX_INDEX_BYTES))
    except StrictJSONError as error:
        raise AdapterFileError(f"{names.index}: {error}") from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFileError(f"{names.index}: weight_map is {shorten(weight_map)}, expected an object of file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise AdapterFileError(f"{names.index}: tensor {shorten(name)}: {shorten(file)} is no safetensors file")
    return weight_map

"""A safetensors reader for untrusted files: the whole header is checked before one byte of a tensor is read.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the data. The header maps a tensor's name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets relative to the data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch

from moegraft.core.errors import AdapterFileError, AdapterTensorError
from moegraft.lora.peft.strict_json import StrictJSONError, parse_object, shorten
from moegraft.lora.slicing import Cuts, cut_tensor
from moegraft.parallel.slices import count

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_NAME_CHARS = 1024
MAX_DIM = 2**31 - 1
MAX_DIMS = 8
# Shorter runs are not skipped over but read along: a disk gives no less, and a call costs more than their bytes.
MIN_RUN_BYTES = 512

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass and no mask: many times faster than ``isfinite().all()``."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # torch compares no 8-bit floats; e4m3fn and e8m0fnu have NaN and no infinity
        bits = tensor.view(torch.uint8)
        return not bool((bits == 255).any() if tensor.dtype is torch.float8_e8m0fnu else (bits & 127 == 127).any())
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # a NaN comes out of both


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a checked header. ``offset``: its first byte, counted from the start of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def where(self) -> str:
        """File and tensor, as every message names them."""
        return f"{self.file.name}: tensor {shorten(self.name)}"


class SafetensorsFile:
    """One open file. Reads go through the handle that was checked, so a file swapped meanwhile changes nothing.

    Plain reads instead of a memory map: a file that shrinks under a map kills the process, a short read raises.

    ``dtypes``: the dtypes that are taken, by safetensors' names.

    Raises:
        AdapterFileError: unreadable, truncated, or a header that lies about the file.
        AdapterTensorError: a tensor of another dtype.
    """

    def __init__(self, path: Path, *, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self.path = path
        self._dtypes = dtypes
        try:
            self._file: FileIO = path.open("rb", buffering=0)
        except OSError as error:
            raise AdapterFileError(f"{path}: cannot be opened ({error.strerror})") from error
        try:
            self.nbytes = self._file.seek(0, 2)
            self.bytes_read = 0
            self.tensors: Mapping[str, TensorInfo] = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, cuts: Cuts | None = None) -> torch.Tensor:
        """The tensor, or ``cuts`` of it, on the CPU, in the file's dtype.

        Only the bytes of the cuts are read where they make runs of ``MIN_RUN_BYTES``. Raises AdapterTensorError where a
        value is NaN or infinite.
        """
        info = self.tensors[name]
        cuts = {axis: pieces for axis, pieces in (cuts or {}).items() if pieces != ((0, info.shape[axis]),)}
        on_disk, in_memory = _split_cuts(info, cuts)
        shape = [count(on_disk[axis]) if axis in on_disk else size for axis, size in enumerate(info.shape)]
        data = bytearray(math.prod(shape) * info.dtype.itemsize)
        filled = 0
        for offset, nbytes in _runs(info, on_disk):
            self._fill(memoryview(data)[filled : filled + nbytes], offset)
            filled += nbytes
        self.bytes_read += filled
        tensor = torch.frombuffer(data, dtype=info.dtype) if data else torch.empty(0, dtype=info.dtype)
        tensor = cut_tensor(tensor.reshape(shape), in_memory)
        if not all_finite(tensor):
            raise AdapterTensorError(f"{info.where} holds NaN or infinite values")
        return tensor

    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes of a tensor as they are stored; all of a smaller one."""
        info = self.tensors[name]
        return bytes(self._read_bytes(info.offset, min(nbytes, info.nbytes)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_bytes(self, offset: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self._fill(memoryview(data), offset)
        return data

    def _fill(self, view: memoryview, offset: int) -> None:
        filled = 0
        try:
            self._file.seek(offset)
            while filled < len(view):
                count = self._file.readinto(view[filled:])
                if not count:
                    raise AdapterFileError(f"{self.path.name}: ends at byte {offset + filled}, while it is being read")
                filled += count
        except OSError as error:
            raise AdapterFileError(f"{self.path.name}: cannot be read ({error.strerror})") from error

    def _read_header(self) -> dict[str, TensorInfo]:
        name = self.path.name
        if self.nbytes < 8:
            raise AdapterFileError(f"{name}: {self.nbytes} bytes, too short for a safetensors header")
        length = int.from_bytes(self._read_bytes(0, 8), "little")
        if length > min(MAX_HEADER_BYTES, self.nbytes - 8):
            raise AdapterFileError(
                f"{name}: header length {length}, but the file has {self.nbytes} bytes "
                f"and a header at most {MAX_HEADER_BYTES}; truncated, or not a safetensors file"
            )
        try:
            header = parse_object(bytes(self._read_bytes(8, length)))
        except StrictJSONError as error:
            raise AdapterFileError(f"{name}: header: {error}") from None
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise AdapterFileError(f"{name}: header: __metadata__ is not an object of strings")
        infos = {key: self._tensor_info(key, entry, 8 + length) for key, entry in header.items()}
        self._check_ranges(infos, 8 + length)
        return infos

    def _tensor_info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        where = f"{self.path.name}: tensor {shorten(name)}"
        if not name or len(name) > MAX_NAME_CHARS:
            raise AdapterFileError(f"{where}: a name of {len(name)} characters, expected 1 to {MAX_NAME_CHARS}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise AdapterFileError(f"{where}: header entry {shorten(entry)}, expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in self._dtypes:
            raise AdapterTensorError(f"{where}: dtype {shorten(dtype)}, expected one of {', '.join(self._dtypes)}")
        if not _is_sizes(shape) or len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
            raise AdapterFileError(f"{where}: shape {shorten(shape)}, expected at most {MAX_DIMS} sizes >= 0")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise AdapterFileError(f"{where}: data_offsets {shorten(offsets)}, expected two integers >= 0")
        begin, end = offsets
        nbytes = math.prod(shape) * self._dtypes[dtype].itemsize
        if end - begin != nbytes:
            raise AdapterFileError(
                f"{where}: data_offsets {offsets} are {end - begin} bytes, but {dtype} {shape} is {nbytes}"
            )
        if data_start + end > self.nbytes:
            raise AdapterFileError(f"{where}: ends at byte {data_start + end}, but the file has {self.nbytes}")
        return TensorInfo(
            name=name,
            file=self.path,
            dtype=self._dtypes[dtype],
            shape=tuple(shape),
            offset=data_start + begin,
            nbytes=nbytes,
        )

    def _check_ranges(self, infos: Mapping[str, TensorInfo], data_start: int) -> None:
        """Tensors follow each other without holes or overlaps, to the last byte of the file."""
        position = data_start
        for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset != position:
                kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
                raise AdapterFileError(f"{info.where}: begins at byte {info.offset}, expected {position}: {kind}")
            position += info.nbytes
        if position != self.nbytes:
            raise AdapterFileError(f"{self.path.name}: {self.nbytes - position} bytes behind the last tensor")


def _split_cuts(info: TensorInfo, cuts: Cuts) -> tuple[Cuts, Cuts]:
    """Which cuts the file is read by, from the outermost axis as long as runs are long, and which are made later."""
    on_disk = {}
    for axis in sorted(cuts):
        run_elems = count(cuts[axis]) * math.prod(info.shape[axis + 1 :]) // max(len(cuts[axis]), 1)
        if 0 < run_elems * info.dtype.itemsize < MIN_RUN_BYTES:
            break
        on_disk[axis] = cuts[axis]
    return on_disk, {axis: pieces for axis, pieces in cuts.items() if axis not in on_disk}


def _runs(info: TensorInfo, cuts: Cuts) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of everything inside the cuts, in the order of the tensor."""
    if not cuts:
        if info.nbytes:
            yield info.offset, info.nbytes
        return
    last = max(cuts)
    unit = math.prod(info.shape[last + 1 :]) * info.dtype.itemsize
    outer: Sequence[range | list[int]] = [
        [index for start, stop in cuts[axis] for index in range(start, stop)] if axis in cuts else range(size)
        for axis, size in enumerate(info.shape[:last])
    ]
    for place in itertools.product(*outer):
        row = 0
        for index, size in zip(place, info.shape, strict=False):
            row = row * size + index
        for start, stop in cuts[last]:
            if stop > start and unit:
                yield info.offset + (row * info.shape[last] + start) * unit, (stop - start) * unit


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

"""A safetensors reader for untrusted files: the whole header is checked before one byte of a tensor is read.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the data. The header maps a tensor's name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets relative to the data.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from typing import Any, Self

import torch

from moegraft.core.cuts import Cuts, cut_tensor
from moegraft.core.errors import FileError, StoredTensorError
from moegraft.files import limits
from moegraft.files.folder import Folder, StrictJSONError, parse_object, shorten

# Shorter runs are not skipped over but read along: a disk gives no less, and a call costs more than their bytes.
MIN_RUN_BYTES = 512
# Values are examined by so many bytes at a time where nobody keeps them.
_BLOCK_BYTES = 2**24

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
    """One tensor of a checked header. ``file``: the name of its file, ``offset``: its first byte in it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def where(self) -> str:
        """File and tensor, as every message names them."""
        return f"{self.file}: tensor {shorten(self.name)}"

    def __str__(self) -> str:
        return self.where


class SafetensorsFile:
    """One open file, which the caller gives over. Everything is checked and read on this one handle.

    Plain reads instead of a memory map: a file that shrinks under a map kills the process, a short read raises.

    ``dtypes``: the dtypes that are taken, by safetensors' names. ``max_tensors``: bounds the header, too.

    Raises:
        FileError: unreadable, truncated, or a header that lies about the file.
        StoredTensorError: a tensor of another dtype.
    """

    def __init__(
        self,
        name: str,
        file: FileIO,
        *,
        dtypes: Mapping[str, torch.dtype] = DTYPES,
        max_tensors: int = limits.MAX_TENSORS,
    ) -> None:
        self.name = name
        self._max_tensors = max_tensors
        self._dtypes = dtypes
        self._file = file
        try:
            self.nbytes = file.seek(0, 2)
            self.bytes_read = 0
            self.tensors: Mapping[str, TensorInfo] = self._read_header()
        except BaseException:
            file.close()
            raise

    def read(self, name: str, cuts: Cuts | None = None) -> torch.Tensor:
        """The tensor, or ``cuts`` of it, on the CPU, in the file's dtype.

        Only the bytes of the cuts are read where they make runs of ``MIN_RUN_BYTES``. Raises StoredTensorError where a
        value is NaN or infinite.
        """
        info = self.tensors[name]
        cuts = {axis: cut for axis, cut in cuts.items() if tuple(cut) != ((0, info.shape[axis]),)} if cuts else {}
        if not cuts:
            return self._finite(info, self._read_bytes(info.offset, info.nbytes), info.shape)
        on_disk, in_memory = _split_cuts(info, cuts)
        shape = [_count(on_disk[axis]) if axis in on_disk else size for axis, size in enumerate(info.shape)]
        data = bytearray(math.prod(shape) * info.dtype.itemsize)
        filled = 0
        for offset, nbytes in _runs(info, on_disk):
            self._fill(memoryview(data)[filled : filled + nbytes], offset)
            filled += nbytes
        return self._finite(info, data, shape, in_memory)

    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes of a tensor as they are stored; all of a smaller one."""
        info = self.tensors[name]
        return bytes(self._read_bytes(info.offset, min(nbytes, info.nbytes)))

    def check_values(self, name: str) -> None:
        """Looks at every value, in memory of a few MiB. Raises StoredTensorError where one is NaN or infinite."""
        info = self.tensors[name]
        for start in range(0, info.nbytes, _BLOCK_BYTES):
            data = self._read_bytes(info.offset + start, min(_BLOCK_BYTES, info.nbytes - start))
            self._finite(info, data, [len(data) // info.dtype.itemsize])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finite(
        self, info: TensorInfo, data: bytearray, shape: Sequence[int], cuts: Cuts | None = None
    ) -> torch.Tensor:
        self.bytes_read += len(data)
        tensor = torch.frombuffer(data, dtype=info.dtype) if data else torch.empty(0, dtype=info.dtype)
        tensor = tensor.reshape(shape)
        if cuts:
            tensor = cut_tensor(tensor, cuts)
        if not all_finite(tensor):
            raise StoredTensorError(f"{info.where} holds NaN or infinite values")
        return tensor

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
                    raise FileError(f"{self.name}: ends at byte {offset + filled}, while it is being read")
                filled += count
        except OSError as error:
            raise FileError(f"{self.name}: cannot be read ({error.strerror})") from error

    def _read_header(self) -> dict[str, TensorInfo]:
        if self.nbytes < 8:
            raise FileError(f"{self.name}: {self.nbytes} bytes, too short for a safetensors header")
        length = int.from_bytes(self._read_bytes(0, 8), "little")
        most = min(limits.MAX_HEADER_BYTES, 2**20 + self._max_tensors * limits.MAX_ENTRY_BYTES)
        if length > min(most, self.nbytes - 8):
            raise FileError(
                f"{self.name}: header length {length}, but the file has {self.nbytes} bytes "
                f"and a header at most {most}; truncated, or not a safetensors file"
            )
        try:
            header = parse_object(bytes(self._read_bytes(8, length)))
        except StrictJSONError as error:
            raise FileError(f"{self.name}: header: {error}") from None
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
            raise FileError(f"{self.name}: header: __metadata__ is not an object of strings")
        if len(header) > self._max_tensors:
            raise FileError(f"{self.name}: {len(header)} tensors, expected at most {self._max_tensors}")
        infos = {key: self._tensor_info(key, entry, 8 + length) for key, entry in header.items()}
        self._check_ranges(infos, 8 + length)
        return infos

    def _tensor_info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        if not name or len(name) > limits.MAX_NAME_CHARS:
            expected = f"expected 1 to {limits.MAX_NAME_CHARS}"
            raise self._refused(name, f"a name of {len(name)} characters, {expected}")
        if not name.isprintable():
            raise self._refused(name, "a name with control characters, line breaks or half of a surrogate pair")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._refused(name, f"header entry {shorten(entry)}, expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in self._dtypes:
            raise StoredTensorError(
                f"{self.name}: tensor {shorten(name)}: dtype {shorten(dtype)}, expected {', '.join(self._dtypes)}"
            )
        if not isinstance(shape, list) or len(shape) > limits.MAX_DIMS or not _are_sizes(shape):
            raise self._refused(name, f"shape {shorten(shape)}, expected at most {limits.MAX_DIMS} sizes >= 0")
        if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets, largest=self.nbytes):
            raise self._refused(name, f"data_offsets {shorten(offsets)}, expected two integers up to {self.nbytes}")
        begin, end = offsets
        nbytes = math.prod(shape) * self._dtypes[dtype].itemsize
        if end - begin != nbytes:
            raise self._refused(
                name, f"data_offsets {offsets} are {end - begin} bytes, but {dtype} {shape} is {nbytes}"
            )
        if data_start + end > self.nbytes:
            raise self._refused(name, f"ends at byte {data_start + end}, but the file has {self.nbytes}")
        return TensorInfo(
            name=name,
            file=self.name,
            dtype=self._dtypes[dtype],
            shape=tuple(shape),
            offset=data_start + begin,
            nbytes=nbytes,
        )

    def _refused(self, name: str, why: str) -> FileError:
        return FileError(f"{self.name}: tensor {shorten(name)}: {why}")

    def _check_ranges(self, infos: Mapping[str, TensorInfo], data_start: int) -> None:
        """Tensors follow each other without holes or overlaps, to the last byte of the file."""
        position = data_start
        for info in sorted(infos.values(), key=operator.attrgetter("offset", "nbytes")):
            if info.offset != position:
                kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
                raise FileError(f"{info.where}: begins at byte {info.offset}, expected {position}: {kind}")
            position += info.nbytes
        if position != self.nbytes:
            raise FileError(f"{self.name}: {self.nbytes - position} bytes behind the last tensor")


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


class WeightFolder:
    """All tensors of a folder, from one file or from shards; a context manager. ``names``: how the files are called.

    ``unread``: tensors of which nothing was read yet, so that a client can tell whether it applied all of them.

    Raises:
        FileError: no weights, only pickles, or an index that disagrees with its shards.
        StoredTensorError: a dtype that is not served; while reading, values that are not finite.
    """

    def __init__(self, folder: Folder, names: WeightFiles, *, max_tensors: int = limits.MAX_TENSORS) -> None:
        self._names = names
        self._max_tensors = max_tensors
        self._stack = ExitStack()
        try:
            index = _weight_map(folder, names)
            shards = sorted(set(index.values())) if index is not None else [names.weights]
            self._file_of: dict[str, SafetensorsFile] = {}
            self.infos: dict[str, TensorInfo] = {}
            self.files: list[SafetensorsFile] = []
            for shard in shards:
                file = SafetensorsFile(shard, folder.open(shard), dtypes=names.dtypes, max_tensors=max_tensors)
                self._stack.callback(file.close)
                self._add(file, index)
            for name, shard in (index or {}).items():
                if name not in self.infos:
                    raise FileError(f"{names.index}: tensor {shorten(name)} is not in {shard}")
            self.unread = set(self.infos)
        except BaseException:
            self._stack.close()
            raise

    @property
    def nbytes(self) -> int:
        """Size of the weight files, headers included."""
        return sum([file.nbytes for file in self.files])

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum([file.bytes_read for file in self.files])

    def read(self, name: str, cuts: Cuts | None = None) -> torch.Tensor:
        """One tensor or ``cuts`` of it, on the CPU, in the file's dtype, finite."""
        self.unread.discard(name)
        return self._file_of[name].read(name, cuts)

    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes of a tensor as they are stored; all of a smaller one."""
        return self._file_of[name].read_start(name, nbytes)

    def check_values(self, name: str) -> None:
        """Looks at every value of a tensor and keeps none of them."""
        self._file_of[name].check_values(name)

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, file: SafetensorsFile, index: Mapping[str, str] | None) -> None:
        for name, info in file.tensors.items():
            if name in self.infos:
                raise FileError(f"{info.where}: also in {self.infos[name].file}")
            if index is not None and index.get(name) != file.name:
                raise FileError(f"{info.where}: {self._names.index} places it in {shorten(index.get(name))}")
            self._file_of[name] = file
        self.infos |= file.tensors
        self.files.append(file)
        if len(self.infos) > self._max_tensors:
            raise FileError(f"{file.name}: more than {self._max_tensors} tensors in one folder")


def _weight_map(folder: Folder, names: WeightFiles) -> Mapping[str, str] | None:
    """Tensor name -> shard, or None where there is one file."""
    has_weights, has_index = folder.has(names.weights), folder.has(names.index)
    if has_weights and has_index:
        raise FileError(f"{folder.path}: both {names.weights} and {names.index}; expected one of them")
    if has_weights:
        return None
    if not has_index:
        pickles = [name for name in names.pickles if folder.has(name)]
        if pickles:
            raise FileError(f"{folder.path}: {pickles[0]}: {names.advice}")
        raise FileError(f"{folder.path}: neither {names.weights} nor {names.index}")
    weight_map = folder.read_object(names.index, max_bytes=limits.MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{names.index}: weight_map is {shorten(weight_map)}, expected an object of file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise FileError(f"{names.index}: tensor {shorten(name)}: {shorten(file)} is no safetensors file")
    return weight_map


def _split_cuts(info: TensorInfo, cuts: Cuts) -> tuple[Cuts, Cuts]:
    """Which cuts the file is read by, from the outermost axis as long as runs are long, and which are made later."""
    on_disk = {}
    for axis in sorted(cuts):
        run_elems = _count(cuts[axis]) * math.prod(info.shape[axis + 1 :]) // max(len(cuts[axis]), 1)
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


def _count(pieces: Sequence[tuple[int, int]]) -> int:
    return sum([stop - start for start, stop in pieces])


def _are_sizes(values: list[Any], *, largest: int = limits.MAX_DIM) -> bool:
    return not [value for value in values if type(value) is not int or not 0 <= value <= largest]

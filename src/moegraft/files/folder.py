"""A folder of untrusted files: which of them may be opened, and that none of them lies outside."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from io import FileIO
from pathlib import Path
from typing import Any, Self

from moegraft.core.errors import FileError


class StrictJSONError(ValueError):
    """The text is not one well-formed JSON object; the message says why, the caller says where."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. Raises StrictJSONError."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except StrictJSONError:
        raise
    except RecursionError:
        raise StrictJSONError("nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise StrictJSONError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise StrictJSONError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJSONError(f"duplicate key {shorten(key)}")
            seen.add(key)
    return result


def _no_constant(text: str) -> float:
    raise StrictJSONError(f"{text} is not JSON")


def shorten(value: object, limit: int = 160) -> str:
    """``repr`` of something that an untrusted file chose, short enough for a message."""
    if not isinstance(value, str):
        return reprlib.repr(value)  # looks at a few items of a few levels only
    text = repr(value[: limit + 1])
    return text if len(value) <= limit else f"{text[:limit]}... ({len(value)} characters)"


class Folder:
    """An open folder; use as a context manager.

    Where a file lies is decided once, from its resolved location: a link may lead to another place inside the folder
    (as Kubernetes' ``..data`` does) or, in the cache of huggingface_hub (``models--*/snapshots/<revision>``), to
    ``models--*/blobs``. Then every step to it is opened without following links, so that what is swapped meanwhile is
    an error, and all checks are made on the handle that is read.

    Raises FileError where there is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._home = os.path.realpath(path, strict=True)
            self._fds = {self._home: os.open(self._home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)}
        except (OSError, ValueError) as error:
            is_file = isinstance(error, NotADirectoryError)
            raise FileError(f"{self.path}: {'is a file' if is_file else 'no such folder'}") from None
        self._blobs = _blobs(Path(self._home))
        self._version: str | None = None  # where ``..data`` led the first file

    def has(self, name: str) -> bool:
        """Whether anything of that name is there."""
        return os.path.lexists(os.path.join(self._home, name))

    def open(self, name: str) -> FileIO:
        """A regular file, unbuffered. Raises FileError where it is none, missing, or outside."""
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise self._refused(name, "is not a plain file name")
        if not self.has(name):
            raise self._refused(name, "is missing")
        try:
            real = os.path.realpath(os.path.join(self._home, name), strict=True)
            root = self._root_of(real)
            if root is None:
                raise self._refused(name, "is a link that leaves the folder")
            parts = os.path.relpath(real, root).split(os.sep)
            if parts[0].startswith("..") and parts[0] != (self._version or parts[0]):
                raise self._refused(name, f"is of another version ({parts[0]}) than files before it ({self._version})")
            self._version = self._version or (parts[0] if parts[0].startswith("..") else None)
            fd = self._open_below(root, parts)
        except (OSError, ValueError) as error:
            code = error.errno if isinstance(error, OSError) else None
            if code in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.ENOENT):  # a link, a socket, a link to nothing
                raise self._refused(name, "is not a regular file") from None
            why = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
            raise self._refused(name, why) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._refused(name, "is not a regular file")
        return FileIO(fd, "rb")

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """A file, whole. Raises FileError, also where it is larger."""
        with self.open(name) as file:
            try:
                if os.fstat(file.fileno()).st_size > max_bytes:
                    raise FileError(f"{name}: larger than {max_bytes} bytes")
                data = bytearray()
                while part := file.read(max_bytes + 1 - len(data)):
                    data += part
            except OSError as error:
                raise FileError(f"{name}: cannot be read ({error.strerror})") from error
        if len(data) > max_bytes:  # it grew
            raise FileError(f"{name}: larger than {max_bytes} bytes")
        return bytes(data)

    def read_object(self, name: str, *, max_bytes: int) -> dict[str, Any]:
        """The JSON object in a file. Raises FileError."""
        try:
            return parse_object(self.read(name, max_bytes=max_bytes))
        except StrictJSONError as error:
            raise FileError(f"{name}: {error}") from None

    def close(self) -> None:
        """Closes the folder; files that were opened stay open."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refused(self, name: str, why: str) -> FileError:
        return FileError(f"{self.path}: {shorten(name)} {why}")

    def _root_of(self, real: str) -> str | None:
        if os.path.commonpath([real, self._home]) == self._home:
            return self._home
        return self._blobs if os.path.dirname(real) == self._blobs else None

    def _open_below(self, root: str, parts: list[str]) -> int:
        """A file by the names of the folders on its way, none of which may be a link now."""
        as_folder = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if root not in self._fds:
            self._fds[root] = os.open(root, as_folder)
        opened: list[int] = []
        try:
            for part in parts[:-1]:
                opened.append(os.open(part, as_folder, dir_fd=opened[-1] if opened else self._fds[root]))
            # Without O_NONBLOCK the opening of a pipe would wait for a writer.
            as_file = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(parts[-1], as_file, dir_fd=opened[-1] if opened else self._fds[root])
        finally:
            for fd in opened:
                os.close(fd)


def _blobs(home: Path) -> str | None:
    """Where the files of a hub snapshot, or of a folder in one, really lie."""
    for folder in home.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return str(folder.parent / "blobs")
    return None

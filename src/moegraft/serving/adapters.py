"""Adapters of a running engine: names, versions, the thread that reads them, pins, unloading that drains.

A name stands for its newest version. Replacing loads a new version beside the old one, which takes no more requests
and goes when its last one has ended; so does a version that is unloaded. The bank knows each version under a key of its
own. Several adapters that one request names are a version of their own, made of theirs, which it keeps meanwhile.
"""

from __future__ import annotations

import itertools
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from moegraft.core.errors import (
    AdapterError,
    AdapterFileError,
    AdapterInUseError,
    AdapterMemoryError,
    AdapterNameError,
    MoegraftError,
    UnknownAdapterError,
)
from moegraft.integrations.transformers import GraftedModel
from moegraft.lora.bank import AdapterBatch
from moegraft.lora.bank.combination import Combination, check_combines
from moegraft.lora.peft.config import CONFIG_FILE
from moegraft.lora.peft.loader import as_adapter_error
from moegraft.serving.ranks import Leader, RankedAdapters
from moegraft.serving.requests import EngineBusyError, label_of
from moegraft.serving.status import FIRST_TOKEN_BUCKETS, AdapterStatus, Observations
from moegraft.serving.text import TextCodec, adapter_template

Source = str | os.PathLike[str] | Mapping[str, bytes]

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_NAME_CHARACTERS = 256
MAX_REMOTE_BYTES = 64 * 2**30
REMOTE_PROTOCOLS = (
    "file", "local", "memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "hdfs", "oci", "oss",
)  # fmt: skip
"""Stores of objects. Of fsspec's others some read what a remote file tells them to (``reference``, chains with ``::``),
and ``http`` reaches whatever this machine does."""
_BLOCK_BYTES = 1 << 24
_REMOTE_FILES = (".safetensors", ".json", ".jinja")


@dataclass(eq=False)
class AdapterVersion:
    """One version of one name. ``uid`` is never given twice; ``users`` counts the requests that it serves.

    ``left_out``: modules that are not served, where ``skip_unserved`` allows to leave them out. ``parts``: the versions
    that it adds up, with their weights, where a request names several.
    """

    name: str
    version: int
    uid: int
    source: str
    state: Literal["loading", "ready", "draining", "failed"] = "loading"
    users: int = 0
    pinned: bool = False
    load_seconds: float = 0.0
    skip_unserved: bool = False
    left_out: tuple[str, ...] = ()
    parts: tuple[tuple[AdapterVersion, float], ...] = ()
    error: AdapterError | None = None
    loaded: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> str:
        """The bank's name of it."""
        return f"{self.name}@+{self.uid}" if self.parts else f"{self.name}@{self.version}"

    def stands_on(self, versions: Sequence[AdapterVersion]) -> bool:
        """Whether it is one of these, or made of one."""
        return self in versions or any(part in versions for part, _ in self.parts)


class AdapterStore:
    """Thread-safe; one thread of its own reads adapters. On several ranks it also unloads and pins them, which no other
    thread then waits for while it holds the lock: the ranks do it together."""

    def __init__(
        self, graft: GraftedModel, codec: TextCodec, *, folder: Path | None, leader: Leader | None = None
    ) -> None:
        """folder: where adapters lie that are loaded on first use · leader: of the other ranks, where there are any."""
        self.folder = folder
        self.load_times = Observations(FIRST_TOKEN_BUCKETS)
        self._graft = graft if leader is None else RankedAdapters(graft, leader)
        self._leader = leader
        self._codec = codec
        self._on_loaded: Callable[[AdapterVersion], None] = lambda version: None
        self._on_gone: Callable[[int], None] = lambda uid: None
        self._lock = threading.RLock()
        self._current: dict[str, AdapterVersion] = {}
        self._loading: dict[str, AdapterVersion] = {}
        self._draining: dict[int, AdapterVersion] = {}
        self._failed: dict[str, AdapterVersion] = {}
        # By uids and weights of their parts; the one used last comes last.
        self._combined: dict[tuple[tuple[int, float], ...], AdapterVersion] = {}
        self._keys: dict[int, str] = {}
        self._held: dict[int, AdapterBatch] = {}
        self._versions: dict[str, int] = {}
        self._uids = itertools.count(1)  # 0 is the base model
        self._jobs: queue.SimpleQueue[tuple[AdapterVersion, Source] | _Act | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._load_all, name="moegraft-adapters", daemon=True)
        self._thread.start()

    def listen(self, on_loaded: Callable[[AdapterVersion], None], on_gone: Callable[[int], None]) -> None:
        """on_loaded is told when a load has ended, well or not; on_gone the uid of what was unloaded."""
        self._on_loaded, self._on_gone = on_loaded, on_gone

    def close(self) -> None:
        """Ends the thread; what waits to be loaded fails."""
        self._jobs.put(None)
        self._thread.join()
        self._refuse_rest()
        for batch in self._held.values():
            batch.release()
        self._held.clear()

    # Requests

    def use(self, adapter: str | Combination) -> AdapterVersion:
        """The version that a new request runs on, loading or ready, counted as used until ``done``.

        Raises UnknownAdapterError; for adapters that add up BatchError, and EngineBusyError where requests use too many
        combinations already.
        """
        with self._lock:
            self.check(adapter)
            version = self._newest(adapter) if isinstance(adapter, str) else self._combination(adapter)
            for each in (version, *(part for part, _ in version.parts)):
                each.users += 1
            return version

    def _newest(self, name: str) -> AdapterVersion:
        version = self._current.get(name) or self._loading.get(name)
        if version is None:
            source = self._in_folder(name)
            assert source is not None
            version = self._start(name, source)
        return version

    def _combination(self, adapters: Combination) -> AdapterVersion:
        """Kept from earlier, or made by the thread, behind the adapters of which it is made."""
        parts = tuple((self._newest(name), weight) for name, weight in adapters)
        key = _parts_key(parts)
        version = self._combined.pop(key, None)
        if version is None:
            most = self._graft.bank.max_slots
            if sum(each.users > 0 for each in self._combined.values()) >= most:
                raise EngineBusyError(f"requests use {most} combinations of adapters; try again later")
            for part, _ in parts:
                if part.state == "ready":
                    check_combines(self._graft.bank, part.key)
            version = AdapterVersion(label_of(adapters), 1, next(self._uids), "other adapters", parts=parts)
            self._keys[version.uid] = version.key
            self._jobs.put((version, {}))
        self._combined[key] = version
        return version

    def check(self, adapter: str | Combination) -> None:
        """Raises UnknownAdapterError where ``use`` would."""
        with self._lock:
            for name in [adapter] if isinstance(adapter, str) else [name for name, _ in adapter]:
                if name not in self._current and name not in self._loading and self._in_folder(name) is None:
                    known = ", ".join(repr(each) for each in self._current) or "none"
                    raise UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {known}")

    def is_loaded(self, name: str) -> bool:
        with self._lock:
            return name in self._current

    def done(self, version: AdapterVersion) -> None:
        """A request has ended."""
        with self._lock:
            for each in (version, *(part for part, _ in version.parts)):
                each.users -= 1
            self._prune()
            for each in (version, *(part for part, _ in version.parts)):
                if each.state == "draining" and each.users == 0:
                    self._drop(each)

    def key(self, uid: int) -> str:
        """The bank's name of a version."""
        return self._keys[uid]

    def hold(self, lane: int) -> bool:
        """See ``Residents``; of the engine's thread."""
        try:
            if self._leader is None:
                held = self._graft.bank.acquire([self._keys[lane]])
            else:
                held = self._leader.hold(lane, self._keys[lane])
        except AdapterMemoryError:
            return False
        self._held[lane] = held
        return True

    def let_go(self, lane: int) -> None:
        self._held.pop(lane).release()
        if self._leader is not None:
            self._leader.let_go(lane)

    # Administrators

    def load(self, name: str, source: Source, *, replace: bool = False, skip_unserved: bool = False) -> AdapterVersion:
        """Waits until the adapter is loaded. Raises AdapterError."""
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_CHARACTERS:
            raise AdapterNameError(f"name: found {name!r}, expected 1 to {MAX_NAME_CHARACTERS} characters")
        with self._lock:
            if name in self._loading:
                raise AdapterNameError(f"an adapter {name!r} is being loaded")
            if name in self._current and not replace:
                raise AdapterNameError(f"an adapter {name!r} is loaded already; unload it first, or replace it")
            version = self._start(name, source, skip_unserved=skip_unserved)
        version.loaded.wait()
        if version.error is not None:
            raise version.error
        return version

    def unload(self, name: str) -> None:
        """Takes a name away. Raises UnknownAdapterError, or AdapterInUseError while requests drain."""
        users = sum(version.users for version in self.retire(name))
        self.settle()
        if users:
            raise AdapterInUseError(
                f"adapter {name!r} serves {users} requests; it takes no more, and goes when they have ended"
            )

    def retire(self, name: str) -> list[AdapterVersion]:
        """Takes a name away, and gives the versions that still serve requests. Raises UnknownAdapterError."""
        with self._lock:
            version = self._current.pop(name, None)
            if version is not None:
                self._codec.set_template(name, None)
                self._retire(version)
            draining = [each for each in self._draining.values() if each.name == name]
            if version is None and not draining:
                known = ", ".join(repr(each) for each in self._current) or "none"
                raise UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {known}")
            return draining

    def pin(self, name: str, *, pinned: bool) -> None:
        """Raises UnknownAdapterError or AdapterMemoryError."""
        self._act(partial(self._pin, name, pinned=pinned)).result()

    def settle(self) -> None:
        """Waits until what was taken away is gone on all ranks too."""
        self._act(lambda: None).result()

    def available(self) -> tuple[str, ...]:
        """Names of the folder that are not loaded."""
        if self.folder is None:
            return ()
        with self._lock, os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries)
            return tuple(name for name in names if name not in self._current and self._in_folder(name))

    def status(self, counts: Callable[[str], tuple[int, int]]) -> dict[str, AdapterStatus]:
        """By name; ``counts``: (running, waiting) sequences of a name."""
        with self._lock:
            newest = {each.name: each for each in (*self._failed.values(), *self._draining.values())}
            newest |= {name: each for name, each in self._loading.items() if name not in self._current}
            newest |= self._current
            return {name: self._status(version, counts(name)) for name, version in sorted(newest.items())}

    def _status(self, version: AdapterVersion, counts: tuple[int, int]) -> AdapterStatus:
        info = None
        if version.state in ("ready", "draining"):
            info = self._graft.bank.info(version.key)
        return AdapterStatus(
            name=version.name,
            version=version.version,
            source=version.source,
            state=version.state,
            residency="none" if info is None else "device" if info.resident else "host",
            pinned=version.pinned,
            ranks={} if info is None else info.ranks,
            num_bytes=0 if info is None else info.num_bytes,
            running=counts[0],
            waiting=counts[1],
            draining=sum(each.name == version.name for each in self._draining.values()),
            load_seconds=version.load_seconds,
            left_out=version.left_out,
            error=None if version.error is None else str(version.error),
        )

    # Inside

    def _in_folder(self, name: str) -> Path | None:
        """The folder of an adapter that may be loaded on first use."""
        if self.folder is None or not name or name.startswith(".") or Path(name).name != name or "\0" in name:
            return None
        path = self.folder / name
        with suppress(OSError):  # a name too long for a file
            return path if (path / CONFIG_FILE).is_file() else None
        return None

    def _start(self, name: str, source: Source, *, skip_unserved: bool = False) -> AdapterVersion:
        number = self._versions[name] = self._versions.get(name, 0) + 1
        shown = "memory" if isinstance(source, Mapping) else os.fspath(source)
        version = AdapterVersion(name, number, next(self._uids), shown, skip_unserved=skip_unserved)
        self._failed.pop(name, None)
        self._loading[name] = version
        self._keys[version.uid] = version.key
        self._jobs.put((version, source))
        return version

    def _act(self, run: Callable[[], None]) -> Future[None]:
        """Changes the bank: at once, or where several ranks do it together on the thread, after what was begun."""
        act = _Act(run)
        if self._leader is None:
            run()
            act.done.set_result(None)
        elif self._thread.is_alive():
            self._jobs.put(act)
        else:
            act.refuse()
        return act.done

    def _load_all(self) -> None:
        """The thread: one adapter after the other, while everything else goes on."""
        while (job := self._jobs.get()) is not None:
            job() if isinstance(job, _Act) else self._load_one(*job)
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        while not self._jobs.empty():
            left = self._jobs.get()
            if isinstance(left, _Act):
                left.refuse()
            elif left is not None:
                self._finish(left[0], AdapterError("the engine was closed"))

    def _load_one(self, version: AdapterVersion, source: Source) -> None:
        start, error = time.perf_counter(), None
        template = None
        try:
            if version.parts:
                self._combine(version)
            else:
                template = self._read(version, source)
        except MoegraftError as found:
            error = found if isinstance(found, AdapterError) else AdapterError(str(found))
        except Exception as found:  # the thread must live on
            error = AdapterFileError(f"{version.source}: {type(found).__name__}: {found}")
        version.load_seconds = time.perf_counter() - start
        if error is None and not version.parts:
            self.load_times.add(version.load_seconds)
            self._codec.set_template(version.name, template)
        self._finish(version, error)

    def _read(self, version: AdapterVersion, source: Source) -> str | None:
        """Its chat template, where it has one."""
        with _as_folder(source) as folder:
            with as_adapter_error():
                template = adapter_template(folder)  # first: where it fails, nothing was loaded
            report = self._graft.load_adapter(
                folder, name=version.key, resident=False, skip_unserved=version.skip_unserved
            )
            version.left_out = tuple(report.left_out)
            return template

    def _combine(self, version: AdapterVersion) -> None:
        for part, _ in version.parts:
            if part.error is not None:
                raise AdapterError(f"{part.name}: {part.error}")
        self._graft.combine_adapters([(part.key, weight) for part, weight in version.parts], version.key)

    def _finish(self, version: AdapterVersion, error: AdapterError | None) -> None:
        was_pinned = False
        with self._lock:
            version.error = error
            if version.parts:
                version.state = "ready" if error is None else "failed"
                if error is not None:
                    self._combined.pop(_parts_key(version.parts), None)
                    del self._keys[version.uid]
                self._prune()
            elif error is not None:
                version.state = "failed"
                del self._loading[version.name], self._keys[version.uid]
                if version.name not in self._current:
                    self._failed[version.name] = version
                    while len(self._failed) > 64:
                        self._failed.pop(next(iter(self._failed)))
            else:
                version.state = "ready"
                del self._loading[version.name]
                old = self._current.get(version.name)
                self._current[version.name] = version
                was_pinned = old is not None and old.pinned
                if old is not None:
                    self._retire(old)
        if error is None and was_pinned:
            with suppress(AdapterError):  # the old version still takes the room; it is resident whenever it runs
                self._pin(version.name, pinned=True)
        version.loaded.set()
        self._on_loaded(version)

    def _pin(self, name: str, *, pinned: bool) -> None:
        # On several ranks this is the thread, and what takes the adapter away comes behind it.
        with self._lock if self._leader is None else nullcontext():
            version = self._current.get(name)
            if version is None:
                raise UnknownAdapterError(f"no adapter {name!r} is loaded")
            if pinned:
                self._graft.pin_adapter(version.key)
            else:
                self._graft.unpin_adapter(version.key)
            version.pinned = pinned and version.state == "ready"

    def _retire(self, version: AdapterVersion) -> None:
        if version.pinned:
            self._act(partial(self._graft.unpin_adapter, version.key))
            version.pinned = False
        version.state = "draining"
        self._draining[version.uid] = version
        self._prune()
        if version.users == 0:
            self._drop(version)

    def _drop(self, version: AdapterVersion) -> None:
        self._act(partial(self._graft.unload_adapter, version.key))
        self._draining.pop(version.uid, None)
        del self._keys[version.uid]
        self._on_gone(version.uid)

    def _prune(self) -> None:
        """Drops combinations that no request uses: those of which a part has been taken away, and the oldest of more
        than may be resident."""
        idle = {key: each for key, each in self._combined.items() if each.state == "ready" and each.users == 0}
        stale = [key for key, each in idle.items() if any(part.state == "draining" for part, _ in each.parts)]
        fresh = [key for key in idle if key not in stale]
        for key in (*stale, *fresh[: max(0, len(fresh) - self._graft.bank.max_slots)]):
            self._drop(self._combined.pop(key))


def _parts_key(parts: Sequence[tuple[AdapterVersion, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((part.uid, weight) for part, weight in parts)


class _Act:
    """Something that the thread does, and what became of it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.done: Future[None] = Future()
        self._run = run

    def __call__(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def refuse(self) -> None:
        self.done.set_exception(AdapterError("the engine was closed"))


@contextmanager
def _as_folder(source: Source) -> Iterator[Path]:
    """The adapter as a folder on disk: itself, or a temporary copy of files from memory or from an fsspec URL."""
    if isinstance(source, Mapping):
        with tempfile.TemporaryDirectory(prefix="moegraft-") as temporary:
            folder = Path(temporary)
            if not {CONFIG_FILE, WEIGHTS_FILE} <= source.keys():
                raise AdapterFileError(f"found files {sorted(source)}, expected {CONFIG_FILE} and {WEIGHTS_FILE}")
            for name, data in source.items():
                if Path(name).name != name or not name.endswith(_REMOTE_FILES):
                    raise AdapterFileError(f"found a file {name!r}, expected names that end in {_REMOTE_FILES}")
                (folder / name).write_bytes(data)
            yield folder
    elif "://" in os.fspath(source):
        with tempfile.TemporaryDirectory(prefix="moegraft-") as temporary:
            _download(os.fspath(source), Path(temporary))
            yield Path(temporary)
    else:
        yield Path(source)


def _download(url: str, folder: Path) -> None:
    """The files of a remote folder. Nothing but the stores of ``REMOTE_PROTOCOLS`` is asked, and what they say of sizes
    is not trusted."""
    try:
        import fsspec
    except ImportError as error:
        raise AdapterFileError(f"{url}: fsspec is not installed; pass a folder") from error
    protocol = url.partition("://")[0]
    if protocol not in REMOTE_PROTOCOLS:
        raise AdapterFileError(f"{url}: protocol {protocol!r}, expected one of {', '.join(REMOTE_PROTOCOLS)}")
    files, base = fsspec.core.url_to_fs(url)
    left = MAX_REMOTE_BYTES
    for entry in files.ls(base, detail=True):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry.get("type") != "file" or not name.endswith(_REMOTE_FILES) or Path(name).name != name:
            continue
        if int(entry.get("size") or 0) > left:  # before anything of it is read
            raise AdapterFileError(f"{url}: more than {MAX_REMOTE_BYTES} bytes")
        with files.open(entry["name"], "rb") as source, (folder / name).open("wb") as target:
            while block := source.read(min(left + 1, _BLOCK_BYTES)):
                left -= len(block)
                if left < 0:
                    raise AdapterFileError(f"{url}: more than {MAX_REMOTE_BYTES} bytes")
                target.write(block)

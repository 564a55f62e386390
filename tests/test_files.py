"""What is opened, and that what was checked is what is read, whoever changes the folder meanwhile."""

from __future__ import annotations

import os
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families, hostile
from support.adapters import write_adapter

import moegraft
from moegraft.core.errors import AdapterFileError, AdapterMemoryError, FileError
from moegraft.files import Folder
from moegraft.files.safetensors import SafetensorsFile
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import PeftAdapter, inspect_peft_adapter, load_peft_adapter
from moegraft.lora.targets import ModelTargets

MiB = 2**20


@pytest.fixture(scope="module")
def targets() -> ModelTargets:
    return discover_targets(families.build(hostile.FAMILY))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": fifo,
    "socket": unix_socket,
    "folder": Path.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link outside": lambda path: path.symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("kind", SPECIAL)
class TestSpecialFiles:
    def test_in_place_of_a_file(self, kind: str, tmp_path: Path) -> None:
        SPECIAL[kind](tmp_path / "x")
        with (
            Folder(tmp_path) as folder,
            pytest.raises(FileError, match=r"'x' is (not a regular file|a link that leaves)"),
        ):
            folder.open("x")

    def test_swapped_in_between_the_look_and_the_opening(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The moment that an attacker waits for: the location is decided, the file is not open yet."""
        (tmp_path / "x").write_text("harmless")
        open_below = Folder._open_below

        def swapped(folder: Folder, *args: Any) -> int:
            (tmp_path / "x").unlink()
            SPECIAL[kind](tmp_path / "x")
            return open_below(folder, *args)

        monkeypatch.setattr(Folder, "_open_below", swapped)
        with Folder(tmp_path) as folder, pytest.raises(FileError, match="'x' is not a regular file"):
            folder.open("x")

    def test_anywhere_in_an_adapter(self, kind: str, tmp_path: Path, targets: ModelTargets) -> None:
        for name in (hostile.CONFIG, hostile.WEIGHTS):
            folder = hostile.good_adapter(tmp_path / name)
            (folder / name).unlink()
            SPECIAL[kind](folder / name)
            with pytest.raises(moegraft.core.errors.AdapterError, match=name):
                load_peft_adapter(folder, targets, dtype=torch.float32)


def test_a_folder_on_the_way_that_becomes_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "in" / "real" / "x").write_text("mine")
    (tmp_path / "in" / "x").symlink_to("real/x")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("secret")
    open_below = Folder._open_below

    def swapped(folder: Folder, *args: Any) -> int:
        (tmp_path / "in" / "real").rename(tmp_path / "in" / "gone")
        (tmp_path / "in" / "real").symlink_to(tmp_path / "secret")
        return open_below(folder, *args)

    with Folder(tmp_path / "in") as folder:
        assert folder.read("x", max_bytes=9) == b"mine"
        monkeypatch.setattr(Folder, "_open_below", swapped)
        with pytest.raises(FileError, match="not a regular file"):
            folder.open("x")


def test_what_was_checked_is_what_is_digested_and_read(tmp_path: Path, targets: ModelTargets) -> None:
    """The whole adapter is replaced behind its open handles, as an atomic deployment does."""
    folder = hostile.good_adapter(tmp_path / "a")
    with PeftAdapter(folder, targets) as adapter:
        digest = adapter.digest()
        weights, _ = adapter.build(dtype=torch.float32)
    with PeftAdapter(folder, targets) as adapter:
        tensors = {name: tensor + 1 for name, tensor in hostile.good_tensors().items()}
        write_adapter(tmp_path / "b", tensors, **hostile.CONFIG_FIELDS, use_rslora=True)
        for name in (hostile.CONFIG, hostile.WEIGHTS):
            os.replace(tmp_path / "b" / name, folder / name)
        assert adapter.digest() == digest
        found, _ = adapter.build(dtype=torch.float32)
    q = hostile.Q_PROJ
    assert found.linears[q].a.equal(weights.linears[q].a)
    assert found.linears[q].b.equal(weights.linears[q].b)
    changed, _ = load_peft_adapter(folder, targets, dtype=torch.float32)
    assert not changed.linears[q].a.equal(weights.linears[q].a)


class TestLinks:
    def test_volumes_of_kubernetes(self, tmp_path: Path, targets: ModelTargets) -> None:
        real = hostile.good_adapter(tmp_path / "..2026_01")
        (tmp_path / "..data").symlink_to(real.name)
        for file in real.iterdir():
            (tmp_path / file.name).symlink_to(f"..data/{file.name}")
        load_peft_adapter(tmp_path, targets, dtype=torch.float32)

        hostile.good_adapter(tmp_path / "..2026_02")
        with Folder(tmp_path) as folder:
            folder.open(hostile.CONFIG).close()
            (tmp_path / "..new").symlink_to("..2026_02")
            os.replace(tmp_path / "..new", tmp_path / "..data")  # as kubelet does
            with pytest.raises(FileError, match=r"another version \(..2026_02\) than files before it \(..2026_01\)"):
                folder.open(hostile.WEIGHTS)
        load_peft_adapter(tmp_path, targets, dtype=torch.float32)

        (tmp_path / "..data").unlink()
        outside = hostile.good_adapter(tmp_path.parent / f"{tmp_path.name}-outside")
        (tmp_path / "..data").symlink_to(outside)
        with pytest.raises(moegraft.core.errors.AdapterError, match="leaves the folder"):
            load_peft_adapter(tmp_path, targets, dtype=torch.float32)

    @pytest.mark.parametrize("sub", ["", "adapters/math"])
    def test_snapshots_of_a_hub_cache(self, sub: str, tmp_path: Path, targets: ModelTargets) -> None:
        """The snapshot itself, and an adapter in a subfolder of it."""
        home = tmp_path / "models--org--name"
        folder = hostile.good_adapter(home / "snapshots" / "0123abc" / sub)
        (home / "blobs").mkdir()
        for file in list(folder.iterdir()):
            file.rename(home / "blobs" / file.name)
            file.symlink_to(os.path.relpath(home / "blobs" / file.name, folder))
        load_peft_adapter(folder, targets, dtype=torch.float32)
        (home / "blobs").rename(home / "elsewhere")
        (home / "blobs").symlink_to("elsewhere")  # what the links resolve to is no place of the cache any more
        with pytest.raises(moegraft.core.errors.AdapterError, match="leaves the folder"):
            load_peft_adapter(folder, targets, dtype=torch.float32)

    def test_a_folder_that_is_a_link(self, tmp_path: Path, targets: ModelTargets) -> None:
        hostile.good_adapter(tmp_path / "real")
        (tmp_path / "current").symlink_to("real")
        _, report = load_peft_adapter(tmp_path / "current", targets, dtype=torch.float32)
        assert report.path == str(tmp_path / "current")


def sparse_adapter(folder: Path, rank: int) -> Path:
    """A file of a few blocks that claims factors of any rank."""
    shapes = {"lora_A": [rank, families.HIDDEN_SIZE], "lora_B": [families.HIDDEN_SIZE, rank]}
    header, position = "", 0
    for name, shape in shapes.items():
        end = position + 4 * rank * families.HIDDEN_SIZE
        header += f'"{hostile.PREFIX}{hostile.Q_PROJ}.{name}.weight":{{"dtype":"F32","shape":{shape},'
        header += f'"data_offsets":[{position},{end}]}},'
        position = end
    write_adapter(folder, {}, r=rank)
    text = f"{{{header[:-1]}}}".encode()
    with (folder / hostile.WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return folder


class TestSizes:
    def test_too_large_an_adapter_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        graft = moegraft.attach(families.build(hostile.FAMILY), adapter_memory="4MiB")
        folder = sparse_adapter(tmp_path, 65536)

        def no_read(*_: object) -> torch.Tensor:
            raise AssertionError("a tensor was read")

        monkeypatch.setattr(SafetensorsFile, "read", no_read)
        with pytest.raises(AdapterMemoryError, match=rf"needs {2 * 4 * 65536 * families.HIDDEN_SIZE} bytes at least"):
            graft.load_adapter(folder)

    @pytest.mark.parametrize("with_targets", [False, True])
    def test_inspection_holds_little_at_a_time(
        self, with_targets: bool, tmp_path: Path, targets: ModelTargets, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("moegraft.files.limits.MAX_BUILT_BYTES", 64 * MiB)
        folder = sparse_adapter(tmp_path, 2**20 if not with_targets else 65536 * 8)
        monkeypatch.setattr("moegraft.files.limits.MAX_RANK", 2**20)
        tracemalloc.start()
        try:
            inspection = inspect_peft_adapter(folder, targets if with_targets else None)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert inspection.bytes_in_file > 128 * MiB
        assert peak < 48 * MiB

    def test_no_more_tensors_than_the_model_has_places(self, tmp_path: Path, targets: ModelTargets) -> None:
        """A header of 500,000 names takes seconds to read; the model of the test has places for a few hundred."""
        entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        for count, expected in ((500_000, "header length"), (60_000, "60000 tensors, expected at most")):
            folder = write_adapter(tmp_path / str(count), {})
            text = ("{" + ",".join(f'"{i}":{entry}' for i in range(count)) + "}").encode()
            (folder / hostile.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
            with pytest.raises(AdapterFileError, match=expected):
                load_peft_adapter(folder, targets, dtype=torch.float32)

    def test_unknown_fields_are_counted_after_the_first(self, tmp_path: Path, targets: ModelTargets) -> None:
        fields = {f"field_{i}": 1 for i in range(100_000)}
        folder = write_adapter(tmp_path, hostile.good_tensors(), **hostile.CONFIG_FIELDS, **fields)
        _, report = load_peft_adapter(folder, targets, dtype=torch.float32)
        assert len(report.notes) < 30
        assert any("99980 more unknown fields" in note for note in report.notes)

    def test_a_file_that_grows_while_it_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"x" * 100)
        with Folder(tmp_path) as folder:
            assert folder.read("x", max_bytes=100) == b"x" * 100
            with pytest.raises(FileError, match="larger than 99 bytes"):
                folder.read("x", max_bytes=99)


def test_handles_are_closed(tmp_path: Path, targets: ModelTargets) -> None:
    good = hostile.good_adapter(tmp_path / "good")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_peft_adapter(good, targets, dtype=torch.float32)
        with pytest.raises(AdapterFileError):
            load_peft_adapter(tmp_path / "absent", targets, dtype=torch.float32)
        inspect_peft_adapter(good)
    for case in list(hostile.hostile_cases(tmp_path / "cases"))[::7]:
        with pytest.raises(case.error_type):
            load_peft_adapter(case.path, targets, dtype=torch.float32)
        inspect_peft_adapter(case.path, targets)
    assert len(os.listdir("/proc/self/fd")) == before

"""A short name for what an adapter's files say: two folders with one digest hold adapters of one make."""

from __future__ import annotations

import hashlib
import os

from moegraft.lora.peft.folder import CONFIG_FILE, FolderTensors, open_folder, read_small_file

MAX_CONFIG_BYTES = 16 * 2**20


def adapter_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the config and over name, dtype and shape of every tensor; no tensor is read.

    Ranks compare it, so that none of them loads another version of an adapter: versions whose headers and config agree
    are told apart by nobody. Raises AdapterFileError or AdapterTensorError.
    """
    folder = open_folder(path)
    digest = hashlib.sha256(read_small_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES))
    with FolderTensors(folder) as tensors:
        for name, info in sorted(tensors.infos.items()):
            digest.update(f"\0{name}\0{info.dtype}\0{list(info.shape)}".encode())
    return digest.hexdigest()

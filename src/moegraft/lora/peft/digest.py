"""A short name for an adapter's files: what they say, and a sample of what they hold."""

from __future__ import annotations

import hashlib
import os

from moegraft.lora.peft.folder import CONFIG_FILE, FolderTensors, open_folder, read_small_file

MAX_CONFIG_BYTES = 16 * 2**20
# What is sampled of the values: at most 1 MiB in 256 reads, a small part of loading the largest adapters.
SAMPLED_TENSORS = 256
SAMPLED_BYTES = 4096


def adapter_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the config, name, dtype and shape of every tensor, and the first bytes of a sample of them.

    Ranks compare it, so that none of them loads another version of an adapter. Another step of one training differs in
    nearly every tensor, so in the sample too: tensors at even steps of the sorted names, which are those of all layers.
    Files that differ elsewhere only are not told apart. Raises AdapterFileError or AdapterTensorError.
    """
    folder = open_folder(path)
    digest = hashlib.sha256(read_small_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES))
    with FolderTensors(folder) as tensors:
        names = sorted(tensors.infos)
        for name in names:
            info = tensors.infos[name]
            digest.update(f"\0{name}\0{info.dtype}\0{list(info.shape)}".encode())
        for name in names[:: -(-len(names) // SAMPLED_TENSORS) or 1]:
            digest.update(tensors.read_start(name, SAMPLED_BYTES))
    return digest.hexdigest()

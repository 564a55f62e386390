"""Prompts and engines for tests of serving."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from support.families import VOCAB_SIZE


def draw_prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths]


COMMAND = [sys.executable, "-c", "from moegraft.cli import main; main()"]


@contextmanager
def serving(*options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``moegraft serve``: the process, in a group of its own, and its address; killed unless the test has ended it."""
    sizes = ["--port", "0", "--kv-memory", "4MiB", "--adapter-memory", "16MiB"]
    command = [*COMMAND, "serve", *map(str, options), *sizes]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line):
                yield process, found[1]
                return
        raise AssertionError("the server did not start: " + "".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()

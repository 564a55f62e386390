"""An engine's model with adapters of several kinds, and the text of each request alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.families import build
from support.mixed import MixedBatch, save_kinds

import moegraft

Truth = Callable[[Sequence[tuple[tuple[int, ...], str | None]], int], list[tuple[int, ...]]]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Products of this size are faster without waking a second thread."""


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """The tests of a module close their engines: all threads end."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("moegraft")]
    assert not left


@pytest.fixture(scope="session")
def kinds(mixed: MixedBatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on the head, embeddings, norms, router, everything at once; and those of ``mixed``."""
    folder = tmp_path_factory.mktemp("kinds")
    names = save_kinds(mixed.model, folder, mixed.input_ids)
    return {**mixed.adapters, **{name: folder / name for name in names}}


@pytest.fixture(scope="session")
def truth(kinds: dict[str, Path]) -> Iterator[Truth]:
    """Greedy tokens of each request alone, by transformers' own generate under the adapter."""
    known: dict[tuple[tuple[int, ...], str | None, int], tuple[int, ...]] = {}
    with moegraft.attach(build("qwen3_moe"), adapter_memory="8MiB") as graft:
        for name, path in kinds.items():
            graft.load_adapter(path, name=name)

        def alone(prompt: tuple[int, ...], name: str | None, count: int) -> tuple[int, ...]:
            ids = torch.tensor([prompt])
            options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
            found = graft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=[name], **options)
            return tuple(found[0, len(prompt) :].tolist())

        def run(requests: Sequence[tuple[tuple[int, ...], str | None]], count: int) -> list[tuple[int, ...]]:
            for request in requests:
                if (*request, count) not in known:
                    known[*request, count] = alone(*request, count)
            return [known[(*request, count)] for request in requests]

        yield run

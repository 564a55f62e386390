"""An engine's model with adapters of several kinds, and the text of each request alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.mixed import MixedBatch, save_kinds

import moegraft

Truth = Callable[[Sequence[tuple[tuple[int, ...], str | None]], int], list[tuple[int, ...]]]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Products of this size are faster without waking a second thread."""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Every test closes its engines: their threads end."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("moegraft")]
    assert not left


@pytest.fixture(scope="session")
def kinds(mixed: MixedBatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on the head, embeddings, norms, router, everything at once; and those of ``mixed``."""
    folder = tmp_path_factory.mktemp("kinds")
    names = save_kinds(mixed.model, folder, mixed.input_ids)
    return {**mixed.adapters, **{name: folder / name for name in names}}


@pytest.fixture(scope="session")
def truth(mixed: MixedBatch, kinds: dict[str, Path]) -> Truth:
    """Greedy tokens of each request alone, by transformers' own generate under the adapter."""
    known: dict[tuple[tuple[int, ...], str | None, int], tuple[int, ...]] = {}

    def run(requests: Sequence[tuple[tuple[int, ...], str | None]], count: int) -> list[tuple[int, ...]]:
        missing = [request for request in requests if (*request, count) not in known]
        if missing:
            with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
                for name in {name for _, name in missing if name is not None}:
                    graft.load_adapter(kinds[name], name=name)
                for prompt, name in missing:
                    ids = torch.tensor([prompt])
                    found = graft.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        adapters=[name],
                        do_sample=False,
                        max_new_tokens=count,
                        min_new_tokens=count,
                    )
                    known[prompt, name, count] = tuple(found[0, len(prompt) :].tolist())
        return [known[(*request, count)] for request in requests]

    return run

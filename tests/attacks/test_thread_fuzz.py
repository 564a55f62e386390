"""Threads that load, unload, pin, list and run at once, against a model of what each of them may see.

Every thread has a name of its own, of which it knows at any moment whether it is loaded; all share two names, of which
it knows only which errors may come, and that no error is about another name than the one it gave.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.mixed import MixedBatch

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import AdapterInUseError, AdapterNameError, UnknownAdapterError

pytestmark = [pytest.mark.attacks, pytest.mark.usefixtures("one_thread")]

THREADS = 3
SHARED = ("shared 0", "shared 1")
KINDS = ("fused", "per_expert", "dora")


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Worker:
    """One thread: what it does, drawn at random, and what of it was not as it must be."""

    def __init__(self, number: int, graft: GraftedModel, mixed: MixedBatch, expected: dict[str, torch.Tensor]) -> None:
        self.own = f"own {number}"
        self.kind = KINDS[number % len(KINDS)]
        self.graft = graft
        self.mixed = mixed
        self.expected = expected
        self.rng = random.Random(number)
        self.is_loaded = False
        self.complaints: list[str] = []

    def run(self, steps: int) -> list[str]:
        torch.set_num_threads(1)
        acts = (self.change_own, self.change_shared, self.look, self.run_own, self.run_shared, self.pin_own)
        for _ in range(steps):
            act = self.rng.choice(acts)
            try:
                act()
            except Exception as error:
                self.complaints.append(f"{self.own}: {act.__name__}: {type(error).__name__}: {error}")
        return self.complaints

    def change_own(self) -> None:
        """Nobody else names it: both must succeed."""
        if self.is_loaded:
            self.graft.unload_adapter(self.own)
        else:
            self.graft.load_adapter(self.mixed.adapters[self.kind], name=self.own)
        self.is_loaded = not self.is_loaded

    def change_shared(self) -> None:
        name = self.rng.choice(SHARED)
        try:
            if self.rng.random() < 0.5:
                self.graft.load_adapter(self.mixed.adapters["fused"], name=name)
            else:
                self.graft.unload_adapter(name)
        except (AdapterNameError, UnknownAdapterError, AdapterInUseError) as error:
            if f"adapter {name!r}" not in str(error):
                self.complaints.append(f"{self.own}: asked for {name!r}, was told {error}")

    def look(self) -> None:
        seen = self.graft.adapters
        if (self.own in seen) != self.is_loaded:
            self.complaints.append(f"{self.own}: is_loaded={self.is_loaded}, seen {list(seen)}")
        if any(info.name != name for name, info in seen.items()):
            self.complaints.append(f"{self.own}: names and records differ")

    def pin_own(self) -> None:
        if self.is_loaded:
            self.graft.pin_adapter(self.own)
            if not self.graft.adapters[self.own].pinned:
                self.complaints.append(f"{self.own}: pinned, and seen unpinned")
            self.graft.unpin_adapter(self.own)

    def run_own(self) -> None:
        self.check(self.own if self.is_loaded else None, self.kind)

    def run_shared(self) -> None:
        name = self.rng.choice(SHARED)
        try:
            self.check(name, "fused")
        except UnknownAdapterError as error:
            if f"adapter {name!r}" not in str(error):
                self.complaints.append(f"{self.own}: asked for {name!r}, was told {error}")

    def check(self, name: str | None, kind: str) -> None:
        found = self.graft(input_ids=self.mixed.input_ids[:2, :3], adapters=[name, None]).logits
        if not torch.equal(found, self.expected[kind if name else "base"]):
            self.complaints.append(f"{self.own}: wrong logits of {name!r}")


def test_threads(mixed: MixedBatch, request: pytest.FixtureRequest) -> None:
    steps = 1000 if "attacks" in (request.config.getoption("-m") or "") else 40
    with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
        ids = mixed.input_ids[:2, :3]
        expected = {"base": graft(input_ids=ids, adapters=[None, None]).logits}
        for kind in KINDS:
            graft.load_adapter(mixed.adapters[kind], name=kind)
            expected[kind] = graft(input_ids=ids, adapters=[kind, None]).logits
            graft.unload_adapter(kind)
        free = graft.bank.pool.num_free
        workers = [Worker(number, graft, mixed, expected) for number in range(THREADS)]
        line = threading.Barrier(THREADS)

        def run(worker: Worker) -> list[str]:
            line.wait()
            return worker.run(steps)

        with ThreadPoolExecutor(THREADS) as pool:
            complaints = [complaint for found in pool.map(run, workers) for complaint in found]
        assert complaints == []
        graft.bank.check_integrity()
        for name in graft.adapters:
            graft.unload_adapter(name)
        assert graft.bank.pool.num_free == free
        assert torch.equal(graft(input_ids=ids, adapters=[None, None]).logits, expected["base"])

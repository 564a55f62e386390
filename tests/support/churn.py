"""Adapters loaded, unloaded, replaced, evicted and pinned, and requests cancelled, while others run and are checked."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moegraft import Engine, SamplingParams
from moegraft.core.errors import AdapterError, UnknownAdapterError
from moegraft.serving.requests import FinishReason, Request
from support.serving import draw_prompts

NEW = 12
SAMPLING = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW)
NAMES = ("a", "b", "c", "d")
FILES = ("fused", "dora", "per_expert", "everything", "save lm_head", "lm_head")
PROMPTS = draw_prompts((5, 17, 30), seed=4)


class Churn:
    """``behind``: the files that may stand behind each name at this moment; None where it may be unknown."""

    def __init__(self, engine: Engine, kinds: dict[str, Path], expected: Any) -> None:
        self.engine = engine
        self.kinds = kinds
        self.expected = expected
        self.behind: dict[str, frozenset[str | None]] = {name: frozenset([None]) for name in NAMES}
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.counts = {"finished": 0, "cancelled": 0, "refused": 0, "changes": 0}
        self.lock = threading.Lock()

    def guarded(self, run: Any, seed: int) -> None:
        try:
            while not self.stop.is_set():
                run(random.Random(seed))
                seed += 1000
        except BaseException as error:
            self.wrong.append(f"{run.__name__}: {type(error).__name__}: {error}")
            self.stop.set()

    def ask(self, rng: random.Random) -> None:
        name = rng.choice((*NAMES, None))
        prompt = rng.choice(PROMPTS)
        request_id = f"{threading.get_ident()}-{rng.random()}"
        before = frozenset([None]) if name is None else self.behind[name]
        try:
            stream = self.engine.submit(
                Request(request_id=request_id, prompt_ids=prompt, adapter=name, sampling=SAMPLING)
            )
        except UnknownAdapterError:
            assert name is not None
            assert None in before | self.behind[name], f"{name} was loaded all the time, and refused"
            self.count("refused")
            return
        possible = before | (before if name is None else self.behind[name])
        cut = rng.randrange(NEW) if rng.random() < 0.2 else None
        tokens: list[int] = []
        for event in stream:
            tokens += event.token_ids
            if cut is not None and len(tokens) > cut:
                self.engine.cancel(request_id)
                cut = None
        self.check(name, prompt, tuple(tokens), event, possible)

    def check(self, name: str | None, prompt: Any, tokens: Any, last: Any, possible: Any) -> None:
        files = [each for each in possible if name is None or each is not None]
        right = [self.expected[prompt, each][: len(tokens)] for each in files]
        if tokens and tokens not in right:
            self.wrong.append(f"{name}, {sorted(map(str, files))}: {tokens} is none of {right}")
        elif last.finish_reason is FinishReason.LENGTH and len(tokens) == NEW:
            self.count("finished")
        elif last.finish_reason is FinishReason.CANCELLED:
            self.count("cancelled")
        elif None in possible and "no such folder" in (last.error or ""):
            self.count("refused")  # it came while the name was being loaded, which failed
        else:
            self.wrong.append(f"{name}: ended with {last}")

    def change(self, rng: random.Random) -> None:
        """One administrator: nobody else changes what stands behind a name."""
        name, files = rng.choice(NAMES), rng.choice(FILES)
        before = self.behind[name]
        act = rng.choice(("load", "load", "load", "unload", "force", "evict", "pin", "fail"))
        if act == "load":
            self.behind[name] = before | {files}
            self.engine.load_adapter(name, self.kinds[files], replace=True)
            self.behind[name] = frozenset([files])
        elif act in ("unload", "force"):
            self.behind[name] = before | {None}
            with suppress(AdapterError):  # it drains, or was not there
                self.engine.unload_adapter(name, force=act == "force")
            self.behind[name] = frozenset([None])
        elif act == "fail":
            with pytest.raises(AdapterError):
                self.engine.load_adapter(name, self.kinds[files] / "nowhere", replace=True)
        else:
            self.disturb(name, act)
        self.count("changes")
        time.sleep(rng.random() / 20)

    def disturb(self, name: str, act: str) -> None:
        bank = self.engine._graft.bank
        with suppress(AdapterError):  # unknown, in use, or no room
            if act == "pin":
                self.engine.pin_adapter(name)
                self.engine.unpin_adapter(name)
            else:
                for key in bank.names():
                    bank.evict(key)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def run(self, seconds: float) -> None:
        """Eight who ask and one who changes; then nobody is left."""
        runs = [self.ask] * 8 + [self.change]
        threads = [threading.Thread(target=self.guarded, args=(run, i)) for i, run in enumerate(runs)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        while not self.stop.is_set() and not self.wrong:
            passed = time.monotonic() - start
            if passed > seconds and (self.has_seen_all or passed > seconds + 40):
                break
            self.engine.check_integrity()
            time.sleep(0.2)
        self.stop.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        self.engine.check_integrity()

    @property
    def has_seen_all(self) -> bool:
        """Whether everything that may happen has happened: on a crowded machine it takes longer."""
        return min(self.counts.values()) > 0 and self.engine.stats().preemptions > 0

    def check_end(self) -> None:
        """No wrong token, nothing left, and everything that may happen has happened."""
        assert not self.wrong, self.wrong[:3]
        stats = self.engine.stats()
        assert stats.pages_used == stats.running == stats.waiting == stats.failed_steps == 0
        assert not self.engine._store._held
        self.engine._store.settle()  # over ranks what drains goes a moment later
        loaded = {key.partition("@")[0] for key in self.engine._graft.adapters}
        behind = {name for name, files in self.behind.items() if files != {None}}
        assert loaded == behind, (loaded, behind)
        assert self.has_seen_all, (self.counts, stats.preemptions)


def expect(truth: Any) -> dict[Any, tuple[int, ...]]:
    """The right tokens of every prompt under every adapter's files."""
    requests = [(prompt, files) for prompt in PROMPTS for files in (*FILES, None)]
    return dict(zip(requests, truth(requests, NEW), strict=True))


# Pages for three sequences of six, and slots for two adapters of four: preemption and eviction all the time.
NARROW: dict[str, Any] = {
    "page_size": 4,
    "max_rows": 6,
    "chunk_tokens": 24,
    "max_model_len": 48,
    "kv_memory": 4 * 256 * 34,
    "max_adapters": 2,
    "adapter_memory": "4MiB",
}

"""Snapshots of an engine, for metrics and for people."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BETWEEN_TOKENS_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)

MAX_NAMED = 200
OTHERS = " "
"""No adapter's name."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Seconds. ``counts``: observations of at most each bound, each counted once; one more for those above."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, kw_only=True)
class AdapterStatus:
    """One adapter by its public name, in its newest version.

    version: 1 for the first; replaced in place counts up · residency: where its factors lie · ranks: module -> largest
    rank · running, waiting: sequences now, of all its versions · draining: versions that serve their last requests ·
    load_seconds: that reading and checking took · left_out: modules that are not served, where they might be left out ·
    error: why the last load failed.
    """

    name: str
    version: int
    source: str | None
    state: Literal["loading", "ready", "draining", "failed"]
    residency: Literal["device", "host", "none"]
    pinned: bool
    ranks: Mapping[str, int]
    num_bytes: int
    running: int
    waiting: int
    draining: int
    load_seconds: float
    left_out: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterCounters:
    """Counts since the start, of one adapter; finished: sequences by finish reason."""

    running: int
    waiting: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]
    first_token_seconds: Histogram
    between_tokens_seconds: Histogram


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """One moment of an engine. ``adapters`` has the base model under the empty name and, where more than
    ``MAX_NAMED`` adapters were served, all others together under ``OTHERS``. evictions: moved to host memory."""

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    steps: int
    failed_steps: int
    preemptions: int
    step_seconds: float
    graph_captures: int
    adapters: Mapping[str, AdapterCounters]
    load_seconds: Histogram
    evictions: int


@dataclass
class Observations:
    """A histogram that counts; one thread writes."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def merge(self, other: Observations) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def snapshot(self) -> Histogram:
        return Histogram(bounds=self.bounds, counts=tuple(self.counts), total=self.total)

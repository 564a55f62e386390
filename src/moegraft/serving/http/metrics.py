"""``/metrics``: what the engine counts, in Prometheus' text format. Read when it is asked for, never on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from moegraft.serving.engine import Engine
from moegraft.serving.status import OTHERS, AdapterCounters, Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = {"": "_base", OTHERS: "_other"}


class Metrics:
    """A collector over one engine, and the answers that the server has given by status."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self.answers = Counter("moegraft_http_requests", "Answers given", ["route", "status"], registry=self._registry)
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks a collector for."""
        stats = self._engine.stats()
        for name, what, value in (
            ("running", "Sequences that run", stats.running),
            ("waiting", "Sequences that wait", stats.waiting),
            ("kv_pages", "Pages of keys and values", stats.pages_total),
            ("kv_pages_used", "Pages that hold something a sequence reads", stats.pages_used),
            ("kv_pages_cached", "Pages kept for prompts that begin alike", stats.pages_cached),
        ):
            yield GaugeMetricFamily(f"moegraft_{name}", what, value=value)
        for name, what, count in (
            ("steps", "Steps of the engine", stats.steps),
            ("failed_steps", "Steps that failed, and their requests with them", stats.failed_steps),
            ("preemptions", "Sequences that gave their pages up and were computed again", stats.preemptions),
            ("step_seconds", "Seconds in steps", stats.step_seconds),
            ("graph_captures", "CUDA graphs captured", stats.graph_captures),
            ("adapter_evictions", "Adapters moved to host memory", stats.evictions),
        ):
            yield CounterMetricFamily(f"moegraft_{name}", what, value=count)
        yield _histogram("adapter_load_seconds", "Seconds to read and check an adapter", [({}, stats.load_seconds)])
        yield from self._by_residency()
        yield from _by_adapter({_LABELS.get(name, name): each for name, each in stats.adapters.items()})

    def _by_residency(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("moegraft_adapters", "Adapters by where they lie", labels=["residency"])
        counts = dict.fromkeys(("device", "host", "none"), 0)
        for status in self._engine.adapters.values():
            counts[status.residency] += 1
        for residency, count in counts.items():
            family.add_metric([residency], count)
        yield family


def _by_adapter(labelled: Mapping[str, AdapterCounters]) -> Iterator[Metric]:
    gauges: tuple[tuple[str, str, Callable[[AdapterCounters], int]], ...] = (
        ("adapter_running", "Sequences that run, by adapter", lambda one: one.running),
        ("adapter_waiting", "Sequences that wait, by adapter", lambda one: one.waiting),
    )
    for name, what, value in gauges:
        gauge = GaugeMetricFamily(f"moegraft_{name}", what, labels=["adapter"])
        for label, counted in labelled.items():
            gauge.add_metric([label], value(counted))
        yield gauge
    counters: tuple[tuple[str, str, Callable[[AdapterCounters], int]], ...] = (
        ("prompt_tokens", "Tokens of prompts, by adapter", lambda one: one.prompt_tokens),
        ("cached_tokens", "Tokens of prompts found in the prefix cache, by adapter", lambda one: one.cached_tokens),
        ("generated_tokens", "New tokens, by adapter", lambda one: one.generated_tokens),
    )
    for name, what, value in counters:
        counter = CounterMetricFamily(f"moegraft_{name}", what, labels=["adapter"])
        for label, counted in labelled.items():
            counter.add_metric([label], value(counted))
        yield counter
    finished = CounterMetricFamily("moegraft_finished", "Sequences that ended", labels=["adapter", "reason"])
    for label, counted in labelled.items():
        for reason, count in sorted(counted.finished.items()):
            finished.add_metric([label, reason], count)
    yield finished
    for name, what, of in (
        ("first_token_seconds", "From a request's arrival to its first token", lambda one: one.first_token_seconds),
        ("between_tokens_seconds", "From token to token of a sequence", lambda one: one.between_tokens_seconds),
    ):
        rows = [({"adapter": label}, of(counted)) for label, counted in labelled.items()]
        yield _histogram(name, what, rows)


def _histogram(name: str, what: str, rows: list[tuple[dict[str, str], Histogram]]) -> HistogramMetricFamily:
    labels = list(rows[0][0]) if rows else []
    family = HistogramMetricFamily(f"moegraft_{name}", what, labels=labels)
    for found, histogram in rows:
        buckets, total = [], 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
        family.add_metric(list(found.values()), buckets, histogram.total)
    return family

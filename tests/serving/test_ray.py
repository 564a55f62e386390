"""The server on a real Ray Serve: two replicas of a tiny model, one address, the openai client. Takes a minute."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.http_server import Served, eventually, make_served

pytest.importorskip("ray.serve", reason="needs ray[serve]")

import ray
from ray import serve

from moegraft.serving.ray_app import LOST, Settings, build

SOURCE = Path(__file__).parents[2] / "src"
NEW = 6


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


class Cluster:
    """One application whose replicas are changed in place."""

    def __init__(self, served: Served, port: int) -> None:
        self.served = served
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", timeout=120, max_retries=0)

    def run(self, **scaling: Any) -> None:
        settings = Settings(
            model=str(self.served.model),
            adapters_from=str(self.served.model.parent),
            device="cpu",
            num_cpus=0.5,
            engine={"kv_memory": "8MiB", "adapter_memory": "16MiB"},
            drain_seconds=10,
            **scaling,
        )
        serve.run(build(settings), route_prefix="/")
        self.engines = serve.get_deployment_handle("EngineReplica", "default")

    def held(self) -> list[dict[str, list[str]]]:
        """What each replica holds; nothing of those that are just going."""
        found = self.engines.broadcast("record_routing_stats").results(return_exceptions=True, timeout_s=30)
        return [one for one in found if isinstance(one, dict)]

    def names(self) -> list[set[str]]:
        return [set(one["device"] + one["host"]) for one in self.held()]

    def complete(self, model: str, **options: Any) -> Any:
        options = {"max_tokens": NEW, "temperature": 0, **options}
        return self.client.completions.create(model=model, prompt="a red fox", **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=120)

    def expected(self, adapter: str | None) -> str:
        tokens = self.served.alone("a red fox", adapter, max_new_tokens=NEW)
        return self.served.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def cluster(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCE))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        # Within 5 and 60 seconds a busy machine starts no proxy, which the controller then kills and starts again.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        patch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 240)
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        port = 20000 + os.getpid() % 10000
        serve.start(http_options={"port": port})
        found = Cluster(served, port)
        try:
            found.run(replicas=2)
            yield found
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas() -> set[int]:
    """Processes of the replicas that hold engines."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "ServeReplica:default:EngineReplica" in (process / "cmdline").read_text():
                found.add(int(process.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_streams_are_those_of_one_process(cluster: Cluster) -> None:
    """Base and adapters, which the replicas find in the shared folder when they are first named."""
    for model, adapter in (("model", None), ("experts", "experts"), ("model:head", "head")):
        chunks = list(cluster.complete(model, stream=True))
        assert len(chunks) > 1 or cluster.expected(adapter) == ""
        assert "".join(chunk.choices[0].text for chunk in chunks) == cluster.expected(adapter)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        cluster.complete("nobody")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        cluster.complete("model", max_tokens=10**6)


def test_adapters_go_where_they_are(cluster: Cluster) -> None:
    """The first request decides, and the others follow; under load the other replica takes some too."""
    for _ in range(8):
        cluster.complete("attention")
    where = [one for one in cluster.held() if "attention" in one["device"] + one["host"]]
    assert len(where) == 1
    options = {"max_tokens": 200}
    threads = [threading.Thread(target=cluster.complete, args=("attention",), kwargs=options) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all("attention" in names for names in cluster.names())


def test_loads_and_unloads_are_everywhere_or_nowhere(cluster: Cluster, served: Served, tmp_path: Path) -> None:
    path = str(served.adapters["head"])
    assert cluster.post("load_lora_adapter", lora_name="new", lora_path=path).status_code == 200
    assert [("new" in names) for names in cluster.names()] == [True, True]
    assert cluster.complete("new").choices[0].text == cluster.expected("head")
    again = cluster.post("load_lora_adapter", lora_name="new", lora_path=path)
    assert again.status_code == 409 and "replace" in again.json()["error"]["message"]
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {name: (served.adapters["experts"] / name).read_bytes() for name in names}
    url = f"{cluster.url}/load_lora_adapter_from_tensors?lora_name=sent"
    assert httpx.post(url, files=files, timeout=60).status_code == 200
    assert cluster.complete("sent").choices[0].text == cluster.expected("experts")
    missing = cluster.post("load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "nowhere"))
    assert missing.status_code == 400 and "nowhere" in missing.json()["error"]["message"]
    assert not any("bad" in names for names in cluster.names())
    assert cluster.post("unload_lora_adapter", lora_name="sent").status_code == 200
    assert not any("sent" in names for names in cluster.names())
    with pytest.raises(openai.NotFoundError):
        cluster.complete("sent")


def test_a_replica_is_killed_in_mid_stream(cluster: Cluster) -> None:
    """Its request is told, the other goes on; the replica comes back, with what administrators have loaded."""
    before = replicas()
    assert len(before) == 2
    ends: list[str] = []

    def read() -> None:
        try:
            chunks = list(cluster.complete("model", max_tokens=450, stream=True, extra_body={"ignore_eos": True}))
            ends.append(chunks[-1].choices[0].finish_reason)
        except openai.APIError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: any(one for one in cluster.engines.broadcast("running").results()), seconds=240)
    os.kill(min(before), signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    # Before its stream began, a request gets the same words with status 503.
    assert len(ends) == 8 and {LOST if LOST in end else end for end in ends} == {"length", LOST}
    assert cluster.complete("model").choices[0].text == cluster.expected(None)
    eventually(lambda: len(replicas() - before) == 1 and len(cluster.held()) == 2, seconds=300)
    eventually(lambda: all("new" in names for names in cluster.names()), seconds=240)


def test_one_replica_two_and_one(cluster: Cluster) -> None:
    """By ongoing requests, none of which is cut when a replica goes."""
    fast = {"metrics_interval_s": 0.5, "look_back_period_s": 1.0}
    scaling = {"upscale_delay_seconds": 0.1, "downscale_delay_seconds": 1.0, "autoscaling": fast}
    cluster.run(min_replicas=1, max_replicas=2, target_ongoing_requests=2, **scaling)
    eventually(lambda: len(cluster.held()) == 1, seconds=240)
    stop = threading.Event()
    texts: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                texts.append(cluster.complete("model").choices[0].text)
            except openai.APIError as error:
                texts.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()

    def are_two() -> bool:
        assert set(texts) <= {cluster.expected(None)}  # said at once: whom errors answer, nobody scales up for
        return len(cluster.held()) == 2

    try:
        eventually(are_two, seconds=300)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    eventually(lambda: len(cluster.held()) == 1, seconds=240)
    assert set(texts) == {cluster.expected(None)}


class Soak:
    """Clients that check every text, an administrator, and replicas that are killed; counts by how a request ended."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.first_token: list[float] = []
        self.back: list[float] = []
        self.odd: list[str] = []
        self.lock = threading.Lock()
        longest = {}
        for adapter in (None, "attention", "experts", "head"):
            longest[adapter] = cluster.served.alone("a red fox", adapter, max_new_tokens=48)
        self.right = {
            (adapter, count): cluster.served.tokenizer.decode(tokens[:count], skip_special_tokens=True)
            for adapter, tokens in longest.items()
            for count in range(1, 49)
        }

    def ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            adapter = rng.choice((None, "attention", "experts", "experts", "head"))
            count, began = rng.randint(4, 48), time.monotonic()
            try:
                chunks = self.cluster.complete(adapter or "model", max_tokens=count, stream=True)
                text, first = "", None
                for chunk in chunks:
                    first = first or time.monotonic() - began
                    text += chunk.choices[0].text
                end = "right" if text == self.right[adapter, count] else "wrong"
                self.first_token.append(first or 0.0)
            except openai.APIError as error:
                status = getattr(error, "status_code", None)
                end = f"told in mid-stream: {LOST}" if status is None and LOST in str(error) else f"status {status}"
                if not (end.startswith("told") or status == 503):
                    self.odd.append(repr(error))
            with self.lock:
                self.counts[end] += 1

    def change(self) -> None:
        rng = random.Random(0)
        while not self.stop.wait(2.0):
            path = str(self.cluster.served.adapters[rng.choice(("experts", "head"))])
            loaded = self.cluster.post("load_lora_adapter", lora_name="other", lora_path=path, load_inplace=True)
            gone = self.cluster.post("unload_lora_adapter", lora_name="other")
            with self.lock:
                self.counts[f"load {loaded.status_code}"] += 1
                self.counts[f"unload {gone.status_code}"] += 1

    def kill(self) -> None:
        while not self.stop.wait(45.0):
            before = replicas()
            os.kill(min(before), signal.SIGKILL)
            began = time.monotonic()
            eventually(lambda before=before: bool(replicas() - before) and len(self.cluster.held()) == 2, seconds=150)
            self.back.append(time.monotonic() - began)

    def memory(self) -> dict[str, int]:
        """MiB of the processes that are not killed."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                name = (process / "cmdline").read_text().split("\0")[0]
                if name.startswith("ray::") and "EngineReplica" not in name:
                    pages = int((process / "statm").read_text().split()[1])
                    found[f"{name} {process.name}"] = pages * os.sysconf("SC_PAGESIZE") >> 20
        return found


@pytest.mark.soak
def test_soak(cluster: Cluster) -> None:
    """Ten minutes by hand: ``SOAK_SECONDS=600 pytest -s -m soak tests/serving/test_ray.py``."""
    cluster.run(replicas=2)
    soak = Soak(cluster)
    acts = [partial(soak.ask, seed) for seed in range(6)] + [soak.change, soak.kill]
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    seconds = float(os.environ.get("SOAK_SECONDS", "60"))
    time.sleep(seconds / 3)
    before = soak.memory()
    time.sleep(seconds * 2 / 3)
    soak.stop.set()
    for thread in threads:
        thread.join(200)
    after = soak.memory()
    times = sorted(soak.first_token)
    p50, p99 = (round(1e3 * times[int(len(times) * share)]) for share in (0.5, 0.99))
    grown = {name: (size, after[name]) for name, size in before.items() if name in after}
    print(
        f"{seconds:.0f} s: {dict(soak.counts)}; first token {p50} ms, 99 %: {p99} ms; back after {soak.back}; {grown}"
    )
    assert soak.counts["right"] > 0 and not soak.counts["wrong"] and not soak.odd, soak.odd[:5]
    eventually(lambda: len(cluster.held()) == 2, seconds=150)

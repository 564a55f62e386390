"""Load on an OpenAI-compatible server: arrivals that do not wait for answers, adapters as popular as zipf has them.

    python benchmarks/serve.py --url http://127.0.0.1:8000 [--models a,b,base] [--rate 4] [--requests 200]
        [--prompt-tokens 128] [--new-tokens 64] [--popularity zipf] [--load NAME=PATH]

Works against any server that has /v1/completions with streaming and /v1/models, so that two engines meet the same
arrivals: same seed, same prompts, same order. Prompts are token ids drawn at random, answers run to their last token
(``ignore_eos``, where the server knows it). ``--load`` loads an adapter in the middle of the run and tells what it does
to the others' tokens. A request that fails, or gives another number of tokens than was asked for, is counted and
makes the run fail: no figure of a run with wrong answers is printed. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Outcome:
    """One request: seconds since the start of the run."""

    model: str
    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def main() -> None:
    args = parse_arguments()
    outcomes, loading = asyncio.run(run(args))
    failed = [one for one in outcomes if one.error is not None]
    short = [one for one in outcomes if one.error is None and len(one.tokens) != args.new_tokens]
    if failed or short:
        for one in (failed + short)[:5]:
            print(f"{one.model}: {one.error or f'{len(one.tokens)} tokens of {args.new_tokens}'}", file=sys.stderr)
        sys.exit(f"{len(failed)} requests failed and {len(short)} were cut short: nothing is reported")
    report(outcomes, loading, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--models", help="names between commas; default: all that the server lists")
    parser.add_argument("--popularity", choices=("zipf", "uniform"), default="zipf")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second, Poisson")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=500, help="prompts are ids below this")
    parser.add_argument("--load", metavar="NAME=PATH", help="an adapter to load in the middle of the run")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


async def run(args: argparse.Namespace) -> tuple[list[Outcome], tuple[float, float] | None]:
    draw = random.Random(args.seed)
    headers = {"authorization": f"Bearer {args.api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, limits=limits, timeout=600.0) as client:
        models = args.models.split(",") if args.models else await list_models(client)
        weights = [1 / (i + 1) if args.popularity == "zipf" else 1.0 for i in range(len(models))]
        plan = []
        at = 0.0
        for _ in range(args.requests):
            at += draw.expovariate(args.rate)
            prompt = [draw.randrange(5, args.vocabulary) for _ in range(args.prompt_tokens)]
            plan.append((at, draw.choices(models, weights)[0], prompt))
        start = time.perf_counter()
        loading = asyncio.ensure_future(load_in_between(client, args, start, plan[-1][0] / 2)) if args.load else None
        outcomes = await asyncio.gather(*(ask(client, args, start, *one) for one in plan))
        return list(outcomes), None if loading is None else await loading


async def list_models(client: httpx.AsyncClient) -> list[str]:
    answer = await client.get("/v1/models")
    answer.raise_for_status()
    return [card["id"] for card in answer.json()["data"]]


async def ask(
    client: httpx.AsyncClient, args: argparse.Namespace, start: float, at: float, model: str, prompt: Sequence[int]
) -> Outcome:
    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
    body: dict[str, Any] = {
        "model": model, "prompt": list(prompt), "max_tokens": args.new_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip
    outcome = Outcome(model=model, sent=time.perf_counter() - start)
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                outcome.error = f"status {answer.status_code}: {(await answer.aread())[:200]!r}"
                return outcome
            async for line in answer.aiter_lines():
                read_event(outcome, line, time.perf_counter() - start)
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


def read_event(outcome: Outcome, line: str, now: float) -> None:
    """Log-probabilities tell how many tokens an event has, also where its text is held back."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        outcome.error = str(event["error"])
        return
    for choice in event["choices"]:
        logprobs = choice.get("logprobs")
        outcome.tokens += [now] * len(logprobs["tokens"] if logprobs else ())


async def load_in_between(
    client: httpx.AsyncClient, args: argparse.Namespace, start: float, at: float
) -> tuple[float, float]:
    """(start, end) of the load, in seconds since the start of the run."""
    name, _, path = args.load.partition("=")
    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
    began = time.perf_counter() - start
    answer = await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
    if answer.status_code != 200:
        sys.exit(f"the adapter could not be loaded: {answer.text[:500]}")
    return began, time.perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def report(outcomes: Sequence[Outcome], loading: tuple[float, float] | None, args: argparse.Namespace) -> None:
    seconds = max(one.tokens[-1] for one in outcomes) - min(one.sent for one in outcomes)
    tokens = sum(len(one.tokens) for one in outcomes)
    groups = {"all": list(outcomes)}
    for one in outcomes:
        groups.setdefault(one.model, []).append(one)
    print(f"{'model':24}{'requests':>9}{'first token, ms':>24}{'between tokens, ms':>27}")
    print(f"{'':24}{'':9}{'p50':>8}{'p90':>8}{'p99':>8}{'p50':>9}{'p90':>9}{'p99':>9}")
    summary: dict[str, Any] = {}
    for name, group in groups.items():
        firsts, gaps = [one.first for one in group], [gap for one in group for gap in one.gaps]
        cells = [1000 * percentile(values, share) for values in (firsts, gaps) for share in (0.5, 0.9, 0.99)]
        summary[name] = {"requests": len(group), "first_token_ms": cells[:3], "between_tokens_ms": cells[3:]}
        shown = "".join(f"{cell:8.1f}" for cell in cells[:3]) + "".join(f"{cell:9.2f}" for cell in cells[3:])
        print(f"{name[:23]:24}{len(group):9}{shown}")
    print(
        f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s, {len(outcomes) / seconds:.2f} requests/s"
    )
    found: dict[str, Any] = {
        "benchmark": "serve", "url": args.url, "rate": args.rate, "popularity": args.popularity,
        "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "models": summary,
    }  # fmt: skip
    if loading is not None:
        found["loading"] = during_load(outcomes, *loading)
        print(
            f"a load of {loading[1] - loading[0]:.2f} s: p99 between tokens {found['loading']['p99_during_ms']:.2f} ms "
            f"while it ran, {found['loading']['p99_quiet_ms']:.2f} ms otherwise"
        )
    print(json.dumps(found))


def during_load(outcomes: Sequence[Outcome], began: float, ended: float) -> dict[str, float]:
    during, quiet = [], []
    for one in outcomes:
        for time_a, time_b in zip(one.tokens, one.tokens[1:], strict=False):
            (during if time_b >= began and time_a <= ended else quiet).append(time_b - time_a)
    return {
        "seconds": ended - began,
        "p99_during_ms": 1000 * percentile(during, 0.99),
        "p99_quiet_ms": 1000 * percentile(quiet, 0.99),
        "median_quiet_ms": 1000 * statistics.median(quiet) if quiet else float("nan"),
    }


if __name__ == "__main__":
    main()

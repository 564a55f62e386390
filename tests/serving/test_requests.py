"""What requests may ask, and what happens to those that fail, are cancelled, or meet a closed engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import VOCAB_SIZE, build
from support.mixed import MixedBatch
from support.serving import draw_prompts

import moegraft
from moegraft import Engine, SamplingParams
from moegraft.cli.train import _make_tokenizer
from moegraft.core.errors import UnknownAdapterError
from moegraft.serving.requests import (
    EngineBusyError,
    EngineClosedError,
    FinishReason,
    Grammar,
    Request,
    RequestError,
)

PROMPT = draw_prompts([9])[0]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
OPTIONS: dict[str, Any] = {"page_size": 4, "adapter_memory": "4MiB", "max_model_len": 100}


def ask(request_id: str = "r", sampling: SamplingParams = LONG, **fields: Any) -> Request:
    return Request(**{"request_id": request_id, "prompt_ids": PROMPT, "sampling": sampling, **fields})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"prompt_ids": (VOCAB_SIZE,)}, "prompt"),
        ({"prompt_ids": (-1,)}, "prompt"),
        ({"prompt_ids": (1.0,)}, "prompt"),
        ({"prompt_ids": (1,) * 100}, "prompt"),
        ({"sampling": SamplingParams(max_tokens=92)}, "max_tokens"),
        ({"sampling": SamplingParams(stop_token_ids=(VOCAB_SIZE,))}, "stop_token_ids"),
        ({"sampling": SamplingParams(logit_bias={VOCAB_SIZE: 1.0})}, "logit_bias"),
        ({"sampling": SamplingParams(stop=("x",))}, "stop"),
        ({"sampling": SamplingParams(grammar=Grammar(kind="regex", text="a"))}, "grammar"),
    ],
)
def test_refused_before_it_is_queued(engine: Engine, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        engine.submit(ask(**fields))
    assert caught.value.field == field
    assert engine.stats().waiting == 0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """On a model of its own: tests attach to the shared one meanwhile."""
    with Engine(build("qwen3_moe"), **OPTIONS) as engine:
        yield engine


def test_unknown_adapters_and_names_in_flight(engine: Engine) -> None:
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        engine.submit(ask(adapter="nobody"))
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        engine.generate([PROMPT, (PROMPT, "nobody")])
    stream = engine.submit(ask("twice"))
    with pytest.raises(RequestError, match="in flight"):
        engine.submit(ask("twice"))
    assert list(stream)[-1].finish_reason is FinishReason.LENGTH
    assert list(engine.submit(ask("twice")))[-1].finish_reason is FinishReason.LENGTH


def test_n_sequences_are_those_of_their_seeds(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, seed=5, n=4, ignore_eos=True)
    first = next(engine.generate([PROMPT], params))
    others = list(engine.generate([PROMPT, PROMPT], params))
    assert [each.outputs for each in others] == [first.outputs] * 2
    assert len({each.token_ids for each in first.outputs}) > 1
    alone = next(engine.generate([PROMPT], SamplingParams(max_tokens=8, seed=5, ignore_eos=True)))
    assert alone.outputs[0].token_ids == first.outputs[0].token_ids
    assert first.usage.completion_tokens == 32


def test_end_tokens(engine: Engine) -> None:
    free = next(engine.generate([PROMPT], LONG)).token_ids
    end = free[5]
    first = free.index(end)
    found = next(engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=60, stop_token_ids=(end,))))
    assert found.token_ids == free[: first + 1]
    assert found.outputs[0].finish_reason is FinishReason.STOP
    assert found.outputs[0].stop_reason == end


def test_sampled_logprobs_are_the_models(engine: Engine) -> None:
    """Against one forward pass of the model alone."""
    model = build("qwen3_moe")
    params = SamplingParams(max_tokens=6, seed=1, logprobs=3, ignore_eos=True)
    found = next(engine.generate([PROMPT], params)).outputs[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *found.token_ids]])).logits[0].log_softmax(-1)
    for step, entry in enumerate(found.logprobs):
        row = logits[len(PROMPT) - 1 + step]
        assert entry.token_id == found.token_ids[step]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("kind", ["lm_head", "save lm_head", "fused"])
def test_logprobs_under_an_adapter(mixed: MixedBatch, kinds: dict[str, Path], kind: str) -> None:
    """The head's delta is part of them."""
    params = SamplingParams(max_tokens=6, seed=1, logprobs=3, ignore_eos=True)
    requests = [(PROMPT, None), (PROMPT, kind), (PROMPT[:4], kind)]
    with Engine(mixed.model, adapters={kind: kinds[kind]}, **OPTIONS) as engine:
        found = list(engine.generate(requests, params))
    with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
        graft.load_adapter(kinds[kind], name=kind)
        for (prompt, name), each in zip(requests, found, strict=True):
            ids = torch.tensor([[*prompt, *each.token_ids]])
            logits = graft(input_ids=ids, adapters=[name]).logits[0].log_softmax(-1)
            for step, entry in enumerate(each.outputs[0].logprobs):
                row = logits[len(prompt) - 1 + step]
                assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)


def test_cancel(engine: Engine) -> None:
    stream = engine.submit(ask("c"))
    assert stream.get(timeout=60) is not None
    assert engine.cancel("c")
    events = list(stream)
    assert events[-1].finish_reason is FinishReason.CANCELLED
    assert len(events) < 60
    assert not engine.cancel("c")
    assert engine.stats().pages_used == 0
    engine.check_integrity()


def test_a_step_that_fails_ends_its_requests_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._loop.runner
    run = runner.run

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(runner, "run", fail)
    found = list(engine.generate([PROMPT, PROMPT], LONG))
    assert [each.outputs[0].finish_reason for each in found] == [FinishReason.ERROR] * 2
    assert "on fire" in str(found[0].outputs[0].error)
    monkeypatch.setattr(runner, "run", run)
    engine.check_integrity()
    assert engine.stats().pages_used == 0
    assert next(engine.generate([PROMPT], LONG)).outputs[0].finish_reason is FinishReason.LENGTH
    assert engine.stats().failed_steps in (1, 2)  # both in one step, or one after the other


def test_logits_that_are_not_finite_end_their_row_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine._loop.runner.run

    def spoil(plan: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = run(plan, ids)
        for row, chunk in enumerate(chunk for chunk in plan.chunks if chunk.samples):
            if chunk.sequence.tokens[0] == 7 and len(chunk.sequence.tokens) > 5:
                logits[row, 3] = float("nan")
        return logits

    expected = next(engine.generate([PROMPT], LONG)).token_ids
    monkeypatch.setattr(engine._loop.runner, "run", spoil)
    bad, good = engine.generate([(7, 8, 9), PROMPT], LONG)
    assert bad.outputs[0].finish_reason is FinishReason.ERROR
    assert len(bad.token_ids) == 3
    assert "not finite" in str(bad.outputs[0].error)
    assert good.token_ids == expected
    engine.check_integrity()


def test_streams_in_an_event_loop(engine: Engine) -> None:
    async def read(name: str) -> list[int]:
        return [token async for event in engine.submit(ask(name)) for token in event.token_ids]

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(read(f"a{i}") for i in range(5)))

    expected = list(next(engine.generate([PROMPT], LONG)).token_ids)
    assert asyncio.run(run()) == [expected] * 5


def test_busy(mixed: MixedBatch) -> None:
    with Engine(mixed.model, max_waiting=1, max_rows=1, chunk_tokens=16, **OPTIONS) as engine:
        streams = [engine.submit(ask(f"b{i}")) for i in range(2)]
        with pytest.raises(EngineBusyError):
            engine.submit(ask("b2"))
        for stream in streams:
            assert list(stream)[-1].finish_reason is FinishReason.LENGTH
        assert len(list(engine.generate([PROMPT] * 5, SamplingParams(max_tokens=2)))) == 5


def test_drain_and_close(mixed: MixedBatch) -> None:
    attention = mixed.model.config._attn_implementation
    engine = Engine(mixed.model, **OPTIONS)
    streams = [engine.submit(ask(f"d{i}")) for i in range(3)]
    assert engine.drain(60)
    assert not engine.is_ready
    with pytest.raises(EngineClosedError):
        engine.submit(ask())
    assert [list(stream)[-1].finish_reason for stream in streams] == [FinishReason.LENGTH] * 3
    engine.close()
    engine.close()
    assert mixed.model.config._attn_implementation == attention
    second = Engine(mixed.model, **OPTIONS)
    stream = second.submit(ask())
    second.close()
    assert list(stream)[-1].finish_reason is FinishReason.CANCELLED
    assert not hasattr(mixed.model, "_moegraft_graft")


def test_generate_that_is_left_cancels_the_rest(engine: Engine) -> None:
    for _ in engine.generate([PROMPT] * 6, LONG):
        break
    engine._loop.call(lambda: None)
    assert engine.stats().running == engine.stats().waiting == 0


def test_many_threads(engine: Engine) -> None:
    expected = next(engine.generate([PROMPT], LONG)).token_ids
    found: list[tuple[int, ...]] = []

    def run() -> None:
        found.extend(each.token_ids for each in engine.generate([PROMPT] * 3, LONG))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 18


class TestText:
    """With the demo's tokenizer, on a model that has its vocabulary."""

    @pytest.fixture
    def engine(self) -> Any:
        tokenizer = _make_tokenizer()
        with Engine(build("qwen3_moe", vocab_size=len(tokenizer)), tokenizer=tokenizer, **OPTIONS) as engine:
            yield engine

    def test_text_and_stop_strings(self, engine: Engine) -> None:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        whole = next(engine.generate([("What is", None)], params))
        assert whole.text == engine.text.decode(whole.token_ids)
        stop = whole.text[8:11]
        found = next(engine.generate(["What is"], SamplingParams(temperature=0, max_tokens=30, stop=(stop,))))
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.outputs[0].stop_reason == stop

    def test_grammar_through_the_engine(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=40, seed=3, grammar=Grammar(kind="regex", text="(yes|no), (yes|no)"))
        texts = [each.text for each in engine.generate(["a", "b", "c"], params)]
        assert set(texts) <= {f"{a}, {b}" for a in ("yes", "no") for b in ("yes", "no")}
        with pytest.raises(RequestError, match="regex"):
            engine.submit(ask(sampling=SamplingParams(grammar=Grammar(kind="regex", text="(("))))

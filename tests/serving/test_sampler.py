"""Draws against what the parameters say, counted over many seeds, and against other rows of the batch."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegraft.cli.train import _make_tokenizer
from moegraft.serving import sampler
from moegraft.serving.grammar import GrammarCompiler
from moegraft.serving.requests import Grammar, RequestError, SamplingParams
from moegraft.serving.sampler import Drawn, SamplingRow, sequence_seed

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 2.5])
DRAWS = 3000


def rows(count: int = 1, *, prompt: Any = (), generated: Any = (), **params: Any) -> list[SamplingRow]:
    return [
        SamplingRow(SamplingParams(**params), seed=i, prompt=frozenset(prompt), generated=Counter(generated))
        for i in range(count)
    ]


def sample(logits: torch.Tensor, batch: list[SamplingRow]) -> Drawn:
    return sampler.draw(logits, batch).read()


def draw(logits: torch.Tensor, batch: list[SamplingRow]) -> list[int]:
    return list(sample(logits.expand(len(batch), -1).clone(), batch).tokens)


def frequencies(**params: Any) -> dict[int, float]:
    found = Counter(draw(LOGITS, rows(DRAWS, **params)))
    return {token: count / DRAWS for token, count in sorted(found.items())}


def assert_drawn_as(found: dict[int, float], weights: torch.Tensor) -> None:
    """Five standard deviations of a count."""
    expected = weights / weights.sum()
    for token, probability in enumerate(expected.tolist()):
        slack = 5 * math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(found.get(token, 0.0) - probability) <= slack, (token, probability, found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert_drawn_as(frequencies(temperature=temperature), (LOGITS / temperature).softmax(0))


def test_top_k() -> None:
    kept = torch.tensor([0.0, 0, 0, 0, 1, 1])
    assert_drawn_as(frequencies(top_k=2), LOGITS.softmax(0) * kept)


def test_top_p_keeps_the_smallest_set() -> None:
    probabilities = LOGITS.softmax(0).sort(descending=True).values
    limit = float(probabilities[:2].sum()) + 1e-3  # a third token is needed to reach it
    assert_drawn_as(frequencies(top_p=limit), LOGITS.softmax(0) * torch.tensor([1.0, 0, 0, 0, 1, 1]))
    assert frequencies(top_p=0.0) == {4: 1.0}


def test_min_p() -> None:
    kept = (LOGITS.softmax(0) >= 0.3 * LOGITS.softmax(0).max()).float()
    assert 1 < kept.sum() < 6
    assert_drawn_as(frequencies(min_p=0.3), LOGITS.softmax(0) * kept)


def test_all_filters_together() -> None:
    weights = LOGITS.softmax(0)
    kept = torch.tensor([1.0, 0, 0, 0, 1, 1])  # the best three; of these all are at least 0.3 of the best
    top_p = float((weights[4] + 0.5 * weights[5]) / (weights * kept).sum())  # of the three: two reach it
    assert_drawn_as(frequencies(top_k=3, min_p=0.3, top_p=top_p), weights * torch.tensor([0, 0, 0, 0, 1.0, 1]))


def test_penalties_bias_and_min_tokens_on_greedy_rows() -> None:
    assert draw(LOGITS, rows(temperature=0)) == [4]
    assert draw(LOGITS, rows(temperature=0, presence_penalty=0.6, generated={4: 1})) == [5]
    assert draw(LOGITS, rows(temperature=0, presence_penalty=0.6, generated={4: 9, 5: 9})) == [4]
    assert draw(LOGITS, rows(temperature=0, frequency_penalty=0.2, generated={4: 6, 5: 1})) == [5]
    assert draw(LOGITS, rows(temperature=0, repetition_penalty=1.3, prompt={4})) == [5]
    assert draw(-LOGITS, rows(temperature=0, repetition_penalty=5.0, prompt={3})) == [3]
    assert draw(LOGITS.neg(), rows(temperature=0, repetition_penalty=5.0, generated={0: 1})) == [3]
    assert draw(LOGITS, rows(temperature=0, logit_bias={3: 4.5})) == [3]
    held = SamplingRow(SamplingParams(temperature=0, min_tokens=1), seed=0, end_ids=frozenset({4}))
    assert draw(LOGITS, [held]) == [5]
    held.accept(5)
    assert draw(LOGITS, [held]) == [4]


def test_logprobs_are_of_the_raw_logits() -> None:
    batch = rows(temperature=0, logprobs=2, logit_bias={3: 100.0}) + rows(temperature=0)
    found = sample(LOGITS.expand(2, -1).clone(), batch)
    expected = LOGITS.log_softmax(0)
    assert found.tokens == (3, 4)
    assert found.logprobs[1] is None
    entry = found.logprobs[0]
    assert entry is not None
    assert entry.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in entry.top] == [4, 5]
    assert [value for _, value in entry.top] == pytest.approx(expected[[4, 5]].tolist())


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.integers(0, 4),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    logprobs=st.sampled_from([None, 3]),
)


@given(batch=st.lists(st.tuples(PARAMS, st.integers(0, 2**63)), min_size=1, max_size=6), data=st.data())
def test_a_row_does_not_see_the_others(batch: list[tuple[SamplingParams, int]], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = 2 * torch.randn(len(batch), 40, generator=generator)
    made = [SamplingRow(params, seed, frozenset({1, 2}), generated=Counter({3: 2})) for params, seed in batch]
    together = sample(logits.clone(), made)
    for i, row in enumerate(made):
        alone = sample(logits[i : i + 1].clone(), [row])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_seeds() -> None:
    flat = torch.zeros(1000)
    one = SamplingRow(SamplingParams(), seed=7)
    first = draw(flat, [one])
    assert draw(flat, [one]) == first
    one.accept(first[0])
    assert draw(flat, [one]) != first
    assert sequence_seed(7, 0) == 7
    assert len({sequence_seed(seed, index) for seed in range(20) for index in range(20)}) == 400
    uniforms = [SamplingRow(SamplingParams(), seed=seed).uniform() for seed in range(1000)]
    assert abs(sum(uniforms) / 1000 - 0.5) < 0.05
    assert 0 <= min(uniforms) < 0.01 < 0.99 < max(uniforms) < 1


def test_no_token_of_probability_zero_is_drawn() -> None:
    logits = torch.full((64,), float("-inf"))
    logits[[3, 60]] = 0.0
    assert set(draw(logits, rows(500))) == {3, 60}
    assert set(draw(logits, rows(500, top_p=0.999))) == {3, 60}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2),
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("logprobs", 21),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("presence_penalty", 3),
        ("seed", 1.5),
    ],
)
def test_refused_parameters(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match="expected") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.fixture(scope="module")
def compiler() -> tuple[GrammarCompiler, Any]:
    """The vocabulary of the demo's tokenizer: bytes and their pairs."""
    tokenizer = _make_tokenizer()
    return GrammarCompiler(tokenizer, len(tokenizer) + 5, (tokenizer.eos_token_id,)), tokenizer


class TestGrammar:
    def run(self, compiler: Any, grammar: Grammar, seed: int) -> str:
        made, tokenizer = compiler
        row = SamplingRow(
            SamplingParams(), seed, end_ids=frozenset({tokenizer.eos_token_id}), matcher=made.compile(grammar)
        )
        vocabulary = len(tokenizer) + 5
        logits = torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(seed))
        logits[:, tokenizer.eos_token_id] += 6
        ids: list[int] = []
        for step in range(200):
            row.prepare(vocabulary)
            (token,) = sample(logits[step : step + 1].clone(), [row]).tokens
            row.accept(token)
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            assert row.matcher is not None
            if row.matcher.has_ended:
                break
        text: str = tokenizer.decode(ids)
        return text

    @pytest.mark.parametrize("seed", range(4))
    def test_schema(self, compiler: Any, seed: int) -> None:
        schema = {
            "type": "object",
            "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
        found = json.loads(self.run(compiler, Grammar(kind="json_schema", text=json.dumps(schema)), seed))
        assert found["a"] in ("x", "yes")
        assert isinstance(found["b"], bool)

    @pytest.mark.parametrize("seed", range(4))
    def test_regex(self, compiler: Any, seed: int) -> None:
        assert re.fullmatch("(ab|c){2,4}!", self.run(compiler, Grammar(kind="regex", text="(ab|c){2,4}!"), seed))

    @pytest.mark.parametrize(
        "grammar",
        [
            Grammar(kind="json_schema", text="{"),
            Grammar(kind="json_schema", text='{"type": "nothing"}'),
            Grammar(kind="regex", text="(("),
            Grammar(kind="lark", text="start: nothing"),
        ],
    )
    def test_refused(self, compiler: Any, grammar: Grammar) -> None:
        with pytest.raises(RequestError, match=grammar.kind):
            compiler[0].compile(grammar)

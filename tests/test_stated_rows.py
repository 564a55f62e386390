"""A grafted model states the rows of every forward pass: packed, grown, partial, foreign rows are right or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from support.adapters import save_with_peft
from support.families import build
from support.mixed import EXPERTS, ROWS, MixedBatch, random_ids

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import BatchError
from moegraft.testing import assert_close, assert_close_delta

pytestmark = pytest.mark.usefixtures("one_thread")
TOL = 1e-5


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, attached with two adapters on experts, attention, router, embeddings and head, two that save modules."""
    model, folder = build("qwen3_moe"), tmp_path_factory.mktemp("kinds")
    config = {
        "r": 2,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
    }
    saved = {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["norm", "gate", "lm_head", "embed_tokens"]}
    adapters = {"a": config, "b": config, "sa": saved, "sb": saved}
    for seed, (name, options) in enumerate(adapters.items()):
        save_with_peft(model, peft.LoraConfig(**options), folder / name, random_ids(), seed=seed)
    with moegraft.attach(model, adapter_memory="8MiB") as graft:
        for name in adapters:
            graft.load_adapter(folder / name, name)
        yield graft


def packed(*lengths: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Requests of these lengths, and the inputs that have them in one row."""
    ids = [random_ids(1, length, seed=i) for i, length in enumerate(lengths)]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, {"input_ids": torch.cat(ids, 1), "position_ids": position_ids}


@torch.no_grad()
def check_packed(graft: GraftedModel, names: Sequence[str | None], lengths: Sequence[int], **options: Any) -> None:
    requests, inputs = packed(*lengths)
    with graft.batch(names, lengths=lengths):
        found = graft.model(**inputs, use_cache=False, **options).logits[0]
    base = graft.model(**inputs, use_cache=False, **options).logits[0]
    kept = torch.arange(sum(lengths))
    if options:
        kept = kept[options["logits_to_keep"]] if not isinstance(options["logits_to_keep"], int) else kept[-3:]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[kept]
    for i, (name, ids) in enumerate(zip(names, requests, strict=True)):
        rows = (kept - sum(lengths[:i]))[owner == i]
        alone = graft(input_ids=ids, adapters=[name]).logits[0][rows]
        plain = graft(input_ids=ids, adapters=[None]).logits[0][rows]
        if name is None:
            assert torch.equal(found[owner == i], base[owner == i])
        elif rows.numel():
            assert_close_delta(found[owner == i], base[owner == i], alone, plain, TOL)


class TestPackedRows:
    @pytest.mark.parametrize("names", [["a", "b", None], ["sa", "sb", None], ["a", "sb", "b"]], ids=str)
    def test_lengths(self, kinds: GraftedModel, names: list[str | None]) -> None:
        check_packed(kinds, names, [3, 5, 2])

    @pytest.mark.parametrize("kept", [3, torch.tensor([1, 4, 9])], ids=["last", "indices"])
    def test_a_head_that_sees_some_tokens(self, kinds: GraftedModel, kept: Any) -> None:
        check_packed(kinds, ["a", "b", None], [3, 5, 2], logits_to_keep=kept)

    @pytest.mark.parametrize(("lengths", "sums"), [([3, 5], 8), ([10, 1], 11)])
    def test_lengths_of_other_tokens(self, kinds: GraftedModel, lengths: list[int], sums: int) -> None:
        with kinds.batch(["a", "b"], lengths=lengths), pytest.raises(BatchError, match=f"are {sums} tokens, the model"):
            kinds.model(input_ids=random_ids(1, 10))

    def test_without_lengths(self, kinds: GraftedModel) -> None:
        """8 tokens, 2 entries: shared out evenly, every second token would have another request's adapter."""
        with kinds.batch(["a", "b"]), pytest.raises(BatchError, match=r"2 entries, .* 1 rows of 8 tokens.*lengths="):
            kinds.model(**packed(3, 5)[1], use_cache=False)

    def test_lengths_have_an_entry_each(self, kinds: GraftedModel) -> None:
        with (
            pytest.raises(BatchError, match="lengths= has 1 entries, adapters= has 2"),
            kinds.batch(["a", "b"], lengths=[3]),
        ):
            pass
        assert not kinds.adapters["a"].in_use


class TestRowsOfTheModel:
    @torch.no_grad()
    def test_every_token_is_an_entry(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        """[T, 1], as engines with attention of their own call a model; prefill tiles all the same."""
        names = ["fused"] * 40 + [None] + ["dora"] * 40
        with graft.batch(names) as call:
            assert call is not None
            found = graft.model(input_ids=random_ids(81, 1), use_cache=False).logits
            assert call.token_rows(81, 1).run_length == 39
        alone = graft(input_ids=random_ids(81, 1), adapters=["fused"] * 81).logits
        assert_close(found[:40], alone[:40], TOL)

    @torch.no_grad()
    def test_several_rows_an_entry(self, kinds: GraftedModel) -> None:
        """Beams stand next to each other."""
        ids = random_ids(4, 5)
        with kinds.batch(["a", "b"]):
            found = kinds.model(input_ids=ids).logits
        assert_close(found, kinds(input_ids=ids, adapters=["a", "a", "b", "b"]).logits, TOL)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_rows_that_are_no_multiple(self, kinds: GraftedModel, rows: int) -> None:
        for names in (["a", "b"], ["a", "a"], [None, None]):
            with (
                kinds.batch(names),
                pytest.raises(BatchError, match=f"2 entries, the model was given {rows} rows of 6"),
            ):
                kinds.model(input_ids=random_ids(rows, 6))
        with pytest.raises(BatchError, match=f"2 entries for a batch of {rows} rows"):
            kinds(input_ids=random_ids(rows, 6), adapters=["a", "b"])

    @torch.no_grad()
    def test_inputs_embeds_and_an_inner_model(self, kinds: GraftedModel) -> None:
        ids = random_ids(2, 6)
        embeds = kinds.model.get_input_embeddings()(ids)
        names = ["b", None]
        with kinds.batch(names):
            found = kinds.model(inputs_embeds=embeds).logits
            inner = kinds.model.model(inputs_embeds=embeds).last_hidden_state
            assert_close(kinds.model.lm_head(inner[:, -1]), found[:, -1], TOL)
        assert torch.equal(found[1], kinds(inputs_embeds=embeds, adapters=[None, None]).logits[1])

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
    def test_generation(self, kinds: GraftedModel, options: dict[str, Any]) -> None:
        """Right rows through beams and a cache; inside a block too, where nothing has said how many there are."""
        ids, names = random_ids(2, 4), ["a", None]
        options = {"max_new_tokens": 4, "attention_mask": torch.ones_like(ids), **options}
        torch.manual_seed(0)
        expected = kinds.generate(input_ids=ids, adapters=names, **options)
        torch.manual_seed(0)
        with kinds.batch(names), torch.no_grad():
            assert torch.equal(kinds.model.generate(input_ids=ids, **options), expected)

    def test_a_pass_that_fails_leaves_nothing_behind(self, kinds: GraftedModel) -> None:
        ids, names = random_ids(2, 6), ["a", "b"]
        expected = kinds(input_ids=ids, adapters=names).logits
        handle = kinds.model.model.layers[1].register_forward_pre_hook(_raise)
        with kinds.batch(names), torch.no_grad():
            for kind in (ZeroDivisionError, KeyboardInterrupt):
                _raise.kind = kind  # type: ignore[attr-defined]
                with pytest.raises(kind):
                    kinds.model(input_ids=random_ids(2, 9))
            handle.remove()
            assert torch.equal(kinds.model(input_ids=ids).logits, expected)


def _raise(*_: Any) -> None:
    raise _raise.kind  # type: ignore[attr-defined]


class TestRowsOfAModule:
    @pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.experts", "mlp.gate"])
    @torch.no_grad()
    def test_a_part_of_the_tokens(self, kinds: GraftedModel, name: str) -> None:
        """6 of 12 tokens, which 2 entries divide: refused by name, never shared out; the base rows' batch runs."""
        module = kinds.model.model.layers[0].get_submodule(name)
        handle = module.register_forward_pre_hook(_some_rows)
        try:
            with pytest.raises(
                BatchError, match=rf"'model.layers.0.{name}' met rows .*, expected the 12 tokens of 2 rows"
            ):
                kinds(input_ids=random_ids(2, 6), adapters=["a", None])
        finally:
            handle.remove()

    @torch.no_grad()
    def test_outside_of_the_model(self, kinds: GraftedModel) -> None:
        """An engine that calls the head by itself: one row an entry is known, more are not."""
        head, x = kinds.model.lm_head, torch.randn(2, 3, kinds.model.config.hidden_size)
        expected = torch.stack([head(x)[i] for i in range(2)])
        with kinds.batch(["a", None]):
            one = head(x[:, 0])
            assert not torch.equal(one[0], expected[0, 0]) and torch.equal(one[1], head(x[:, 0])[1])
            with pytest.raises(BatchError, match=r"'lm_head' met rows \[2, 3\] outside of a forward pass"):
                head(x)
        with kinds.batch(["a", "a"]):
            assert_close(head(x)[:, 0][:1], one[:1], TOL)


def _some_rows(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x[:1] if x.dim() == 3 else x[:6] for x in args)


class TestArguments:
    @pytest.mark.parametrize(
        ("adapters", "message"),
        [
            ({"a", None}, "is a set, expected a list"),
            (frozenset({"a"}), "is a frozenset"),
            ({"a": None}, "is a dict"),
            (5, "is a int"),
            ("ab", "is a string"),
            (["a", 5], "has an entry 5"),
            ([["a", 5], None], "found 5 among the adapters of one row"),
        ],
        ids=["set", "frozenset", "dict", "int", "string", "number in it", "list in it"],
    )
    def test_what_is_no_list_of_names(self, kinds: GraftedModel, adapters: Any, message: str) -> None:
        with pytest.raises(BatchError, match=message):
            kinds(input_ids=random_ids(2, 3), adapters=adapters)
        with pytest.raises(BatchError, match=message), kinds.batch(adapters):
            pass

    def test_slots_of_the_caller(self, kinds: GraftedModel) -> None:
        """A buffer whose contents change between calls; the host knows nothing of it."""
        ids = random_ids(2, 4)
        slot = {name: kinds.bank.get(name).slot for name in ("a", "b")} | {None: -1}
        slots_M = torch.full((8,), -1, dtype=torch.int32)
        with kinds.batch(["a", "b"], slots=slots_M), torch.no_grad():
            for names in ([None, None], ["b", None], ["a", "b"]):
                slots_M.copy_(torch.tensor([slot[name] for name in names]).repeat_interleave(4))
                found = kinds.model(input_ids=ids).logits
                assert_close(found, kinds(input_ids=ids, adapters=names).logits, TOL)


def test_a_batch_of_another_model_inside_hides_nothing(graft: GraftedModel, mixed: MixedBatch) -> None:
    other = build("mixtral")
    expected = graft(input_ids=mixed.input_ids, adapters=ROWS).logits
    with (
        moegraft.attach(other, adapter_memory="1MiB") as inner,
        graft.batch(ROWS),
        inner.batch([None]),
        torch.no_grad(),
    ):
        assert torch.equal(graft.model(input_ids=mixed.input_ids).logits, expected)

"""``AdapterRows`` and ``AdapterCall``: rows state their adapter one by one, and nothing is shared out by guess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moegraft.core.errors import BatchError
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.call import AdapterCall, CallMemory
from moegraft.lora.punica.cpu import segments_of
from moegraft.lora.rows import AdapterRows, RankBounds, typical_run
from moegraft.lora.targets import AdapterWeights, LinearLoRA, LinearTarget, ModelTargets

CPU = torch.device("cpu")


class TestRows:
    def test_entries_and_their_lengths(self) -> None:
        rows = AdapterRows.of((4, -1, 2), device="cpu", lengths=(3, 0, 2))
        assert rows.slots_M.tolist() == [4, 4, 4, 2, 2] == list(rows.host or ())
        assert rows.slots_M.dtype == torch.int32 and rows.has_adapters

    def test_no_rows(self) -> None:
        rows = AdapterRows.of((), device="cpu")
        assert rows.num_rows == 0 and not rows.has_adapters and segments_of(rows).is_empty

    def test_base_rows(self) -> None:
        rows = AdapterRows.of((-1, -1), device="cpu", lengths=2)
        assert not rows.has_adapters and segments_of(rows).slots == ()
        assert AdapterRows.on_device(rows.slots_M).has_adapters  # for all that the host knows

    @pytest.mark.parametrize("host_knows", [True, False])
    def test_segments(self, host_knows: bool) -> None:
        rows = AdapterRows.of((7, -1, 3, 7, 3), device="cpu", lengths=(1, 2, 1, 1, 0))
        segments = segments_of(rows if host_knows else AdapterRows.on_device(rows.slots_M))
        assert segments.slots == (7, 3) and segments.offsets == (0, 2, 3)
        assert segments.rows_L.tolist() == [0, 4, 3] and not segments.is_whole
        assert [(slot, part.tolist()) for slot, part in segments.rows_of_segments()] == [(7, [0, 4]), (3, [3])]

    def test_slots_that_are_replaced_in_place(self) -> None:
        rows = AdapterRows.on_device(torch.tensor([1, -1], dtype=torch.int32))
        assert segments_of(rows).slots == (1,)
        rows.slots_M.copy_(torch.tensor([-1, 5]))
        assert segments_of(rows).slots == (5,) and segments_of(rows).rows_L.tolist() == [1]

    @pytest.mark.parametrize(
        ("slots", "is_whole"), [((1, 1, 2), True), ((1, 2, 1), False), ((-1, 1), False), ((2, 1), True)]
    )
    def test_whole(self, slots: tuple[int, ...], is_whole: bool) -> None:
        assert segments_of(AdapterRows.of(slots, device="cpu")).is_whole is is_whole

    @pytest.mark.parametrize(
        ("slots", "lengths", "run"),
        [
            ((1, 2, 3), (7, 7, 7), 7),
            ((1,) * 64 + (2,) * 64, (1,) * 128, 64),  # every token an entry of its own: a prefill all the same
            ((1, 2) * 8, (1,) * 16, 1),
            ((1, *range(2, 66)), (2048, *(1,) * 64), 1985),  # a prefill beside a decode step
            ((), (), 1),
            ((3,), (0,), 1),
        ],
    )
    def test_run_length(self, slots: Sequence[int], lengths: Sequence[int], run: int) -> None:
        assert typical_run(slots, lengths) == run
        assert AdapterRows.of(slots, device="cpu", lengths=lengths).run_length == run

    @pytest.mark.parametrize(("lengths", "message"), [((1,), "1 entries"), ((2, -1), "none below 0")])
    def test_lengths_that_do_not_fit(self, lengths: tuple[int, ...], message: str) -> None:
        with pytest.raises(BatchError, match=message):
            AdapterRows.of((0, 1), device="cpu", lengths=lengths)

    @pytest.mark.parametrize("slots", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2)], ids=["shape", "dtype"])
    def test_tensors_that_are_no_slots(self, slots: torch.Tensor) -> None:
        with pytest.raises(BatchError, match=r"expected \[M\] torch.int32"):
            AdapterRows.on_device(slots)

    def test_bounds(self) -> None:
        assert RankBounds.of(()) == RankBounds(a13=0, a2=0) and RankBounds.of(()).are_zero
        assert RankBounds.of((6, 3, 3, 2, 2)) == RankBounds(a13=6, a2=2)


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    """Adapters a, b, c on a map q and a head; "elsewhere" on the head alone."""
    sizes = {"in_features": 4, "out_features": 4}
    linears = {name: LinearTarget(name=name, **sizes) for name in ("q", "lm_head")}
    layout = BankLayout(ModelTargets(model_type="plain", linears=linears), dtype=torch.float32, page_bytes=256)
    bank = AdapterBank(layout, capacity_bytes=1 << 16, device="cpu", max_slots=8)
    lora = LinearLoRA(a=torch.ones(2, 4), b=torch.ones(2, 4))
    for name in "abc":
        bank.load(name, AdapterWeights(linears={"q": lora, "lm_head": lora}))
    return bank


@contextmanager
def call_of(bank: AdapterBank, names: Sequence[str | None], **options: Any) -> Iterator[AdapterCall]:
    with bank.acquire(names) as batch:
        yield AdapterCall(batch, CPU, heads={"lm_head"}, **options)


def names_of(bank: AdapterBank, rows: AdapterRows) -> str:
    name_of = {bank.get(name).slot: name for name in bank.names()} | {-1: "-"}
    return "".join(name_of[slot] for slot in rows.slots_M.tolist())


class TestForwardPass:
    @pytest.mark.parametrize("rank_bound", [None, 8])
    @pytest.mark.parametrize(
        ("names", "shape", "found", "expected"),
        [
            (["a", None, "b"], (3, 2), (3, 2), "aa--bb"),
            (["a", None, "b"], (3, 2), (6,), "aa--bb"),
            (["a", "b"], (4, 1), (4, 1), "aabb"),  # beams
            (["a", "b"], (2, 2), (2, 2, 2), "aaaabbbb"),  # several rows a token: heads of attention
            (["a", "b"], (2, 2), (4, 2), "aaaabbbb"),
            (["a", "b"], (2, 2), (0,), ""),
        ],
    )
    def test_rows(
        self,
        bank: AdapterBank,
        names: Sequence[str | None],
        shape: tuple[int, int],
        found: tuple[int, ...],
        expected: str,
        rank_bound: int | None,
    ) -> None:
        with call_of(bank, names, rank_bound=rank_bound) as call:
            call.begin(*shape)
            rows = call.rows("q", found)
            assert names_of(bank, rows) == expected
            assert (rows.host is None) == (rank_bound is not None and bool(expected))
            call.end()

    @pytest.mark.parametrize(("names", "expected"), [(["a", "a"], "aaaaa"), ([None, None], "-----")])
    def test_one_adapter_for_all(self, bank: AdapterBank, names: list[str | None], expected: str) -> None:
        """It does not matter which row is which, unless that may change in place."""
        with call_of(bank, names) as call:
            call.begin(2, 3)
            assert names_of(bank, call.rows("q", (5,))) == expected
        with call_of(bank, names, rank_bound=8) as call:
            call.begin(2, 3)
            with pytest.raises(BatchError, match="'q' met rows"):
                call.rows("q", (5,))

    @pytest.mark.parametrize("found", [(5,), (2,), (3, 2), (2, 2), (2, 1), (12,)])
    def test_other_rows_are_refused(self, bank: AdapterBank, found: tuple[int, ...]) -> None:
        """Two sequences of three tokens: a part of them, another order, twice as many."""
        with call_of(bank, ["a", "b"]) as call:
            call.begin(2, 3)
            with pytest.raises(BatchError, match=r"'q' met rows .*, expected the 6 tokens of 2 rows of 3"):
                call.rows("q", found)

    @pytest.mark.parametrize(
        ("kept", "found", "expected"),
        [
            (1, (2, 1), "ab"),
            (None, (2, 2), "aabb"),  # any tokens of a sequence have its adapter
            (None, (2,), "ab"),
            (torch.tensor([0, 2]), (2, 2), "aabb"),
        ],
    )
    @pytest.mark.parametrize("rank_bound", [None, 8])
    def test_a_head(
        self, bank: AdapterBank, kept: Any, found: tuple[int, ...], expected: str, rank_bound: int | None
    ) -> None:
        with call_of(bank, ["a", "b"], rank_bound=rank_bound) as call:
            call.begin(2, 3, kept)
            if rank_bound is not None and kept is None:
                with pytest.raises(BatchError, match="lm_head"):
                    call.rows("lm_head", found)
                return
            rows = call.rows("lm_head", found)
            assert names_of(bank, rows) == expected
            if rank_bound is not None:  # follows what it was taken from
                call.token_rows(2, 3).slots_M.copy_(call.token_rows(2, 3).slots_M.flip(0))
                assert names_of(bank, call.rows("lm_head", found)) == expected[::-1]

    def test_packed_rows(self, bank: AdapterBank) -> None:
        with call_of(bank, ["a", None, "b"], lengths=[1, 2, 3]) as call:
            call.begin(1, 6, 2)
            assert names_of(bank, call.rows("q", (1, 6))) == "a--bbb"
            assert names_of(bank, call.rows("lm_head", (1, 2))) == "bb"
            with pytest.raises(BatchError, match="lm_head"):
                call.rows("lm_head", (1, 3))
            call.end()
            with pytest.raises(BatchError, match=r"lengths=\[1, 2, 3\] are 6 tokens, .* 1 rows of 7"):
                call.begin(1, 7)

    @pytest.mark.parametrize(("names", "shape"), [(["a", "b"], (1, 4)), (["a", "b"], (3, 4)), ([], (2, 4))])
    def test_entries_that_do_not_fit(self, bank: AdapterBank, names: list[str], shape: tuple[int, int]) -> None:
        with (
            call_of(bank, names) as call,
            pytest.raises(BatchError, match=rf"{len(names)} entries, the model was given {shape[0]} rows of 4 tokens"),
        ):
            call.begin(*shape)

    def test_growth(self, bank: AdapterBank) -> None:
        with call_of(bank, ["a", "b"], growth=(1, 3)) as call:
            assert names_of(bank, call.token_rows(6, 1)) == "aaabbb"
            with pytest.raises(BatchError, match="2 entries"):
                call.token_rows(4, 1)

    def test_a_pass_inside_a_pass(self, bank: AdapterBank) -> None:
        """The text model inside the whole model; an encoder of other lengths; other rows."""
        with call_of(bank, ["a", "b"]) as call:
            call.begin(2, 3)
            call.begin(2, 5)
            assert names_of(bank, call.rows("q", (10,))) == "aaaaabbbbb"
            call.end()
            with pytest.raises(BatchError, match="inside a forward pass of 2 rows the model runs one of 4"):
                call.begin(4, 3)
            assert names_of(bank, call.rows("q", (6,))) == "aaabbb"

    def test_outside_of_a_pass(self, bank: AdapterBank) -> None:
        with call_of(bank, ["a", "b"]) as call:
            assert names_of(bank, call.rows("q", (2,))) == "ab"
            with pytest.raises(BatchError, match=r"'q' met rows \[2, 3\] outside of a forward pass"):
                call.rows("q", (2, 3))
        with call_of(bank, ["a", "b"], lengths=[2, 1]) as call:
            assert names_of(bank, call.rows("q", (3,))) == "aab"

    def test_a_buffer_of_the_caller(self, bank: AdapterBank) -> None:
        slots_M = torch.tensor([bank.get("b").slot, -1, bank.get("a").slot], dtype=torch.int32)
        with call_of(bank, ["a", "b"], slots_M=slots_M) as call:
            call.begin(1, 3)
            rows = call.rows("q", (1, 3))
            assert rows.slots_M is slots_M and rows.host is None
            call.end()
            with pytest.raises(BatchError, match=r"slots= has 3 rows, the model was given 2 rows of 3"):
                call.begin(2, 3)


class TestMemory:
    def test_a_decode_loop_derives_nothing_anew(self, bank: AdapterBank) -> None:
        memory = CallMemory()
        with call_of(bank, ["a", "b"], memory=memory) as call:
            first = call.token_rows(2, 1)
        with call_of(bank, ["a", "b"], memory=call.memory) as call:
            assert call.token_rows(2, 1) is first
        with call_of(bank, ["b", "a"], memory=call.memory) as call:
            assert call.token_rows(2, 1) is not first

    def test_an_adapter_that_came_back_elsewhere(self, bank: AdapterBank) -> None:
        with call_of(bank, ["c"]) as call:
            first = call.token_rows(1, 1)
        bank.evict("c")
        with call_of(bank, ["c"], memory=call.memory) as call:
            assert call.token_rows(1, 1).factors is not first.factors

    def test_rows_that_change_in_place_are_shared_with_no_other_call(self, bank: AdapterBank) -> None:
        with call_of(bank, ["a"], rank_bound=4) as call:
            bounded = call.token_rows(1, 1)
        with call_of(bank, ["a"], memory=call.memory) as call:
            assert call.token_rows(1, 1) is not bounded


class TestTakeRows:
    def test_the_rows_of_a_later_batch(self, bank: AdapterBank) -> None:
        with call_of(bank, [None, None], rank_bound=4, modules={"q", "lm_head"}) as captured:
            read = captured.token_rows(2, 2).slots_M
            assert read.tolist() == [-1] * 4
        with call_of(bank, ["b", "a"], rank_bound=4) as later:
            captured.take_rows(later)
        slots = [bank.get(name).slot for name in "bbaa"]
        assert read.tolist() == slots and captured.token_rows(2, 2).slots_M is read

    @pytest.mark.parametrize(
        ("bound", "modules", "later_bound", "message"),
        [
            (4, {"q"}, 4, "adapter 'a' touches 'lm_head', where no adapter did"),
            (4, {"q", "lm_head"}, 5, "rank_bound=5, the captured call has 4"),
            (4, {"q", "lm_head"}, None, "rank_bound=None"),
            (None, {"q", "lm_head"}, 4, "serves its own adapters only"),
        ],
    )
    def test_what_would_be_lost_is_refused(
        self, bank: AdapterBank, bound: int | None, modules: set[str], later_bound: int | None, message: str
    ) -> None:
        with call_of(bank, [None], rank_bound=bound, modules=modules) as captured:
            read = captured.token_rows(1, 2).slots_M
        with call_of(bank, ["a"], rank_bound=later_bound) as later, pytest.raises(BatchError, match=message):
            captured.take_rows(later)
        assert read.tolist() == [-1, -1]

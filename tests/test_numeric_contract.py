"""The numeric contract: what may be rounded and when, bits of base rows, bits of repeated batches, training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from support.layers import MODULE, BuiltLayer, build_layer, make_experts_bank, num_threads
from support.mixed import ROWS, MixedBatch

import moegraft
from moegraft.build import build_fused_moe, build_fused_moe_with_lora
from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.core.halves import apply_activation
from moegraft.formats.base import DenseExperts
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.testing import ExpertsFactors, LoRASpec, MoECase, poison_allocations

DTYPES = [torch.float32, torch.bfloat16]
# (E, K, D, F): a power of two, an odd size that no vector register divides, sizes of several BLAS panels.
SIZES = [(4, 2, 64, 32), (5, 3, 37, 19), (8, 2, 256, 96)]
# float32: fewer than 8 E rows take small blocks, others large ones; 1 to 3 rows leave padding in a block.
TOKENS = [1, 2, 3, 4, 7, 11, 13, 16, 31, 32, 33, 70, 150]


pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(size: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype) -> BuiltLayer:
    E, K, D, F = size
    config = MoEConfig(num_experts=E, top_k=K, hidden_size=D, intermediate_size=F, dtype=dtype, has_bias=E == 5)
    adapters = (LoRASpec(), LoRASpec(r_gate=3, r_up=1, r2=16), LoRASpec(expert_ids=(0, 2)))
    return build_layer(MoECase(name="bits", config=config, num_tokens=num_tokens, adapters=adapters, base_share=0.5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_base_rows_keep_their_bits(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_base_rows(size, dtype, TOKENS)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_base_rows_keep_their_bits_with_two_threads(dtype: torch.dtype) -> None:
    with num_threads(2):
        check_base_rows(SIZES[2], dtype, (1, 13, 150))


def check_base_rows(size: tuple[int, int, int, int], dtype: torch.dtype, tokens: Iterable[int]) -> None:
    """Whatever their neighbours do: adapters on or off, other activations, other experts."""
    for num_tokens in tokens:
        layer = layer_of(size, num_tokens, dtype)
        slots_T = layer.inputs.token_slots_T
        without = layer.run_with(None)
        is_base_T = slots_T < 0
        assert torch.equal(layer.run()[is_base_T], without[is_base_T]), f"{num_tokens} tokens"
        assert torch.equal(layer.run(torch.full_like(slots_T, -1)), without), f"{num_tokens} tokens"
        one_adapter_T = slots_T.clone().fill_(-1)
        one_adapter_T[0] = 1
        assert torch.equal(layer.run(one_adapter_T)[1:], without[1:]), f"{num_tokens} tokens"
        for seed in range(4):
            moved = neighbours_moved(layer, seed)
            assert torch.equal(moved.run()[is_base_T], without[is_base_T]), f"{num_tokens} tokens, seed {seed}"


def neighbours_moved(layer: BuiltLayer, seed: int) -> BuiltLayer:
    """Rows with an adapter come with other activations and choose other experts: so do other rows share an expert with
    a base row, and another number of them. Seed 0: all of them choose the same experts."""
    inputs, generator = layer.inputs, torch.Generator().manual_seed(seed)
    moves_T = inputs.token_slots_T >= 0
    logits_TE = torch.rand(len(moves_T), layer.case.config.num_experts, generator=generator)
    ids_TK = logits_TE.topk(layer.case.config.top_k).indices.to(torch.int32)
    ids_TK = ids_TK[:1].expand_as(ids_TK) if seed == 0 else ids_TK
    noise_TD = torch.randn(inputs.x_TD.shape, generator=generator).to(inputs.x_TD.dtype)
    moved = replace(
        inputs,
        topk_ids_TK=torch.where(moves_T[:, None], ids_TK, inputs.topk_ids_TK),
        x_TD=torch.where(moves_T[:, None], noise_TD, inputs.x_TD),
    )
    return replace(layer, inputs=moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_base_rows_of_a_model_keep_their_bits(dtype: torch.dtype, mixed: MixedBatch) -> None:
    """Adapters on experts, attention and router, so that neighbours route otherwise in every layer."""
    with moegraft.attach(copy.deepcopy(mixed.model).to(dtype), adapter_memory="4MiB") as graft:
        for name, path in mixed.adapters.items():
            graft.load_adapter(path, name=name)
        for rows in range(2, 7):
            for tokens in (1, 2, 5, 7):
                ids, names = mixed.input_ids[:rows, :tokens], ROWS[:rows]
                found = graft(input_ids=ids, adapters=names).logits
                plain = graft(input_ids=ids, adapters=[None] * rows).logits
                assert torch.equal(found[1], plain[1]), f"{rows} rows of {tokens} tokens"
                assert not torch.equal(found[0], plain[0])
        # A decoding step on a cache.
        logits = {}
        for names in (ROWS, (None,) * len(ROWS)):
            cache = graft(input_ids=mixed.input_ids[:, :-1], adapters=names).past_key_values
            step = graft(input_ids=mixed.input_ids[:, -1:], past_key_values=cache, adapters=names)
            logits[names] = step.logits[1]
        assert len({tuple(row.flatten().tolist()) for row in logits.values()}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_same_batch_same_bits(dtype: torch.dtype) -> None:
    for num_tokens in (1, 13, 150):
        layer = layer_of(SIZES[0], num_tokens, dtype)
        first = layer.run()
        for _ in range(5):
            assert torch.equal(layer.run(), first)
        with poison_allocations():
            assert torch.equal(layer.run(), first)
        assert torch.equal(layer_of(SIZES[0], num_tokens, dtype).run(), first)


def test_an_expert_that_no_adapter_holds_keeps_its_bits() -> None:
    """A row with an adapter is a base row in the experts that the adapter lacks."""
    layer = layer_of((4, 1, 64, 32), 40, torch.float32)
    partial_T = torch.full((40,), 2, dtype=torch.int32)
    lacks_T = torch.isin(layer.inputs.topk_ids_TK[:, 0], torch.tensor([1, 3]))
    assert 0 < lacks_T.sum() < 40
    assert torch.equal(layer.run(partial_T)[lacks_T], layer.run_with(None)[lacks_T])
    assert (layer.run(partial_T) != layer.run_with(None)).any(dim=1)[~lacks_T].all()


class TestRounding:
    """bfloat16 has 8 significant bits: 1 + 2**-8 is a tie and rounds to 1, 1 + 2**-7 is exact."""

    TINY = 2.0**-8

    @pytest.mark.parametrize("num_tokens", [1, 5, 40])
    def test_w2_delta_lands_before_the_base_is_rounded(self, num_tokens: int) -> None:
        eye = torch.eye(2)
        w2 = torch.tensor([[1.0, self.TINY], [0.0, 0.0]])
        lora = factors(a2=torch.tensor([[1.0, 0.0]]), b2=torch.tensor([[self.TINY, 0.0]]))
        found = run_plain(eye, w2, lora, torch.ones(num_tokens, 2))
        assert (found[:, 0] == 1 + 2 * self.TINY).all()

    @pytest.mark.parametrize("num_tokens", [1, 5, 40])
    def test_w13_delta_lands_before_the_base_is_rounded(self, num_tokens: int) -> None:
        w13 = torch.tensor([[1.0, self.TINY], [0.0, 0.0]])
        lora = factors(a13=torch.tensor([[1.0, 0.0]]), b_up=torch.tensor([[self.TINY, 0.0]]))
        found = run_plain(w13, torch.eye(2), lora, torch.ones(num_tokens, 2))
        # relu(1 + 2**-7) ** 2 = 1 + 2**-6 + 2**-14, rounded once
        assert (found[:, 0] == 1 + 4 * self.TINY).all()

    @pytest.mark.parametrize("num_tokens", [1, 5, 40])
    def test_sums_over_rank_and_width_are_float32(self, num_tokens: int) -> None:
        """256 + 1 is a tie in bfloat16: a sum that was rounded on the way would lose the 1."""
        a2 = torch.tensor([[256.0, 1.0, -256.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        b2 = torch.tensor([[1.0] * 4, [256.0] * 4, [-256.0] * 4])
        found = run_plain(torch.eye(4), torch.zeros(4, 4), factors(a2=a2, b2=b2), torch.ones(num_tokens, 4))
        assert (found == 1).all()

    @pytest.mark.parametrize("num_tokens", [1, 5, 40])
    def test_the_low_rank_vector_is_rounded_once(self, num_tokens: int) -> None:
        """A x = 257 is rounded to 256 before B: part of the contract, so that all backends agree."""
        a2 = torch.tensor([[256.0, 1.0], [256.0, 0.0]])
        b2 = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        found = run_plain(torch.eye(2), torch.zeros(2, 2), factors(a2=a2, b2=b2), torch.ones(num_tokens, 2))
        assert (found == 0).all()

    def test_the_sum_over_k_is_rounded_once(self) -> None:
        """Three experts give 1, 2**-8 and 2**-8: added one by one in bfloat16 they make 1."""
        config = MoEConfig(num_experts=3, top_k=3, hidden_size=2, intermediate_size=2, activation=RELU2, dtype=BF16)
        scale_E11 = torch.tensor([1.0, self.TINY, self.TINY])[:, None, None]
        weights = DenseExperts(
            w13=torch.eye(2).repeat(3, 1, 1).to(BF16), w2=(torch.eye(2) * scale_E11).to(BF16), num_halves=1
        )
        moe, _ = build_fused_moe(config, weights)
        out = moe.apply_experts(torch.ones(1, 2, dtype=BF16), torch.ones(1, 3), torch.tensor([[0, 1, 2]]))
        assert (out == 1 + 2 * self.TINY).all()

    @pytest.mark.parametrize("kind", ActivationKind)
    def test_the_activation_is_rounded_once(self, kind: ActivationKind) -> None:
        """One rounding moves a value by at most 2**-8 of itself; a second one would go beyond."""
        u_NGF = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(BF16)
        found_NF = apply_activation(u_NGF, Activation(kind=kind))
        exact_NF = apply_activation(u_NGF.float(), Activation(kind=kind))
        torch.testing.assert_close(found_NF.float(), exact_NF, rtol=1.001 * self.TINY, atol=1e-6)


BF16 = torch.bfloat16
RELU2 = Activation(kind=ActivationKind.RELU2, gated=False)


def factors(**tensors: torch.Tensor) -> ExpertsFactors:
    """The LoRA of expert 0, rank rows first."""
    return ExpertsFactors(expert_ids=(0,), **{name: tensor[None].to(BF16) for name, tensor in tensors.items()})


def run_plain(w13_FD: torch.Tensor, w2_DF: torch.Tensor, lora: ExpertsFactors, x_TD: torch.Tensor) -> torch.Tensor:
    """One expert in bfloat16, h = relu(w13 x)**2, with one adapter on every token."""
    width, hidden = w13_FD.shape
    config = MoEConfig(
        num_experts=1, top_k=1, hidden_size=hidden, intermediate_size=width, activation=RELU2, dtype=BF16
    )
    weights = DenseExperts(w13=w13_FD[None].to(BF16), w2=w2_DF[None].to(BF16), num_halves=1)
    bank = make_experts_bank(MoECase(name="plain", config=config), (lora,))
    moe, _ = build_fused_moe(config, weights)
    layer = build_fused_moe_with_lora(moe, bank.experts_tables(MODULE))
    num_tokens = x_TD.shape[0]
    with bank.acquire(["a0"]) as batch:
        rows = AdapterRows.of(batch.row_slots, device="cpu", lengths=num_tokens)
        ids_TK = torch.zeros(num_tokens, 1, dtype=torch.int32)
        return layer.apply_experts(x_TD.to(BF16), torch.ones(num_tokens, 1), ids_TK, rows, RankBounds(a13=8, a2=8))

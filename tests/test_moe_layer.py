"""FusedMoE and FusedMoEWithLoRA from plain tensors, over the shipped case table, against the merged-weights oracle."""

from __future__ import annotations

import random
import threading
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from support.layers import (
    MODULE,
    BuiltLayer,
    build_layer,
    check_layer,
    dense_weights,
    make_experts_bank,
    with_dtype,
)

from moegraft.build import build_fused_moe, build_fused_moe_with_lora
from moegraft.core.config import Activation, ActivationKind, BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica import PunicaWrapperCPU
from moegraft.lora.rows import RankBounds
from moegraft.moe.experts import FusedMoEExpertsModular
from moegraft.moe.layer import (
    ExpertsOutput,
    FusedMoE,
    FusedMoEModularMethod,
    FusedMoEWithLoRA,
    NoDispatchPrepareAndFinalize,
    PreparedRows,
)
from moegraft.moe.router import RouterConfig, Scoring, route
from moegraft.oracle.select import EXPERTS_CLASSES
from moegraft.testing import (
    MOE_CASES,
    ExpertsFactors,
    LoRASpec,
    MoECase,
    Popularity,
    Routing,
    make_inputs,
    poison_allocations,
)

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=32, intermediate_size=16)
MIXED = MoECase(
    name="mixed",
    config=CONFIG,
    num_tokens=24,
    adapters=(LoRASpec(r_gate=3, r_up=5, r2=2), LoRASpec(expert_ids=(1, 4)), LoRASpec(shared_outer=True, r2=0)),
)
CASES = {case.name: case for case in MOE_CASES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_delta_equals_merged_weights(case: MoECase, dtype: torch.dtype) -> None:
    check_layer(build_layer(with_dtype(case, dtype)))


@pytest.mark.parametrize("page_bytes", [1, 1 << 18], ids=["a few rows a page", "all in one page"])
@pytest.mark.parametrize("name", ["mixed_ranks", "single_projections", "shared_outer"])
def test_any_page_size(name: str, page_bytes: int) -> None:
    check_layer(build_layer(CASES[name], page_bytes=page_bytes))


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 23, 24, 25, 150])
@pytest.mark.parametrize("name", ["bias", "transposed", "relu2_without_gate"])
def test_both_sides_of_the_block_size(name: str, num_tokens: int) -> None:
    """Few rows an expert and many rows an expert take different GEMMs."""
    check_layer(build_layer(replace(CASES[name], num_tokens=num_tokens)))


# In 129 and 500 a factor begins inside a page at no multiple of its rows' common measure with the page.
@pytest.mark.parametrize("seed", [*range(40), 129, 500])
def test_random_cases(seed: int) -> None:
    """What the table does not think of: any mixture of shapes, layouts, ranks, held experts and popularity."""
    check_layer(build_layer(random_case(random.Random(seed)), seed=seed, page_bytes=2 ** (seed % 12)))


def random_case(rng: random.Random) -> MoECase:
    num_experts, kind = rng.randint(1, 9), rng.choice(list(ActivationKind))
    is_gated = kind.needs_gate or rng.random() < 0.7
    config = MoEConfig(
        num_experts=num_experts,
        top_k=rng.randint(1, num_experts),
        hidden_size=rng.choice((8, 16, 21, 40)),
        intermediate_size=rng.choice((4, 16, 17, 24)),
        activation=Activation(kind=kind, gated=is_gated),
        has_bias=rng.random() < 0.5,
        dtype=rng.choice((torch.float32, torch.bfloat16)),
    )
    return MoECase(
        name="random",
        config=config,
        num_tokens=rng.choice((1, 2, 7, 20, 90)),
        adapters=tuple(random_spec(rng, num_experts) for _ in range(rng.randint(1, 7))),
        popularity=rng.choice(list(Popularity)),
        base_share=rng.choice((0.0, 0.3, 0.8)),
        routing=rng.choice(list(Routing)),
        is_transposed=rng.random() < 0.5,
        is_interleaved=is_gated and rng.random() < 0.5,
    )


def random_spec(rng: random.Random, num_experts: int) -> LoRASpec:
    ranks = (0, 1, 2, 3, 7, 8, 16, 33)
    held = tuple(sorted(rng.sample(range(num_experts), rng.randint(1, num_experts)))) if rng.random() < 0.4 else None
    return LoRASpec(
        r_gate=rng.choice(ranks),
        r_up=rng.choice(ranks),
        r2=rng.choice(ranks),
        shared_a13=rng.random() < 0.4,
        shared_outer=rng.random() < 0.3,
        expert_ids=held,
    )


def test_ranks_that_differ_by_expert() -> None:
    """Experts of one projection share the largest rank, zero-padded: exact for each."""
    case = replace(MIXED, adapters=(LoRASpec(r_gate=5, r_up=5, r2=5),), base_share=0.2)
    inputs = make_inputs(case)
    lora = inputs.adapters[0]
    for e, rank in enumerate((1, 2, 3, 4, 5, 1)):
        for factor in (lora.b_gate, lora.b_up, lora.a2):
            factor[e, rank:] = 0
    layer = build_layer(case)
    trimmed = rebuilt(layer, (lora,))
    check_layer(trimmed)
    assert not torch.equal(trimmed.run(), layer.run())


def rebuilt(layer: BuiltLayer, adapters: tuple[ExpertsFactors, ...]) -> BuiltLayer:
    """The same layer with other adapters."""
    bank = make_experts_bank(layer.case, adapters)
    with_lora = build_fused_moe_with_lora(layer.base, bank.experts_tables(MODULE))
    return replace(layer, inputs=replace(layer.inputs, adapters=adapters), bank=bank, with_lora=with_lora)


class TestSentinels:
    def test_foreign_experts_give_nothing(self) -> None:
        layer = build_layer(replace(MIXED, num_tokens=5))
        ids_TK = torch.tensor([[-1, 6], [7, 1], [0, -(2**31)], [2**31 - 1, -1], [3, 4]], dtype=torch.int32)
        layer = replace(layer, inputs=replace(layer.inputs, topk_ids_TK=ids_TK))
        check_layer(layer)
        for out in (layer.run(), layer.run_with(None)):
            assert (out[[0, 3]] == 0).all()
            assert (out[[1, 2, 4]] != 0).any(dim=1).all()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_no_local_row_at_all(self, dtype: torch.dtype) -> None:
        layer = build_layer(MIXED)
        ids_TK = torch.full_like(layer.inputs.topk_ids_TK, -1, dtype=dtype)
        layer = replace(layer, inputs=replace(layer.inputs, topk_ids_TK=ids_TK))
        with poison_allocations():
            assert (layer.run() == 0).all()


class TestRouterWeightOnInput:
    def test_needs_one_expert_a_token(self) -> None:
        config = replace(CONFIG, apply_router_weight_on_input=True)
        case = replace(MIXED, config=config)
        with pytest.raises(ValueError, match="top_k = 1, found 2"):
            build_fused_moe(config, dense_weights(case, make_inputs(case)))

    def test_differs_from_weighting_the_output(self) -> None:
        case = CASES["weight_on_input"]
        on_input = build_layer(case).run()
        on_output = build_layer(replace(case, config=replace(case.config, apply_router_weight_on_input=False))).run()
        assert not torch.allclose(on_input, on_output, atol=1e-2)


class TestForward:
    """FusedMoE routes by itself where it was built with a router."""

    def test_router_and_experts(self) -> None:
        layer = build_layer(MIXED)
        router = RouterConfig(top_k=2, scoring=Scoring.SIGMOID, renormalize=True)
        bias_E = torch.linspace(-1, 1, 6)
        logits_TE = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
        moe, _ = build_fused_moe(CONFIG, dense_weights(MIXED, layer.inputs), router=router, correction_bias_E=bias_E)
        with_lora = build_fused_moe_with_lora(moe, layer.bank.experts_tables(MODULE))
        weights_TK, ids_TK = route(logits_TE, router, bias_E)
        layer = replace(layer, inputs=replace(layer.inputs, topk_ids_TK=ids_TK, topk_weights_TK=weights_TK))
        x_TD = layer.inputs.x_TD
        assert torch.equal(moe(x_TD, logits_TE), layer.run_with(None))
        with layer.context() as context:
            found = with_lora(x_TD, logits_TE, context.rows, context.bounds)
            assert torch.equal(found, layer.run())
            given = with_lora.apply_experts(x_TD, weights_TK, ids_TK, context.rows, context.bounds)
            assert torch.equal(given, found)

    def test_without_a_router(self) -> None:
        layer = build_layer(MIXED)
        with pytest.raises(ValueError, match="without a router"):
            layer.base(layer.inputs.x_TD, torch.zeros(24, 6))


class TestContext:
    def test_is_frozen(self) -> None:
        layer = build_layer(MIXED)
        with layer.context() as context, pytest.raises(FrozenInstanceError):
            context.bounds = RankBounds(a13=0, a2=0)  # type: ignore[misc]

    def test_bound_context_and_argument(self) -> None:
        layer = build_layer(MIXED)
        other_T = layer.inputs.token_slots_T.flip(0)
        base, mine, other = layer.run_with(None), layer.run(), layer.run(other_T)
        assert not torch.equal(mine, other)
        with layer.context() as bound, layer.context(other_T) as argument, layer.context(other_T * 0 - 1) as no_adapter:
            layer.base.method.experts.set_lora_context(bound)
            assert torch.equal(layer.run_with(None), mine)
            assert torch.equal(layer.run_with(argument), other)
            assert torch.equal(layer.run_with(no_adapter), base)
            layer.base.method.experts.set_lora_context(None)
        assert torch.equal(layer.run_with(None), base)

    def test_two_contexts_in_flight(self) -> None:
        """Two threads, one layer, contexts of different batches: each gets its own bits, every time."""
        layer = build_layer(MIXED)
        slots = (layer.inputs.token_slots_T, layer.inputs.token_slots_T.flip(0))
        expected = [layer.run(slots_T) for slots_T in slots]
        mixed_up: list[int] = []
        start = threading.Barrier(2)

        def work(i: int) -> None:
            torch.set_num_threads(1)
            with layer.context(slots[i]) as context:
                start.wait()
                mixed_up.extend(n for n in range(100) if not torch.equal(layer.run_with(context), expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mixed_up == []

    def test_nested_contexts_of_one_thread(self) -> None:
        layer = build_layer(MIXED)
        flipped_T = layer.inputs.token_slots_T.flip(0)
        expected, expected_flipped = layer.run(), layer.run(flipped_T)
        with layer.context() as outer, layer.context(flipped_T) as inner:
            assert torch.equal(layer.run_with(outer), expected)
            assert torch.equal(layer.run_with(inner), expected_flipped)
            assert torch.equal(layer.run_with(outer), expected)

    def test_nothing_is_parked(self) -> None:
        layer = build_layer(MIXED)
        before = {name: dict(vars(part)) for name, part in parts(layer).items()}
        layer.run()
        assert {name: dict(vars(part)) for name, part in parts(layer).items()} == before


def parts(layer: BuiltLayer) -> dict[str, object]:
    method = layer.base.method
    return {
        "layer": layer.base,
        "with_lora": layer.with_lora,
        "method": method,
        "experts": method.experts,
        "punica": layer.with_lora.punica,
    }


class WithoutLoRA(FusedMoEExpertsModular):
    """Serves, but adds no delta."""

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        return True, ""

    def apply(self, rows: PreparedRows, lora_context: MoELoRAContext | None = None, **memory: Any) -> ExpertsOutput:
        return ExpertsOutput(y=torch.zeros_like(rows.x_MD), is_reduced=True)


class Monolithic(WithoutLoRA):
    is_monolithic = True

    @staticmethod
    def supports_lora() -> bool:
        return True


class TestClasses:
    """``supports_lora()`` is a promise, and what does not make it is refused by name."""

    @pytest.mark.parametrize("experts_cls", EXPERTS_CLASSES, ids=lambda cls: cls.__name__)
    def test_promise_is_kept(self, experts_cls: type[FusedMoEExpertsModular]) -> None:
        """Every class of the registry: it changes its output when an adapter is on, by the right delta, or refuses."""
        if experts_cls.is_monolithic or not experts_cls.supports_lora():
            with pytest.raises(NoBackendError, match=r"monolithic|does not take LoRA"):
                build_layer(MIXED, backend=experts_cls.__name__)
            return
        place, reason = place_for(experts_cls)
        if place is None:
            pytest.skip(f"{experts_cls.__name__} serves no device of this machine: {reason}")
        device, dtype = place
        layer = build_layer(with_dtype(MIXED, dtype), backend=experts_cls.__name__, device=device)
        assert isinstance(layer.base.method.experts, experts_cls)
        touched_T = layer.inputs.token_slots_T == 0
        assert touched_T.any()
        assert (layer.run() != layer.run_with(None)).any(dim=1)[touched_T].all()
        check_layer(layer)

    @pytest.mark.parametrize("experts_cls", [WithoutLoRA, Monolithic])
    def test_others_are_refused(self, experts_cls: type[FusedMoEExpertsModular]) -> None:
        layer = build_layer(MIXED)
        prepare_finalize = NoDispatchPrepareAndFinalize(CONFIG)
        weights = dense_weights(MIXED, layer.inputs)
        if experts_cls.is_monolithic:
            with pytest.raises(ValueError, match="Monolithic is monolithic"):
                FusedMoEModularMethod(CONFIG, weights, experts_cls, prepare_finalize)
            return
        method = FusedMoEModularMethod(CONFIG, weights, experts_cls, prepare_finalize)
        with pytest.raises(NoBackendError, match="WithoutLoRA cannot take LoRA"):
            FusedMoEWithLoRA(FusedMoE(CONFIG, method), layer.bank.experts_tables(MODULE), PunicaWrapperCPU())

    def test_reduced_output_is_not_weighted_again(self) -> None:
        layer = build_layer(MIXED)
        pair = NoDispatchPrepareAndFinalize(CONFIG)
        rows = pair.prepare(layer.inputs.x_TD, layer.inputs.topk_weights_TK, layer.inputs.topk_ids_TK, None)
        y_TD = torch.ones(24, 32)
        assert pair.finalize(ExpertsOutput(y=y_TD, is_reduced=True), rows) is y_TD


def place_for(experts_cls: type[FusedMoEExpertsModular]) -> tuple[tuple[str, torch.dtype] | None, str]:
    """A device of this machine and a dtype that the class serves, else the reason why not."""
    reason = ""
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            config = with_dtype(MIXED, dtype).config
            ok, reason = experts_cls.is_supported_config(
                BackendRequest(config=config, device=DeviceTarget.of(torch.device(device)))
            )
            if ok:
                return (device, dtype), ""
    return None, reason


def test_every_activation_is_in_the_case_table() -> None:
    """A new activation without a case would go unproved."""
    assert {case.config.activation.kind for case in MOE_CASES} == set(ActivationKind)
    assert Activation(gated=False).num_halves == 1
    with pytest.raises(ValueError, match="silu_clamped is of gate and up"):
        Activation(kind=ActivationKind.SILU_CLAMPED, gated=False)

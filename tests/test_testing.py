from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.testing import (
    MOE_CASES,
    ExpertsFactors,
    ExpertsWeights,
    LoRASpec,
    MoECase,
    MoEInputs,
    Popularity,
    assert_close,
    assert_close_delta,
    draw_adapters,
    make_inputs,
    make_lora,
    moe_reference,
    poison_allocations,
    relative_error,
)

TOL = 1e-12  # float64 on both sides; only the order of sums differs


class TestWorkloads:
    @pytest.mark.parametrize("popularity", Popularity)
    def test_the_seed_decides(self, popularity: Popularity) -> None:
        drawn_N = draw_adapters(popularity, 1000, 7, base_share=0.2, seed=3)
        assert drawn_N.dtype == torch.int32
        assert drawn_N.equal(draw_adapters(popularity.value, 1000, 7, base_share=0.2, seed=3))
        assert not drawn_N.equal(draw_adapters(popularity, 1000, 7, base_share=0.2, seed=4))

    @pytest.mark.parametrize("popularity", Popularity)
    @pytest.mark.parametrize(("num_rows", "share", "num_base"), [(0, 0.5, 0), (1, 1.0, 1), (10, 0.0, 0), (10, 0.25, 2)])
    def test_base_share_is_exact(self, popularity: Popularity, num_rows: int, share: float, num_base: int) -> None:
        drawn_N = draw_adapters(popularity, num_rows, 4, base_share=share)
        assert drawn_N.shape == (num_rows,)
        assert (drawn_N == -1).sum() == num_base
        assert ((drawn_N >= -1) & (drawn_N < 4)).all()

    @pytest.mark.parametrize(
        ("popularity", "expected"),
        [
            (Popularity.IDENTICAL, [1, 0, 0, 0]),
            (Popularity.DISTINCT, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
            (Popularity.UNIFORM, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
            (Popularity.ZIPF, [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
            (Popularity.SKEWED, [27 / 65, 18 / 65, 12 / 65, 8 / 65]),
        ],
    )
    def test_shares(self, popularity: Popularity, expected: list[float]) -> None:
        num_rows = 40_000
        share_S = draw_adapters(popularity, num_rows, 4).bincount(minlength=4) / num_rows
        # Four standard deviations of a share of 1/2.
        assert torch.allclose(share_S, torch.tensor(expected, dtype=share_S.dtype), rtol=0, atol=2 / num_rows**0.5)

    def test_distinct_sorts_into_equal_segments(self) -> None:
        assert draw_adapters("distinct", 6, 3).sort().values.tolist() == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize(
        ("popularity", "num_rows", "num_adapters", "share"),
        [("popular", 4, 4, 0.0), ("zipf", -1, 4, 0.0), ("zipf", 4, 0, 0.0), ("zipf", 4, 4, 1.5), ("zipf", 4, 4, -0.1)],
    )
    def test_bad_arguments(self, popularity: str, num_rows: int, num_adapters: int, share: float) -> None:
        with pytest.raises(ValueError, match=r"popular|expected"):
            draw_adapters(popularity, num_rows, num_adapters, base_share=share)


ALLOCATIONS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((3, 5), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1).new_empty((3, 5), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1).new_empty_strided((3, 5), (5, 1), dtype=dtype),
}


class TestPoison:
    @pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
    def test_floats_are_nan(self, allocate: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype) -> None:
        with poison_allocations():
            allocated = allocate(dtype)
        assert allocated.shape == (3, 5)
        wide = torch.complex64 if dtype.is_complex else torch.float32
        assert allocated.to(wide).isnan().all()

    @pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
    def test_integers_are_the_largest(
        self, allocate: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype
    ) -> None:
        with poison_allocations():
            allocated = allocate(dtype)
        assert (allocated == torch.iinfo(dtype).max).all()

    def test_defined_allocations_are_left_alone(self) -> None:
        with poison_allocations():
            assert torch.zeros(4).sum() == 0
            assert torch.ones(4).clone().sum() == 4
            assert torch.empty(4, dtype=torch.bool).all()
            assert torch.empty(2, requires_grad=True).requires_grad

    def test_it_ends_with_the_block(self) -> None:
        with pytest.raises(RuntimeError, match="inside"), poison_allocations():
            raise RuntimeError("inside")
        assert torch.overrides._get_current_function_mode() is None

    def test_an_unwritten_read_shows(self) -> None:
        def sum_rows_of_a_buffer(rows: int) -> torch.Tensor:
            buffer = torch.empty(4, 2)
            buffer[:rows] = 1.0
            return buffer.sum()

        with poison_allocations():
            assert sum_rows_of_a_buffer(4) == 8
            assert sum_rows_of_a_buffer(3).isnan()


class TestErrors:
    def test_it_is_relative(self) -> None:
        ref = torch.tensor([3.0, 4.0])
        assert relative_error(ref, ref) == 0.0
        assert relative_error(ref * 1.5, ref) == pytest.approx(0.5)
        assert relative_error(torch.zeros(2), ref) == pytest.approx(1.0)
        assert relative_error(ref.bfloat16(), ref) == 0.0

    def test_it_is_computed_in_float64(self) -> None:
        ref = torch.full((1000,), 1e30)  # the squares overflow float32
        assert relative_error(ref * 2, ref) == pytest.approx(1.0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_never_passes(self, bad: float) -> None:
        ref = torch.ones(3)
        out = torch.tensor([1.0, bad, 1.0])
        assert relative_error(out, ref) == math.inf
        with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
            assert_close(out, ref, tol=1e30)
        with pytest.raises(ValueError, match="finite reference"):
            relative_error(ref, out)
        with pytest.raises(ValueError, match="finite reference"):
            relative_error(out, out)

    def test_zero_reference(self) -> None:
        assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
        assert relative_error(torch.full((3,), 1e-30), torch.zeros(3)) == math.inf

    def test_empty(self) -> None:
        assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0

    def test_shapes_do_not_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
            relative_error(torch.zeros(3), torch.zeros(3, 1))

    def test_the_message_shows_the_worst_element(self) -> None:
        ref = torch.ones(2, 3)
        out = ref.clone()
        out[1, 2] = 7.0
        with pytest.raises(AssertionError, match=r"rows: relative error .* worst at \(1, 2\): found 7, expected 1"):
            assert_close(out, ref, tol=1e-3, what="rows")

    def test_a_missing_delta_hides_in_the_output_but_not_in_the_delta(self) -> None:
        base = torch.randn(64, generator=torch.Generator().manual_seed(0))
        with_delta = base * 1.005
        assert_close(base, with_delta, tol=1e-2)
        with pytest.raises(AssertionError, match=r"delta: relative error 1\.0"):
            assert_close_delta(base, base, with_delta, base, tol=1e-2)
        assert_close_delta(with_delta, base, with_delta, base, tol=0.0)

    def test_without_a_delta_the_outputs_agree_in_every_bit(self) -> None:
        base = torch.ones(4)
        assert_close_delta(base, base, base * 2, base * 2, tol=0.0)
        with pytest.raises(AssertionError, match="inf"):
            assert_close_delta(base + 1e-6, base, base, base, tol=1e-2)


def activate(activation: Activation, u_G: list[torch.Tensor]) -> torch.Tensor:
    """The activations spelt out once more, from their definitions."""
    gate = u_G[0]
    table: dict[ActivationKind, Callable[[], torch.Tensor]] = {
        ActivationKind.SILU: lambda: gate / (1 + (-gate).exp()),
        ActivationKind.GELU: lambda: gate * (1 + (gate / 2**0.5).erf()) / 2,
        ActivationKind.GELU_TANH: lambda: gate * (1 + ((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) / 2,
        ActivationKind.RELU2: lambda: torch.where(gate > 0, gate**2, 0.0),
    }
    if activation.kind == ActivationKind.SWIGLU_OAI:
        clamped = torch.minimum(gate, torch.tensor(7.0))
        return (u_G[1].clip(-7, 7) + 1) * clamped / (1 + (-1.702 * clamped).exp())
    if activation.kind == ActivationKind.SILU_CLAMPED:
        clamped = torch.minimum(gate, torch.tensor(7.0))
        return u_G[1].clip(-7, 7) * clamped / (1 + (-clamped).exp())
    if activation.kind == ActivationKind.CLAMPED_SILU:
        return u_G[1].clip(-7, 7) * (gate / (1 + (-gate).exp())).clip(max=7)
    if activation.kind == ActivationKind.SILU_SOFTCAPPED:
        return 1.702 * (gate / 1.702).tanh() / (1 + (-gate).exp()) * 7 * (u_G[1] / 7).tanh()
    return table[activation.kind]() * (u_G[1] if activation.gated else 1.0)


def add_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor | None,
    a: torch.Tensor | None,
    position: int,
    lane: int = 0,
) -> torch.Tensor:
    if a is None or b is None:
        return y
    a_rI, b_rO = a[min(position, len(a) - 1)], b[min(position, len(b) - 1)]
    return y + b_rO.T @ (a_rI @ x)[lane : lane + len(b_rO)]


def unmerged_reference(inputs: MoEInputs, case: MoECase) -> torch.Tensor:
    """Row by row, the delta beside the base product: ``W x + b + B (A x)``, as the layer is defined."""
    w, config = inputs.weights, case.config
    w13, w2 = (w.w13.mT, w.w2.mT) if w.is_transposed else (w.w13, w.w2)
    num_halves, width = config.activation.num_halves, config.intermediate_size
    columns = torch.arange(num_halves * width)
    half_columns = columns.view(width, num_halves).T if w.is_interleaved else columns.view(num_halves, width)
    out_TD = torch.zeros_like(inputs.x_TD)
    for t, j in torch.cartesian_prod(torch.arange(len(out_TD)), torch.arange(config.top_k)).tolist():
        e, slot, weight = int(inputs.topk_ids_TK[t, j]), int(inputs.token_slots_T[t]), inputs.topk_weights_TK[t, j]
        if not 0 <= e < config.num_experts:
            continue
        lora = inputs.adapters[slot] if slot >= 0 and e in inputs.adapters[slot].expert_ids else None
        position = lora.expert_ids.index(e) if lora is not None else -1
        x = inputs.x_TD[t] * weight if config.apply_router_weight_on_input else inputs.x_TD[t]
        u = w13[e] @ x + (0 if w.b13 is None else w.b13[e])
        u_G = [u[half] for half in half_columns]
        if lora is not None:
            u_G[-1] = add_delta(u_G[-1], x, lora.b_up, lora.a13, position, lora.up_lane)
            if config.activation.gated:
                u_G[0] = add_delta(u_G[0], x, lora.b_gate, lora.a13, position)
        h = activate(config.activation, u_G)
        y = w2[e] @ h + (0 if w.b2 is None else w.b2[e])
        if lora is not None:
            y = add_delta(y, h, lora.b2, lora.a2, position)
        out_TD[t] += y if config.apply_router_weight_on_input else weight * y
    return out_TD


def run_reference(inputs: MoEInputs, config: MoEConfig, *, with_adapters: bool = True) -> torch.Tensor:
    return moe_reference(
        inputs.x_TD,
        inputs.topk_ids_TK,
        inputs.topk_weights_TK,
        inputs.weights,
        config,
        adapters=inputs.adapters if with_adapters else (),
        token_slots_T=inputs.token_slots_T if with_adapters else None,
    )


class TestReference:
    @pytest.mark.parametrize("case", MOE_CASES, ids=str)
    def test_it_is_the_layer_as_defined(self, case: MoECase) -> None:
        case = replace(case, config=replace(case.config, dtype=torch.float64))
        inputs = make_inputs(case, seed=1)
        base = run_reference(inputs, case.config, with_adapters=False)
        out = run_reference(inputs, case.config)
        naive = unmerged_reference(inputs, case)
        naive_base = unmerged_reference(replace(inputs, token_slots_T=torch.full_like(inputs.token_slots_T, -1)), case)
        assert_close(base, naive_base, TOL)
        assert_close_delta(out, base, naive, naive_base, TOL)
        assert out.equal(base) == (inputs.token_slots_T == -1).all()

    def test_a_worked_example(self) -> None:
        """One token of size 1, two experts: every number can be followed by hand."""
        config = MoEConfig(
            num_experts=2,
            top_k=2,
            hidden_size=1,
            intermediate_size=1,
            activation=Activation(kind=ActivationKind.RELU2, gated=False),
            has_bias=True,
        )
        weights = ExpertsWeights(
            w13=torch.tensor([[[1.0]], [[2.0]]]),
            w2=torch.tensor([[[1.0]], [[10.0]]]),
            b13=torch.tensor([[1.0], [0.0]]),
            b2=torch.tensor([[5.0], [0.0]]),
        )
        lora = ExpertsFactors(
            expert_ids=(1,),
            a13=torch.tensor([[[3.0]]]),
            b_up=torch.tensor([[[1.0]]]),
            a2=torch.tensor([[[2.0]]]),
            b2=torch.tensor([[[-4.0]]]),
        )
        out = moe_reference(
            torch.tensor([[2.0]]),
            torch.tensor([[0, 1]]),
            torch.tensor([[0.5, 0.25]]),
            weights,
            config,
            adapters=[lora],
            token_slots_T=torch.tensor([0]),
        )
        expert_0 = 1 * (1 * 2 + 1) ** 2 + 5  # not held by the adapter
        expert_1 = (10 - 4 * 2) * ((2 + 1 * 3) * 2) ** 2
        assert out.tolist() == [[0.5 * expert_0 + 0.25 * expert_1]]

    def test_the_stored_layout_does_not_matter(self) -> None:
        case = next(case for case in MOE_CASES if case.name == "bias")
        inputs = make_inputs(case)
        stored = inputs.weights
        order = torch.arange(2 * case.config.intermediate_size).view(2, -1).T.flatten()
        assert stored.b13 is not None
        interleaved = replace(stored, w13=stored.w13[:, order], b13=stored.b13[:, order], is_interleaved=True)
        expected = run_reference(inputs, case.config)
        for weights in (stored, interleaved):
            transposed = replace(weights, w13=weights.w13.mT, w2=weights.w2.mT, is_transposed=True)
            for layout in (weights, transposed):
                assert_close(run_reference(replace(inputs, weights=layout), case.config), expected, TOL)

    def test_an_empty_slot_is_a_base_row(self) -> None:
        case = next(case for case in MOE_CASES if case.name == "only_adapters")
        inputs = make_inputs(case)
        args = (inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, inputs.weights, case.config)
        slots_T = torch.zeros_like(inputs.token_slots_T)
        assert moe_reference(*args, adapters=[None], token_slots_T=slots_T).equal(moe_reference(*args))

    def test_float32_on_request(self) -> None:
        case = next(case for case in MOE_CASES if case.name == "odd_sizes")
        inputs = make_inputs(case)
        args = (inputs.x_TD, inputs.topk_ids_TK, inputs.topk_weights_TK, inputs.weights, case.config)
        out = moe_reference(*args, dtype=torch.float32)
        assert out.dtype == torch.float32
        assert_close(out, moe_reference(*args), 1e-6)

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_transformers_agrees(self, family: str) -> None:
        sizes = {"hidden_size": 24, "num_experts_per_tok": 2}
        module: nn.Module
        config = MoEConfig(num_experts=5, top_k=2, hidden_size=24, intermediate_size=10)
        if family == "qwen3_moe":
            module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=5, moe_intermediate_size=10, **sizes))
        else:
            module = GptOssExperts(GptOssConfig(num_local_experts=5, intermediate_size=10, **sizes))
            config = replace(config, has_bias=True, activation=Activation(kind=ActivationKind.SWIGLU_OAI))
        module = module.double()
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            # Large enough for gpt-oss's clamp at 7 to act.
            nn.init.normal_(parameter, std=2.0, generator=generator)
        held = dict(module.named_parameters())
        weights = ExpertsWeights(
            w13=held["gate_up_proj"],
            w2=held["down_proj"],
            b13=held.get("gate_up_proj_bias"),
            b2=held.get("down_proj_bias"),
            is_transposed=family == "gpt_oss",
            is_interleaved=family == "gpt_oss",
        )
        x_TD = torch.randn(9, 24, dtype=torch.float64, generator=generator)
        topk_weights_TK, topk_ids_TK = torch.rand(9, 5, dtype=torch.float64, generator=generator).topk(2)
        expected = module(x_TD, topk_ids_TK, topk_weights_TK)
        assert_close(moe_reference(x_TD, topk_ids_TK, topk_weights_TK, weights, config), expected, TOL)


class TestCases:
    def test_names_are_unique(self) -> None:
        names = [case.name for case in MOE_CASES]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize("case", MOE_CASES, ids=str)
    def test_inputs_fit_the_case(self, case: MoECase) -> None:
        config, inputs = case.config, make_inputs(case)
        assert inputs.x_TD.shape == (case.num_tokens, config.hidden_size)
        assert inputs.topk_ids_TK.shape == inputs.topk_weights_TK.shape == (case.num_tokens, config.top_k)
        assert inputs.token_slots_T.shape == (case.num_tokens,)
        assert (inputs.weights.b13 is not None) == config.has_bias
        assert ((inputs.token_slots_T >= -1) & (inputs.token_slots_T < max(len(inputs.adapters), 1))).all()
        again = make_inputs(case)
        assert again.x_TD.equal(inputs.x_TD)
        assert again.topk_ids_TK.equal(inputs.topk_ids_TK)
        assert again.weights.w13.equal(inputs.weights.w13)

    def test_some_case_is_odd_in_each_way(self) -> None:
        """The table would lose its worth without these, whatever the cases are called."""
        inputs = {case.name: make_inputs(case) for case in MOE_CASES}
        assert len(inputs["no_tokens"].x_TD) == 0
        assert len(inputs["one_token"].x_TD) == 1
        assert (inputs["no_adapters_used"].token_slots_T == -1).all()
        assert (inputs["only_adapters"].token_slots_T >= 0).all()
        assert (inputs["one_hot_expert"].topk_ids_TK == 0).all()
        assert {-1, 6} <= set(inputs["sentinels"].topk_ids_TK.flatten().tolist())
        assert inputs["mixed_ranks"].token_slots_T.unique().tolist()[-6:] == [0, 1, 2, 3, 4, 5]

    def test_factors_have_the_shapes_of_their_spec(self) -> None:
        config = MoEConfig(num_experts=4, top_k=1, hidden_size=10, intermediate_size=6)
        generator = torch.Generator().manual_seed(0)

        def shapes(spec: LoRASpec, config: MoEConfig = config) -> list[tuple[int, ...] | None]:
            lora = make_lora(spec, config, generator=generator)
            factors = (lora.a13, lora.b_gate, lora.b_up, lora.a2, lora.b2)
            return [None if factor is None else tuple(factor.shape) for factor in factors]

        assert shapes(LoRASpec(r_gate=2, r_up=3, r2=5)) == [(4, 5, 10), (4, 2, 6), (4, 3, 6), (4, 5, 6), (4, 5, 10)]
        assert shapes(LoRASpec(r_gate=2, r_up=3, r2=0, shared_a13=True))[:3] == [(4, 3, 10), (4, 2, 6), (4, 3, 6)]
        assert shapes(LoRASpec(r_gate=0, r_up=3, r2=0)) == [(4, 3, 10), None, (4, 3, 6), None, None]
        assert shapes(LoRASpec(r_gate=3, r_up=0, r2=0)) == [(4, 3, 10), (4, 3, 6), None, None, None]
        assert shapes(LoRASpec(r_gate=0, r_up=0, r2=1)) == [None, None, None, (4, 1, 6), (4, 1, 10)]
        assert shapes(LoRASpec(r_gate=2, r_up=2, r2=1, shared_outer=True, expert_ids=(1, 3))) == [
            (1, 4, 10),
            (2, 2, 6),
            (2, 2, 6),
            (2, 1, 6),
            (1, 1, 10),
        ]
        ungated = replace(config, activation=Activation(kind=ActivationKind.RELU2, gated=False))
        assert shapes(LoRASpec(), ungated)[:3] == [(4, 8, 10), None, (4, 8, 6)]

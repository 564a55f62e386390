"""The whole MoE path with LoRA inside its GEMMs, in Triton's interpreter (or on the GPU), against merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.kernels import DEVICE, make_lora_batch, make_weights, reference, run_poisoned

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.device import groups
from moegraft.kernels.lora_shrink.device import shrink_kernel
from moegraft.kernels.moe_forward.reference import fused_moe_lora_reference
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.testing.cases import MOE_CASES, LoRASpec, MoECase, MoEInputs, make_inputs
from moegraft.testing.errors import assert_close, assert_close_delta
from moegraft.tuning.tiles import MoETiles, TokenTile, TokenTiles


def run(
    case: MoECase, inputs: MoEInputs, weights: MoEWeights, lora: LoRABatch | None, tiles: MoETiles | None = None
) -> torch.Tensor:
    on_input = case.config.apply_router_weight_on_input
    return run_poisoned(inputs, weights, lora, tiles, weight_on_input=on_input)


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_torch_reference_matches_merged_weights(case: MoECase) -> None:
    inputs = make_inputs(case, device=DEVICE)
    weights, batch = make_weights(case, inputs), make_lora_batch(case, inputs)
    base, out = (
        fused_moe_lora_reference(
            inputs.x_TD,
            weights,
            inputs.topk_ids_TK,
            inputs.topk_weights_TK,
            lora=lora,
            apply_router_weight_on_input=case.config.apply_router_weight_on_input,
        )
        for lora in (None, batch)
    )
    base_ref = reference(case, inputs, None)
    assert_close(base, base_ref, 1e-5, what="base")
    assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, 2e-5)


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_layer_matches_merged_weights(case: MoECase) -> None:
    inputs = make_inputs(case, device=DEVICE)
    weights, lora = make_weights(case, inputs), make_lora_batch(case, inputs)
    base, out = run(case, inputs, weights, None), run(case, inputs, weights, lora)
    base_ref = reference(case, inputs, None)
    assert_close(base, base_ref, 1e-5, what="base")
    assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, 2e-5)
    if DEVICE == "cuda":  # the interpreter's matrix product gives a row other bits at another place of a tile
        is_base = inputs.token_slots_T < 0
        assert torch.equal(out[is_base], base[is_base])


EVERY_RANK = MoECase(
    name="every rank",
    config=MoEConfig(num_experts=3, top_k=2, hidden_size=24, intermediate_size=20),
    num_tokens=45,
    adapters=tuple(LoRASpec(r_gate=r, r_up=r, r2=r) for r in (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 64, 128, 256)),
)


def test_ranks_from_1_to_256_in_one_batch() -> None:
    inputs = make_inputs(EVERY_RANK, device=DEVICE)
    assert set(range(len(EVERY_RANK.adapters))) <= set(inputs.token_slots_T.tolist())
    weights, lora = make_weights(EVERY_RANK, inputs), make_lora_batch(EVERY_RANK, inputs, pages=4000)
    base, out = run(EVERY_RANK, inputs, weights, None), run(EVERY_RANK, inputs, weights, lora)
    base_ref = reference(EVERY_RANK, inputs, None)
    assert_close_delta(out, base, reference(EVERY_RANK, inputs, inputs.token_slots_T), base_ref, 2e-5)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were launched; of a GEMM also whether it adds lanes, and whether it waits first."""
    launches: list[str] = []
    kind = type(shrink_kernel)
    run_kernel = kind.run

    def note(self: object, *args: object, **options: object) -> object:
        name = getattr(self, "fn").__name__.removesuffix("_kernel")
        for lanes in (arg for arg in args if isinstance(arg, groups.Expand)):
            name += "" if lanes.u is None else " with lanes"
            name += ", waits first" if options.get("WAIT_FIRST", lanes.u is None) else ""
        launches.append(name)
        return run_kernel(self, *args, **options)

    monkeypatch.setattr(kind, "run", note)
    yield launches


# A GEMM with lanes reads its rows before it waits: it must stand behind a shrink, which has waited for their writer.
GEMMS = {
    "none": ["route", "gemm13, waits first", "gemm2, waits first", "sum"],
    "w13": ["route", "shrink", "gemm13 with lanes", "gemm2, waits first", "sum"],
    "w2": ["route", "gemm13, waits first", "shrink", "gemm2 with lanes", "sum"],
    "both": ["route", "shrink", "gemm13 with lanes", "shrink", "gemm2 with lanes", "sum"],
}
ONE_TOKEN = {**GEMMS, "w13": ["route_token", "gemm13 with lanes, waits first", *GEMMS["w13"][3:]]}
ONE_TOKEN["both"] = [*ONE_TOKEN["w13"][:2], *GEMMS["both"][3:]]
OWN_KERNELS = {
    "none": ["token13", "token2"],
    "w13": ["token_shrink", "token13", "token2"],
    "w2": ["token13", "token_shrink", "token2"],
    "both": ["token_shrink", "token13", "token_shrink", "token2"],
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("num_tokens", "expected"), [(1, ONE_TOKEN), (1, OWN_KERNELS), (6, GEMMS)])
@pytest.mark.parametrize("touched", GEMMS)
def test_which_kernels_run(
    touched: str, num_tokens: int, expected: dict[str, list[str]], gated: bool, launched: list[str]
) -> None:
    token = TokenTile(block_n=16, block_k=16)
    tiles = MoETiles(token=TokenTiles(w13=token, w2=token)) if expected is OWN_KERNELS else None
    rank13, rank2 = 3 * (touched in ("w13", "both")), 3 * (touched in ("w2", "both"))
    kind = ActivationKind.SILU if gated else ActivationKind.RELU2
    case = MoECase(
        name=touched,
        config=MoEConfig(
            num_experts=4, top_k=2, hidden_size=16, intermediate_size=12, activation=Activation(kind=kind, gated=gated)
        ),
        num_tokens=num_tokens,
        adapters=(LoRASpec(r_gate=rank13 if gated else 0, r_up=rank13, r2=rank2),) if touched != "none" else (),
    )
    inputs = make_inputs(case, device=DEVICE)
    if touched != "none":
        inputs = replace(inputs, token_slots_T=torch.zeros_like(inputs.token_slots_T))
    lora = None if touched == "none" else make_lora_batch(case, inputs)
    weights = make_weights(case, inputs)
    base = run(case, inputs, weights, None, tiles)
    del launched[:]
    out = run(case, inputs, weights, lora, tiles)
    assert launched == expected[touched]
    if touched != "none":
        base_ref = reference(case, inputs, None)
        assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, 2e-5)


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = next(case for case in MOE_CASES if case.num_tokens > 1 and case.adapters)
    inputs = make_inputs(case, device=DEVICE)
    weights, lora = make_weights(case, inputs), make_lora_batch(case, inputs)
    strided = lora.token_slots_T.repeat_interleave(2)[::2]
    for changed, message in (
        ({"token_slots_T": strided}, r"token_slots .* strides \[2\], expected \[\d+\] torch.int32, contiguous"),
        ({"token_slots_T": lora.token_slots_T.long()}, r"token_slots .* torch.int64"),
        ({"x_TD": inputs.x_TD.T.contiguous().T}, "LoRA reads rows with strides .*, expected contiguous rows"),
        ({"x_TD": inputs.x_TD[:1]}, r"LoRA reads rows \[1, \d+\]"),
        ({"rank2": 2**30}, r"low-rank columns, expected fewer than 2\^31 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            run(case, inputs, weights, replace(lora, **changed))
    with pytest.raises(ValueError, match=r"w2 is \[E, D, F\]"):
        run(case, inputs, replace(weights, w2=weights.w2[:, :, 1:] if weights.w2.shape[2] > 1 else weights.w2), None)

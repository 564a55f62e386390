"""int8 and fp8 weights in the MoE kernels, in Triton's interpreter or on the GPU, against the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.formats import PACKS
from support.fp8_interpreter import round_fp8_exactly
from support.kernels import DEVICE, make_lora_batch, reference, run_poisoned
from support.layers import dense_weights, dequantised

from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.kernels.moe_forward.host import fused_moe_lora, op_args
from moegraft.kernels.moe_quantise.host import moe_quantise
from moegraft.kernels.moe_quantise.reference import moe_quantise_reference
from moegraft.kernels.weights import kernel_weights
from moegraft.testing import (
    LoRASpec,
    MoECase,
    assert_close,
    assert_close_delta,
    make_inputs,
)
from moegraft.testing.cases import Routing
from moegraft.tuning import weight_formats
from moegraft.tuning.heuristic import batch_invariant_tiles
from moegraft.tuning.tiles import GemmTile, MoETiles, ShrinkTile

CONFIG = MoEConfig(num_experts=3, top_k=2, hidden_size=160, intermediate_size=144)
CASE = MoECase(
    name="eight_bit",
    config=CONFIG,
    num_tokens=6,
    adapters=(LoRASpec(r_gate=3, r_up=5, r2=2), LoRASpec(expert_ids=(1, 2), r2=20), LoRASpec(r_gate=0, r_up=0)),
    routing=Routing.SENTINELS,
)
CASES = {
    "silu": CASE,
    "gpt_oss": replace(
        CASE, config=replace(CONFIG, activation=Activation(kind=ActivationKind.SWIGLU_OAI), has_bias=True)
    ),
    "relu2": replace(CASE, config=replace(CONFIG, activation=Activation(kind=ActivationKind.RELU2, gated=False))),
    "odd_sizes": replace(CASE, config=replace(CONFIG, hidden_size=37, intermediate_size=19)),
    "one_token": replace(CASE, num_tokens=1, routing=Routing.RANDOM, base_share=0.0),
    "no_tokens": replace(CASE, num_tokens=0),
}
# float32: sums in another order; an activation at the edge of two codes may fall to the other side (2**-3 of it). The
# fp8 matrix unit of Hopper keeps about 14 bits of a sum of products (2e-4, measured), which brings more of them there.
TOL = {"int8": 1e-5, "fp8": 2e-3 if DEVICE == "cpu" else 1e-2}


def pack(name: str, dense: DenseExperts) -> ExpertsWeights:
    packed = PACKS[name].pack
    assert packed is not None
    return packed(dense)


@pytest.fixture(autouse=True)
def _exact_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        round_fp8_exactly(monkeypatch)


def tiles(*, block_m: int = 16, block_n: int = 64, swapped: bool = False) -> MoETiles:
    gemm = GemmTile(block_n=block_n, block_k=128, block_l=16, num_stages=2, swapped=swapped)
    shrink = ShrinkTile(block_r=16, block_k=64)
    return MoETiles(block_m=block_m, tile_m=16, gemm13=gemm, gemm2=gemm, shrink13=shrink, shrink2=shrink)


def check(case: MoECase, name: str, call_tiles: MoETiles | None = None) -> None:
    inputs = make_inputs(case, device=DEVICE)
    weights = pack(name, dense_weights(case, inputs))
    records = kernel_weights(weights, case.config.activation, case.config.dtype)
    lora = make_lora_batch(case, inputs)
    inputs = replace(inputs, weights=dequantised(weights))
    base, out = (run_poisoned(inputs, records, which, call_tiles) for which in (None, lora))
    tol = TOL[weights.format_name]
    base_ref = reference(case, inputs, None)
    assert_close(base, base_ref, tol, what="base")
    assert_close_delta(out, base, reference(case, inputs, inputs.token_slots_T), base_ref, tol)
    if DEVICE == "cuda":  # the interpreter's matrix product gives a row other bits at another place of a tile
        is_base = inputs.token_slots_T < 0
        assert torch.equal(out[is_base], base[is_base])


# Scaled by row, fp8 runs what int8 runs with other numbers, and rows that block-scaled fp8 quantises too.
LAYERS = [
    *((case, "fp8 block") for case in CASES),
    *((case, "int8") for case in ("gpt_oss", "odd_sizes", "one_token")),
    *((case, "fp8 channel") for case in ("gpt_oss", "odd_sizes")),
    ("silu", "fp8 static"),
]


@pytest.mark.parametrize(("case", "name"), LAYERS)
def test_layer_matches_dequantised_weights(case: str, name: str) -> None:
    check(CASES[case], name)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize(("name", "block_m"), [("int8", 16), ("fp8 channel", 16), ("fp8 block", 16), ("fp8 block", 64)])
def test_every_form_of_the_products(name: str, block_m: int, swapped: bool) -> None:
    """h quantised inside GEMM 2 (16) or by a kernel before it (64); weights on either side of the product."""
    check(CASE, name, tiles(block_m=block_m, swapped=swapped))


@pytest.mark.parametrize("name", ["int8", "fp8 block", "fp8 channel", "fp8 static"])
def test_tiles_that_know_no_format(name: str) -> None:
    check(CASE, name, batch_invariant_tiles())


def test_gemm13_quantises_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of the tuning that is not taken now; the workspace's plans are cached by shape."""
    monkeypatch.setattr(weight_formats, "X_IN_GEMM", 32)
    check(replace(CASE, num_tokens=7), "fp8 block", tiles(block_m=32))


@pytest.mark.parametrize("case", ["gpt_oss", "odd_sizes"])
def test_gemm13_writes_quantised_groups(case: str) -> None:
    """Tiles as wide as a group of h."""
    check(CASES[case], "fp8 block", tiles(block_m=16, block_n=128, swapped=True))


def test_lora_reads_its_own_rows() -> None:
    """Rows that were quantised on their way here: the base reads them, A13 the rows as they were."""
    inputs = make_inputs(CASE, device=DEVICE)
    weights = pack("fp8 static", dense_weights(CASE, inputs))
    records, lora = kernel_weights(weights, CASE.config.activation, CASE.config.dtype), make_lora_batch(CASE, inputs)
    args = (records, inputs.topk_ids_TK, inputs.topk_weights_TK)
    expected = fused_moe_lora(inputs.x_TD, *args, lora=lora)
    sent_TD = weights.quantise_input(inputs.x_TD)
    assert torch.equal(fused_moe_lora(sent_TD, *args, lora=replace(lora, x_TD=inputs.x_TD)), expected)
    assert not torch.equal(fused_moe_lora(sent_TD, *args, lora=lora), expected)
    with pytest.raises(ValueError, match="LoRA reads rows"):
        fused_moe_lora(sent_TD, *args, lora=replace(lora, x_TD=inputs.x_TD[:3]))


def test_the_custom_op_takes_all_of_it() -> None:
    """What torch.compile sees: quantised weights, static scales and rows of LoRA's own, as plain tensors."""
    inputs = make_inputs(CASE, device=DEVICE)
    weights = pack("fp8 static", dense_weights(CASE, inputs))
    records = kernel_weights(weights, CASE.config.activation, CASE.config.dtype)
    lora = replace(make_lora_batch(CASE, inputs), x_TD=inputs.x_TD * 2)
    args = (inputs.x_TD, records, inputs.topk_ids_TK, inputs.topk_weights_TK)
    through_op = torch.ops.moegraft.fused_moe_lora(*op_args(*args, lora, weight_on_input=False))
    assert torch.equal(through_op, fused_moe_lora(*args, lora=lora))


QUANTISED_ROWS: list[tuple[int, int, int, Callable[[], torch.Tensor | None]]] = [
    (5, 300, 128, lambda: None),
    (3, 300, 0, lambda: None),
    (7, 37, 0, lambda: torch.tensor(0.01)),
    (1, 128, 128, lambda: None),
    (0, 64, 0, lambda: None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "group_size", "scale"), QUANTISED_ROWS)
def test_rows_are_quantised_to_the_bit(
    rows: int, columns: int, group_size: int, scale: Callable[[], torch.Tensor | None], dtype: torch.dtype
) -> None:
    x_MI = torch.randn(rows, columns + 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)[:, :columns]
    x_MI[:1] *= 1e-7
    static_scale = scale()
    static_scale = None if static_scale is None else static_scale.to(DEVICE)
    stored_MI = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale_MQ = torch.full((rows, -(-columns // (group_size or columns))), torch.nan, device=DEVICE)
    moe_quantise(stored_MI, scale_MQ, x_MI, group_size=group_size, static_scale=static_scale)
    expected_MI, expected_MQ = moe_quantise_reference(x_MI, group_size=group_size, static_scale=static_scale)
    assert torch.equal(stored_MI.view(torch.uint8), expected_MI.view(torch.uint8))
    assert torch.equal(scale_MQ, expected_MQ)

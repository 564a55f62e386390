"""TritonExperts in the house: the oracle's word on it, and the layer over it in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.families import build
from support.kernels import DEVICE
from support.layers import BuiltLayer, build_layer, dense_weights, over_class

import moegraft
import moegraft.kernels.moe_forward.host as moe_forward
from moegraft.build import build_fused_moe
from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.formats import FORMAT_NAMES
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.moe.experts import TorchExperts, TritonExperts
from moegraft.moe.layer import PreparedRows
from moegraft.oracle import select_experts
from moegraft.oracle.select import EXPERTS_CLASSES
from moegraft.testing import MOE_CASES, assert_close, assert_close_delta
from moegraft.tuning.heuristic import batch_invariant_tiles

CASES = {case.name: case for case in MOE_CASES}
HOPPER = DeviceTarget(kind="cuda", capability=(9, 0), has_triton=True)
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype=torch.bfloat16)

# Sums of at most 64 terms in another order than the reference's float64.
DELTA_TOL = 1e-5


def over_triton(layer: BuiltLayer) -> BuiltLayer:
    """The same layer over TritonExperts, which the oracle would not give to float32 weights."""
    return over_class(layer, TritonExperts)


@pytest.mark.parametrize(
    "name", ["no_tokens", "one_token", "odd_sizes", "sentinels", "single_projections", "some_experts", "mixed_ranks"]
)
def test_layer_matches_merged_weights(name: str) -> None:
    layer = over_triton(build_layer(CASES[name], device=DEVICE))
    base, out = layer.run_with(None), layer.run()
    assert_close_delta(out, base, layer.reference(), layer.reference(with_adapters=False), DELTA_TOL)
    is_base = layer.inputs.token_slots_T < 0
    if DEVICE == "cuda":
        assert torch.equal(out[is_base], base[is_base])
    else:  # the interpreter's matrix product gives a row other bits at another place of a tile
        assert_close(out[is_base], base[is_base], 1e-6)


@pytest.mark.parametrize("name", ["transposed", "interleaved", "gpt_oss", "relu2_without_gate", "weight_on_input"])
def test_layouts_and_options_reach_the_kernels(name: str) -> None:
    layer = over_triton(build_layer(CASES[name], device=DEVICE))
    base, base_reference = layer.run_with(None), layer.reference(with_adapters=False)
    assert_close(base, base_reference, DELTA_TOL)
    assert_close_delta(layer.run(), base, layer.reference(), base_reference, DELTA_TOL)


def test_a_batch_without_adapters_asks_for_no_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``lora=None`` the kernels have no LoRA in them."""
    layer = over_triton(build_layer(CASES["one_token"], device=DEVICE))
    asked = []

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["lora"] is not None)
        return fused_moe_lora(*args, **kwargs)

    monkeypatch.setattr(moe_forward, "fused_moe_lora", record)
    base = layer.run_with(None)
    assert torch.equal(layer.run(torch.full_like(layer.inputs.token_slots_T, -1)), base)
    assert not torch.equal(layer.run(torch.zeros_like(layer.inputs.token_slots_T)), base)
    assert asked == [False, False, True]


def test_tiles_of_dispatched_rows_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows other ranks send here follows their routing; a row's bits must not."""
    layer = over_triton(build_layer(CASES["one_token"], device=DEVICE))
    experts, inputs, asked = layer.base.method.experts, layer.inputs, []

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["tiles"])
        return fused_moe_lora(*args, **kwargs)

    monkeypatch.setattr(moe_forward, "fused_moe_lora", record)
    for copies, expected in ((1, None), (1, 2), (9, 2), (0, 2), (1, 4096)):
        rows = PreparedRows(
            x_MD=inputs.x_TD.repeat(copies, 1),
            unquantised_MD=inputs.x_TD.repeat(copies, 1),
            topk_ids_MK=inputs.topk_ids_TK.repeat(copies, 1),
            topk_weights_MK=inputs.topk_weights_TK.repeat(copies, 1),
            slots_M=None,
            expected_choices=expected,
        )
        out = experts.apply(rows).y
        assert_close(out, layer.run_with(None).repeat(copies, 1), 1e-6)
    asked = [tiles for tiles in asked if tiles is not None]
    assert asked[0] == asked[1] == asked[2] != asked[3]


def test_batch_invariant_layers_have_one_set_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = over_triton(build_layer(CASES["one_token"], device=DEVICE))
    experts, asked = layer.base.method.experts, []

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["tiles"])
        return fused_moe_lora(*args, **kwargs)

    monkeypatch.setattr(moe_forward, "fused_moe_lora", record)
    base = layer.run_with(None)
    experts.config = replace(experts.config, batch_invariant=True)
    assert_close(layer.run_with(None), base, 1e-6)
    assert_close_delta(layer.run(), base, layer.reference(), layer.reference(with_adapters=False), DELTA_TOL)
    assert asked == [None, batch_invariant_tiles(), batch_invariant_tiles()]


def test_who_promises_batch_invariant_results() -> None:
    config = replace(CONFIG, batch_invariant=True)
    assert select_experts(BackendRequest(config=config, device=HOPPER)).experts_cls is TritonExperts
    for format_name, reason in (
        ("int4", "MarlinExperts: it has no tiles"),
        ("mxfp4", "TorchExperts: its GEMMs are a BLAS's"),
    ):
        with pytest.raises(NoBackendError, match=reason):
            select_experts(BackendRequest(config=config, device=HOPPER, format_name=format_name))
    with pytest.raises(NoBackendError, match="sums a row in another order where more rows are with it"):
        moegraft.attach(build("qwen3_moe"), batch_invariant=True)


def test_bound_context_serves_hosts_without_an_argument() -> None:
    layer = over_triton(build_layer(CASES["one_token"], device=DEVICE))
    expected, experts = layer.run(), layer.base.method.experts
    assert isinstance(experts, TritonExperts)
    with layer.context() as context:
        experts.set_lora_context(context)
        assert torch.equal(layer.run_with(None), expected)
        experts.set_lora_context(None)
    assert not torch.equal(layer.run_with(None), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_oracle_takes_it_on_cuda(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    device = replace(HOPPER, capability=capability)
    decision = select_experts(BackendRequest(config=replace(CONFIG, dtype=dtype), device=device))
    assert decision.experts_cls is TritonExperts
    reasons = {rejection.backend: rejection.reason for rejection in decision.rejections}
    assert set(reasons) == {cls.__name__ for cls in EXPERTS_CLASSES} - {"TritonExperts"}
    assert "TritonExperts comes first" in reasons["TorchExperts"]


@pytest.mark.parametrize(
    ("format_name", "capability", "backend"),
    [
        ("dense", (8, 0), "TritonExperts"),
        ("int8", (8, 0), "TritonExperts"),
        ("fp8", (8, 9), "TritonExperts"),
        ("fp8", (8, 6), "TorchExperts"),
        ("int4", (8, 0), "MarlinExperts"),
        ("mxfp4", (8, 0), "UnfusedOAITritonExperts"),
        ("mxfp4", (7, 5), "TorchExperts"),
    ],
)
def test_the_backend_of_each_format(format_name: str, capability: tuple[int, int], backend: str) -> None:
    device = replace(HOPPER, capability=capability)
    decision = select_experts(BackendRequest(config=CONFIG, device=device, format_name=format_name))
    assert decision.backend == backend


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_every_format_but_one_has_kernels(format_name: str) -> None:
    decision = select_experts(BackendRequest(config=CONFIG, device=HOPPER, format_name=format_name))
    assert (decision.experts_cls is TorchExperts) == (format_name == "nvfp4")
    reasons = {rejection.backend: rejection.reason for rejection in decision.rejections}
    assert format_name != "nvfp4" or "weights are nvfp4, it reads dense, int8, fp8" in reasons["TritonExperts"]


def test_fp8_needs_a_device_that_knows_it() -> None:
    request = BackendRequest(config=CONFIG, device=replace(HOPPER, capability=(8, 0)), format_name="fp8")
    with pytest.raises(NoBackendError, match=r"needs compute capability 8.9 for fp8 weights, the device is cuda sm80"):
        select_experts(request, backend="TritonExperts")


REFUSED = {
    "CUDA devices": {"device": DeviceTarget(kind="cpu", has_triton=True)},
    "triton cannot be imported": {"device": replace(HOPPER, has_triton=False)},
    "compute capability 8.0": {"device": replace(HOPPER, capability=(7, 5))},
    "torch.float32": {"config": replace(CONFIG, dtype=torch.float32)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_oracle_says_why_not(reason: str) -> None:
    request = replace(BackendRequest(config=CONFIG, device=HOPPER), **REFUSED[reason])
    decision = select_experts(request)
    assert decision.experts_cls is TorchExperts
    assert reason in decision.rejections[0].reason
    with pytest.raises(NoBackendError, match=reason):
        select_experts(request, backend="TritonExperts")


def test_other_formats_are_refused() -> None:
    ok, reason = TritonExperts.is_supported_config(BackendRequest(config=CONFIG, device=HOPPER, format_name="int4"))
    assert not ok and "weights are int4" in reason


def test_weights_are_not_copied() -> None:
    layer = over_triton(build_layer(CASES["one_token"], device=DEVICE))
    experts = layer.base.method.experts
    before = layer.run_with(None)
    experts.weights.w2.mul_(2)
    assert_close(layer.run_with(None), 2 * before, 1e-6)


def test_float32_layers_keep_torch_on_any_device() -> None:
    layer = build_layer(CASES["one_token"], device=DEVICE)
    _, decision = build_fused_moe(layer.case.config, dense_weights(layer.case, layer.inputs))
    assert decision.experts_cls is TorchExperts

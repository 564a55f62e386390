"""MarlinExperts and UnfusedOAITritonExperts in the house: the oracle's word on them, and the layer over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.formats import PACKS
from support.kernels import DEVICE
from support.layers import BuiltLayer, build_layer, over_class

from moegraft.core.config import BackendRequest, DeviceTarget, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.formats.base import ExpertsWeights
from moegraft.moe.experts import FusedMoEExpertsModular, MarlinExperts, UnfusedOAITritonExperts
from moegraft.oracle import select_experts
from moegraft.testing import MOE_CASES, LoRASpec, MoECase, assert_close, assert_close_delta

CLASSES: dict[str, type[FusedMoEExpertsModular]] = {"int4": MarlinExperts, "mxfp4": UnfusedOAITritonExperts}
CASES = {case.name: case for case in MOE_CASES}
HOPPER = DeviceTarget(kind="cuda", capability=(9, 0), has_triton=True)
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype=torch.bfloat16)
DELTA_TOL = 1e-5  # sums of at most 64 terms in another order than the reference's float64


def packed(layer: BuiltLayer) -> ExpertsWeights:
    weights = layer.base.method.experts.weights
    assert isinstance(weights, ExpertsWeights)
    return weights


def over_kernels(case: MoECase, format_name: str) -> BuiltLayer:
    """The layer over the class of its format, which the oracle would not give to float32 weights."""
    layer = build_layer(case, backend="TorchExperts", pack=PACKS[format_name].pack, device=DEVICE)
    return over_class(layer, CLASSES[format_name])


@pytest.mark.parametrize("name", ["one_token", "some_experts", "mixed_ranks", "weight_on_input"])
@pytest.mark.parametrize("format_name", CLASSES)
def test_layer_matches_merged_weights(format_name: str, name: str) -> None:
    layer = over_kernels(CASES[name], format_name)
    base, out = layer.run_with(None), layer.run()
    assert_close_delta(out, base, layer.reference(), layer.reference(with_adapters=False), DELTA_TOL)
    is_base = layer.inputs.token_slots_T < 0
    if DEVICE == "cuda":
        assert torch.equal(out[is_base], base[is_base])
    else:  # the interpreter's matrix product gives a row other bits at another place of a tile
        assert_close(out[is_base], base[is_base], 1e-6)


@pytest.mark.parametrize("format_name", CLASSES)
def test_the_oracle_takes_the_class_of_the_format(format_name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16) if format_name == "int4" else (torch.bfloat16,):
        request = BackendRequest(config=replace(CONFIG, dtype=dtype), device=HOPPER, format_name=format_name)
        decision = select_experts(request)
        assert decision.experts_cls is CLASSES[format_name] and decision.experts_cls.supports_lora()
        reasons = {rejection.backend: rejection.reason for rejection in decision.rejections}
        assert reasons["TritonExperts"].startswith(f"weights are {format_name}, it reads")
        assert reasons["TorchExperts"] == f"{decision.backend} comes first in the order of preference"


@pytest.mark.parametrize(
    ("format_name", "changes", "reason"),
    [
        (
            "int4",
            {"config": replace(CONFIG, dtype=torch.float32)},
            "the matrix units of bfloat16 and float16",
        ),
        (
            "mxfp4",
            {"config": replace(CONFIG, dtype=torch.float16)},
            "it would compute in torch.float16, its tiles are for",
        ),
        ("int4", {"device": DeviceTarget(kind="cpu")}, "it runs on CUDA devices, the layer is on cpu"),
        ("mxfp4", {"device": replace(HOPPER, capability=(7, 5))}, "it needs compute capability 8.0"),
        ("int4", {"device": replace(HOPPER, has_triton=False)}, "triton cannot be imported"),
        ("mxfp4", {"format_name": "dense"}, "weights are dense, it reads mxfp4"),
        ("int4", {"format_name": "mxfp4"}, "weights are mxfp4, it reads int4"),
    ],
)
def test_what_a_class_cannot_serve_is_refused_with_the_reason(
    format_name: str, changes: dict[str, object], reason: str
) -> None:
    request = replace(BackendRequest(config=CONFIG, device=HOPPER, format_name=format_name), **changes)  # type: ignore[arg-type]
    cls = CLASSES[format_name]
    assert reason in cls.is_supported_config(request)[1]
    with pytest.raises(NoBackendError, match=cls.__name__):
        select_experts(request, backend=cls.__name__)


@pytest.mark.parametrize("format_name", CLASSES)
def test_weights_of_another_format_are_refused(format_name: str) -> None:
    layer = build_layer(CASES["one_token"], backend="TorchExperts", pack=PACKS["int8"].pack)
    with pytest.raises(TypeError, match=f"{CLASSES[format_name].__name__}: found int8 weights, expected {format_name}"):
        CLASSES[format_name](layer.case.config, packed(layer))


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", CLASSES)
def test_the_chosen_class_on_a_gpu(format_name: str) -> None:
    config = MoEConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=192, dtype=torch.bfloat16)
    case = MoECase(name="gpu", config=config, num_tokens=40, adapters=(LoRASpec(), LoRASpec(r_gate=20, r_up=4, r2=0)))
    layer = build_layer(case, backend=CLASSES[format_name].__name__, pack=PACKS[format_name].pack, device="cuda")
    base, out = layer.run_with(None), layer.run()
    assert_close_delta(out, base, layer.reference(), layer.reference(with_adapters=False), 2e-2)
    is_base = layer.inputs.token_slots_T < 0
    assert torch.equal(out[is_base], base[is_base])

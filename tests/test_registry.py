"""Every class x format x activation x {bias, none} that the oracle can choose moves its output as its adapters say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.formats import PACKS
from support.kernels import DEVICE
from support.layers import BuiltLayer, build_layer, over_class, with_dtype

from moegraft.core.config import Activation, ActivationKind, BackendRequest, DeviceTarget, MoEConfig
from moegraft.formats import FORMAT_NAMES
from moegraft.moe.experts import FusedMoEExpertsModular, TorchExperts
from moegraft.oracle import select_experts, why_not
from moegraft.oracle.select import EXPERTS_CLASSES
from moegraft.testing import LoRASpec, MoECase, assert_close, assert_close_delta, poison_allocations, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = {
    "silu": Activation(),
    "gelu": Activation(kind=ActivationKind.GELU),
    "gelu_tanh": Activation(kind=ActivationKind.GELU_TANH),
    "swiglu_oai": Activation(kind=ActivationKind.SWIGLU_OAI),
    "silu_clamped": Activation(kind=ActivationKind.SILU_CLAMPED, limit=0.75),
    "silu_softcapped": Activation(kind=ActivationKind.SILU_SOFTCAPPED, alpha=0.75, limit=0.5),
    "clamped_silu": Activation(kind=ActivationKind.CLAMPED_SILU, limit=0.5),
    "relu2": Activation(kind=ActivationKind.RELU2, gated=False),
}
CASE = MoECase(
    name="registry",
    config=MoEConfig(num_experts=4, top_k=2, hidden_size=160, intermediate_size=192),
    num_tokens=16,
    adapters=(LoRASpec(r_gate=3, r_up=5, r2=2), LoRASpec(expert_ids=(1, 3)), LoRASpec(r_gate=0, r_up=0, r2=20)),
)
# float32: sums in another order. Half precision: two rounded outputs. Where activations are quantised, one that lies at
# the edge of two codes may fall to the other side, a step of 2**-3 away: rare in float32, one in thirty in bfloat16.
# Reading activations unquantised would be an error of 3e-2 in the base.
TOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TOL_QUANTISED_ACTIVATIONS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
SMALL = replace(CASE, config=replace(CASE.config, hidden_size=48, intermediate_size=32), num_tokens=5)
"""Cheap in Triton's interpreter."""
HOPPER = DeviceTarget(kind="cuda", capability=(9, 0), has_triton=True)


def combinations(device: DeviceTarget, dtype: torch.dtype) -> list[object]:
    """What can be chosen on a device, by the classes' own word."""
    found = []
    for cls, pack, activation, has_bias in itertools.product(EXPERTS_CLASSES, PACKS, ACTIVATIONS, (False, True)):
        config = replace(CASE.config, activation=ACTIVATIONS[activation], has_bias=has_bias, dtype=dtype)
        request = BackendRequest(config=config, device=device, format_name=PACKS[pack].format_name)
        if why_not(cls, request) is None:
            name = f"{cls.__name__}-{pack}-{activation}{'-bias' if has_bias else ''}"
            found.append(pytest.param(cls, pack, config, id=name))
    return found


@pytest.mark.parametrize(("cls", "pack", "config"), combinations(DeviceTarget(kind="cpu"), torch.float32))
def test_on_the_cpu(cls: type[FusedMoEExpertsModular], pack: str, config: MoEConfig) -> None:
    check(build_layer(replace(CASE, config=config), backend=cls.__name__, pack=PACKS[pack].pack))


@pytest.mark.gpu
@pytest.mark.parametrize(("cls", "pack", "config"), combinations(HOPPER, torch.bfloat16))
def test_on_cuda(cls: type[FusedMoEExpertsModular], pack: str, config: MoEConfig) -> None:
    target = DeviceTarget.of(torch.device("cuda"))
    format_name = PACKS[pack].format_name
    ok, reason = cls.is_supported_config(BackendRequest(config=config, device=target, format_name=format_name))
    if not ok:
        pytest.skip(f"this device is not served: {reason}")
    check(build_layer(replace(CASE, config=config), backend=cls.__name__, pack=PACKS[pack].pack, device="cuda"))


@pytest.mark.parametrize("pack", PACKS)
def test_bfloat16_is_a_compute_dtype_of_every_format(pack: str) -> None:
    """The weights have no dtype of their own to compute in: the layer's config says it."""
    check(build_layer(with_dtype(CASE, torch.bfloat16), backend="TorchExperts", pack=PACKS[pack].pack))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("pack", PACKS)
def test_few_tokens(pack: str, num_tokens: int) -> None:
    case = replace(CASE, num_tokens=num_tokens)
    if num_tokens == 0:
        assert build_layer(case, backend="TorchExperts", pack=PACKS[pack].pack).run().shape == (0, 160)
    else:
        check(build_layer(replace(case, base_share=0.0), backend="TorchExperts", pack=PACKS[pack].pack))


def choices_on_hopper() -> list[object]:
    """Every format with every activation, with biases and without in turn, over the class that is taken on a Hopper.

    By default every activation with dense weights, and of it two or three with each other format.
    """
    found = []
    for index, (pack, activation) in enumerate(itertools.product(PACKS, ACTIVATIONS)):
        is_sampled = PACKS[pack].format_name == "dense" or index % 3 == 0
        config = replace(SMALL.config, activation=ACTIVATIONS[activation], has_bias=index % 2 == 1)
        request = BackendRequest(
            config=replace(config, dtype=torch.bfloat16), device=HOPPER, format_name=PACKS[pack].format_name
        )
        name = f"{pack}-{activation}{'-bias' if config.has_bias else ''}"
        marks = () if is_sampled else (pytest.mark.soak,)
        found.append(pytest.param(select_experts(request).experts_cls, pack, config, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("cls", "pack", "config"), choices_on_hopper())
def test_kernels(
    cls: type[FusedMoEExpertsModular], pack: str, config: MoEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes over kernels, in Triton's interpreter where there is no GPU, and in float32, which it multiplies."""
    pytest.importorskip("triton", reason="needs triton")
    if DEVICE == "cpu":
        from support.fp8_interpreter import round_fp8_exactly

        round_fp8_exactly(monkeypatch)
    case = replace(SMALL, config=config)
    layer = build_layer(case, backend="TorchExperts", pack=PACKS[pack].pack, device=DEVICE)
    check(over_class(layer, cls), same_bits=DEVICE == "cuda")


def test_every_format_and_activation_is_among_them() -> None:
    assert {packing.format_name for packing in PACKS.values()} == set(FORMAT_NAMES)
    assert {activation.kind for activation in ACTIVATIONS.values()} == set(ActivationKind)
    chosen = {param.values[0] for param in choices_on_hopper()}
    assert chosen | {TorchExperts} == set(EXPERTS_CLASSES)


def check(layer: BuiltLayer, *, same_bits: bool = True) -> None:
    """Base and delta against the oracle of the dequantised weights; base rows bit for bit.

    ``same_bits``: not in the interpreter, whose products give a row other bits at another place of a tile.
    """
    with poison_allocations():
        without, found = layer.run_with(None), layer.run()
    expected, expected_base = layer.reference(), layer.reference(with_adapters=False)
    changed_T = ((expected - expected_base).abs() > 1e-12).any(dim=1)
    assert changed_T.any() and (found != without).any(dim=1)[changed_T].all()
    if same_bits:
        assert torch.equal(found[~changed_T], without[~changed_T]), "a row that no adapter changes has other bits"
    quantise = layer.inputs.weights.quantise_input
    reads_quantised = quantise is not None and not torch.equal(quantise(layer.inputs.x_TD), layer.inputs.x_TD)
    tol = (TOL_QUANTISED_ACTIVATIONS if reads_quantised else TOL)[found.dtype]
    assert_close(without, expected_base, tol, what="base")
    weight = max(1.0, float(expected[changed_T].norm() / (expected - expected_base)[changed_T].norm()))
    assert_close_delta(
        found[changed_T], without[changed_T], expected[changed_T], expected_base[changed_T], tol * weight
    )


def test_lora_reads_unquantised_rows() -> None:
    """A row that fp8 rounds to another: the delta is that of the row itself."""
    layer = build_layer(CASE, backend="TorchExperts", pack=PACKS["fp8 tensor"].pack)
    found = layer.run() - layer.run_with(None)
    expected = layer.reference() - layer.reference(with_adapters=False)
    rounded = layer.base.method.experts.weights.quantise_input(layer.inputs.x_TD)
    wrong = replace(layer, inputs=replace(layer.inputs, x_TD=rounded))
    of_rounded = wrong.reference() - wrong.reference(with_adapters=False)
    assert relative_error(found, expected) < 1e-4 < 1e-2 < relative_error(of_rounded, expected)


def test_only_the_chosen_experts_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build_layer(replace(CASE, num_tokens=1), backend="TorchExperts", pack=PACKS["int8"].pack)
    weights, asked = layer.base.method.experts.weights, []
    original = type(weights).w13_in_out_of

    def record(self: object, expert: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(expert)
        return original(weights, expert, dtype)

    monkeypatch.setattr(type(weights), "w13_in_out_of", record)
    layer.run_with(None)
    assert sorted(asked) == sorted(layer.inputs.topk_ids_TK.flatten().tolist())

"""An experts layer from plain tensors, with a poisoned adapter bank behind it, for a case of ``moegraft.testing``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch

from moegraft.build import build_fused_moe, build_fused_moe_with_lora
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica import PunicaWrapperCPU
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets
from moegraft.moe.experts import FusedMoEExpertsModular
from moegraft.moe.layer import FusedMoE, FusedMoEModularMethod, FusedMoEWithLoRA, NoDispatchPrepareAndFinalize
from moegraft.testing import (
    ExpertsFactors,
    MoECase,
    MoEInputs,
    assert_close,
    assert_close_delta,
    make_inputs,
    moe_reference,
    poison_allocations,
)
from moegraft.testing import ExpertsWeights as DenseTensors

MODULE = "experts"

Pack = Callable[[DenseExperts], ExpertsWeights]
"""Dense weights into another format."""

# What the relative error of a delta may be. float32: sums of at most 64 terms in another order. bfloat16 (8 bits, half
# a unit in the last place is 2**-9 = 0.002): x A, u, h, h A, y and the output are each rounded once, and the output
# that the delta is taken from is about as large as the delta.
DELTA_TOL = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltLayer:
    """A case, built: the layer without and with LoRA, and the bank that holds adapters ``a0``, ``a1``, ..."""

    case: MoECase
    inputs: MoEInputs
    bank: AdapterBank
    base: FusedMoE
    with_lora: FusedMoEWithLoRA

    @contextmanager
    def context(self, slots_T: torch.Tensor | None = None) -> Iterator[MoELoRAContext]:
        """The context of a batch in which row t uses adapter ``slots_T[t]`` (default: the case's own rows)."""
        slots_T = self.inputs.token_slots_T if slots_T is None else slots_T
        names = [None if slot < 0 else f"a{slot}" for slot in slots_T.tolist()]
        with self.bank.acquire(names) as batch:
            rows = AdapterRows.of(batch.row_slots, device=self.bank.pool.data.device)
            yield self.with_lora.lora_context(rows, RankBounds.of(batch.max_ranks(MODULE)))

    def run(self, slots_T: torch.Tensor | None = None) -> torch.Tensor:
        with self.context(slots_T) as context:
            return self.run_with(context)

    def run_with(self, context: MoELoRAContext | None) -> torch.Tensor:
        inputs = self.inputs
        return self.base.apply_experts(inputs.x_TD, inputs.topk_weights_TK, inputs.topk_ids_TK, context)

    def reference(self, *, with_adapters: bool = True, slots_T: torch.Tensor | None = None) -> torch.Tensor:
        """The merged-weights oracle in float64."""
        inputs = self.inputs
        return moe_reference(
            inputs.x_TD,
            inputs.topk_ids_TK,
            inputs.topk_weights_TK,
            inputs.weights,
            self.case.config,
            adapters=inputs.adapters if with_adapters else (),
            token_slots_T=(inputs.token_slots_T if slots_T is None else slots_T) if with_adapters else None,
        )


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Torch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_dtype(case: MoECase, dtype: torch.dtype) -> MoECase:
    return replace(case, config=replace(case.config, dtype=dtype))


def build_layer(
    case: MoECase,
    *,
    seed: int = 0,
    page_bytes: int = 1024,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    pack: Pack | None = None,
) -> BuiltLayer:
    """Small pages, so that most factors span several; the pool is poisoned, so that what nobody wrote is NaN.

    ``pack``: the case's weights in another format; the inputs then have what they dequantise to.
    """
    inputs = make_inputs(case, seed=seed, device=device)
    bank = make_experts_bank(case, inputs.adapters, page_bytes=page_bytes, device=device)
    weights: ExpertsWeights = dense_weights(case, inputs)
    if pack is not None:
        weights = pack(dense_weights(case, inputs))
        inputs = replace(inputs, weights=dequantised(weights))
    base, _ = build_fused_moe(case.config, weights, backend=backend)
    with_lora = build_fused_moe_with_lora(base, bank.experts_tables(MODULE))
    return BuiltLayer(case=case, inputs=inputs, bank=bank, base=base, with_lora=with_lora)


def over_class(layer: BuiltLayer, cls: type[FusedMoEExpertsModular]) -> BuiltLayer:
    """The layer over another class, also one that the oracle would not give to its float32 rows."""
    config, weights = layer.case.config, layer.base.method.experts.weights
    prepare = NoDispatchPrepareAndFinalize(config)
    base = FusedMoE(config, FusedMoEModularMethod(config, weights, cls, prepare))
    with_lora = FusedMoEWithLoRA(base, layer.bank.experts_tables(MODULE), PunicaWrapperCPU())
    return replace(layer, base=base, with_lora=with_lora)


def dequantised(weights: ExpertsWeights) -> DenseTensors:
    """What the oracle reads of weights in any format: float32, and how their base reads activations."""
    w13, w2 = weights.dequantise(torch.float32)
    b13 = weights.b13
    if b13 is not None and weights.is_interleaved:
        b13 = torch.cat([b13[:, ::2], b13[:, 1::2]], dim=1)
    return DenseTensors(w13=w13, w2=w2, b13=b13, b2=weights.b2, quantise_input=weights.quantise_input)


def check_layer(layer: BuiltLayer) -> None:
    """The delta against the oracle, base rows bit for bit, nothing read that nobody wrote."""
    case, tol = layer.case, DELTA_TOL[layer.case.config.dtype]
    with poison_allocations():
        without, found = layer.run_with(None), layer.run()
    assert found.shape == without.shape == (case.num_tokens, case.config.hidden_size)
    assert found.dtype == without.dtype == case.config.dtype

    expected, expected_base = layer.reference(), layer.reference(with_adapters=False)
    assert_close(without, expected_base, tol, what="base")
    # The oracle's own sums differ by 1e-16 where a row meets other rows.
    changed_T = ((expected - expected_base).abs() > 1e-12).any(dim=1)
    assert torch.equal(found[~changed_T], without[~changed_T]), "a row that no adapter changes has other bits"
    found, without, expected, expected_base = (out[changed_T] for out in (found, without, expected, expected_base))
    # A delta is taken from two rounded outputs: where it is the smaller, their rounding weighs more.
    weight = max(1.0, float(expected.norm() / (expected - expected_base).norm())) if changed_T.any() else 1.0
    assert_close_delta(found, without, expected, expected_base, tol * weight)


def dense_weights(case: MoECase, inputs: MoEInputs) -> DenseExperts:
    w = inputs.weights
    return DenseExperts(
        w13=w.w13,
        w2=w.w2,
        b13=w.b13,
        b2=w.b2,
        num_halves=case.config.activation.num_halves,
        is_transposed=w.is_transposed,
        is_interleaved=w.is_interleaved,
    )


def experts_target(case: MoECase) -> ExpertsTarget:
    config = case.config
    return ExpertsTarget(
        name=MODULE,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        has_gate=config.activation.gated,
        is_transposed=case.is_transposed,
        is_interleaved=case.is_interleaved,
    )


def make_experts_bank(
    case: MoECase,
    adapters: tuple[ExpertsFactors, ...],
    *,
    page_bytes: int = 1024,
    device: torch.device | str = "cpu",
) -> AdapterBank:
    layout = BankLayout(
        ModelTargets(model_type="plain", experts={MODULE: experts_target(case)}),
        dtype=case.config.dtype,
        page_bytes=page_bytes,
    )
    bank = AdapterBank(layout, capacity_bytes=4 << 20, device=device, max_slots=max(len(adapters), 1), poison=True)
    for i, factors in enumerate(adapters):
        bank.load(f"a{i}", AdapterWeights(experts={MODULE: ExpertsLoRA(**fields_of(factors))}))
    return bank


def fields_of(record: object) -> dict[str, object]:
    return {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]

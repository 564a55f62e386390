"""Inputs of a test case as the MoE kernels take them: an adapter bank's tables and records of weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.core.config import MoEConfig
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets
from moegraft.testing.cases import MoECase, MoEInputs
from moegraft.testing.moe_reference import ExpertsFactors, moe_reference
from moegraft.testing.poison import poison_allocations
from moegraft.tuning.heuristic import batch_invariant_tiles
from moegraft.tuning.tiles import MoETiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = "experts"


def make_weights(case: MoECase, inputs: MoEInputs) -> MoEWeights:
    w = inputs.weights
    return MoEWeights(
        w13=w.w13,
        w2=w.w2,
        b13=w.b13,
        b2=w.b2,
        activation=case.config.activation,
        is_transposed=w.is_transposed,
        is_interleaved=w.is_interleaved,
    )


def run_poisoned(
    inputs: MoEInputs,
    weights: MoEWeights,
    lora: LoRABatch | None,
    tiles: MoETiles | None = None,
    *,
    weight_on_input: bool = False,
) -> torch.Tensor:
    """A call of the layer whose memory is NaN before it is written."""
    with poison_allocations():
        return fused_moe_lora(
            inputs.x_TD,
            weights,
            inputs.topk_ids_TK,
            inputs.topk_weights_TK,
            lora=lora,
            apply_router_weight_on_input=weight_on_input,
            tiles=tiles,
        )


def reference(case: MoECase, inputs: MoEInputs, slots_T: torch.Tensor | None) -> torch.Tensor:
    """The merged-weights oracle in float64; without adapters where ``slots_T`` is None."""
    return moe_reference(
        inputs.x_TD,
        inputs.topk_ids_TK,
        inputs.topk_weights_TK,
        inputs.weights,
        case.config,
        adapters=inputs.adapters,
        token_slots_T=slots_T,
    )


def run_invariant(inputs: MoEInputs, weights: MoEWeights, lora: LoRABatch) -> torch.Tensor:
    """Output under batch-invariant tiles; fails where a row has other bits in other company. Of 290 rows or more."""

    def rows(start: int, end: int) -> torch.Tensor:
        part = slice(start, end)
        return fused_moe_lora(
            inputs.x_TD[part],
            weights,
            inputs.topk_ids_TK[part],
            inputs.topk_weights_TK[part],
            lora=replace(lora, token_slots_T=lora.token_slots_T[part]),
            tiles=batch_invariant_tiles(),
        )

    together = rows(0, len(inputs.x_TD))
    for start, end in ((0, 1), (5, 12), (100, 131), (17, 290)):
        assert torch.equal(rows(start, end), together[start:end])
    return together


def make_bank(
    config: MoEConfig, *, max_slots: int, pages: int = 400, page_bytes: int = 1024, device: str = DEVICE
) -> AdapterBank:
    """A poisoned bank for one experts layer, its pages so small that most factors span several."""
    target = ExpertsTarget(
        name=MODULE,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        has_gate=config.activation.gated,
    )
    layout = BankLayout(
        ModelTargets(model_type="tiny", experts={MODULE: target}), dtype=config.dtype, page_bytes=page_bytes
    )
    return AdapterBank(
        layout, capacity_bytes=pages * layout.page_bytes, device=device, max_slots=max_slots, poison=True
    )


def load(bank: AdapterBank, name: str, factors: ExpertsFactors) -> int:
    """Loads an adapter and gives its slot."""
    tensors = {
        field: None if getattr(factors, field) is None else getattr(factors, field).cpu()
        for field in ("a13", "b_gate", "b_up", "a2", "b2")
    }
    lora = ExpertsLoRA(expert_ids=factors.expert_ids, up_lane=factors.up_lane, **tensors)
    handle = bank.load(name, AdapterWeights(experts={MODULE: lora}))
    assert handle.residency is not None
    return handle.residency.slot


def make_lora_batch(case: MoECase, inputs: MoEInputs, **bank_options: int) -> LoRABatch:
    """The case's adapters in a bank. Slots are as the bank gives them, so that the batch's are mapped."""
    bank = make_bank(case.config, max_slots=len(inputs.adapters) + 1, **bank_options)
    slots = [load(bank, f"adapter{i}", factors) for i, factors in enumerate(inputs.adapters)]
    slot_of = torch.tensor([*slots, -1], dtype=torch.int32, device=inputs.token_slots_T.device)
    ranks13 = [0 if f.a13 is None else f.a13.shape[1] for f in inputs.adapters]
    ranks2 = [0 if f.a2 is None else f.a2.shape[1] for f in inputs.adapters]
    return LoRABatch(
        tables=bank.experts_tables(MODULE),
        token_slots_T=slot_of[inputs.token_slots_T.long()],
        rank13=max(ranks13, default=0),
        rank2=max(ranks2, default=0),
    )

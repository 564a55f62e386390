"""``torch.ops.moegraft.fused_moe_lora``: the layer as a custom op over plain tensors, for torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import torch

from moegraft.core.config import Activation, ActivationKind
from moegraft.core.tables import ExpertsTables
from moegraft.kernels.moe_forward.run import run_layer
from moegraft.kernels.records import LoRABatch, MoEWeights, Quantisation, WeightFormat


def op_args(
    x_TD: torch.Tensor,
    weights: MoEWeights,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    lora: LoRABatch | None,
    *,
    weight_on_input: bool,
) -> tuple[Any, ...]:
    """The records as the plain arguments of the op."""
    activation = weights.activation
    tables = None if lora is None else lora.tables
    quantisation = weights.quantisation
    return (
        x_TD, topk_ids_TK, topk_weights_TK, weights.w13, weights.w2, weights.b13, weights.b2, activation.kind.value,
        activation.gated, activation.alpha, activation.limit, weights.is_transposed, weights.is_interleaved,
        weight_on_input,
        None if lora is None else lora.token_slots_T,
        None if tables is None else tables.pool,
        None if tables is None else tables.page_table,
        None if tables is None else tables.factors,
        None if tables is None else tables.expert_index,
        0 if tables is None else tables.page_elems,
        0 if lora is None else lora.rank13,
        0 if lora is None else lora.rank2,
        None if lora is None else lora.x_TD,
        *(() if quantisation is None else (
            quantisation.format.value, quantisation.scales13, quantisation.scales2, quantisation.zeros13,
            quantisation.zeros2, quantisation.scale_group, quantisation.hidden_size, quantisation.intermediate_size,
            quantisation.input_scale13, quantisation.input_scale2,
        )),
    )  # fmt: skip


def _run(
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
    b13: torch.Tensor | None, b2: torch.Tensor | None, kind: str, gated: bool, alpha: float, limit: float,
    is_transposed: bool, is_interleaved: bool, weight_on_input: bool, token_slots_T: torch.Tensor | None,
    pool: torch.Tensor | None, page_table: torch.Tensor | None, factors: torch.Tensor | None,
    expert_index: torch.Tensor | None, page_elems: int, rank13: int, rank2: int,
    lora_x_TD: torch.Tensor | None = None, format: str = "dense", scales13: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None, zeros13: torch.Tensor | None = None, zeros2: torch.Tensor | None = None,
    scale_group: int = 0, hidden_size: int = 0, intermediate_size: int = 0,
    input_scale13: torch.Tensor | None = None, input_scale2: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    quantisation = None
    if scales13 is not None and scales2 is not None:
        quantisation = Quantisation(
            format=WeightFormat(format), scales13=scales13, scales2=scales2, zeros13=zeros13, zeros2=zeros2,
            scale_group=scale_group, hidden_size=hidden_size, intermediate_size=intermediate_size,
            input_scale13=input_scale13, input_scale2=input_scale2,
        )  # fmt: skip
    activation = Activation(kind=ActivationKind(kind), gated=gated, alpha=alpha, limit=limit)
    weights = MoEWeights(
        w13=w13, w2=w2, b13=b13, b2=b2, activation=activation, is_transposed=is_transposed,
        is_interleaved=is_interleaved, quantisation=quantisation,
    )  # fmt: skip
    lora = None
    if token_slots_T is not None and pool is not None:
        assert page_table is not None and factors is not None and expert_index is not None
        tables = ExpertsTables(
            pool=pool, page_table=page_table, factors=factors, expert_index=expert_index, page_elems=page_elems
        )
        lora = LoRABatch(tables=tables, token_slots_T=token_slots_T, rank13=rank13, rank2=rank2, x_TD=lora_x_TD)
    return run_layer(x_TD, weights, topk_ids_TK, topk_weights_TK, lora, weight_on_input=weight_on_input)


# define and impl instead of custom_op, whose wrapper costs ten times as much a call.
torch.library.define(
    "moegraft::fused_moe_lora",
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, str kind, "
    "bool gated, float alpha, float limit, bool is_transposed, bool is_interleaved, bool weight_on_input, "
    "Tensor? token_slots, Tensor? pool, Tensor? page_table, Tensor? factors, Tensor? expert_index, int page_elems, "
    "int rank13, int rank2, Tensor? lora_x=None, str format='dense', Tensor? scales13=None, Tensor? scales2=None, "
    "Tensor? zeros13=None, Tensor? zeros2=None, int scale_group=0, int hidden_size=0, int intermediate_size=0, "
    "Tensor? input_scale13=None, Tensor? input_scale2=None) -> Tensor",
)
torch.library.impl("moegraft::fused_moe_lora", "default", _run)
torch.library.register_fake("moegraft::fused_moe_lora", lambda x, *tensors_and_sizes: torch.empty_like(x))

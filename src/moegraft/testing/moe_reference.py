"""The merged-weights oracle of one experts layer: W + B·A per (adapter, expert), then the dense layer. Slow and plain.

Shape letters: T tokens · K experts per token · E experts · D hidden size · F expert intermediate size ·
G = 2 (gate and up) or 1 (no gate) · M rows of one (adapter, expert) pair · h experts that an adapter holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional

from moegraft.core.config import Activation, ActivationKind, MoEConfig


class SupportsExpertsLoRA(Protocol):
    """The LoRA of one experts layer as matrices of rank rows, the scale folded into every ``b_*``.

    Factors have h = len(expert_ids) leading entries, or 1 where one serves all: ``a13`` [h|1, R13, D],
    ``b_gate`` [h|1, r, F], ``b_up`` [h|1, r, F], ``a2`` [h|1, r, F], ``b2`` [h|1, r, D]. ``b_gate`` reads the rank rows
    of ``a13`` from 0, ``b_up`` from ``up_lane``. Without a gate there is only ``b_up``.
    """

    @property
    def expert_ids(self) -> tuple[int, ...]: ...
    @property
    def a13(self) -> torch.Tensor | None: ...
    @property
    def b_gate(self) -> torch.Tensor | None: ...
    @property
    def b_up(self) -> torch.Tensor | None: ...
    @property
    def up_lane(self) -> int: ...
    @property
    def a2(self) -> torch.Tensor | None: ...
    @property
    def b2(self) -> torch.Tensor | None: ...


@dataclass(frozen=True, kw_only=True)
class ExpertsFactors:
    """The plainest ``SupportsExpertsLoRA``."""

    expert_ids: tuple[int, ...]
    a13: torch.Tensor | None = None
    b_gate: torch.Tensor | None = None
    b_up: torch.Tensor | None = None
    up_lane: int = 0
    a2: torch.Tensor | None = None
    b2: torch.Tensor | None = None


class QuantiseInput(Protocol):
    """``ExpertsWeights.quantise_input`` of a format."""

    def __call__(self, x_MI: torch.Tensor, *, of_w2: bool = False) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ExpertsWeights:
    """Weights of one experts layer, stored as checkpoints do.

    ``w13`` [E, G*F, D] and ``w2`` [E, D, F]; transposed: [E, D, G*F] and [E, F, D]. ``b13`` [E, G*F], ``b2`` [E, D].
    ``is_interleaved``: gate and up alternate along G*F (gpt-oss) instead of standing one after the other.
    ``quantise_input``: what the base's GEMMs make of their inputs; LoRA reads them as they are.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    is_transposed: bool = False
    is_interleaved: bool = False
    quantise_input: QuantiseInput | None = None


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """One expert in compute layout: ``halves`` are (gate, up) or (up,), each [F, D]; ``w2`` [D, F]; their B·A."""

    halves: tuple[torch.Tensor, ...]
    half_biases: tuple[torch.Tensor | None, ...]
    w2: torch.Tensor
    b2: torch.Tensor | None
    half_deltas: tuple[torch.Tensor | float, ...] = (0.0, 0.0)
    w2_delta: torch.Tensor | float = 0.0


def moe_reference(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    weights: ExpertsWeights,
    config: MoEConfig,
    *,
    adapters: Sequence[SupportsExpertsLoRA | None] = (),
    token_slots_T: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Output [T, D] of the layer, computed and returned in ``dtype`` (float64 or float32), on the inputs' device.

    Semantics, for token t with adapter a = adapters[token_slots[t]], slot j, expert e = topk_ids[t, j]:

        u = (W13[e] + B13[a,e] A13[a,e]) x[t] + b13[e]
        y = (W2[e] + B2[a,e] A2[a,e]) act(u) + b2[e]
        out[t] = sum over j of topk_weights[t, j] * y

    With ``config.apply_router_weight_on_input`` the weight multiplies x[t] instead of y. An expert id outside [0, E)
    gives nothing; slot -1, an adapter that is None or one that lacks expert e leave the base weights.
    With ``weights.quantise_input``, W multiplies what it makes of x[t] and of act(u), and B A what they are.
    """
    if token_slots_T is None:
        token_slots_T = torch.full(x_TD.shape[:1], -1)
    x_TD, topk_weights_TK = x_TD.to(dtype), topk_weights_TK.to(dtype)
    experts_TK, slots_TK = topk_ids_TK.long().cpu(), token_slots_T.long().cpu()[:, None].expand(topk_ids_TK.shape)
    out_TD = torch.zeros_like(x_TD)
    for slot, e in torch.stack([slots_TK.flatten(), experts_TK.flatten()], dim=1).unique(dim=0).tolist():
        if not 0 <= e < config.num_experts:
            continue
        expert = _unpack_expert(weights, e, config.activation.num_halves, dtype)
        lora = adapters[slot] if slot >= 0 else None
        if lora is not None and e in lora.expert_ids:
            expert = _with_lora(expert, lora, lora.expert_ids.index(e), dtype)
        token_M, choice_M = (index.to(x_TD.device) for index in torch.where((experts_TK == e) & (slots_TK == slot)))
        weight_M1 = topk_weights_TK[token_M, choice_M, None]
        if config.apply_router_weight_on_input:
            y_MD = _run_expert(expert, x_TD[token_M] * weight_M1, config.activation, weights.quantise_input)
        else:
            y_MD = _run_expert(expert, x_TD[token_M], config.activation, weights.quantise_input) * weight_M1
        out_TD.index_add_(0, token_M, y_MD)
    return out_TD


def _unpack_expert(weights: ExpertsWeights, e: int, num_halves: int, dtype: torch.dtype) -> _Expert:
    w13, w2 = weights.w13[e].to(dtype), weights.w2[e].to(dtype)
    if weights.is_transposed:
        w13, w2 = w13.T, w2.T
    bias = None if weights.b13 is None else weights.b13[e].to(dtype)
    width = w13.shape[0] // num_halves
    halves = [
        slice(g, None, num_halves) if weights.is_interleaved else slice(g * width, (g + 1) * width)
        for g in range(num_halves)
    ]
    return _Expert(
        halves=tuple(w13[half] for half in halves),
        half_biases=tuple(None if bias is None else bias[half] for half in halves),
        w2=w2,
        b2=None if weights.b2 is None else weights.b2[e].to(dtype),
    )


def _with_lora(expert: _Expert, lora: SupportsExpertsLoRA, position: int, dtype: torch.dtype) -> _Expert:
    def delta(b: torch.Tensor | None, a: torch.Tensor | None, lane: int = 0) -> torch.Tensor | float:
        """B·A [out, in] from rank rows; 0 where the adapter has no such projection."""
        if b is None or a is None:
            return 0.0
        b_rO, a_rI = (factor[position if len(factor) > 1 else 0].to(dtype) for factor in (b, a))
        return b_rO.T @ a_rI[lane : lane + len(b_rO)]

    lanes = [(lora.b_gate, 0), (lora.b_up, lora.up_lane)][-len(expert.halves) :]
    return replace(
        expert,
        half_deltas=tuple(delta(b, lora.a13, lane) for b, lane in lanes),
        w2_delta=delta(lora.b2, lora.a2),
    )


def _run_expert(
    expert: _Expert, x_MD: torch.Tensor, activation: Activation, quantise: QuantiseInput | None
) -> torch.Tensor:
    x_base_MD = x_MD if quantise is None else quantise(x_MD)
    u_GMF = [
        _merged_linear(x_MD, x_base_MD, w, delta, b)
        for w, delta, b in zip(expert.halves, expert.half_deltas, expert.half_biases, strict=False)
    ]
    h_MF = _activate(u_GMF, activation)
    h_base_MF = h_MF if quantise is None else quantise(h_MF, of_w2=True)
    return _merged_linear(h_MF, h_base_MF, expert.w2, expert.w2_delta, expert.b2)


def _merged_linear(
    x_MI: torch.Tensor, x_base_MI: torch.Tensor, w: torch.Tensor, delta: torch.Tensor | float, bias: torch.Tensor | None
) -> torch.Tensor:
    """(W + B·A) x + bias; where the base reads other rows, W x_base + B·A x + bias."""
    if x_base_MI is x_MI or isinstance(delta, float):
        return functional.linear(x_base_MI, w + delta, bias)
    return functional.linear(x_base_MI, w, bias) + functional.linear(x_MI, delta)


def _activate(u_GMF: Sequence[torch.Tensor], activation: Activation) -> torch.Tensor:
    gate = u_GMF[0]
    match activation.kind:
        case ActivationKind.SILU:
            h = gate * torch.sigmoid(gate)
        case ActivationKind.GELU:
            h = functional.gelu(gate)
        case ActivationKind.GELU_TANH:
            h = functional.gelu(gate, approximate="tanh")
        case ActivationKind.RELU2:
            h = functional.relu(gate).square()
        case ActivationKind.SWIGLU_OAI:
            gate, up = gate.clamp(max=activation.limit), u_GMF[1].clamp(-activation.limit, activation.limit)
            return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
        case ActivationKind.SILU_CLAMPED:
            gate, up = gate.clamp(max=activation.limit), u_GMF[1].clamp(-activation.limit, activation.limit)
            return up * gate * torch.sigmoid(gate)
        case ActivationKind.CLAMPED_SILU:
            h = (gate * torch.sigmoid(gate)).clamp(max=activation.limit)
            return h * u_GMF[1].clamp(-activation.limit, activation.limit)
        case ActivationKind.SILU_SOFTCAPPED:
            capped_gate = activation.alpha * torch.tanh(gate / activation.alpha)
            return capped_gate * torch.sigmoid(gate) * activation.limit * torch.tanh(u_GMF[1] / activation.limit)
    return h * u_GMF[1] if activation.gated else h

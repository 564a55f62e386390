"""vLLM's unquantised MoE method with an experts class over ``fused_moe_lora``, through its out-of-tree registration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from moegraft.core.config import Activation, ActivationKind
from moegraft.integrations.vllm.versions import current_config, is_skipped, mapping_of, why_not_device, why_not_lora
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.rows import RankBounds

if TYPE_CHECKING:
    from moegraft.core.tables import ExpertsTables

logger = init_logger("vllm.moegraft")

# (kind, gated, gate and up alternate)
_KINDS = {
    MoEActivation.SILU: (ActivationKind.SILU, True, False),
    MoEActivation.GELU: (ActivationKind.GELU, True, False),
    MoEActivation.GELU_TANH: (ActivationKind.GELU_TANH, True, False),
    MoEActivation.SWIGLUOAI: (ActivationKind.SWIGLU_OAI, True, True),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: (ActivationKind.SWIGLU_OAI, True, False),
    MoEActivation.SILU_NO_MUL: (ActivationKind.SILU, False, False),
    MoEActivation.GELU_NO_MUL: (ActivationKind.GELU, False, False),
    MoEActivation.GELU_TANH_NO_MUL: (ActivationKind.GELU_TANH, False, False),
    MoEActivation.RELU2_NO_MUL: (ActivationKind.RELU2, False, False),
}


class MoegraftExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    """Routing, both GEMMs with the adapters inside, weights and sum. The LoRA layer binds the attributes."""

    tables: ExpertsTables | None = None
    stored: MoEWeights | None = None
    """Quantised weights, which the layer's tensors alone do not describe."""
    idle: torch.Tensor
    bounds = RankBounds(a13=0, a2=0)

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return why_not_device() is None

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _KINDS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def supports_expert_map(self) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """(E, rows, columns of w13, D, K) of weights in any form."""
        return w1.shape[0], a1.shape[0], w1.shape[1], a1.shape[1], topk_ids.shape[1]

    def activation_of(self, activation: MoEActivation) -> Activation:
        """With the numbers that vLLM's configuration of the layer has."""
        kind, gated, _ = _KINDS[activation]
        return _activation(kind, gated, self.quant_config)

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *rest: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The output alone: what kernels keep between launches is one allocation of their own."""
        return (M, 1), (M, 1), (M, K)

    def apply(  # noqa: PLR0913 - vLLM's signature
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        from moegraft.kernels.moe_forward.host import fused_moe_lora

        weights = self.stored
        if weights is None:
            weights = MoEWeights(
                w13=w1,
                w2=w2,
                b13=self.w1_bias,
                b2=self.w2_bias,
                activation=self.activation_of(activation),
                is_interleaved=is_interleaved(activation),
            )
        if expert_map is not None:  # experts of other ranks become -1, which gives nothing
            topk_ids = expert_map[topk_ids.long()].to(torch.int32)
        if apply_router_weight_on_input:  # vLLM's prepare step has multiplied the rows already
            topk_weights = torch.ones_like(topk_weights)
        fused_moe_lora(
            hidden_states,
            weights,
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            lora=self._lora(hidden_states.shape[0]),
            out_TD=output,
        )

    def _lora(self, num_rows: int) -> LoRABatch | None:
        context = self._lora_context
        if context is None or self.tables is None:
            return None
        slots, no_lora = mapping_of(context.punica_wrapper)
        if context.local_token_lora_mapping is not None:  # of rows that ranks of one engine have gathered
            slots = context.local_token_lora_mapping.to(torch.int32).contiguous()
        elif is_skipped(slots.device, no_lora, self.idle):  # on the CPU: it also decides which graph is captured
            return None
        bounds = self.bounds
        return LoRABatch(tables=self.tables, token_slots_T=slots[:num_rows], rank13=bounds.a13, rank2=bounds.a2)


def _activation(kind: ActivationKind, gated: bool, quant_config: Any) -> Activation:
    default = Activation(kind=kind, gated=gated)
    alpha, limit = quant_config.gemm1_alpha, quant_config.gemm1_clamp_limit
    if kind is ActivationKind.SILU and gated and limit is not None:
        kind = ActivationKind.SILU_CLAMPED
    return Activation(
        kind=kind,
        gated=gated,
        alpha=default.alpha if alpha is None else alpha,
        limit=default.limit if limit is None else limit,
    )


def is_interleaved(activation: MoEActivation) -> bool:
    """Whether gate and up alternate; also of an activation without a kernel."""
    return activation in _KINDS and _KINDS[activation][2]


def why_not_experts(moe: Any) -> str | None:
    """Why the experts of a layer, described by vLLM's FusedMoEConfig, keep vLLM's kernels."""
    name = moe.activation.value
    if moe.is_lora_enabled and moe.moe_parallel_config.dp_size > 1:
        # Rows come with the slot that an adapter has in the engine they are from, and engines fill slots by themselves.
        return "data parallelism gathers rows of several engines, whose slots hold other adapters"
    if moe.activation not in _KINDS:
        return f"the activation {name} has no kernel"
    if moe.activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE and (moe.swiglu_beta != 1.0 or moe.swiglu_alpha is None):
        return f"the activation {name} with alpha = {moe.swiglu_alpha}, beta = {moe.swiglu_beta} has no kernel"
    return None


def install(*, base_too: bool) -> None:
    """``base_too``: also engines without LoRA. Once a process; another plug-in that was first keeps its method."""
    name = UnquantizedFusedMoEMethod.__name__
    if name in op_registry_oot:
        if not op_registry_oot[name].__module__.startswith("moegraft."):
            logger.info("moegraft leaves vLLM's experts as they are: another plug-in has registered its method")
        return

    class MoegraftUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            reason = why_not_engine(moe, base_too=base_too)
            reason = why_not_experts(moe) if reason is None else reason
            if reason is None:
                # With this backend vLLM leaves the weights as they were loaded.
                self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.TRITON, MoegraftExperts
            elif reason:
                logger.info_once("moegraft leaves the experts to vLLM: %s", reason)

    UnquantizedFusedMoEMethod.register_oot(MoegraftUnquantizedFusedMoEMethod)


def why_not_engine(moe: Any, *, base_too: bool) -> str | None:
    """An empty reason: nothing to say, since nothing was asked for."""
    if not moe.is_lora_enabled:
        return why_not_device() if base_too else ""
    config = current_config()
    if config is None or config.lora_config is None:
        return "the engine's configuration is not known here"
    return why_not_lora(config.lora_config, config.model_config.dtype)

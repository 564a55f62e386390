"""FusedMoE and FusedMoEWithLoRA: the layers that an engine or an integration calls."""

from __future__ import annotations

import torch
from torch import nn

from moegraft.core.config import MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.core.tables import ExpertsTables
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.mapping import AdapterMapping
from moegraft.lora.punica.base import PunicaWrapperBase
from moegraft.moe.method import FusedMoEModularMethod
from moegraft.moe.router import RouterConfig, route


class FusedMoE(nn.Module):
    """A Mixture-of-Experts layer over plain tensors.

    ``forward`` routes by itself (needs ``router``); ``apply_experts`` takes a routing that the host has made.
    """

    def __init__(
        self,
        config: MoEConfig,
        method: FusedMoEModularMethod,
        router: RouterConfig | None = None,
        correction_bias_E: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.method = method
        self.router = router
        self.correction_bias_E = correction_bias_E

    def forward(
        self, x_TD: torch.Tensor, router_logits_TE: torch.Tensor, lora_context: MoELoRAContext | None = None
    ) -> torch.Tensor:
        """out [T, D] from hidden states and router logits."""
        if self.router is None:
            raise ValueError("FusedMoE was built without a router: call apply_experts with topk weights and ids")
        weights_TK, ids_TK = route(router_logits_TE, self.router, self.correction_bias_E)
        return self.apply_experts(x_TD, weights_TK, ids_TK, lora_context)

    def apply_experts(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
    ) -> torch.Tensor:
        """out [T, D] from hidden states and a given routing."""
        return self.method.apply(x_TD, topk_weights_TK, topk_ids_TK, lora_context)


class FusedMoEWithLoRA(nn.Module):
    """A FusedMoE whose rows may each use their own adapter.

    Builds the frozen ``MoELoRAContext`` of each call and passes it down as an argument; holds the bank's tables of
    this layer and nothing of any call.
    """

    def __init__(self, base_layer: FusedMoE, tables: ExpertsTables, punica: PunicaWrapperBase) -> None:
        super().__init__()
        method = base_layer.method
        if not method.supports_lora():
            raise NoBackendError(f"{type(method.experts).__name__} cannot take LoRA (supports_lora() is False)")
        self.base_layer = base_layer
        self.tables = tables
        self.punica = punica

    def lora_context(self, mapping: AdapterMapping, rank_bound: int, rank2_bound: int | None = None) -> MoELoRAContext:
        """The context of one call; for the bounds see MoELoRAContext."""
        return MoELoRAContext(
            tables=self.tables, mapping=mapping, punica=self.punica, rank_bound=rank_bound, rank2_bound=rank2_bound
        )

    def forward(
        self, x_TD: torch.Tensor, router_logits_TE: torch.Tensor, mapping: AdapterMapping, rank_bound: int
    ) -> torch.Tensor:
        return self.base_layer(x_TD, router_logits_TE, self.lora_context(mapping, rank_bound))

    def apply_experts(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        mapping: AdapterMapping,
        rank_bound: int,
        rank2_bound: int | None = None,
    ) -> torch.Tensor:
        context = self.lora_context(mapping, rank_bound, rank2_bound)
        return self.base_layer.apply_experts(x_TD, topk_weights_TK, topk_ids_TK, context)

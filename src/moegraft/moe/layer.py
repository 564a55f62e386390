"""The layer on one page, from the outside in: FusedMoEWithLoRA, FusedMoE, its method (a kernel), and what that runs.

Shape letters: T tokens · K experts per token · E experts · D hidden size · M rows that are on this rank
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.core.errors import NoBackendError
from moegraft.core.tables import ExpertsTables
from moegraft.formats.base import ExpertsWeights
from moegraft.kernels.records import LayerSizes
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica.base import PunicaWrapperBase
from moegraft.lora.rows import AdapterRows, GroupAdapters, RankBounds, base_slots
from moegraft.moe.router import RouterConfig, route

if TYPE_CHECKING:
    from moegraft.kernels.workspace import Workspace


class FusedMoEWithLoRA(nn.Module):
    """Gives each row its own adapter: builds the ``MoELoRAContext`` of a call over the bank's tables of this layer."""

    def __init__(self, base_layer: FusedMoE, tables: ExpertsTables, punica: PunicaWrapperBase) -> None:
        super().__init__()
        if not base_layer.method.experts.supports_lora():
            name = type(base_layer.method.experts).__name__
            raise NoBackendError(f"{name} cannot take LoRA (supports_lora() is False)")
        self.base_layer = base_layer
        self.tables = tables
        self.punica = punica

    def lora_context(self, rows: AdapterRows, bounds: RankBounds, group: GroupAdapters | None = None) -> MoELoRAContext:
        """The context of one call; ``group`` where rows travel between ranks."""
        return MoELoRAContext(tables=self.tables, rows=rows, bounds=bounds, punica=self.punica, group=group)

    def forward(
        self,
        x_TD: torch.Tensor,
        router_logits_TE: torch.Tensor,
        rows: AdapterRows,
        bounds: RankBounds,
        *,
        group: GroupAdapters | None = None,
        out_TD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> torch.Tensor:
        """As ``FusedMoE.forward``, row t with the adapter that ``rows`` states."""
        context = self.lora_context(rows, bounds, group)
        return self.base_layer(x_TD, router_logits_TE, context, out_TD=out_TD, workspace=workspace)

    def apply_experts(  # what forward can say, with a routing in place of logits
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        rows: AdapterRows,
        bounds: RankBounds,
        *,
        group: GroupAdapters | None = None,
        out_TD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> torch.Tensor:
        """As ``FusedMoE.apply_experts``, row t with the adapter that ``rows`` states."""
        context = self.lora_context(rows, bounds, group)
        return self.base_layer.method.apply(
            x_TD, topk_weights_TK, topk_ids_TK, context, out_TD=out_TD, workspace=workspace
        )


class FusedMoE(nn.Module):
    """A Mixture-of-Experts layer over plain tensors: from hidden states and router logits to the summed output.

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
        self,
        x_TD: torch.Tensor,
        router_logits_TE: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
        *,
        out_TD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> torch.Tensor:
        """out [T, D] from hidden states and router logits; for ``out_TD`` and ``workspace`` see FusedMoEKernel."""
        if self.router is None:
            raise ValueError("FusedMoE was built without a router: call apply_experts with topk weights and ids")
        weights_TK, ids_TK = route(router_logits_TE, self.router, self.correction_bias_E)
        return self.method.apply(x_TD, weights_TK, ids_TK, lora_context, out_TD=out_TD, workspace=workspace)

    def apply_experts(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
        *,
        out_TD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> torch.Tensor:
        """out [T, D] from hidden states and a given routing; for ``out_TD`` and ``workspace`` see FusedMoEKernel."""
        return self.method.apply(x_TD, topk_weights_TK, topk_ids_TK, lora_context, out_TD=out_TD, workspace=workspace)


class FusedMoEKernel:
    """Runs prepare, experts, finalize, in this order and nothing else. Raises ValueError for monolithic experts."""

    def __init__(self, prepare_finalize: FusedMoEPrepareAndFinalize, experts: FusedMoEExpertsModular) -> None:
        if experts.is_monolithic:
            raise ValueError(f"{type(experts).__name__} is monolithic: it has no rows to prepare or finalize")
        self.prepare_finalize = prepare_finalize
        self.experts = experts

    def apply(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None = None,
        *,
        out_TD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> torch.Tensor:
        """out [T, D].

        out_TD: the caller's tensor to write it to, in the dtype of x; a new one by default. workspace: the caller's
        memory for what kernels keep between launches; experts classes without kernels need none. ValueError where
        they do not fit.
        """
        if out_TD is not None and (out_TD.shape != x_TD.shape or out_TD.dtype != x_TD.dtype):
            found = f"{list(out_TD.shape)} {out_TD.dtype}"
            raise ValueError(f"out is {found}, expected {list(x_TD.shape)} {x_TD.dtype}, as x")
        if lora_context is None:
            lora_context = self.experts.bound_context
        rows = self.prepare_finalize.prepare(x_TD, topk_weights_TK, topk_ids_TK, lora_context)
        own_out = out_TD if self.prepare_finalize.keeps_rows else None
        output = self.experts.apply(rows, lora_context, out_MD=own_out, workspace=workspace)
        result_TD = self.prepare_finalize.finalize(output, rows)
        return result_TD if out_TD is None or result_TD is out_TD else out_TD.copy_(result_TD)


class FusedMoEModularMethod(FusedMoEKernel):
    """What a layer does with its weights, whatever format they are in: a kernel whose experts are bound to them."""

    def __init__(
        self,
        config: MoEConfig,
        weights: ExpertsWeights,
        experts_cls: type[FusedMoEExpertsModular],
        prepare_finalize: FusedMoEPrepareAndFinalize,
    ) -> None:
        super().__init__(prepare_finalize, experts_cls(config, weights))


@dataclass(frozen=True, kw_only=True)
class PreparedRows:
    """What experts read. M rows are on this rank (M = T where nothing is dispatched).

    x [M, D] as they came, or, where ``is_quantised``, as the format quantises what its GEMM reads · unquantised [M, D],
    what LoRA reads · topk_ids [M, K], ids outside [0, E) belong to other ranks · topk_weights [M, K] float32 ·
    slots [M] int32: adapter slot of each row, -1 = base; all of them in a call without adapters.
    expected_choices: None = M*K. Where M follows the routing, how many of the M*K choices a batch of this size brings
    on average: what decides between forms of a GEMM looks at it, or a row's bits would follow its neighbours' routing.
    """

    x_MD: torch.Tensor
    unquantised_MD: torch.Tensor
    topk_weights_MK: torch.Tensor
    topk_ids_MK: torch.Tensor
    slots_M: torch.Tensor
    is_quantised: bool = False
    expected_choices: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsOutput:
    """y [M, K, D] not yet weighted, or, where ``is_reduced``, [M, D] weighted and summed over K."""

    y: torch.Tensor
    is_reduced: bool


class FusedMoEExpertsModular(ABC):
    """GEMM13, activation, GEMM2 over prepared rows.

    An instance is bound to weights and holds no state of a call: any number of calls may be in flight.
    ``is_monolithic``: routing, experts and sum are one opaque call, into which no delta can be added.
    """

    is_monolithic: ClassVar[bool] = False
    bound_context: MoELoRAContext | None = None  # of hosts whose call cannot carry one; see LoRAExpertsMixin

    def __init__(self, config: MoEConfig, weights: ExpertsWeights) -> None:
        self.config = config
        self.weights = weights
        self.num_halves = weights.num_halves
        self.sizes = LayerSizes(
            num_experts=weights.num_experts,
            hidden_size=weights.hidden_size,
            intermediate_size=weights.intermediate_size,
            gated=weights.num_halves == 2,
        )
        self.is_interleaved = weights.is_interleaved

    @staticmethod
    def supports_lora() -> bool:
        """True only where an adapter really changes the output; ``LoRAExpertsMixin`` says so."""
        return False

    @staticmethod
    def adds_lora_separately() -> bool:
        """True where every delta goes through the mixin's ``apply_*_lora``, as fully sharded LoRA needs it."""
        return False

    @staticmethod
    def scales_lora() -> bool:
        """True where DoRA of experts is served: gains of single adapters on what base and delta have given."""
        return False

    @classmethod
    @abstractmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        """(True, "") or (False, why not). Pure data: no weight is touched, no kernel imported."""

    @abstractmethod
    def apply(
        self,
        rows: PreparedRows,
        lora_context: MoELoRAContext | None = None,
        *,
        out_MD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> ExpertsOutput:
        """An expert id that lies outside [0, E) gives zero. ``out_MD``: where a reduced output may be written."""


class FusedMoEPrepareAndFinalize(ABC):
    """The two ends of a layer, where rows leave for their experts and come back: ``finalize`` takes what ``prepare``
    gave out. ``keeps_rows``: the experts' reduced output is the layer's."""

    keeps_rows: ClassVar[bool] = False

    @abstractmethod
    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> PreparedRows: ...

    @abstractmethod
    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        """out [T, D] in the dtype of the layer's input."""


class NoDispatchPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """One process holds all experts: rows stay where they are."""

    keeps_rows: ClassVar[bool] = True

    def __init__(self, config: MoEConfig) -> None:
        self.weight_on_input = weighs_input(config)

    def prepare(
        self,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        lora_context: MoELoRAContext | None,
    ) -> PreparedRows:
        x_TD, weights_TK = weigh_input(x_TD, topk_weights_TK, on_input=self.weight_on_input)
        return PreparedRows(
            x_MD=x_TD,
            unquantised_MD=x_TD,
            topk_weights_MK=weights_TK,
            topk_ids_MK=topk_ids_TK,
            slots_M=slots_of_call(x_TD, lora_context),
        )

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        return weighted_sum(output, rows)


def slots_of_call(x_TD: torch.Tensor, lora_context: MoELoRAContext | None) -> torch.Tensor:
    """[T] int32: the slots of the caller's rows."""
    return base_slots(x_TD.shape[0], x_TD.device) if lora_context is None else lora_context.rows.slots_M


def weighs_input(config: MoEConfig) -> bool:
    """Whether router weights multiply the input. Raises ValueError where that has no meaning."""
    if config.apply_router_weight_on_input and config.top_k != 1:
        raise ValueError(f"apply_router_weight_on_input needs top_k = 1, found {config.top_k}")
    return config.apply_router_weight_on_input


def weigh_input(
    x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, *, on_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, float32 weights that are still to be applied)."""
    weights_TK = topk_weights_TK.float()
    if not on_input:
        return x_TD, weights_TK
    return (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)


def weighted_sum(output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
    """[M, D]: the sum over K, in the dtype of the experts' output."""
    if output.is_reduced:
        return output.y
    return weighted_sum_float32(output, rows).to(output.y.dtype)


def weighted_sum_float32(output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
    """[M, D] float32 of an output that is not reduced: one batched product, with a fixed order over K."""
    return torch.bmm(rows.topk_weights_MK.unsqueeze(1), output.y.float()).squeeze(1)

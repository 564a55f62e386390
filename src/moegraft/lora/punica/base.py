"""What every punica wrapper offers: the separate form of LoRA, added to the result of someone else's GEMM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from moegraft.core.tables import ExpertsTables, LinearTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.mapping import AdapterMapping


class PunicaWrapperBase(ABC):
    """Stateless primitives; one instance serves any number of calls at once.

    Contract: outputs are changed in place and only in rows that have an adapter; the low-rank vector is rounded once,
    to the dtype of the activations; nothing depends on which other rows are in the batch but summation order, which
    is fixed.
    """

    @abstractmethod
    def moe_lora_align_block_size(
        self,
        expert_N: torch.Tensor,
        slot_N: torch.Tensor,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        sizes: LayerSizes | None = None,
        ranks: tuple[int, int] | None = None,
    ) -> Any:
        """Segments of N routed rows with expert ids and slots (-1 = base) [N]; ids outside [0, E) take no part.

        A record of the wrapper's own, for the two adds. Kernels need ``sizes`` of the layer and ``ranks``, bounds of
        the (A13, A2) rows of the adapters that the call, or a graph that captured it, may meet.
        """

    @abstractmethod
    def add_lora_w13(
        self,
        u_NGF: torch.Tensor,
        x_ND: torch.Tensor,
        segments: Any,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        num_halves: int = 2,
        is_interleaved: bool = False,
    ) -> None:
        """Semantics: u[n] += B13[a, e] @ (A13[a, e] @ x[n]) for rows n of every segment (a, e)."""

    @abstractmethod
    def add_lora_w2(
        self,
        y_ND: torch.Tensor,
        h_NF: torch.Tensor,
        segments: Any,
        mapping: AdapterMapping,
        tables: ExpertsTables,
    ) -> None:
        """Semantics: y[n] += B2[a, e] @ (A2[a, e] @ h[n]) for the rows n of every segment (a, e)."""

    @abstractmethod
    def add_lora_linear(
        self,
        y_MO: torch.Tensor,
        x_MI: torch.Tensor,
        mapping: AdapterMapping,
        tables: LinearTables,
        *,
        bias_O: torch.Tensor | None = None,
        rank_bound: int | None = None,
    ) -> None:
        """Semantics: y[m] += B[a] @ (A[a] @ x[m]), and for DoRA + (gain[a] - 1) * (y[m] - bias), a = slot of row m.

        ``rank_bound``: no adapter of the call has a larger rank here, where the host knows it; sizes buffers.
        """

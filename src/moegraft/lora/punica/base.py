"""What every punica wrapper offers: the separate form of LoRA, added to the result of someone else's GEMM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from moegraft.core.tables import ExpertsTables, LinearTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.rows import AdapterRows

if TYPE_CHECKING:
    from moegraft.kernels.lora_expand.host import RoutedRows
    from moegraft.lora.punica.cpu import LoRASegments

Segments: TypeAlias = "LoRASegments | RoutedRows"
"""Routed rows sorted by adapter and expert: as the host groups them, or as a kernel has on the device."""


class PunicaWrapperBase(ABC):
    """Stateless primitives; one instance serves any number of calls at once.

    Contract: outputs are changed in place and only in rows that have an adapter; the low-rank vector is rounded once,
    to the dtype of the activations; nothing depends on which other rows are in the batch but summation order, which
    is fixed. A wrapper reads the segments that it has made itself.
    """

    @abstractmethod
    def moe_lora_align_block_size(
        self, expert_N: torch.Tensor, slot_N: torch.Tensor, context: MoELoRAContext, sizes: LayerSizes
    ) -> Segments:
        """Segments of N routed rows with expert ids and slots (-1 = base) [N]; ids outside [0, E) take no part.

        The name is the field's; no size is aligned to a block here, kernels do that themselves. ``sizes`` of the layer.
        """

    @abstractmethod
    def add_lora_w13(
        self,
        u_NGF: torch.Tensor,
        x_ND: torch.Tensor,
        segments: Segments,
        tables: ExpertsTables,
        *,
        num_halves: int = 2,
        is_interleaved: bool = False,
    ) -> None:
        """Semantics: u[n] += B13[a, e] @ (A13[a, e] @ x[n]) for rows n of every segment (a, e)."""

    @abstractmethod
    def add_lora_w2(self, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments, tables: ExpertsTables) -> None:
        """Semantics: y[n] += B2[a, e] @ (A2[a, e] @ h[n]) for the rows n of every segment (a, e)."""

    @abstractmethod
    def add_lora_linear(
        self,
        y_MO: torch.Tensor,
        x_MI: torch.Tensor,
        rows: AdapterRows,
        tables: LinearTables,
        *,
        rank_bound: int,
        bias_O: torch.Tensor | None = None,
    ) -> None:
        """Semantics: y[m] += B[a] @ (A[a] @ x[m]), and for DoRA + (gain[a] - 1) * (y[m] - bias), a = slot of row m.

        ``rank_bound``: no adapter that the call, or a graph that captured it, may meet has a larger rank here.
        """

    def add_lora_linears(
        self,
        ys: Sequence[torch.Tensor],
        x_MI: torch.Tensor,
        rows: AdapterRows,
        tables: Sequence[LinearTables],
        *,
        rank_bound: int,
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        """``add_lora_linear`` of several maps that read the same x; their ``tables`` are of one bank."""
        for y_MO, each, bias_O in zip(ys, tables, biases, strict=True):
            self.add_lora_linear(y_MO, x_MI, rows, each, rank_bound=rank_bound, bias_O=bias_O)

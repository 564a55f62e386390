"""PunicaWrapperGPU: the primitives as Triton kernels. Importing this module does not need Triton; calling it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moegraft.core.tables import ExpertsTables, Field, LinearFactor, LinearTables
from moegraft.kernels.records import LayerSizes, LoRABatch
from moegraft.lora.mapping import AdapterMapping
from moegraft.lora.punica.base import PunicaWrapperBase

if TYPE_CHECKING:
    from moegraft.kernels.lora_expand.host import RoutedRows


class PunicaWrapperGPU(PunicaWrapperBase):
    """Kernels that read the bank's pages in place, without a host sync: all of it may be captured in a CUDA graph."""

    def moe_lora_align_block_size(
        self,
        expert_N: torch.Tensor,
        slot_N: torch.Tensor,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        sizes: LayerSizes | None = None,
        ranks: tuple[int, int] | None = None,
    ) -> RoutedRows:
        """See the base class. Raises ValueError without ``sizes`` or ``ranks``."""
        from moegraft.kernels.lora_expand.host import route_lora_rows

        if sizes is None or ranks is None:
            raise ValueError("PunicaWrapperGPU needs the layer's sizes and the bounds of its adapters' ranks")
        slots_N = slot_N.to(torch.int32).contiguous()
        lora = LoRABatch(tables=tables, token_slots_T=slots_N, rank13=ranks[0], rank2=ranks[1])
        return route_lora_rows(expert_N.contiguous(), lora, sizes)

    def add_lora_w13(
        self,
        u_NGF: torch.Tensor,
        x_ND: torch.Tensor,
        segments: RoutedRows,
        mapping: AdapterMapping,
        tables: ExpertsTables,
        *,
        num_halves: int = 2,
        is_interleaved: bool = False,
    ) -> None:
        from moegraft.kernels.lora_expand.host import add_lora_w13

        x_ND = _for_kernel(x_ND, tables)
        add_lora_w13(u_NGF, x_ND, segments, num_halves=num_halves, is_interleaved=is_interleaved)

    def add_lora_w2(
        self,
        y_ND: torch.Tensor,
        h_NF: torch.Tensor,
        segments: RoutedRows,
        mapping: AdapterMapping,
        tables: ExpertsTables,
    ) -> None:
        from moegraft.kernels.lora_expand.host import add_lora_w2

        add_lora_w2(y_ND, _for_kernel(h_NF, tables), segments)

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
        """See the base class. ``rank_bound``: no adapter of the call has a larger rank here.

        Without it the largest rank is read from the tables, once a batch and linear map: a host sync, which a CUDA
        graph may not capture, so a batch must have run once before it is captured. A graph that shall serve adapters
        of larger ranks later on needs the bound.
        """
        from moegraft.kernels.lora_linear.host import add_lora_linear

        if rank_bound is None:
            rank_bound = _largest_rank(mapping, tables)
        x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
        add_lora_linear(
            y_MO,
            x_MI,
            mapping.token_slots,
            tables,
            rank_bound=rank_bound,
            run_length=mapping.repeats,
            bias_O=bias_O,
        )


def _for_kernel(x_NI: torch.Tensor, tables: ExpertsTables) -> torch.Tensor:
    """The adapters' dtype, contiguous rows."""
    x_NI = x_NI.to(tables.pool.dtype)
    return x_NI if x_NI.stride(-1) == 1 else x_NI.contiguous()


def _largest_rank(mapping: AdapterMapping, tables: LinearTables) -> int:
    """Over the adapters of the batch. They hold their slots and ranks while the batch lives: read once."""
    bounds: dict[int, int] = mapping.shared.setdefault("linear_rank_bounds", {})
    key = id(tables)
    if key not in bounds:
        ranks_S = tables.factors[list(mapping.active_slots), LinearFactor.A, Field.RANK]
        bounds[key] = int(ranks_S.max()) if mapping.active_slots else 0
    return bounds[key]

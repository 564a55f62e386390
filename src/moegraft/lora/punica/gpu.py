"""PunicaWrapperGPU: the primitives as Triton kernels. Importing this module does not need Triton; calling it does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegraft.core.tables import ExpertsTables, LinearTables
from moegraft.kernels.records import LayerSizes, LoRABatch
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica.base import PunicaWrapperBase, Segments
from moegraft.lora.punica.cpu import LoRASegments
from moegraft.lora.rows import AdapterRows


class PunicaWrapperGPU(PunicaWrapperBase):
    """Kernels that read the bank's pages in place, without a host sync: all of it may be captured in a CUDA graph."""

    def moe_lora_align_block_size(
        self, expert_N: torch.Tensor, slot_N: torch.Tensor, context: MoELoRAContext, sizes: LayerSizes
    ) -> Segments:
        from moegraft.kernels.lora_expand.host import route_lora_rows

        lora = LoRABatch(
            tables=context.tables,
            token_slots_T=slot_N.to(torch.int32).contiguous(),
            rank13=context.bounds.a13,
            rank2=context.bounds.a2,
        )
        return route_lora_rows(expert_N.contiguous(), lora, sizes)

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
        from moegraft.kernels.lora_expand.host import add_lora_w13

        assert not isinstance(segments, LoRASegments), "segments come from this wrapper"
        x_ND = for_kernel(x_ND, tables)
        add_lora_w13(u_NGF, x_ND, segments, num_halves=num_halves, is_interleaved=is_interleaved)

    def add_lora_w2(self, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments, tables: ExpertsTables) -> None:
        from moegraft.kernels.lora_expand.host import add_lora_w2

        assert not isinstance(segments, LoRASegments), "segments come from this wrapper"
        add_lora_w2(y_ND, for_kernel(h_NF, tables), segments)

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
        from moegraft.kernels.lora_linear.host import add_lora_linear

        x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
        add_lora_linear(
            y_MO, x_MI, rows.slots_M, tables, rank_bound=rank_bound, run_length=rows.run_length, bias_O=bias_O
        )

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
        from moegraft.kernels.lora_linear.host import add_lora_linears

        x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
        add_lora_linears(
            ys, x_MI, rows.slots_M, tables, rank_bound=rank_bound, run_length=rows.run_length, biases=biases
        )


def for_kernel(x_NI: torch.Tensor, tables: ExpertsTables) -> torch.Tensor:
    """The adapters' dtype, contiguous rows."""
    x_NI = x_NI.to(tables.pool.dtype)
    return x_NI if x_NI.stride(-1) == 1 else x_NI.contiguous()

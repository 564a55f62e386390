"""How an experts class gets LoRA: the context of one call of one layer, and the mixin that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from moegraft.core.halves import split_halves
from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field
from moegraft.kernels.records import LayerSizes
from moegraft.lora.rows import AdapterRows, GroupAdapters, RankBounds

if TYPE_CHECKING:
    from moegraft.lora.punica.base import PunicaWrapperBase, Segments


@dataclass(frozen=True, kw_only=True)
class MoELoRAContext:
    """Everything that an experts class needs to add LoRA in one call; passed down as an argument, never parked.

    tables: the bank's tables of this layer · rows: the adapter of each of the caller's rows · bounds of the ranks ·
    punica: the primitives of the device · group: where rows travel between ranks, the adapters of all ranks' rows.
    """

    tables: ExpertsTables
    rows: AdapterRows
    bounds: RankBounds
    punica: PunicaWrapperBase
    group: GroupAdapters | None = None

    @property
    def is_active(self) -> bool:
        """False where the layer must run exactly its base path."""
        has_adapters = self.rows.has_adapters if self.group is None else bool(self.group.ids)
        return has_adapters and not self.bounds.are_zero


class LoRAExpertsMixin:
    """Mixed into an experts class, makes ``supports_lora()`` true and offers the separate form of the delta.

    What the mixin reads is declared here and given by the class it is mixed into: ``sizes``, ``num_halves`` (G) and
    ``is_interleaved`` (gate and up alternate in the buffer after the w13 GEMM).
    """

    sizes: LayerSizes
    num_halves: int
    is_interleaved: bool
    bound_context: MoELoRAContext | None

    @staticmethod
    def supports_lora() -> bool:
        return True

    def set_lora_context(self, context: MoELoRAContext | None) -> None:
        """Bind a context for hosts whose call cannot carry one. An argument wins over a bound context."""
        self.bound_context = context

    def active_context(self, argument: MoELoRAContext | None) -> MoELoRAContext | None:
        """The context to use, or None where the call must run exactly the base path."""
        context = argument if argument is not None else self.bound_context
        return context if context is not None and context.is_active else None

    def lora_segments(self, context: MoELoRAContext, expert_N: torch.Tensor, slot_N: torch.Tensor) -> Segments:
        """Segments of N routed rows; see ``PunicaWrapperBase.moe_lora_align_block_size``."""
        return context.punica.moe_lora_align_block_size(expert_N, slot_N, context, self.sizes)

    def apply_w13_lora(
        self, context: MoELoRAContext, u_NGF: torch.Tensor, x_ND: torch.Tensor, segments: Segments
    ) -> None:
        """Add the delta of w13 to ``u`` in place, before the activation; ``x`` are the unquantised rows."""
        context.punica.add_lora_w13(
            u_NGF, x_ND, segments, context.tables, num_halves=self.num_halves, is_interleaved=self.is_interleaved
        )

    def apply_w2_lora(
        self, context: MoELoRAContext, y_ND: torch.Tensor, h_NF: torch.Tensor, segments: Segments
    ) -> None:
        """Add the delta of w2 to ``y`` in place, before the router weight and the sum over K."""
        context.punica.add_lora_w2(y_ND, h_NF, segments, context.tables)

    def apply_w13_gains(
        self,
        context: MoELoRAContext,
        u_NGF: torch.Tensor,
        expert_N: torch.Tensor,
        slot_N: torch.Tensor,
        b13_EO: torch.Tensor | None,
    ) -> None:
        """DoRA of w13: scale what base and delta have given ``u``, its bias aside, in place."""
        halves_of = partial(split_halves, num_halves=self.num_halves, is_interleaved=self.is_interleaved)
        biases = (None, None) if b13_EO is None else halves_of(b13_EO)
        factors = (ExpertsFactor.GAIN_GATE, ExpertsFactor.GAIN_UP)
        halves = list(zip(halves_of(u_NGF), biases, factors, strict=True))
        for half, bias, factor in halves[-self.num_halves :]:
            scale_experts_rows(half, context.tables, factor, expert_N, slot_N, bias)

    def apply_w2_gains(
        self,
        context: MoELoRAContext,
        y_ND: torch.Tensor,
        expert_N: torch.Tensor,
        slot_N: torch.Tensor,
        b2_EO: torch.Tensor | None,
    ) -> None:
        """DoRA of w2, before the router weight."""
        scale_experts_rows(y_ND, context.tables, ExpertsFactor.GAIN2, expert_N, slot_N, b2_EO)


def scale_experts_rows(
    y_NO: torch.Tensor,
    tables: ExpertsTables,
    factor: ExpertsFactor,
    expert_N: torch.Tensor,
    slot_N: torch.Tensor,
    bias_EO: torch.Tensor | None,
) -> None:
    """y[n] = gain[slot, expert] * (y[n] - bias[expert]) + bias[expert], in place; rows without a gain keep their bits.

    Plain torch over the bank's tables, on any device, without a wait.
    """
    desc_N = tables.factors[:, factor].index_select(0, slot_N.clamp(min=0)).long()
    E = tables.expert_index.shape[1]
    position_N = tables.expert_index[slot_N.clamp(min=0).long(), expert_N.clamp(0, E - 1)].long()
    is_local_N = (slot_N >= 0) & (expert_N >= 0) & (expert_N < E) & (position_N >= 0)
    has_N = is_local_N & (desc_N[:, Field.RANK] > 0)
    row_N = torch.where(has_N, position_N * desc_N[:, Field.EXPERT_STRIDE], 0)
    row_len = y_NO.shape[1]
    rows_per_page = tables.page_elems // row_len
    page_N = tables.page_table[slot_N.clamp(min=0).long(), desc_N[:, Field.FIRST_PAGE] + row_N // rows_per_page].long()
    elem_N = page_N * tables.page_elems + desc_N[:, Field.OFFSET] + row_N % rows_per_page * row_len
    elem_NO = torch.where(has_N, elem_N, 0)[:, None] + torch.arange(row_len, device=y_NO.device)
    gain_NO = tables.pool.view(-1)[elem_NO].float()
    plain_NO = y_NO.float()
    if bias_EO is None:
        scaled_NO = plain_NO * gain_NO
    else:
        bias_NO = bias_EO.index_select(0, expert_N.clamp(0, E - 1)).float()
        scaled_NO = (plain_NO - bias_NO) * gain_NO + bias_NO
    y_NO.copy_(torch.where(has_N[:, None], scaled_NO.to(y_NO.dtype), y_NO))

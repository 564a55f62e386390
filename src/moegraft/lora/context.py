"""How an experts class gets LoRA: the context of one call of one layer, and the mixin that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moegraft.core.tables import ExpertsTables
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

"""The explicit context: everything an experts class needs to add LoRA, as one frozen argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moegraft.core.tables import ExpertsTables
from moegraft.lora.mapping import AdapterMapping

if TYPE_CHECKING:
    from moegraft.lora.punica.base import PunicaWrapperBase


@dataclass(frozen=True, kw_only=True)
class MoELoRAContext:
    """Built by ``FusedMoEWithLoRA`` for one call and passed down unchanged; never stored on a module.

    tables: the bank's tables of this layer · mapping: slot of every token · punica: the primitives of the device ·
    rank_bound: no adapter of the call has more A13 rows in this layer; sizes workspaces, and 0 runs no LoRA on w13 ·
    rank2_bound: the same for A2 rows, of which there are half as many where gate and up have an A each; None: not
    known, ``rank_bound`` then holds for both.
    """

    tables: ExpertsTables
    mapping: AdapterMapping
    punica: PunicaWrapperBase
    rank_bound: int
    rank2_bound: int | None = None

    @property
    def is_active(self) -> bool:
        """False where the layer must run exactly its base path."""
        return self.mapping.has_adapters and max(self.rank_bound, self.rank2) > 0

    @property
    def rank2(self) -> int:
        """The bound of A2 rows."""
        return self.rank_bound if self.rank2_bound is None else self.rank2_bound

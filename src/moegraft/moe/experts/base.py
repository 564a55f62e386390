"""The contract of an experts class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.lora.context import MoELoRAContext
from moegraft.moe.prepare_finalize import ExpertsOutput, PreparedRows


class FusedMoEExpertsModular(ABC):
    """GEMM13, activation, GEMM2 over prepared rows.

    An instance is bound to weights and holds no state of a call: any number of calls may be in flight.
    ``is_monolithic``: routing, experts and sum are one opaque call, into which no delta can be added.
    """

    is_monolithic: ClassVar[bool] = False

    def __init__(self, config: MoEConfig, weights: ExpertsWeights) -> None:
        self.config = config
        self.weights = weights
        self.num_halves = weights.num_halves
        self.is_interleaved = weights.is_interleaved

    @staticmethod
    def supports_lora() -> bool:
        """True only where an adapter really changes the output; ``LoRAExpertsMixin`` says so."""
        return False

    @staticmethod
    def adds_lora_separately() -> bool:
        """True where every delta goes through the mixin's ``apply_*_lora``, as fully sharded LoRA needs it."""
        return False

    @classmethod
    @abstractmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        """(True, "") or (False, why not). Pure data: no weight is touched, no kernel imported."""

    @abstractmethod
    def apply(self, rows: PreparedRows, lora_context: MoELoRAContext | None = None) -> ExpertsOutput:
        """Rows whose expert id lies outside [0, E) give zero."""

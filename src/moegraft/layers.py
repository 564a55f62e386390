"""For authors of engines: all of moegraft below transformers, from one module. ``examples/engine_layers.py`` uses it.

| what | names |
|---|---|
| a layer | ``MoEConfig``, ``RouterConfig``, weights in a format → ``build_fused_moe`` → ``FusedMoE``, ``Decision`` |
| adapters | ``ModelTargets`` → ``BankLayout`` → ``AdapterBank``; ``load_peft_adapter`` or ``AdapterWeights`` fill it |
| a layer with adapters | the bank's tables → ``build_fused_moe_with_lora`` → ``FusedMoEWithLoRA`` |
| linear maps with adapters | the bank's tables → ``linear_punica_for`` → ``PunicaWrapperBase.add_lora_linear`` |
| one call | ``AdapterBank.acquire`` → ``AdapterBatch``; ``AdapterRows``: the adapter of each row; ``RankBounds`` |
| a whole model's call | ``AdapterCall``: the rows of every forward pass and the bounds of every module of a batch |
| memory of a call | ``Workspace``, ``CallMemory``: tensors that the caller keeps, as CUDA graphs need them |
| several ranks | ``ParallelConfig`` → ``ParallelGroups``; ``take_slice`` → ``build_parallel_moe``; ``local_targets`` |

What other modules have and this one does not may change without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moegraft.build import (
    build_fused_moe,
    build_fused_moe_with_lora,
    build_parallel_moe,
    linear_punica_for,
    punica_for,
    take_slice,
)
from moegraft.core.config import Activation, ActivationKind, DeviceTarget, MoEConfig
from moegraft.core.errors import (
    AdapterError,
    BatchError,
    MoegraftError,
    NoBackendError,
    ParallelError,
)
from moegraft.core.tables import ExpertsTables, LinearTables
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts
from moegraft.formats.nvfp4 import NVFP4Experts
from moegraft.lora.bank import AdapterBank, AdapterBatch, AdapterInfo, BankLayout
from moegraft.lora.call import AdapterCall, CallMemory
from moegraft.lora.collective_bank import CollectiveBank
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.peft import LoadReport, load_peft_adapter
from moegraft.lora.punica import PunicaWrapperBase
from moegraft.lora.rows import AdapterRows, GroupAdapters, RankBounds
from moegraft.lora.targets import (
    AdapterWeights,
    EmbeddingLoRA,
    EmbeddingTarget,
    ExpertsLoRA,
    ExpertsTarget,
    LinearLoRA,
    LinearTarget,
    ModelTargets,
    local_targets,
)
from moegraft.moe.layer import FusedMoE, FusedMoEWithLoRA
from moegraft.moe.router import GroupScore, RouterConfig, Scoring
from moegraft.oracle import Decision, Rejection
from moegraft.parallel import (
    ExpertsSlice,
    LinearSlice,
    ParallelConfig,
    ParallelGroups,
    RankSlice,
    Share,
    experts_slice,
)
from moegraft.parallel.slices import ExpertMap

if TYPE_CHECKING:
    from moegraft.kernels.workspace import Workspace

__all__ = [
    "Activation",
    "ActivationKind",
    "AdapterBank",
    "AdapterBatch",
    "AdapterCall",
    "AdapterError",
    "AdapterInfo",
    "AdapterRows",
    "AdapterWeights",
    "BankLayout",
    "BatchError",
    "CallMemory",
    "CollectiveBank",
    "Decision",
    "DenseExperts",
    "DeviceTarget",
    "EmbeddingLoRA",
    "EmbeddingTarget",
    "ExpertMap",
    "ExpertsLoRA",
    "ExpertsSlice",
    "ExpertsTables",
    "ExpertsTarget",
    "ExpertsWeights",
    "Fp8Experts",
    "FusedMoE",
    "FusedMoEWithLoRA",
    "GroupAdapters",
    "GroupScore",
    "Int4Experts",
    "Int8Experts",
    "LinearLoRA",
    "LinearSlice",
    "LinearTables",
    "LinearTarget",
    "LoadReport",
    "MXFP4Experts",
    "MoEConfig",
    "MoELoRAContext",
    "ModelTargets",
    "MoegraftError",
    "NVFP4Experts",
    "NoBackendError",
    "ParallelConfig",
    "ParallelError",
    "ParallelGroups",
    "PunicaWrapperBase",
    "RankBounds",
    "RankSlice",
    "Rejection",
    "RouterConfig",
    "Scoring",
    "Share",
    "Workspace",
    "build_fused_moe",
    "build_fused_moe_with_lora",
    "build_parallel_moe",
    "experts_slice",
    "linear_punica_for",
    "load_peft_adapter",
    "local_targets",
    "punica_for",
    "take_slice",
]


def __getattr__(name: str) -> Any:
    if name == "Workspace":  # its module needs Triton
        from moegraft.kernels.workspace import Workspace

        return Workspace
    raise AttributeError(f"module 'moegraft.layers' has no attribute {name!r}")

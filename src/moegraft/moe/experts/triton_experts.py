"""TritonExperts: grouped GEMMs with the adapters' deltas inside them. The backend of dense, fp8 and int8 on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from moegraft.core.config import BackendRequest, MoEConfig
from moegraft.formats.base import ExpertsWeights
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.kernels.weights import kernel_weights
from moegraft.lora.context import LoRAExpertsMixin, MoELoRAContext
from moegraft.moe.layer import ExpertsOutput, FusedMoEExpertsModular, PreparedRows
from moegraft.tuning.heuristic import batch_invariant_tiles
from moegraft.tuning.table import choose_tiles
from moegraft.tuning.tiles import MoETiles

if TYPE_CHECKING:
    from moegraft.kernels.workspace import Workspace

MIN_CAPABILITY = (8, 0)
"""Ampere: bfloat16 matrix units and asynchronous copies. How much shared memory there is, tile choice asks the GPU."""


class TritonExperts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """Rows sorted by (expert, adapter), two grouped GEMMs that walk the lanes of the adapters behind their own K.

    Weights are read where the checkpoint put them, by strides. fp8 weights meet rows quantised as their format says,
    int8 weights become numbers of the rows' dtype in registers; LoRA reads the rows as they came. Buffers of a call
    come from torch's caching allocator in one piece: streams and threads do not share them, and a captured CUDA graph
    keeps its own. A call without adapters launches the base kernels only. Needs Triton when it is called, not when it
    is imported.
    """

    # By format. Ada: conversions and matrix units of fp8.
    min_capabilities: ClassVar[Mapping[str, tuple[int, int]]] = {
        "dense": MIN_CAPABILITY,
        "int8": MIN_CAPABILITY,
        "fp8": (8, 9),
    }
    # Whether one set of tiles serves batches of every size.
    has_invariant_tiles: ClassVar[bool] = True
    # The kernels compute float32 exactly (as the tests' interpreter does), which no matrix unit offers.
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def __init__(self, config: MoEConfig, weights: ExpertsWeights) -> None:
        """Raises TypeError for weights of another format."""
        if weights.format_name not in self.min_capabilities:
            expected = ", ".join(self.min_capabilities)
            raise TypeError(f"{type(self).__name__}: found {weights.format_name} weights, expected {expected}")
        super().__init__(config, weights)
        self._kernel_weights = kernel_weights(weights, config.activation, config.dtype)

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        device, dtype = request.device, request.config.dtype
        if request.format_name not in cls.min_capabilities:
            return False, f"weights are {request.format_name}, it reads {', '.join(cls.min_capabilities)}"
        if device.kind != "cuda":
            return False, f"it runs on CUDA devices, the layer is on {device}"
        if not device.has_triton:
            return False, "triton cannot be imported; install moegraft[gpu]"
        needed = cls.min_capabilities[request.format_name]
        if device.capability is None or device.capability < needed:
            reads = "" if request.format_name == "dense" else f" for {request.format_name} weights"
            return False, f"it needs compute capability {needed[0]}.{needed[1]}{reads}, the device is {device}"
        if dtype not in cls.dtypes:
            names = " and ".join(str(one).removeprefix("torch.") for one in cls.dtypes)
            return False, f"it would compute in {dtype}, its tiles are for the matrix units of {names}"
        if request.config.batch_invariant and not cls.has_invariant_tiles:
            return False, "it has no tiles that give a row the same bits in any batch"
        return True, ""

    def apply(
        self,
        rows: PreparedRows,
        lora_context: MoELoRAContext | None = None,
        *,
        out_MD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> ExpertsOutput:
        from moegraft.kernels.moe_forward.host import fused_moe_lora

        lora = self._lora_batch(rows, self.active_context(lora_context))
        out_MD = fused_moe_lora(
            rows.x_MD.contiguous(),
            self._kernel_weights,
            rows.topk_ids_MK.contiguous(),
            rows.topk_weights_MK.contiguous(),
            lora=lora,
            tiles=self._tiles(rows, lora),
            workspace=workspace,
            out_TD=out_MD,
        )
        return ExpertsOutput(y=out_MD, is_reduced=True)

    def _tiles(self, rows: PreparedRows, lora: LoRABatch | None) -> MoETiles | None:
        if self.config.batch_invariant:
            return batch_invariant_tiles()
        return tiles_of_batch(rows, self._kernel_weights, lora)

    def _lora_batch(self, rows: PreparedRows, context: MoELoRAContext | None) -> LoRABatch | None:
        if context is None:
            return None
        return LoRABatch(
            tables=context.tables,
            token_slots_T=rows.slots_M,
            rank13=context.bounds.a13,
            rank2=context.bounds.a2,
            x_TD=rows.unquantised_MD.contiguous() if rows.is_quantised else None,
        )


def tiles_of_batch(rows: PreparedRows, weights: MoEWeights, lora: LoRABatch | None) -> MoETiles | None:
    """Where the number of rows follows the routing, the tiles of a batch of this size: tiles decide a row's bits.

    None: the number of rows says it.
    """
    if rows.expected_choices is None:
        return None
    from moegraft.kernels.moe_forward.host import tuning_shape

    shape = tuning_shape(rows.x_MD, weights, rows.topk_ids_MK, lora)
    return choose_tiles(replace(shape, num_tokens=-(-rows.expected_choices // shape.top_k)))

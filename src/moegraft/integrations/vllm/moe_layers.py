"""vLLM's LoRA layers of experts over pages: sizes in place of its dense buffers, factors by the adapter's own rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import vllm.lora.utils as lora_utils
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from moegraft.core.tables import ExpertsFactor, ExpertsTables
from moegraft.integrations.vllm.experts import MoegraftExperts
from moegraft.integrations.vllm.pages import Part, no_rows
from moegraft.lora.rows import RankBounds
from moegraft.lora.targets import ExpertsTarget


def size_only(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a shape and of one number: vLLM reads sizes from the buffers that it would have."""
    return torch.zeros(1, dtype=dtype, device=device).expand(*shape)


class PagedExperts:
    """What both forms share. ``parts``: what the manager's next step writes into the pages of a slot."""

    parts: tuple[Part, ...] = ()

    def begin(self: Any, max_loras: int, lora_config: Any) -> None:
        """In place of buffers: the attributes that vLLM reads."""
        self._verify_ep_fs(lora_config)
        self.max_loras = lora_config.max_loras
        self.max_rank = lora_config.max_lora_rank
        self.lora_dtype = lora_config.lora_dtype
        self.fully_sharded = False
        self.enable_moe_shared_loras = getattr(lora_config, "enable_moe_shared_loras", False)
        self.adapter_enabled = torch.zeros(max_loras + 1, dtype=torch.int, device=self.device)

    def target(self: Any, name: str) -> ExpertsTarget:
        """What this rank holds of the layer."""
        return ExpertsTarget(
            name=name,
            num_experts=self.local_num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size_per_partition,
            has_gate=self.moe_config.is_act_and_mul,
        )

    def largest(self: Any) -> list[Part]:
        """Sizes of an adapter of the largest rank."""
        E, r = self.local_num_experts, self.max_rank
        halves = [ExpertsFactor.B_GATE, ExpertsFactor.B_UP] if self.moe_config.is_act_and_mul else [ExpertsFactor.B_UP]
        factors = [(ExpertsFactor.A13, self.rank_rows_of_a13(r)), *((half, r) for half in halves)]
        factors += [(ExpertsFactor.A2, r), (ExpertsFactor.B2, r)]
        return [Part(factor=factor, rank=rank, copies=E, rows=no_rows) for factor, rank in factors]

    def dense_bytes(self: Any) -> int:
        """Bytes of the buffers that vLLM would have allocated."""
        stacked = (
            *self.w13_lora_a_stacked, *self.w13_lora_b_stacked, *self.w2_lora_a_stacked, *self.w2_lora_b_stacked
        )  # fmt: skip
        return sum(buffer.numel() * buffer.element_size() for buffer in stacked)

    def bind(self: Any, tables: ExpertsTables) -> None:
        """From now on the layer reads these pages."""
        experts = self._moe_kernel.fused_experts
        experts.tables = tables
        self.idle = experts.idle = torch.ones(1, dtype=torch.bool)
        experts.bounds = RankBounds(a13=self.rank_rows_of_a13(self.max_rank), a2=self.max_rank)

    def reset_lora(self, index: int) -> None:
        """Nothing of the slot's next adapter is here."""
        self.parts = ()

    def _length(self: Any, factor: ExpertsFactor) -> int:
        inner = self.intermediate_size_per_partition
        return self.hidden_size if factor in (ExpertsFactor.A13, ExpertsFactor.B2) else inner

    def b_part(self: Any, factor: ExpertsFactor, b_EOR: torch.Tensor, lane: int = 0) -> Part:
        """B [E, out, r], turned into rank rows on the device; zeros where vLLM pads the expert's sizes."""
        width = self._length(factor)

        def rows() -> torch.Tensor:
            rows_ERO = b_EOR.to(self.device, non_blocking=True).transpose(1, 2)
            return F.pad(rows_ERO, (0, width - rows_ERO.shape[2]))

        return Part(factor=factor, rank=b_EOR.shape[2], copies=b_EOR.shape[0], lane=lane, rows=rows)

    def a_part(self: Any, factor: ExpertsFactor, *a_ERI: torch.Tensor) -> Part:
        """One A [E, r, in] or several, one after the other in each expert; padded as B."""
        width = self._length(factor)

        def rows() -> torch.Tensor:
            rows_ERI = torch.cat([a.to(self.device, non_blocking=True) for a in a_ERI], dim=1)
            return F.pad(rows_ERI, (0, width - rows_ERI.shape[2]))

        return Part(factor=factor, rank=sum(a.shape[1] for a in a_ERI), copies=a_ERI[0].shape[0], rows=rows)


class PagedFusedMoEWithLoRA(PagedExperts, FusedMoEWithLoRA):
    """Gate, up and down of each expert as matrices of their own."""

    def rank_rows_of_a13(self, rank: int) -> int:
        return rank * self._w13_slices

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Sizes instead of buffers."""
        self.begin(max_loras, lora_config)
        E, D, inner, r = self.local_num_experts, self.hidden_size, self.intermediate_size_per_partition, self.max_rank
        outer = 1 if self.enable_moe_shared_loras else E

        def size(*shape: int) -> torch.Tensor:
            return size_only((max_loras, *shape), self.lora_dtype, self.device)

        self.w13_lora_a_stacked = (size(outer, r, D),) * self._w13_slices
        self.w13_lora_b_stacked = (size(E, inner, r),) * self._w13_slices
        self.w2_lora_a_stacked = (size(E, r, inner),)
        self.w2_lora_b_stacked = (size(outer, D, r),)
        # vLLM's empty adapters of the warm-up read one pair of shapes for each matrix of each expert and slot.
        a13, b13 = self.w13_lora_a_stacked[0][0, 0], self.w13_lora_b_stacked[0][0, 0]
        a2, b2 = self.w2_lora_a_stacked[0][0, 0], self.w2_lora_b_stacked[0][0, 0]
        gated = self._w13_slices == 2
        self.lora_a_stacked = [a13, a2, *([a13] if gated else [])] * (E * max_loras)
        self.lora_b_stacked = [b13, b2, *([b13] if gated else [])] * (E * max_loras)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Keeps the factors of [gate, down, up] until the manager writes them."""
        (a_gate, a_down, a_up), (b_gate, b_down, b_up) = lora_a, lora_b
        b_gate, a_down = self._slice_w13_b(b_gate), self._slice_w2_a(a_down)
        parts = []
        if self._w13_slices == 1:
            parts = [self.a_part(ExpertsFactor.A13, a_gate), self.b_part(ExpertsFactor.B_UP, b_gate)]
        else:
            b_up = self._slice_w13_b(b_up)
            together = [a_gate] if a_up is a_gate else _alike(a_gate, a_up)
            lane = 0 if a_up is a_gate else a_gate.shape[1]
            parts = [
                self.a_part(ExpertsFactor.A13, *together),
                self.b_part(ExpertsFactor.B_GATE, b_gate),
                self.b_part(ExpertsFactor.B_UP, b_up, lane=lane),
            ]
        parts += [self.a_part(ExpertsFactor.A2, a_down), self.b_part(ExpertsFactor.B2, b_down)]
        self.parts = tuple(part for part in parts if part.rank)


class PagedFusedMoE3DWithLoRA(PagedExperts, FusedMoE3DWithLoRA):
    """Gate and up as one tensor, down as one, with the experts stacked."""

    def rank_rows_of_a13(self, rank: int) -> int:
        return rank

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Sizes instead of buffers."""
        self._base_model = model_config.architectures[0]
        self.begin(max_loras, lora_config)
        E, D, inner, r = self.local_num_experts, self.hidden_size, self.intermediate_size_per_partition, self.max_rank

        def size(*shape: int) -> torch.Tensor:
            return size_only((max_loras, *shape), self.lora_dtype, self.device)

        self.w13_lora_a_stacked, self.w13_lora_b_stacked = (size(E, r, D),), (size(E, 2 * inner, r),)
        self.w2_lora_a_stacked, self.w2_lora_b_stacked = (size(E, r, inner),), (size(E, D, r),)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Keeps the factors of [gate and up, down] until the manager writes them."""
        (a13, a2), (b13, b2) = lora_a, lora_b
        b13, a2 = self._slice_w13_b(b13), self._slice_w2_a(a2)
        if self._base_model == "GptOssForCausalLM":  # vLLM's own rule: gate and up alternate there
            b_gate, b_up = b13[:, ::2], b13[:, 1::2]
        else:
            b_gate, b_up = b13.chunk(2, dim=1)
        parts = (
            self.a_part(ExpertsFactor.A13, a13),
            self.b_part(ExpertsFactor.B_GATE, b_gate),
            self.b_part(ExpertsFactor.B_UP, b_up),
            self.a_part(ExpertsFactor.A2, a2),
            self.b_part(ExpertsFactor.B2, b2),
        )
        self.parts = tuple(part for part in parts if part.rank)


def _alike(*a_ERI: torch.Tensor) -> list[torch.Tensor]:
    """All with as many experts: one that all experts share is repeated beside one that they do not."""
    E = max(a.shape[0] for a in a_ERI)
    return [a.expand(E, -1, -1) for a in a_ERI]


def _is_served(source_layer: Any) -> bool:
    """Layers whose experts are ours: any other, such as a quantised one, keeps vLLM's own wrapper."""
    kernel = getattr(getattr(source_layer, "_quant_method", None), "moe_kernel", None)
    return kernel is not None and isinstance(kernel.fused_experts, MoegraftExperts)


def _in_place_of(ours: Any, theirs: Any) -> None:
    def can_replace_layer(cls: type, source_layer: Any, *args: Any, **kwargs: Any) -> bool:
        return _is_served(source_layer) and theirs.can_replace_layer(source_layer, *args, **kwargs)

    ours.can_replace_layer = classmethod(can_replace_layer)
    ours.__name__ = theirs.__name__  # vLLM compares names of these classes


_in_place_of(PagedFusedMoEWithLoRA, FusedMoEWithLoRA)
_in_place_of(PagedFusedMoE3DWithLoRA, FusedMoE3DWithLoRA)


def install() -> None:
    """vLLM takes the first class of its list that says yes."""
    ours = (PagedFusedMoEWithLoRA, PagedFusedMoE3DWithLoRA)
    if ours[0] not in lora_utils._all_lora_classes:
        lora_utils._all_lora_classes = (*ours, *lora_utils._all_lora_classes)

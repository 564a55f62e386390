"""vLLM's LoRA layers of linear maps over pages: q, k and v (or gate and up) in one shrink and one expand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
import vllm.lora.utils as lora_utils
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from moegraft.core.tables import LinearFactor, LinearTables
from moegraft.integrations.vllm.moe_layers import size_only
from moegraft.integrations.vllm.pages import Part, no_rows
from moegraft.integrations.vllm.versions import is_skipped, mapping_of
from moegraft.lora.targets import LinearTarget

MAX_SLICES = 4
SLICE_ALIGN = 16
"""As the kernel has it: where slices of a map may begin, in columns."""


_PROMPTS = 64


class Serving:
    """What the manager says while its layers are made, and of the batch that runs.

    ``linears``: whether maps of this model are served · ``run_length``: tokens of a request in the batch, which chooses
    tiles and no results; one of two numbers, since each makes kernels of its own.
    """

    linears: ClassVar[bool] = False
    run_length: ClassVar[int] = 1

    @classmethod
    def set_batch(cls, num_rows: int, num_requests: int) -> None:
        cls.run_length = _PROMPTS if num_rows >= _PROMPTS // 2 * max(1, num_requests) else 1


def _run(  # noqa: PLR0913 - an operator's
    y_MO: torch.Tensor, x_MI: torch.Tensor, slots: torch.Tensor, skips: Sequence[torch.Tensor], pool: torch.Tensor,
    page_table: torch.Tensor, factors: torch.Tensor, page_elems: int, rank_bound: int, slice_starts: Sequence[int],
) -> None:  # fmt: skip
    from moegraft.kernels.lora_linear.host import run_lora_linear

    if is_skipped(y_MO.device, *skips):  # on the CPU; Python values would become constants of the compiled graph
        return
    x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
    run_lora_linear(
        y_MO, x_MI, slots[: x_MI.shape[0]], pool, page_table, factors, None, page_elems, rank_bound, Serving.run_length,
        slice_starts,
    )  # fmt: skip


# In compiled graphs one opaque operator, which looks at the batch when it runs.
torch.library.define(
    "moegraft::add_lora_linear_of_batch",
    "(Tensor(a!) y, Tensor x, Tensor slots, Tensor[] skips, Tensor pool, Tensor page_table, Tensor factors, "
    "int page_elems, int rank_bound, int[] slice_starts) -> ()",
)
torch.library.impl("moegraft::add_lora_linear_of_batch", "default", _run)
torch.library.register_fake("moegraft::add_lora_linear_of_batch", lambda *tensors_and_sizes: None)


class PagedLinear:
    """Mixed in before one of vLLM's layers, whose slicing between ranks and whose GEMM it keeps."""

    parts: tuple[Part, ...] = ()

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Sizes instead of buffers."""
        self.lora_config = lora_config
        self._enable_aux_cuda_stream = False
        self.max_rank = lora_config.max_lora_rank
        widths = tuple(getattr(self, "output_slices", ())) or (self.output_size,)
        self.output_slices = widths
        self.slice_starts = tuple(accumulate(widths))[:-1]
        dtype, device, r = lora_config.lora_dtype, self.device, self.max_rank
        self.lora_a_stacked = tuple(size_only((max_loras, 1, r, self.input_size), dtype, device) for _ in widths)
        self.lora_b_stacked = tuple(size_only((max_loras, 1, width, r), dtype, device) for width in widths)

    def target(self: Any, name: str) -> LinearTarget:
        """What this rank holds of the map."""
        return LinearTarget(name=name, in_features=self.input_size, out_features=sum(self.output_slices))

    def largest(self: Any) -> list[Part]:
        """Sizes of an adapter of the largest rank."""
        rank_a = self.max_rank * len(self.output_slices)
        return [
            Part(factor=LinearFactor.A, rank=rank_a, rows=no_rows),
            Part(factor=LinearFactor.B, rank=self.max_rank, rows=no_rows),
        ]

    def dense_bytes(self: Any) -> int:
        """Bytes of the buffers that vLLM would have allocated."""
        buffers = (*self.lora_a_stacked, *self.lora_b_stacked)
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def bind(self: Any, tables: LinearTables) -> None:
        """From now on the layer reads these pages."""
        self.pool, self.page_table, self.factors = tables.pool, tables.page_table, tables.factors
        self.page_elems = tables.page_elems
        self.idle = torch.ones(1, dtype=torch.bool)

    def reset_lora(self, index: int) -> None:
        """Nothing of the slot's next adapter is here."""
        self.parts = ()

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        """Keeps the factors until the manager writes them: A [r, in] and B [out, r], of several slices or of one."""
        if isinstance(lora_b, torch.Tensor):
            lora_a, lora_b = self._of_slices(lora_a, lora_b)
        elif len(lora_b) != len(self.output_slices):
            lora_a, lora_b = self.expand_packed_lora(lora_a, lora_b)
        if self.tp_size > 1:
            several = len(self.output_slices) > 1
            lora_a = self.slice_lora_a(lora_a if several else lora_a[0])
            lora_b = self.slice_lora_b(lora_b if several else lora_b[0])
            lora_a, lora_b = (lora_a, lora_b) if several else ([lora_a], [lora_b])
        rank = max((b.shape[1] for b in lora_b if b is not None), default=0)
        self.parts = () if rank == 0 else (self._a(lora_a, rank), self._b(lora_b, rank))

    def _of_slices(self: Any, lora_a: Any, lora_b: torch.Tensor) -> tuple[list[Any], list[torch.Tensor]]:
        """One pair for all slices: each reads the same A. Widths are of all ranks together."""
        if len(self.output_slices) == 1:
            return [lora_a], [lora_b]
        of_slices = list(lora_b.split(list(self.base_layer.output_sizes), dim=0))
        return [lora_a] * len(of_slices), of_slices

    def _a(self: Any, lora_a: Sequence[torch.Tensor | None], rank: int) -> Part:
        def rows() -> torch.Tensor:
            rows_SRI = self.pool.new_zeros(len(lora_a), rank, self.input_size)
            for of_slice, a in zip(rows_SRI, lora_a, strict=True):
                if a is not None:
                    of_slice[: a.shape[0]].copy_(a, non_blocking=True)
            return rows_SRI

        return Part(factor=LinearFactor.A, rank=rank * len(lora_a), rows=rows)

    def _b(self: Any, lora_b: Sequence[torch.Tensor | None], rank: int) -> Part:
        def rows() -> torch.Tensor:
            rows_RO = self.pool.new_zeros(rank, sum(self.output_slices))
            for columns, b in zip(rows_RO.split(self.output_slices, dim=1), lora_b, strict=True):
                if b is not None:
                    columns[: b.shape[1]].copy_(b.to(self.device, non_blocking=True).T)
            return rows_RO

        return Part(factor=LinearFactor.B, rank=rank, rows=rows)

    def _apply_lora_to_output(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The map's output with the delta, added in place."""
        shape = output.shape
        if x.ndim == 3 and output.ndim == 3:  # vLLM's transformers backend
            x, output = x.flatten(0, 1), output.flatten(0, 1)
        slots, no_lora = mapping_of(self.punica_wrapper)
        torch.ops.moegraft.add_lora_linear_of_batch(
            output, x, slots, [no_lora, self.idle], self.pool, self.page_table, self.factors, self.page_elems,
            self.max_rank, self.slice_starts,
        )  # fmt: skip
        return output.view(shape)


def _paged(theirs: Any) -> Any:
    """vLLM's class with pages, under vLLM's name."""

    def can_replace_layer(cls: type, source_layer: Any, *args: Any, **kwargs: Any) -> bool:
        return (
            Serving.linears and _are_servable(source_layer) and theirs.can_replace_layer(source_layer, *args, **kwargs)
        )

    return type(
        theirs.__name__,
        (PagedLinear, theirs),
        {"can_replace_layer": classmethod(can_replace_layer), "__module__": __name__},
    )


def _are_servable(source_layer: Any) -> bool:
    """Whether the slices of a packed map may begin where they do."""
    widths = getattr(source_layer, "output_sizes", None)
    if widths is None:
        return True
    tp_size = getattr(source_layer, "tp_size", 1)
    return len(widths) <= MAX_SLICES and all(width % (tp_size * SLICE_ALIGN) == 0 for width in widths)


CLASSES = tuple(
    _paged(theirs)
    for theirs in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
    )
)


class IdleLogitsProcessorWithLoRA(LogitsProcessorWithLoRA):
    """vLLM's buffers and kernels of the head, in steps in which an active adapter has one: they run outside graphs."""

    def create_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; no slot has a head yet."""
        super().create_lora_weights(*args, **kwargs)
        self._held: set[int] = set()
        self._filled: set[int] = set()  # with an adapter's numbers, which may have left
        order, size = self.sharded_to_full_mapping, self.base_layer.vocab_size
        self._is_in_order = order is None or order[:size] == list(range(size))

    def release(self, index: int) -> None:
        """The slot's adapter has left; its numbers stay until the next one comes."""
        self._held.discard(index)

    def reset_lora(self, index: int) -> None:
        """Buffers that no adapter has filled are zero already."""
        self.release(index)
        if index in self._filled:
            self._filled.remove(index)
            super().reset_lora(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """vLLM's."""
        super().set_lora(index, lora_a, lora_b)
        self._held.add(index)
        self._filled.add(index)

    def _get_logits(self, hidden_states: torch.Tensor, lm_head: Any, *rest: Any, **more: Any) -> Any:
        if self._held or not self._is_in_order:
            return super()._get_logits(hidden_states, lm_head, *rest, **more)
        return self.base_layer._get_logits(hidden_states, getattr(lm_head, "base_layer", lm_head), *rest, **more)


def install() -> None:
    """vLLM takes the first class of its list that says yes; where these say no, its own follow in its order."""
    if CLASSES[0] not in lora_utils._all_lora_classes:
        lora_utils._all_lora_classes = (*CLASSES, *lora_utils._all_lora_classes)
        lora_utils.LogitsProcessorWithLoRA = IdleLogitsProcessorWithLoRA

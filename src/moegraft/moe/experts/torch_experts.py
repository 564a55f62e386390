"""TorchExperts: grouped GEMMs in plain torch. Serves every format, on any device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from moegraft.core.config import BackendRequest
from moegraft.core.halves import apply_activation
from moegraft.formats import FORMAT_NAMES
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.lora.context import LoRAExpertsMixin, MoELoRAContext
from moegraft.lora.punica.base import Segments
from moegraft.lora.punica.cpu import fits_torch_grouped_mm
from moegraft.lora.rows import BASE_SLOT
from moegraft.moe.layer import ExpertsOutput, FusedMoEExpertsModular, PreparedRows

if TYPE_CHECKING:
    from moegraft.kernels.workspace import Workspace

# A BLAS picks its kernel, and with it the order of a row's sum, by the number of rows. Blocks of these sizes keep a
# row's bits independent of how many rows share its expert (docs/numerics.md has the measurement).
ROW_GRANULE = {torch.float32: 16}
ROW_GRANULE_LOW_PRECISION = 2
SMALL_GRANULE, SMALL_BLOCK = 4, 8  # of the form for few rows an expert
FEW_ROWS = 8
# cuBLAS has no such sizes but one: on CUDA every block has as many rows.
CUDA_BLOCK = 32


@dataclass(frozen=True)
class _RowPlan:
    """Local rows sorted by expert, tokens in order inside one, each expert's rows padded to the row granule.

    token_P: token behind a position (padding repeats a row) · padding: positions that are padding · position_N: where
    routed row n = t*K + j stands, P where its expert is elsewhere · expert_P: expert of every position ·
    ends_E: int32, where each expert's positions end · blocks: (expert, start, end), one GEMM each.
    """

    token_P: torch.Tensor
    padding: list[int]
    position_N: torch.Tensor
    is_all_local: bool
    expert_P: torch.Tensor
    ends_E: torch.Tensor
    blocks: tuple[tuple[int, int, int], ...]
    is_small: bool


@dataclass(frozen=True)
class _Matrix:
    """w13 or w2 of a layer: a view of all experts where nothing has to be computed, else one at a time."""

    dense_EIO: torch.Tensor | None
    in_out_of: Callable[[int, torch.dtype], torch.Tensor]
    width: int

    def of_blocks(self, plan: _RowPlan, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """[in, out] of each block's expert; of what is computed, one expert is alive at a time."""
        if self.dense_EIO is not None:
            w_E = self.dense_EIO.unbind()
            yield from (w_E[expert] for expert, _, _ in plan.blocks)
            return
        for expert, blocks in groupby(plan.blocks, key=lambda block: block[0]):
            w_IO = self.in_out_of(expert, dtype)
            yield from (w_IO for _ in blocks)


class TorchExperts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """Rows sorted by expert, one GEMM a block of rows.

    Weights of any format: dense ones are read where they lie, others are dequantised to the dtype of the rows, expert
    by expert, those that were chosen only; the GEMMs read activations as the format quantises them, LoRA as they are.
    A GEMM accumulates onto a buffer that already holds bias and delta (C += X W), so that a delta meets the float32
    accumulator before the result is rounded, in bfloat16 too. The sizes of the blocks see to it that a base row has
    the same bits whatever its neighbours do.
    """

    @staticmethod
    def adds_lora_separately() -> bool:
        return True

    @staticmethod
    def scales_lora() -> bool:
        return True

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        if request.format_name not in FORMAT_NAMES:
            return False, f"weights are {request.format_name}, it reads {', '.join(FORMAT_NAMES)}"
        if request.config.batch_invariant:
            return False, "its GEMMs are a BLAS's, which sums a row in another order where more rows are with it"
        return True, ""

    def apply(
        self,
        rows: PreparedRows,
        lora_context: MoELoRAContext | None = None,
        *,
        out_MD: torch.Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> ExpertsOutput:
        """See the base class; the output is not reduced and its memory torch's own."""
        context = self.active_context(lora_context)
        M, K = rows.topk_ids_MK.shape
        plan = _plan_rows(rows.topk_ids_MK, self.sizes.num_experts, rows.x_MD.dtype, rows.expected_choices)
        x_MD = rows.x_MD if rows.is_quantised else self.weights.quantise_input(rows.x_MD)
        x_PD = x_MD.index_select(0, plan.token_P)
        segments = slot_P = None
        if context is not None:
            slot_P = rows.slots_M.index_select(0, plan.token_P)
            slot_P[plan.padding] = BASE_SLOT
            segments = self.lora_segments(context, plan.expert_P, slot_P)

        w, D, width13 = self.weights, self.sizes.hidden_size, self.num_halves * self.sizes.intermediate_size
        u_PGF = _seed(x_PD, w.b13, plan.expert_P, width13, segments)
        if context is not None and segments is not None and u_PGF is not None:
            plain_PD = x_PD if x_MD is rows.unquantised_MD else rows.unquantised_MD.index_select(0, plan.token_P)
            self.apply_w13_lora(context, u_PGF, plain_PD, segments)
        u_PGF = _grouped_gemm(u_PGF, x_PD, _w13(w, width13), plan)
        has_gains = context is not None and context.bounds.has_gains
        if has_gains and context is not None and slot_P is not None:
            self.apply_w13_gains(context, u_PGF, plan.expert_P, slot_P, w.b13)
        h_PF = apply_activation(u_PGF, self.config.activation, is_interleaved=self.is_interleaved)
        y_PD = _seed(x_PD, w.b2, plan.expert_P, D, segments)
        if context is not None and segments is not None and y_PD is not None:
            self.apply_w2_lora(context, y_PD, h_PF, segments)
        y_PD = _grouped_gemm(y_PD, w.quantise_input(h_PF, of_w2=True), _w2(w, D), plan)
        if has_gains and context is not None and slot_P is not None:
            self.apply_w2_gains(context, y_PD, plan.expert_P, slot_P, w.b2)

        if not plan.is_all_local:
            y_PD = torch.cat([y_PD, y_PD.new_zeros(1, D)])
        return ExpertsOutput(y=y_PD.index_select(0, plan.position_N).view(M, K, D), is_reduced=False)


def _w13(weights: ExpertsWeights, width: int) -> _Matrix:
    dense_EIO = weights.w13_in_out if isinstance(weights, DenseExperts) else None
    return _Matrix(dense_EIO, weights.w13_in_out_of, width)


def _w2(weights: ExpertsWeights, width: int) -> _Matrix:
    dense_EIO = weights.w2_in_out if isinstance(weights, DenseExperts) else None
    return _Matrix(dense_EIO, weights.w2_in_out_of, width)


def _plan_rows(
    topk_ids_MK: torch.Tensor, num_experts: int, dtype: torch.dtype, expected_choices: int | None
) -> _RowPlan:
    """In plain Python: for the few rows of a decode step that costs less than a dozen tensor operations."""
    K, device = topk_ids_MK.shape[1], topk_ids_MK.device
    rows_of: dict[int, list[int]] = defaultdict(list)
    expert_N = topk_ids_MK.flatten().tolist()
    for row, expert in enumerate(expert_N):
        rows_of[expert].append(row)
    # The choice looks at the size of the batch only: with the routing it would change the bits of a base row.
    num_choices = len(expert_N) if expected_choices is None else expected_choices
    is_cuda = device.type == "cuda"
    is_small = dtype == torch.float32 and num_choices < FEW_ROWS * num_experts and not is_cuda
    granule = SMALL_GRANULE if is_small else ROW_GRANULE.get(dtype, ROW_GRANULE_LOW_PRECISION)
    granule = CUDA_BLOCK if is_cuda else granule
    sources: list[int] = []
    padding: list[int] = []
    ends_E: list[int] = []
    blocks = []
    for expert in range(num_experts):
        rows, start = rows_of.get(expert, ()), len(sources)
        sources += rows
        padding += range(len(sources), len(sources) + -len(rows) % granule)
        sources += [rows[0]] * (-len(rows) % granule) if rows else []
        step = CUDA_BLOCK if is_cuda else SMALL_BLOCK if is_small else max(len(sources) - start, 1)
        blocks += [(expert, s, min(s + step, len(sources))) for s in range(start, len(sources), step)]
        ends_E.append(len(sources))
    position_N = [len(sources)] * len(expert_N)
    for position in range(len(sources) - 1, -1, -1):  # backwards: padding stands behind the row that it repeats
        position_N[sources[position]] = position
    return _RowPlan(
        token_P=torch.tensor([row // K for row in sources], dtype=torch.long, device=device),
        padding=padding,
        position_N=torch.tensor(position_N, dtype=torch.long, device=device),
        is_all_local=len(sources) - len(padding) == len(expert_N),
        expert_P=torch.tensor([expert_N[row] for row in sources], dtype=torch.long, device=device),
        ends_E=torch.tensor(ends_E, dtype=torch.int32, device=device),
        blocks=tuple(blocks),
        is_small=is_small,
    )


def _seed(
    like_PD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    expert_P: torch.Tensor,
    width: int,
    segments: Segments | None,
) -> torch.Tensor | None:
    """What the GEMM accumulates onto; None where that is nothing."""
    if bias_EO is not None:
        return bias_EO.index_select(0, expert_P).to(like_PD.dtype)
    return None if segments is None else like_PD.new_zeros(expert_P.shape[0], width)


def _grouped_gemm(c_PO: torch.Tensor | None, x_PI: torch.Tensor, w: _Matrix, plan: _RowPlan) -> torch.Tensor:
    """c[p] + x[p] @ w[expert of p]; may change c."""
    may_group = c_PO is None and not (plan.is_small or x_PI.is_cuda)
    if may_group and w.dense_EIO is not None and fits_torch_grouped_mm(x_PI, w.dense_EIO):
        # The same GEMMs without a Python loop; onto a zero, addmm gives their very bits. On CUDA, blocks have a size.
        return torch.nn.functional.grouped_mm(x_PI, w.dense_EIO, offs=plan.ends_E)
    if c_PO is None:
        c_PO = x_PI.new_zeros(x_PI.shape[0], w.width)
    sizes = [end - start for _, start, end in plan.blocks]
    matrices = w.of_blocks(plan, x_PI.dtype)
    if plan.is_small:
        # Few rows a block: with the weight as the left operand a float32 GEMM reads it about three times as fast.
        c_OP = c_PO.t().contiguous()
        for w_IO, out, x in zip(matrices, c_OP.split(sizes, 1), x_PI.t().split(sizes, 1), strict=True):
            torch.addmm(out, w_IO.t(), x, out=out)
        return c_OP.t().contiguous()
    for w_IO, out, x in zip(matrices, c_PO.split(sizes), x_PI.split(sizes), strict=True):
        torch.addmm(out, x, w_IO, out=out)
    return c_PO

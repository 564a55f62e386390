"""TorchExperts: grouped GEMMs in plain torch. The backend of the CPU, and of any device without a better one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from moegraft.core.activation import apply_activation
from moegraft.core.config import BackendRequest
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.mapping import LoRASegments
from moegraft.lora.mixin import LoRAExpertsMixin
from moegraft.lora.punica.paged import fits_torch_grouped_mm
from moegraft.moe.experts.base import FusedMoEExpertsModular
from moegraft.moe.prepare_finalize import ExpertsOutput, PreparedRows

# A BLAS picks its kernel, and with it the order of a row's sum, by the number of rows. Blocks of these sizes keep a
# row's bits independent of how many rows share its expert (docs/numerics.md has the measurement).
ROW_GRANULE = {torch.float32: 4}
ROW_GRANULE_LOW_PRECISION = 2
SMALL_BLOCK = 8


@dataclass(frozen=True)
class _RowPlan:
    """Local rows sorted by expert and padded to P positions; an expert's rows start at a multiple of the row granule.

    source_P: routed row n = t*K + j behind a position (padding repeats some row) · local_N: the routed rows whose
    expert is here, by expert · position_N: where each of them stands · expert_P: expert of every position ·
    ends_E: int32, where each expert's positions end · blocks: (expert, start, end), one GEMM each.
    """

    source_P: torch.Tensor
    local_N: torch.Tensor
    position_N: torch.Tensor
    expert_P: torch.Tensor
    ends_E: torch.Tensor
    blocks: tuple[tuple[int, int, int], ...]
    is_small: bool


class TorchExperts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """Rows sorted by expert, one GEMM a block of rows.

    Every GEMM accumulates onto a buffer that already holds bias and delta (C += X W): so a delta meets the float32
    accumulator before the result is rounded, in bfloat16 too, and a base row runs the same instructions whether or
    not its neighbours have adapters, which makes it equal bit for bit.
    """

    @classmethod
    def is_supported_config(cls, request: BackendRequest) -> tuple[bool, str]:
        if request.format_name != "dense":
            return False, f"weights are {request.format_name}, TorchExperts reads dense weights only"
        return True, ""

    def apply(self, rows: PreparedRows, lora_context: MoELoRAContext | None = None) -> ExpertsOutput:
        context = self.active_context(lora_context)
        M, K = rows.topk_ids_MK.shape
        plan = _plan_rows(rows.topk_ids_MK, self.weights.num_experts, rows.x_MD.dtype)
        token_P = plan.source_P // K
        x_PD = rows.x_MD.index_select(0, token_P)
        segments = None
        if context is not None:
            slots_M = context.mapping.token_slots if rows.slots_M is None else rows.slots_M
            slot_P = torch.full_like(plan.source_P, -1)
            slot_P[plan.position_N] = slots_M.index_select(0, plan.local_N // K).long()
            segments = self.lora_segments(context, plan.expert_P, slot_P)

        w = self.weights
        u_PGF = _seed(x_PD, w.b13, plan.expert_P, w.num_halves * w.intermediate_size, segments)
        if context is not None and segments is not None and u_PGF is not None:
            is_quantised = rows.unquantised_MD is not rows.x_MD
            plain_PD = rows.unquantised_MD.index_select(0, token_P) if is_quantised else x_PD
            self.apply_w13_lora(context, u_PGF, plain_PD, segments)
        u_PGF = _grouped_gemm(u_PGF, x_PD, w.w13_in_out, plan)
        h_PF = apply_activation(u_PGF, self.config.activation, is_interleaved=self.is_interleaved)
        y_PD = _seed(x_PD, w.b2, plan.expert_P, w.hidden_size, segments)
        if context is not None and segments is not None and y_PD is not None:
            self.apply_w2_lora(context, y_PD, h_PF, segments)
        y_PD = _grouped_gemm(y_PD, h_PF, w.w2_in_out, plan)

        out_ND = y_PD.new_zeros(M * K, w.hidden_size)
        out_ND[plan.local_N] = y_PD.index_select(0, plan.position_N)
        return ExpertsOutput(y=out_ND.view(M, K, w.hidden_size), is_reduced=False)


def _plan_rows(topk_ids_MK: torch.Tensor, num_experts: int, dtype: torch.dtype) -> _RowPlan:
    expert_N = topk_ids_MK.flatten()
    expert_N = torch.where((expert_N >= 0) & (expert_N < num_experts), expert_N, num_experts)
    # The choice looks at the size of the batch only: with the routing it would change the bits of a base row.
    is_small = dtype == torch.float32 and expert_N.shape[0] < SMALL_BLOCK * num_experts
    expert_N, order_N = torch.sort(expert_N, stable=True)
    counts_E = torch.bincount(expert_N, minlength=num_experts + 1)[:num_experts].tolist()
    granule = ROW_GRANULE.get(dtype, ROW_GRANULE_LOW_PRECISION)
    padded_E = [-(-count // granule) * granule for count in counts_E]
    starts_E = list(accumulate(padded_E, initial=0))
    local = sum(counts_E)
    expert_N, local_N = expert_N[:local], order_N[:local]

    shift_E = torch.tensor([s - c for s, c in zip(starts_E, accumulate(counts_E, initial=0), strict=True)])
    position_N = torch.arange(local, device=local_N.device) + shift_E.to(local_N.device)[expert_N]
    source_P = local_N.new_zeros(starts_E[-1])
    source_P[position_N] = local_N
    sizes_E = torch.tensor(padded_E, device=local_N.device)
    expert_P = torch.arange(num_experts, device=local_N.device).repeat_interleave(sizes_E, output_size=starts_E[-1])
    blocks = []
    for e, size in enumerate(padded_E):
        step = SMALL_BLOCK if is_small else max(size, 1)
        for start in range(starts_E[e], starts_E[e] + size, step):
            blocks.append((e, start, min(start + step, starts_E[e] + size)))
    ends_E = torch.tensor(starts_E[1:], dtype=torch.int32, device=local_N.device)
    return _RowPlan(source_P, local_N, position_N, expert_P, ends_E, tuple(blocks), is_small)


def _seed(
    like_PD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    expert_P: torch.Tensor,
    width: int,
    segments: LoRASegments | None,
) -> torch.Tensor | None:
    """What the GEMM accumulates onto; None where that is nothing."""
    if bias_EO is not None:
        return bias_EO.index_select(0, expert_P).to(like_PD.dtype)
    return None if segments is None else like_PD.new_zeros(expert_P.shape[0], width)


def _grouped_gemm(c_PO: torch.Tensor | None, x_PI: torch.Tensor, w_EIO: torch.Tensor, plan: _RowPlan) -> torch.Tensor:
    """c[p] + x[p] @ w[expert of p]; may change c."""
    if c_PO is None and not plan.is_small and fits_torch_grouped_mm(x_PI, w_EIO):
        # The same GEMMs without a Python loop; onto a zero, addmm gives their very bits.
        return torch.nn.functional.grouped_mm(x_PI, w_EIO, offs=plan.ends_E)
    if c_PO is None:
        c_PO = x_PI.new_zeros(x_PI.shape[0], w_EIO.shape[2])
    sizes = [end - start for _, start, end in plan.blocks]
    if plan.is_small:
        # Few rows a block: with the weight as the left operand a float32 GEMM reads it about three times as fast.
        c_OP, w_E = c_PO.t().contiguous(), w_EIO.transpose(1, 2).unbind()
        columns = zip(plan.blocks, c_OP.split(sizes, 1), x_PI.t().split(sizes, 1), strict=True)
        for (e, _, _), out, x in columns:
            torch.addmm(out, w_E[e], x, out=out)
        return c_OP.t().contiguous()
    w_E = w_EIO.unbind()
    for (e, _, _), out, x in zip(plan.blocks, c_PO.split(sizes), x_PI.split(sizes), strict=True):
        torch.addmm(out, x, w_E[e], out=out)
    return c_PO

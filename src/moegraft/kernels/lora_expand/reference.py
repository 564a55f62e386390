"""The separate form in plain torch: the truth that the kernels are held to."""

from __future__ import annotations

import torch

from moegraft.core.halves import split_halves
from moegraft.core.tables import ExpertsFactor, ExpertsTables, Field
from moegraft.kernels.lora_shrink.reference import lora_shrink_reference
from moegraft.kernels.reference_lib import read_factor


def add_lora_w13_reference(
    u_NGF: torch.Tensor,
    x_ND: torch.Tensor,
    expert_N: list[int],
    slot_N: list[int],
    tables: ExpertsTables,
    *,
    num_halves: int,
    is_interleaved: bool,
) -> None:
    """Semantics: see ``host.add_lora_w13``."""
    gate_NF, up_NF = split_halves(u_NGF, num_halves=num_halves, is_interleaved=is_interleaved)
    low_rank = lora_shrink_reference(x_ND, expert_N, slot_N, tables, ExpertsFactor.A13)
    if num_halves == 2:
        _add(gate_NF, low_rank, expert_N, slot_N, tables, ExpertsFactor.B_GATE)
    _add(up_NF, low_rank, expert_N, slot_N, tables, ExpertsFactor.B_UP)


def add_lora_w2_reference(
    y_ND: torch.Tensor, h_NF: torch.Tensor, expert_N: list[int], slot_N: list[int], tables: ExpertsTables
) -> None:
    """Semantics: see ``host.add_lora_w2``."""
    low_rank = lora_shrink_reference(h_NF, expert_N, slot_N, tables, ExpertsFactor.A2)
    _add(y_ND, low_rank, expert_N, slot_N, tables, ExpertsFactor.B2)


def _add(
    y_NO: torch.Tensor,
    low_rank: list[torch.Tensor],
    expert_N: list[int],
    slot_N: list[int],
    tables: ExpertsTables,
    factor: ExpertsFactor,
) -> None:
    for n, (u_R, expert, slot) in enumerate(zip(low_rank, expert_N, slot_N, strict=True)):
        b_RO = read_factor(tables, slot, expert, factor, y_NO.shape[1])
        if b_RO.shape[0]:
            lane = int(tables.factors[slot, factor, Field.LANE])
            y_NO[n] = (y_NO[n].float() + u_R[lane : lane + b_RO.shape[0]].float() @ b_RO.float()).to(y_NO.dtype)

"""The shrink in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch

from moegraft.core.tables import ExpertsFactor, ExpertsTables
from moegraft.kernels.reference_lib import read_factor


def lora_shrink_reference(
    x_NI: torch.Tensor, expert_N: list[int], slot_N: list[int], tables: ExpertsTables, factor: ExpertsFactor
) -> list[torch.Tensor]:
    """Semantics: u[n] = A[slot[n], expert[n]] x[n], float32 sums rounded once; one vector a row, of its rank."""
    u = []
    for x_I, expert, slot in zip(x_NI, expert_N, slot_N, strict=True):
        a_RI = read_factor(tables, slot, expert, factor, x_NI.shape[1])
        u.append((a_RI.float() @ x_I.float()).to(x_NI.dtype))
    return u

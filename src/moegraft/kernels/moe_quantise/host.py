"""Rows to fp8 with float32 scales: what a GEMM over fp8 weights reads."""

from __future__ import annotations

import torch

from moegraft.kernels.moe_quantise.device import quantise_kernel
from moegraft.kernels.records import cdiv, next_power_of_2, pdl_options

TILE_ELEMENTS = 8192
"""Elements of x a program: with whole rows, those of most models in one."""


def moe_quantise(
    stored_MI: torch.Tensor,
    scale_MQ: torch.Tensor,
    x_MI: torch.Tensor,
    *,
    group_size: int = 0,
    static_scale: torch.Tensor | None = None,
) -> None:
    """Writes e4m3 rows [M, I] and their scales [M, Q], one a group of ``group_size`` columns, or (0) one a row.

    Semantics, for the numbers x of a group: amax = max(max |x|, 1e-10), scale = amax * (1 / 448), stored =
    round(x * (448 / amax)), to the nearest, ties to even; with ``static_scale`` (no axes): scale = it, stored =
    round(clamp(x * (1 / scale), +-448)).
    """
    M, I = x_MI.shape  # noqa: E741
    if M == 0 or I == 0:
        return
    group = group_size or I
    block_k = next_power_of_2(group)
    block_m = max(1, min(TILE_ELEMENTS // 4, next_power_of_2(M) * block_k) // block_k)
    num_groups = cdiv(I, group)
    quantise_kernel[(cdiv(M, block_m), num_groups)](
        stored_MI, scale_MQ, x_MI, static_scale, M, x_MI.stride(0), LENGTH=I, GROUP=group, NUM_GROUPS=num_groups,
        BLOCK_M=block_m, BLOCK_K=block_k, num_warps=max(1, min(16, block_m * block_k // 512)),
        **pdl_options(x_MI.device),
    )  # fmt: skip

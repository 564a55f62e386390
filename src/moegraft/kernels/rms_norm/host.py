"""RMS norms of rows: one launch, no host sync."""

from __future__ import annotations

import torch

from moegraft.kernels.records import cdiv, next_power_of_2, pdl_options
from moegraft.kernels.rms_norm.device import rms_norm_kernel

_ELEMENTS = 2048
"""What a program takes, where its rows are shorter."""


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, *, adds_one: bool = False, rounds_first: bool = False
) -> torch.Tensor:
    """The norm of each row of the last dimension of x [..., D], in its dtype.

        y = x / sqrt(mean(x²) + eps)        float32; rounds_first: rounded to the dtype of x
        out = y · w                         w = weight, 1 + weight where ``adds_one``, or 1; rounded once

    A row's bits depend on the row alone. May be captured in a CUDA graph.
    """
    size = x.shape[-1]
    x_MD = x.reshape(-1, size)
    if not x_MD.is_contiguous():
        x_MD = x_MD.contiguous()
    out_MD = torch.empty_like(x_MD)
    num_rows, block_d = x_MD.shape[0], next_power_of_2(size)
    if num_rows == 0:
        return out_MD.view(x.shape)
    block_m = max(1, _ELEMENTS // block_d)
    rms_norm_kernel[(cdiv(num_rows, block_m),)](
        out_MD, x_MD, weight_D, num_rows, eps, SIZE=size, ADDS_ONE=adds_one, ROUNDS_FIRST=rounds_first,
        HAS_WEIGHT=weight_D is not None, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=8 if block_d > 4096 else 4,
        **pdl_options(x.device),
    )  # fmt: skip
    return out_MD.view(x.shape)

"""Weights as an operand of a grouped GEMM: a TMA descriptor where device and layout allow it, else a pointer."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moegraft.kernels.launch import has_hopper_features
from moegraft.tuning.tiles import GemmTile

_ALIGNMENT_BYTES = 16


def weight_operand(
    w_EOI: torch.Tensor, tile: GemmTile, *, is_plain: bool = True
) -> tuple[torch.Tensor | TensorDescriptor, bool]:
    """(operand, whether it is a descriptor) for weights [E, out, in] read in tiles [block_n, block_k].

    A descriptor sees the matrix [E*out, in]; it needs rows that are contiguous, 16-byte aligned and evenly spaced
    through all experts, and ``is_plain``: columns of one half that are neighbours.
    """
    E, rows, length = w_EOI.shape
    row_bytes = w_EOI.stride(1) * w_EOI.element_size()
    fits = (
        tile.tma
        and is_plain
        and has_hopper_features(w_EOI.device)
        and w_EOI.stride(2) == 1
        and w_EOI.stride(0) == rows * w_EOI.stride(1)
        and row_bytes % _ALIGNMENT_BYTES == 0
        and w_EOI.data_ptr() % _ALIGNMENT_BYTES == 0
    )
    if not fits:
        return w_EOI, False
    return TensorDescriptor(w_EOI, [E * rows, length], [w_EOI.stride(1), 1], [tile.block_n, tile.block_k]), True

"""Tiles of the GEMMs over 4-bit weights. Steps are granules of 128 inputs: a quarter of the bytes of bf16."""

from __future__ import annotations

from moegraft.tuning.tiles import GemmTile, TuningShape

FOUR_BIT = frozenset({"int4", "mxfp4"})
FEW_OUTPUTS = 2 * 132 * 64
"""Rows times columns: fewer programs of 64 columns than two for each multiprocessor of an H200."""
WIDE_OUTPUTS = 4 * FEW_OUTPUTS


def four_bit_block_m(rows_per_expert: float) -> int:
    """Small blocks keep up longer than those of bf16: a second block of an expert reads its weights from the L2."""
    for block_m, most_rows in ((16, 12.8), (32, 40), (64, 64)):
        if rows_per_expert <= most_rows:
            return block_m
    return 128


def four_bit_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2). The weights are the left operand: the matrix unit takes that one from registers."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m == 16:
        num_rows = shape.num_tokens * shape.top_k
        gemm13 = _decode_tile13(num_rows * shape.intermediate_size, shape.intermediate_size, block_l)
        if num_rows * shape.hidden_size < FEW_OUTPUTS:
            return gemm13, GemmTile(block_n=64, block_k=256, num_stages=3, block_l=block_l, swapped=True)
        return gemm13, GemmTile(block_n=128, block_k=128, num_stages=4, block_l=block_l, tma=True, swapped=True)
    block_l, group = (block_l, 2) if block_m == 32 else (32, 4)
    return (
        GemmTile(block_n=64, block_k=128, block_l=block_l, group=8 if block_m == 128 else group, swapped=True),
        GemmTile(block_n=128, block_k=128, block_l=block_l, group=group, swapped=True),
    )


def _decode_tile13(outputs: int, columns: int, block_l: int) -> GemmTile:
    """Few programs: long steps, and the matrix instructions of single warps, which wait for nothing."""
    if outputs < FEW_OUTPUTS:
        narrow = outputs < FEW_OUTPUTS // 4
        return GemmTile(block_n=64 if narrow else 32, block_k=256, num_stages=2 if narrow else 4, block_l=block_l)
    is_wide = outputs >= WIDE_OUTPUTS and columns >= 512
    return GemmTile(block_n=128 if is_wide else 64, block_k=128, block_l=block_l, swapped=True)

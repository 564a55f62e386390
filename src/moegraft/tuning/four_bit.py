"""Tiles of the GEMMs over 4-bit weights. Steps are granules of 128 inputs: a quarter of the bytes of bf16."""

from __future__ import annotations

from moegraft.tuning.tiles import GemmTile, TuningShape


def four_bit_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2). The weights are the left operand: the matrix unit takes that one from registers."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= 32:
        tile = GemmTile(block_n=64, block_k=128, num_stages=4, block_l=block_l, group=block_m // 16, swapped=True)
        return tile, tile
    if block_m == 64:
        tile = GemmTile(block_n=64, block_k=128, num_stages=3, block_l=32, group=4, swapped=True)
        return tile, tile
    tile = GemmTile(block_n=128, block_k=128, num_stages=3, num_warps=8, block_l=32, group=8, swapped=True)
    return tile, tile

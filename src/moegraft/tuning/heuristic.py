"""Tile choice without a table: a few rules that stay close to tuned tiles on every shape of the grid."""

from __future__ import annotations

from moegraft.tuning.tiles import GemmTile, MoETiles, ShrinkTile, TuningShape

NUM_SMS = 132
"""Programs that one wave should hold; the H200's count serves as the measure for all."""


def heuristic_tiles(shape: TuningShape) -> MoETiles:
    """Decode reads weights, prefill multiplies: the rows that an expert gets on average decide which."""
    num_rows = shape.num_tokens * shape.top_k
    rows_per_expert = num_rows / max(1, min(shape.num_experts, num_rows))
    block_m = 16
    while block_m < 128 and block_m < rows_per_expert * 1.25:
        block_m *= 2
    tile_m = 16 if rows_per_expert < 64 else 32
    gemm13, gemm2 = _gemm_tiles(block_m, shape)
    return MoETiles(
        block_m=block_m,
        tile_m=tile_m,
        gemm13=gemm13,
        gemm2=gemm2,
        shrink13=_shrink_tile(shape, tile_m, shape.hidden_size, shape.rank13),
        shrink2=_shrink_tile(shape, tile_m, shape.intermediate_size, shape.rank2),
    )


def _gemm_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """Decode keeps many bytes of weights in flight; prefill has tiles that feed two warp groups."""
    wide = 64 if shape.rank2 > 16 else 32
    if block_m == 16:
        return (
            GemmTile(block_n=64, block_k=128, num_stages=4, block_l=wide),
            GemmTile(block_n=128, block_k=128, num_stages=3, block_l=wide, tma=True),
        )
    if block_m == 32:
        return (
            GemmTile(block_n=64, block_k=128, num_stages=3, block_l=32, group=2),
            GemmTile(block_n=128, block_k=128, num_stages=3, block_l=32, group=2),
        )
    if block_m == 64:
        return (
            GemmTile(block_n=64, block_k=64, num_stages=4, block_l=32, group=4),
            GemmTile(block_n=128, block_k=64, num_stages=4, block_l=32, group=4),
        )
    return (
        GemmTile(block_n=128, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8),
        GemmTile(block_n=256, block_k=64, num_stages=4, num_warps=8, block_l=32, group=16, tma=True),
    )


def _shrink_tile(shape: TuningShape, tile_m: int, length: int, rank: int) -> ShrinkTile:
    """Enough splits to fill the device twice over where there are few rows."""
    block_r = 16
    while block_r < min(rank, 64):
        block_r *= 2
    block_k = 128
    tiles = max(1, shape.num_tokens * shape.top_k) * -(-rank // block_r) // max(1, tile_m // 16)
    splits = 1
    while splits < 16 and splits * tiles < 2 * NUM_SMS and length >= 4 * splits * block_k:
        splits *= 2
    return ShrinkTile(block_r=block_r, block_k=block_k, splits=splits, num_warps=4, num_stages=4)

"""Tiles of the GEMMs over int8 and fp8 weights. A byte a weight: half the bytes of bf16 stand in the way of decode."""

from __future__ import annotations

from dataclasses import replace

from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

FP8_BLOCK = 128
"""Inputs of a step of block-scaled weights, and the most columns of a tile: those of one scale."""
X_IN_GEMM = 0
H_IN_GEMM = 32
"""Up to this ``block_m`` a GEMM over block-scaled weights quantises its rows itself, in every program; beyond, they are
quantised once: x by a kernel of its own, h by GEMM 13 where ``writes_groups``, else by a kernel too."""
MAX_SUMS = 32
"""Numbers of h a thread; with twice as many the loop over the inputs spills, and takes half as long again."""
NUM_SMS = 132
ROWS_OF_128 = 512
"""Rows an expert from which blocks of 128 rows, of which the last is half empty, beat blocks of 64."""


def fp8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2). The products of a step need registers beside the sums: smaller tiles than those of bf16."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= 32:
        tile = GemmTile(block_n=128, block_k=128, num_stages=3, block_l=block_l, tma=True, swapped=True)
        experts = min(shape.num_experts, shape.num_tokens * shape.top_k)
        if experts * shape.intermediate_size >= NUM_SMS * tile.block_n:
            return tile, tile
        return replace(tile, block_n=64, num_stages=4), tile
    num_warps, group = (4, 4) if block_m == 64 else (8, 8)
    tile = GemmTile(block_n=128, block_k=128, num_stages=3, num_warps=num_warps, block_l=32, group=group, tma=True)
    return replace(tile, block_n=64), tile


def fp8_block_m(block_m: int, rows_per_expert: float) -> int:
    """The rows of a block, from those that bf16 would have."""
    return min(block_m, 64) if rows_per_expert < ROWS_OF_128 else block_m


def int8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2)."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= 32:
        decode = GemmTile(block_n=64, block_k=128, num_stages=4, block_l=block_l)
        return decode, decode
    if block_m == 64:
        tile = GemmTile(block_n=128, block_k=64, num_stages=4, block_l=32, group=4, tma=True)
        return tile, tile
    tile = GemmTile(block_n=128, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8, tma=True)
    return tile, tile


def stores_x(shape: TuningShape, tiles: MoETiles) -> bool:
    """Whether x is quantised once, into a buffer, before GEMM 13 reads it. A scale of a whole row needs all of it."""
    return shape.weight_format == "fp8" and (shape.scale_group == 0 or tiles.block_m > X_IN_GEMM)


def stores_h(shape: TuningShape, tiles: MoETiles) -> bool:
    """The same of h, before GEMM 2."""
    group = shape.scale_group
    return shape.weight_format == "fp8" and (group == 0 or tiles.block_m > H_IN_GEMM or writes_groups(tiles, group))


def writes_groups(tiles: MoETiles, group: int) -> bool:
    """Whether a program of GEMM 13 has whole groups of h, and registers enough to quantise what it writes."""
    tile = tiles.gemm13
    return tile.block_n == group and tiles.block_m * tile.block_n <= MAX_SUMS * 32 * tile.num_warps


def fit_tiles(tiles: MoETiles, shape: TuningShape) -> MoETiles:
    """Tiles that were made for other weights, so that they fit fp8.

    A step of block-scaled weights has one scale of them. Any other has at least the 128 products after which a sum
    leaves the matrix unit: Triton refuses to compile a shorter one.
    """
    if shape.weight_format != "fp8":
        return tiles
    fit = _fit_blocks if shape.scale_group else _fit_rows
    return replace(tiles, gemm13=fit(tiles.gemm13), gemm2=fit(tiles.gemm2))


def _fit_blocks(tile: GemmTile) -> GemmTile:
    return replace(tile, block_n=min(tile.block_n, FP8_BLOCK), block_k=FP8_BLOCK)


def _fit_rows(tile: GemmTile) -> GemmTile:
    return replace(tile, block_k=max(tile.block_k, FP8_BLOCK))

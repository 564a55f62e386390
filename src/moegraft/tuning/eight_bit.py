"""Tiles of the GEMMs over int8 and fp8 weights. A byte a weight: half the bytes of bf16 stand in the way of decode."""

from __future__ import annotations

from dataclasses import replace

from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

FP8_BLOCK = 128
"""Inputs of a step of block-scaled weights, and the most columns of a tile: those of one scale."""
FUSED_BLOCK_M = 32
"""Up to here each program of a GEMM quantises its rows itself; beyond, a kernel before it does, once."""


def fp8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2)."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= FUSED_BLOCK_M:
        decode = GemmTile(block_n=64, block_k=128, num_stages=4, block_l=block_l)
        return decode, decode
    if block_m == 64:
        return (
            GemmTile(block_n=128, block_k=128, num_stages=3, block_l=32, group=4, tma=True),
            GemmTile(block_n=128, block_k=128, num_stages=4, block_l=32, group=4, tma=True),
        )
    return (
        GemmTile(block_n=128, block_k=128, num_stages=3, num_warps=8, block_l=32, group=8, tma=True),
        GemmTile(block_n=128, block_k=128, num_stages=3, num_warps=8, block_l=32, group=8, tma=True),
    )


def int8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2)."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= FUSED_BLOCK_M:
        decode = GemmTile(block_n=64, block_k=128, num_stages=4, block_l=block_l)
        return decode, decode
    if block_m == 64:
        tile = GemmTile(block_n=128, block_k=64, num_stages=4, block_l=32, group=4, tma=True)
        return tile, tile
    tile = GemmTile(block_n=128, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8, tma=True)
    return tile, tile


def quantises_apart(weight_format: str, scale_group: int, block_m: int) -> bool:
    """Whether the rows that a GEMM reads are quantised by a kernel of their own.

    A scale of a whole row needs all of it; a group's needs what a program reads in one step anyway.
    """
    return weight_format == "fp8" and (scale_group == 0 or block_m > FUSED_BLOCK_M)


def fit_tiles(tiles: MoETiles, shape: TuningShape) -> MoETiles:
    """Tiles that were made for other weights, so that a step of block-scaled ones has one scale of weights."""
    if shape.weight_format != "fp8" or shape.scale_group == 0:
        return tiles
    return replace(tiles, gemm13=_fit(tiles.gemm13), gemm2=_fit(tiles.gemm2))


def _fit(tile: GemmTile) -> GemmTile:
    return replace(tile, block_n=min(tile.block_n, FP8_BLOCK), block_k=FP8_BLOCK)

"""What tiles, workspace and kernels must know of a format of weights, one record each; ``formats`` packs them.

A new format is a class in ``formats``, a record here, and a product in ``kernels/device/base_product.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from moegraft.tuning.tiles import GemmTile, MoETiles, TuningShape

NUM_SMS = 132
"""Programs that one wave should hold; the H200's count serves as the measure for all."""
FP8_BLOCK = 128
"""Inputs of a step of block-scaled weights, and the most columns of a tile: those of one scale."""
X_IN_GEMM = 0
H_IN_GEMM = 32
"""Up to this ``block_m`` a GEMM over block-scaled weights quantises its rows itself, in every program; beyond, they are
quantised once: x by a kernel of its own, h by GEMM 13 where ``writes_groups``, else by a kernel too."""
MAX_SUMS = 32
"""Numbers of h a thread; with twice as many the loop over the inputs spills, and takes half as long again."""
ROWS_OF_128 = 512
"""Rows an expert from which blocks of 128 rows, of which the last is half empty, beat blocks of 64."""
FEW_OUTPUTS = 2 * NUM_SMS * 64
"""Rows times columns: fewer programs of 64 columns than two for each multiprocessor of an H200."""
WIDE_OUTPUTS = 4 * FEW_OUTPUTS


class WeightFormat(enum.StrEnum):
    """How the numbers of w13 and w2 are stored; ``kernels/device/blocks.py`` numbers them in this order."""

    DENSE = "dense"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    MXFP4 = "mxfp4"


@dataclass(frozen=True, kw_only=True)
class FormatRules:
    """One format. ``gemm_tiles``: (GEMM 13, GEMM 2) for a block_m; None: those of unquantised weights.

    ``block_m``: the rows of a block, from those that unquantised weights would have and the rows an expert gets on
    average · ``quantises_rows``: the GEMMs read rows in fp8 · ``is_granular``: weights lie in granules of 128 inputs
    (``formats/four_bit.py``), and have no strides.
    """

    gemm_tiles: Callable[[int, TuningShape], tuple[GemmTile, GemmTile]] | None = None
    block_m: Callable[[int, float], int] = lambda block_m, rows_per_expert: block_m
    quantises_rows: bool = False
    is_granular: bool = False


def stores_x(shape: TuningShape, tiles: MoETiles) -> bool:
    """Whether x is quantised once, into a buffer, before GEMM 13 reads it. A scale of a whole row needs all of it."""
    return RULES[shape.weight_format].quantises_rows and (shape.scale_group == 0 or tiles.block_m > X_IN_GEMM)


def stores_h(shape: TuningShape, tiles: MoETiles) -> bool:
    """The same of h, before GEMM 2."""
    group = shape.scale_group
    is_stored = group == 0 or tiles.block_m > H_IN_GEMM or writes_groups(tiles, group)
    return RULES[shape.weight_format].quantises_rows and is_stored


def writes_groups(tiles: MoETiles, group: int) -> bool:
    """Whether a program of GEMM 13 has whole groups of h, and registers enough to quantise what it writes."""
    tile = tiles.gemm13
    return tile.block_n == group and tiles.block_m * tile.block_n <= MAX_SUMS * 32 * tile.num_warps


def fit_tiles(tiles: MoETiles, shape: TuningShape) -> MoETiles:
    """Tiles that were made for other weights, so that they fit those whose rows are quantised.

    A step of block-scaled weights has one scale of them. Any other has at least the 128 products after which a sum
    leaves the matrix unit: Triton refuses to compile a shorter one.
    """
    if not RULES[shape.weight_format].quantises_rows:
        return tiles
    fit = _fit_blocks if shape.scale_group else _fit_rows
    return replace(tiles, gemm13=fit(tiles.gemm13), gemm2=fit(tiles.gemm2))


def _fit_blocks(tile: GemmTile) -> GemmTile:
    return replace(tile, block_n=min(tile.block_n, FP8_BLOCK), block_k=FP8_BLOCK)


def _fit_rows(tile: GemmTile) -> GemmTile:
    return replace(tile, block_k=max(tile.block_k, FP8_BLOCK))


def fp8_block_m(block_m: int, rows_per_expert: float) -> int:
    """Blocks of 64 rows until there are many."""
    return min(block_m, 64) if rows_per_expert < ROWS_OF_128 else block_m


def fp8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """The products of a step need registers beside the sums: smaller tiles than those of bf16."""
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


def int8_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """A byte a weight: half the bytes of bf16 stand in the way of decode."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m <= 32:
        decode = GemmTile(block_n=64, block_k=128, num_stages=4, block_l=block_l)
        return decode, decode
    if block_m == 64:
        tile = GemmTile(block_n=128, block_k=64, num_stages=4, block_l=32, group=4, tma=True)
        return tile, tile
    tile = GemmTile(block_n=128, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8, tma=True)
    return tile, tile


def four_bit_block_m(block_m: int, rows_per_expert: float) -> int:
    """Small blocks keep up longer than those of bf16: a second block of an expert reads its weights from the L2."""
    for small, most_rows in ((16, 12.8), (32, 40), (64, 64)):
        if rows_per_expert <= most_rows:
            return small
    return 128


def four_bit_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """Steps are granules of 128 inputs. The weights are the left operand: the matrix unit takes that one from
    registers."""
    block_l = 64 if shape.rank13 > 32 else 32
    if block_m == 16:
        num_rows = shape.num_tokens * shape.top_k
        gemm13 = _four_bit_decode_tile13(num_rows * shape.intermediate_size, shape.intermediate_size, block_l)
        if num_rows * shape.hidden_size < FEW_OUTPUTS:
            return gemm13, GemmTile(block_n=64, block_k=256, num_stages=3, block_l=block_l, swapped=True)
        return gemm13, GemmTile(block_n=128, block_k=128, num_stages=4, block_l=block_l, tma=True, swapped=True)
    block_l, group = (block_l, 2) if block_m == 32 else (32, 4)
    return (
        GemmTile(block_n=64, block_k=128, block_l=block_l, group=8 if block_m == 128 else group, swapped=True),
        GemmTile(block_n=128, block_k=128, block_l=block_l, group=group, swapped=True),
    )


def _four_bit_decode_tile13(outputs: int, columns: int, block_l: int) -> GemmTile:
    """Few programs: long steps, and the matrix instructions of single warps, which wait for nothing."""
    if outputs < FEW_OUTPUTS:
        narrow = outputs < FEW_OUTPUTS // 4
        return GemmTile(block_n=64 if narrow else 32, block_k=256, num_stages=2 if narrow else 4, block_l=block_l)
    is_wide = outputs >= WIDE_OUTPUTS and columns >= 512
    return GemmTile(block_n=128 if is_wide else 64, block_k=128, block_l=block_l, swapped=True)


RULES: dict[str, FormatRules] = {
    WeightFormat.DENSE: FormatRules(),
    WeightFormat.INT8: FormatRules(gemm_tiles=int8_tiles),
    WeightFormat.FP8: FormatRules(gemm_tiles=fp8_tiles, block_m=fp8_block_m, quantises_rows=True),
    WeightFormat.INT4: FormatRules(gemm_tiles=four_bit_tiles, block_m=four_bit_block_m, is_granular=True),
    WeightFormat.MXFP4: FormatRules(gemm_tiles=four_bit_tiles, block_m=four_bit_block_m, is_granular=True),
}

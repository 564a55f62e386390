"""Tile choice without a table: a few rules that stay close to tuned tiles on every shape of the grid."""

from __future__ import annotations

from dataclasses import replace

import torch

from moegraft.core.config import DeviceTarget
from moegraft.tuning.tiles import GemmTile, MoETiles, ShrinkTile, TokenTile, TokenTiles, TuningShape
from moegraft.tuning.weight_formats import NUM_SMS, RULES

H200 = DeviceTarget(kind="cuda", capability=(9, 0), name="NVIDIA H200", num_sms=132, shared_memory=227 * 1024)
"""What tiles were measured on; a GPU with as much shared memory gets them as they are."""
_NUMBER_BYTES = 2
"""In bfloat16 and float16."""


def tuning_device() -> DeviceTarget:
    """The process's GPU; where there are several, they are taken to be alike. Without one, the limits of an H200."""
    return DeviceTarget.of(torch.device("cuda")) if torch.cuda.is_available() else replace(H200, name="cpu")


def heuristic_tiles(shape: TuningShape) -> MoETiles:
    """Decode reads weights, prefill multiplies: the rows that an expert gets on average decide which."""
    num_rows = shape.num_tokens * shape.top_k
    rows_per_expert = num_rows / max(1, min(shape.num_experts, num_rows))
    block_m = 16
    while block_m < 128 and block_m < rows_per_expert * 1.25:
        block_m *= 2
    block_m = RULES[shape.weight_format].block_m(block_m, rows_per_expert)
    tile_m = 16 if rows_per_expert < 64 else 32
    gemm13, gemm2 = gemm_tiles(block_m, shape)
    return MoETiles(
        block_m=block_m,
        tile_m=tile_m,
        route_token=shape.num_tokens == 1 and shape.num_slots > 0,
        gemm13=gemm13,
        gemm2=gemm2,
        shrink13=_shrink_tile(shape, tile_m, shape.hidden_size, shape.rank13),
        shrink2=_shrink_tile(shape, tile_m, shape.intermediate_size, shape.rank2),
    )


def token_tiles(shape: TuningShape) -> TokenTiles:
    """Tiles of a single token's own kernels, which ``heuristic_tiles`` does not choose: what was measured of them is
    older than they are (docs/measured.md). A program reads 8 KiB of unquantised weights a step and half."""
    choices = 1
    while choices < shape.top_k:
        choices *= 2
    if RULES[shape.weight_format].is_granular:
        return TokenTiles(
            w13=TokenTile(block_n=16, block_k=512), w2=TokenTile(block_n=8, block_k=max(128, 2048 // choices))
        )
    return TokenTiles(w13=TokenTile(block_n=8, block_k=512), w2=TokenTile(block_n=4, block_k=max(128, 1024 // choices)))


def gemm_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """(GEMM 13, GEMM 2), such as the GPU has room for."""
    of_format = RULES[shape.weight_format].gemm_tiles
    if of_format is not None:
        return of_format(block_m, shape)
    gemm13, gemm2 = _dense_tiles(block_m, shape)
    return fit_device(gemm13, block_m, num_halves=2), fit_device(gemm2, block_m, num_halves=1)


def _dense_tiles(block_m: int, shape: TuningShape) -> tuple[GemmTile, GemmTile]:
    """Tiles of an H200. Decode keeps many bytes of weights in flight; prefill has tiles that feed two warp groups."""
    if block_m == 16:
        num_rows, block_l = shape.num_tokens * shape.top_k, 64 if shape.rank13 > 32 else 32
        return (
            _decode_tile(num_rows, shape.intermediate_size, wide=64, block_l=block_l),
            _decode_tile(num_rows, shape.hidden_size, wide=128, block_l=block_l),
        )
    if block_m == 32:
        return (
            GemmTile(block_n=64, block_k=128, num_stages=3, block_l=64, group=2),
            GemmTile(block_n=128, block_k=128, num_stages=3, block_l=64, group=2),
        )
    if block_m == 64:
        return (
            GemmTile(block_n=64, block_k=64, num_stages=4, block_l=64, group=4),
            GemmTile(block_n=128, block_k=64, num_stages=4, block_l=64, group=4),
        )
    return (
        GemmTile(block_n=128, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8, tma=True),
        GemmTile(block_n=256, block_k=64, num_stages=4, num_warps=8, block_l=32, group=8, tma=True),
    )


def fit_device(tile: GemmTile, block_m: int, *, num_halves: int, device: DeviceTarget | None = None) -> GemmTile:
    """A tile of unquantised weights for a GPU that has less than an H200: fewer steps in flight, or fewer columns.

    Without wgmma, which reads operands from shared memory, a step's operands take registers beside the sums: tiles of
    128 rows then have half the columns. The copies in flight are one fewer than ``num_stages``; wgmma keeps one more,
    since it still reads a step when the next one is fetched.
    """
    device = device or tuning_device()
    if block_m == 128 and not device.has_wgmma:
        tile = replace(tile, block_n=tile.block_n // 2)
    step_bytes = _NUMBER_BYTES * (block_m + num_halves * tile.block_n) * tile.block_k
    spare = 0 if device.has_wgmma and block_m >= 64 else 1
    stages = min(tile.num_stages, device.shared_memory // step_bytes + spare)
    return tile if stages == tile.num_stages else replace(tile, num_stages=max(2, stages))


def expand_tile(shape: TuningShape, block_m: int) -> GemmTile:
    """The expand that stands alone: few lanes a block, so that its columns are what fills the device.

    Blocks of 128 rows take twice the warps: by four, their sums alone are half of a thread's registers.
    """
    block_l = 64 if max(shape.rank13, shape.rank2) > 32 else 32
    return GemmTile(block_n=128, block_l=block_l, num_warps=8 if block_m == 128 else 4)


def _decode_tile(num_rows: int, columns: int, *, wide: int, block_l: int) -> GemmTile:
    """A tile of ``wide`` columns; where those are too few programs for the device, half of it in longer steps."""
    programs_per_sm = wide // 64
    if num_rows * columns < programs_per_sm * NUM_SMS * wide:
        return GemmTile(block_n=wide // 2, block_k=256, num_stages=3, block_l=block_l)
    if wide == 128:
        return GemmTile(block_n=128, block_k=128, num_stages=3, block_l=block_l, tma=True)
    return GemmTile(block_n=wide, block_k=128, num_stages=4, block_l=block_l)


def _shrink_tile(shape: TuningShape, tile_m: int, length: int, rank: int) -> ShrinkTile:
    """Splits where there are few tiles, as long as each split has eight steps."""
    block_r = 16
    while block_r < min(rank, 64):
        block_r *= 2
    block_k, num_rows = 128, shape.num_tokens * shape.top_k
    tiles = num_rows // tile_m + min(num_rows, shape.num_experts * shape.num_slots)
    splits = 1
    while splits < 8 and splits * tiles < 4 * NUM_SMS and length >= 2 * splits * 8 * block_k:
        splits *= 2
    return ShrinkTile(block_r=block_r, block_k=block_k, splits=splits, num_warps=4, num_stages=4)


def batch_invariant_tiles() -> MoETiles:
    """The same tiles for every call: a row's bits then do not depend on how many and which rows are with it.

    A row is a row of its tile wherever it stands, its sum over K is cut at the same places, and its own lanes come in
    whole matrix instructions, in order; those of its neighbours add exact zeros. The price: decode reads weights with
    the tile of a middling batch.
    """
    shrink = ShrinkTile(block_r=64, block_k=128, splits=1, num_stages=4)
    return MoETiles(
        block_m=64,
        tile_m=16,
        gemm13=GemmTile(block_n=64, block_k=64, num_stages=4, block_l=32, group=4),
        gemm2=GemmTile(block_n=128, block_k=64, num_stages=4, block_l=32, group=4),
        shrink13=shrink,
        shrink2=shrink,
    )

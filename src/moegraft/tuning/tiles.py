"""Tile configs of the MoE kernels: plain records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GemmTile:
    """One grouped GEMM: block_n columns and block_k inputs a step, ``group`` blocks sharing a column of weights.

    ``block_l``: lanes a step of the expand. ``tma``: weights through TMA descriptors where their layout allows it.
    ``swapped``: weights are the left operand of the matrix unit, whose 64 rows are then columns of the result.
    """

    block_n: int = 64
    block_k: int = 64
    block_l: int = 32
    group: int = 1
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class ShrinkTile:
    """One shrink: block_r rank rows and block_k inputs a step; ``splits`` programs share the inputs of a tile."""

    block_r: int = 32
    block_k: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class TokenTile:
    """A product of a single token's rows: block_n columns a program, block_k inputs a step, without the matrix unit."""

    block_n: int = 8
    block_k: int = 512
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class TokenTiles:
    """The layer of a single token. ``block_r`` rank rows a program of a shrink."""

    w13: TokenTile = TokenTile()
    w2: TokenTile = TokenTile(block_n=4, block_k=256)
    block_r: int = 8


@dataclass(frozen=True, kw_only=True)
class MoETiles:
    """All tile choices of one layer call. ``block_m`` positions a GEMM block, ``tile_m`` a shrink tile.

    ``route_token``: a single token is routed and shrunk in one launch, which sums in another order than other batches.
    ``token``: a single token takes kernels of its own, with adapters and without.
    """

    block_m: int = 16
    tile_m: int = 16
    route_token: bool = False
    token: TokenTiles | None = None
    gemm13: GemmTile = GemmTile()
    gemm2: GemmTile = GemmTile()
    shrink13: ShrinkTile = ShrinkTile()
    shrink2: ShrinkTile = ShrinkTile()


@dataclass(frozen=True, kw_only=True)
class TuningShape:
    """What a tile choice depends on; all of it known on the host, none of it data of the batch."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_slots: int = 0
    rank13: int = 0
    rank2: int = 0
    weight_format: str = "dense"
    scale_group: int = 0

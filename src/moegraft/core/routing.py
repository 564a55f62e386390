"""The routing record: one order of the rows of a batch, and the three views of it that the kernels walk.

Rows n = t*K + k are sorted by (expert, adapter slot), base rows first; a row's place in that order is its *position*.

- **Blocks** are what a program of the base GEMM works on: up to ``block_m`` positions of one expert.
- **Tiles** are what a program of the LoRA shrink works on: up to ``tile_m`` positions of one (expert, slot) segment
  whose adapter touches that expert.
- **Lanes** are the rank rows that meet in an expert: every segment brings ceil(rank / 16) granules of 16 lanes, lanes
  of an expert are neighbours, so that the expand is a flat loop over a block's lanes, whatever the mix of adapters.

All counts live on the device: grids are launched for an upper bound, and one captured graph serves any mix.
``docs/kernels.md`` works an example.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

LANE_GRANULE = 16
"""Lanes of a segment come in multiples of this: the K of one matrix instruction, so that a row's sum over its own lanes
is cut at the same places whatever its neighbours are."""


class Count(enum.IntEnum):
    """Elements of ``MoERouting.counts``."""

    BLOCKS = 0
    TILES = 1


class Block(enum.IntEnum):
    """Columns of ``MoERouting.blocks``. Ends are exclusive; a block with FIRST == END has no work."""

    EXPERT = 0
    FIRST = 1
    END = 2
    LANE13_FIRST = 3
    LANE13_END = 4
    LANE2_FIRST = 5
    LANE2_END = 6


class Tile(enum.IntEnum):
    """Columns of ``MoERouting.tiles``. A tile with FIRST == END has no work. The tickets count arrivals, from zero."""

    EXPERT = 0
    SLOT = 1
    FIRST = 2
    END = 3
    TICKET13 = 4
    TICKET2 = 5


RECORD_INTS = 8
"""int32 a block or a tile: one 32-byte sector."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The lanes of w13 or of w2, for the expand: L lanes, B factors (gate and up; for w2 or without a gate, one).

    ``segment`` [L] int32: first position of the segment that a lane belongs to · ``granule`` [B, L] int32: which 16
    columns of the low-rank rows it and its neighbours read · ``element`` [B, L] int64: where its row of B starts in the
    pool, -1 for none.
    """

    segment: torch.Tensor
    granule: torch.Tensor
    element: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class MoERouting:
    """On the device, of fixed capacity; only ``counts`` says how much of each is valid.

    order [N] row at each position · segment [N] first position of the position's (expert, slot) segment ·
    blocks [max_blocks, 8] · tiles [max_tiles, 8] · counts [2], all int32. Rows whose expert id lies outside [0, E) have
    no position. Without adapters there are no tiles and no lanes, and ``segment`` is not written.
    """

    order: torch.Tensor
    segment: torch.Tensor
    blocks: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    lanes13: Lanes | None
    lanes2: Lanes | None
    num_rows: int
    top_k: int
    block_m: int
    tile_m: int

"""The arguments of kernels in groups: host functions fill them, device functions read them by name.

A group of tensors and numbers reaches a kernel as its fields would, one by one. A group of constants (fields in
capitals) is one ``tl.constexpr`` that holds plain numbers: wrapped one by one, they would cost a microsecond each at
every launch. Triton 3.6 takes such a field for a plain number: where one shapes a tensor, or is written into a tuple,
it is made a ``tl.constexpr`` of its own first. A TMA descriptor stays an argument of its own: Triton up to 3.6 finds
none inside a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Pointer = Any
"""A tensor or None; to a kernel, where the tensor lies."""


class Rows(NamedTuple):
    """Rows that a product reads. ``scale``: float32, of rows in fp8, one a row or one a group of its columns."""

    ptr: Pointer
    scale: Pointer
    stride: int


class Weights(NamedTuple):
    """What stands beside the numbers of w13 or w2. Elements from an expert, a column and an input to the next, and from
    a gate's column to its up."""

    scale: Pointer
    zero: Pointer
    stride_e: int
    stride_n: int
    stride_k: int
    up_offset: int


class Bias(NamedTuple):
    """``ptr`` None: there is none. Strides as those of ``Weights``."""

    ptr: Pointer
    stride_e: int
    stride_n: int
    up_offset: int


class Routing(NamedTuple):
    """The lists of ``MoERouting`` that a GEMM walks."""

    order: Pointer
    segment: Pointer
    blocks: Pointer
    counts: Pointer


class Expand(NamedTuple):
    """Low-rank rows, the pool of B, and the lanes of a factor (``core.routing.Lanes``), ``capacity`` of them a half.

    ``u`` None: no LoRA.
    """

    u: Pointer
    pool: Pointer
    segment: Pointer
    granule: Pointer
    element: Pointer
    capacity: int


class Tables(NamedTuple):
    """The bank's tables, and elements from a slot to the next in each."""

    pool: Pointer
    pages: Pointer
    factors: Pointer
    expert_index: Pointer
    stride_pages: int
    stride_factors: int
    stride_experts: int


class Lists(NamedTuple):
    """What a routing build writes (``MoERouting``); ``rows``: the rows of each expert, unsorted, on the way there."""

    order: Pointer
    rows: Pointer
    segment: Pointer
    blocks: Pointer
    tiles: Pointer
    counts: Pointer


class Lanes(NamedTuple):
    """The lanes of w13 or of w2, as a routing build writes them; see ``Expand``."""

    segment: Pointer
    granule: Pointer
    element: Pointer
    capacity: int


class Layer(NamedTuple):
    """E experts, K a token, S adapter slots; granules of the largest rank. PAGE_ELEMS: of a page of the pool."""

    E: int
    K: int
    S: int
    D: int
    F: int
    GATED: bool
    PAGE_ELEMS: int
    GRANULES13: int
    GRANULES2: int


class Shape(NamedTuple):
    """Sizes of a product: LENGTH inputs, COLUMNS outputs of one half, and how the weights are stored.

    ``PAIRED``: dense columns of gate and up alternate. ``SCALE_GROUP``: inputs that share a scale, 0: all of a column.
    """

    FORMAT: int
    LENGTH: int
    COLUMNS: int
    GATED: bool
    PAIRED: bool
    SCALE_GROUP: int


class Tile(NamedTuple):
    """``tuning.tiles.GemmTile``, and what follows from the operands."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_L: int
    GROUP: int
    USE_TMA: bool
    SWAPPED: bool
    PRECISION: str


class TokenTile(NamedTuple):
    """``tuning.tiles.TokenTile``, the choices of the token whose products a program adds up, and the lanes that it
    looks up at once, of at most RANK."""

    CHOICES: int
    BLOCK_N: int
    BLOCK_K: int
    LANES: int
    RANK: int


class LowRank(NamedTuple):
    """Columns of the low-rank rows, and elements that divide the address of every row of B."""

    U_WIDTH: int
    ALIGN: int


class Build(NamedTuple):
    """Constants of a routing build; ``moe_routing/host.py`` says what decides them."""

    BLOCK_M: int
    TILE_M: int
    E_BINS: int
    S_BINS: int
    CHUNK: int
    FEW: int
    ROWS: int
    FEW_LANES: int
    LANES: int
    DENSE: bool
    ALL_FEW: bool


class Factor(NamedTuple):
    """Which factor: A is the factor itself, B_LAST the last B that reads its lanes, TICKET a column of the tiles.

    ``K`` > 0: rows lie in the order of tokens, else of positions.
    """

    A: int
    B_LAST: int
    K: int
    TICKET: int


class ShrinkTile(NamedTuple):
    """``tuning.tiles.ShrinkTile``, and what follows from the operands."""

    TILE_M: int
    RANK_BLOCKS: int
    BLOCK_R: int
    BLOCK_K: int
    SPLITS: int
    PRECISION: str


class RowTile(NamedTuple):
    """TILE_M rows, whose slots GROUPS programs work on: LEADERS of its rows each."""

    TILE_M: int
    GROUPS: int
    LEADERS: int


class Slices(NamedTuple):
    """Columns where the second, third and fourth slice of a linear map begin; each slice has lanes of its own."""

    SECOND: int
    THIRD: int
    FOURTH: int

"""Linear maps of one input with LoRA inside, for a few rows: one launch, or two with adapters; no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from moegraft.core.tables import LinearTables
from moegraft.kernels.device import groups
from moegraft.kernels.linear_few_rows.device import few_rows_kernel
from moegraft.kernels.lora_linear.host import MAX_GROUP, alignment, group_tables, shrink_linears
from moegraft.kernels.records import cdiv, check_token_slots, dot_precision, next_power_of_2, pdl_options

MAX_ROWS = 32
"""Beyond it a library's product and LoRA behind it are as fast."""

_WAVE = 128
"""Programs that fill a device; see lora_linear/host.py."""


@dataclass(frozen=True, kw_only=True)
class FewRowsTile:
    """Tile sizes of one call. Lanes of ``slots`` adapters, ``block_r`` of each, are one product."""

    block_n: int
    block_k: int
    slots: int
    block_r: int = 16
    num_stages: int = 4
    num_warps: int = 4


class _Shape(NamedTuple):
    """LENGTH inputs · V_WIDTH, SPLITS: of the low-rank rows, 0 without LoRA."""

    LENGTH: int
    PAGE_ELEMS: int
    V_WIDTH: int
    SPLITS: int


class _Tile(NamedTuple):
    """``FewRowsTile`` as constants; BLOCK_M: all rows."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    SLOTS: int


def linear_few_rows(
    x_MI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    token_slots_M: torch.Tensor | None = None,
    tables: Sequence[LinearTables] = (),
    rank_bound: int = 0,
    tile: FewRowsTile | None = None,
) -> list[torch.Tensor]:
    """[y [M, out] of each map], in the dtype of x. With adapter a = token_slots[m] >= 0, in float32 and rounded once:

        v    = A[a] x[m]                                rounded to the dtype of x
        y[m] = gain[a] * (W x[m]) + B[a] v + bias       gain 1 where a has none

    A row without adapter has the same bits whatever the others have, and with or without ``token_slots_M``.
    ``weights``: up to four [out, in] of the dtype of x, of one row stride; the rest as ``add_lora_linears`` takes it.
    ``tile`` None: what was measured to be best. May be captured in a CUDA graph.

    Raises ValueError for shapes, dtypes or strides that do not fit, and for more than ``MAX_ROWS`` rows.
    """
    M, length = x_MI.shape
    _check(x_MI, weights, biases, token_slots_M, tables)
    ys = [x_MI.new_empty(M, weight.shape[0]) for weight in weights]
    if M == 0:
        return ys
    v_GSMW = None
    if token_slots_M is not None and rank_bound > 0:
        v_GSMW = shrink_linears(x_MI, token_slots_M, tables, rank_bound)
    columns = tuple(weight.shape[0] for weight in weights)
    _launch(ys, x_MI, weights, biases, v_GSMW, token_slots_M, tables, tile or choose_tile(M, sum(columns), length))
    return ys


def _check(
    x_MI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    token_slots_M: torch.Tensor | None,
    tables: Sequence[LinearTables],
) -> None:
    M, length = x_MI.shape
    if not 1 <= len(weights) <= MAX_GROUP or len(biases) != len(weights):
        raise ValueError(f"linear_few_rows: {len(weights)} maps, {len(biases)} biases; expected 1 to {MAX_GROUP} each")
    if M > MAX_ROWS or (M and x_MI.stride(1) != 1):
        raise ValueError(f"linear_few_rows: x {[M, length]}, strides {x_MI.stride()}; expected {MAX_ROWS} rows at most")
    for weight in weights:
        if weight.dtype != x_MI.dtype or weight.shape[1] != length or weight.stride() != (weights[0].stride(0), 1):
            raise ValueError(
                f"linear_few_rows: weights {weight.dtype} {list(weight.shape)} {weight.stride()}, expected "
                f"{x_MI.dtype} [out, {length}] ({weights[0].stride(0)}, 1)"
            )
    if token_slots_M is not None:
        check_token_slots("linear_few_rows", token_slots_M, M)
        if len(tables) != len(weights) or any(each.pool.dtype != x_MI.dtype for each in tables):
            raise ValueError(f"linear_few_rows: {len(tables)} tables of {len(weights)} maps, of the dtype of x")


@lru_cache(maxsize=4096)
def choose_tile(num_rows: int, out_features: int, in_features: int) -> FewRowsTile:
    """As wide as still fills the device."""
    block_n = next((n for n in (64, 32) if out_features >= n * _WAVE), 16)
    return FewRowsTile(
        block_n=block_n,
        block_k=min(256 if block_n == 16 else 128, max(16, next_power_of_2(in_features))),
        slots=min(16, next_power_of_2(num_rows)) if num_rows <= 64 else 8,
    )


def _block_m(num_rows: int) -> int:
    return max(16, next_power_of_2(num_rows))


def _launch(
    ys: Sequence[torch.Tensor],
    x_MI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    v_GSMW: torch.Tensor | None,
    token_slots_M: torch.Tensor | None,
    tables: Sequence[LinearTables],
    tile: FewRowsTile,
) -> None:
    M, length = x_MI.shape
    absent = MAX_GROUP - len(ys)
    columns = (*(y.shape[1] for y in ys), *[0] * absent)
    outs = [groups.Rows(y, None, y.stride(0)) for y in ys] + [groups.Rows(ys[0], None, 0)] * absent
    if v_GSMW is None:
        operands, shifts, width, splits, page_elems = groups.Tables(None, None, None, None, 0, 0, 0), [0] * 3, 0, 1, 1
        alignments = (1,) * MAX_GROUP
    else:
        (operands, shifts), (_, splits, _, width) = group_tables(tables), v_GSMW.shape
        page_elems = tables[0].page_elems
        alignments = tuple(alignment(tables[0], count) if count else 1 for count in columns)
    few_rows_kernel[(sum(cdiv(count, tile.block_n) for count in columns),)](
        *outs, groups.Rows(x_MI, None, x_MI.stride(0)), *weights, *[None] * absent, *biases, *[None] * absent, v_GSMW,
        token_slots_M, operands, *shifts, weights[0].stride(0), M, COLUMNS=columns, ALIGNS=alignments,
        SHAPE=_Shape(length, page_elems, width, splits),
        TILE=_Tile(_block_m(M), tile.block_n, tile.block_k, tile.block_r, tile.slots),
        PRECISION=dot_precision(x_MI.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        **pdl_options(x_MI.device),
    )  # fmt: skip

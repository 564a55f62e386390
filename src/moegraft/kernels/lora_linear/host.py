"""LoRA on a linear map, added in place to what someone else's GEMM gave: two launches, no sort, no host sync."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from moegraft.core.tables import LinearTables
from moegraft.kernels.device import groups
from moegraft.kernels.lora_linear.device import (
    expand_group_kernel,
    expand_kernel,
    shrink_group_kernel,
    shrink_kernel,
)
from moegraft.kernels.records import cdiv, check_token_slots, dot_precision, next_power_of_2, pdl_options

_WAVE = 128
"""Shrink programs that fill a device: the H200 has 132 multiprocessors, which serves as the measure for all."""
_SLICE_ALIGN = 16
"""Columns: the narrowest block that an expand writes."""

MAX_GROUP = 4


@dataclass(frozen=True, kw_only=True)
class LinearTile:
    """Tile sizes of one call. ``leaders``: rows of a tile whose slots one program works on; see device.py."""

    leaders: int
    shrink_m: int
    shrink_r: int
    shrink_k: int
    splits: int
    expand_m: int
    expand_r: int
    expand_n: int
    expand_steps: int
    num_warps: int = 4


def add_lora_linear(
    y_MO: torch.Tensor,
    x_MI: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: LinearTables,
    *,
    rank_bound: int,
    run_length: int = 1,
    bias_O: torch.Tensor | None = None,
    slice_starts: tuple[int, ...] = (),
) -> None:
    """Adds the delta of every row's adapter to ``y`` in place. The custom op ``moegraft::add_lora_linear``.

    Semantics, for every row m with adapter a = token_slots[m] >= 0:

        v    = A[a] x[m]                            float32 sums, rounded once to the dtype of x
        y[m] = y[m] + B[a] v                        float32, rounded once to the dtype of y
               + (gain[a] - 1) * (y[m] - bias)      where a has a gain (DoRA); bias 0 where there is none

    Rows without adapter, or whose adapter does not touch the map, are not written. The same batch gives the same bits.

    ``slice_starts``: of a map that is several maps side by side (q, k and v), the columns where the second, third and
    fourth begin, multiples of 16. A then has one block of rank rows after the other, as many for each slice as B has,
    and the columns of slice s read block s. ``rank_bound`` stays that of one slice.

    ``x`` has the pool's dtype, ``y`` any; both with contiguous rows. ``token_slots_M`` int32. ``rank_bound``: no
    adapter that may be resident while this call, or a graph that captured it, runs has a larger rank here; it sizes the
    scratch and the grid, the kernels walk the true ranks. ``run_length``: how many neighbouring rows share a slot, at
    a guess: it decides speed, not results. No host sync: may be captured in a CUDA graph, which then serves whatever
    the tables and ``token_slots_M`` come to hold.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    # Outside a compiled graph the implementation itself: the dispatcher costs as much as half a launch.
    run = torch.ops.moegraft.add_lora_linear if torch.compiler.is_compiling() else run_lora_linear
    run(
        y_MO, x_MI, token_slots_M, tables.pool, tables.page_table, tables.factors, bias_O, tables.page_elems,
        rank_bound, run_length, slice_starts,
    )  # fmt: skip


def run_lora_linear(
    y_MO: torch.Tensor,
    x_MI: torch.Tensor,
    token_slots_M: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    factors: torch.Tensor,
    bias_O: torch.Tensor | None,
    page_elems: int,
    rank_bound: int,
    run_length: int,
    slice_starts: Sequence[int] = (),
) -> None:
    """The op's implementation: decides, allocates, launches."""
    tables = LinearTables(pool=pool, page_table=page_table, factors=factors, page_elems=page_elems)
    _check(y_MO, x_MI, token_slots_M, tables)
    M, in_features = x_MI.shape
    if M == 0 or rank_bound == 0:
        return
    starts = tuple(slice_starts)
    tile = sliced_tile(M, in_features, y_MO.shape[1], rank_bound, run_length, starts)
    block_r = max(tile.shrink_r, tile.expand_r)
    width = cdiv(rank_bound * (len(starts) + 1), block_r) * block_r
    v_dtype = x_MI.dtype if tile.splits == 1 else torch.float32
    v_SMW = torch.empty(tile.splits, M, width, dtype=v_dtype, device=x_MI.device)
    _launch_shrink(x_MI, v_SMW, token_slots_M, tables, tile)
    _launch_expand(y_MO, v_SMW, token_slots_M, tables, bias_O, tile, _slices(starts))


def shrink_linear(
    x_MI: torch.Tensor, token_slots_M: torch.Tensor, tables: LinearTables, *, rank_bound: int, run_length: int = 1
) -> torch.Tensor:
    """v [M, W] = A[a] x[m] in float32, the first half of ``add_lora_linear``; what no adapter's lane is holds zeros.

    For ranks that exchange v before ``expand_linear`` reads it.
    """
    M, in_features = x_MI.shape
    tile = choose_tile(M, in_features, in_features, rank_bound, run_length)
    width = cdiv(rank_bound, tile.shrink_r) * tile.shrink_r
    v_SMW = torch.zeros(tile.splits, M, width, dtype=torch.float32, device=x_MI.device)
    _launch_shrink(x_MI, v_SMW, token_slots_M, tables, tile)
    return v_SMW.sum(0)


def expand_linear(
    y_MO: torch.Tensor,
    v_MW: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: LinearTables,
    *,
    run_length: int = 1,
    bias_O: torch.Tensor | None = None,
) -> None:
    """The second half of ``add_lora_linear``, from low-rank rows v [M, W] in the dtype of the adapters."""
    M, out_features = y_MO.shape
    tile = choose_tile(M, out_features, out_features, v_MW.shape[1], run_length)
    _launch_expand(y_MO, v_MW[None].contiguous(), token_slots_M, tables, bias_O, tile, _slices(()))


def add_lora_linears(
    ys: Sequence[torch.Tensor],
    x_MI: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: Sequence[LinearTables],
    *,
    rank_bound: int,
    biases: Sequence[torch.Tensor | None],
    run_length: int = 1,
) -> None:
    """``add_lora_linear`` of up to four maps that read the same x, in two launches: y of each [M, its out], tables of
    one bank. The custom op ``moegraft::add_lora_linears``. Raises ValueError as that does."""
    run = torch.ops.moegraft.add_lora_linears if torch.compiler.is_compiling() else run_lora_linears
    run(
        list(ys), x_MI, token_slots_M, tables[0].pool, tables[0].page_table, [each.factors for each in tables],
        list(biases), tables[0].page_elems, rank_bound, run_length,
    )  # fmt: skip


def run_lora_linears(
    ys: Sequence[torch.Tensor],
    x_MI: torch.Tensor,
    token_slots_M: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    factors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    page_elems: int,
    rank_bound: int,
    run_length: int,
) -> None:
    """The op's implementation: decides, allocates, launches."""
    tables = [LinearTables(pool=pool, page_table=page_table, factors=each, page_elems=page_elems) for each in factors]
    if not 1 < len(ys) <= MAX_GROUP or len(ys) != len(factors) or len(ys) != len(biases):
        raise ValueError(f"add_lora_linears: {len(ys)} maps, expected 2 to {MAX_GROUP}, each with tables and a bias")
    stored = factors[0].untyped_storage().data_ptr()
    if any(each.stride() != factors[0].stride() or each.untyped_storage().data_ptr() != stored for each in factors):
        raise ValueError("add_lora_linears: the maps are of several banks")
    for y_MO, each in zip(ys, tables, strict=True):
        _check(y_MO, x_MI, token_slots_M, each)
    M, in_features = x_MI.shape
    if M == 0 or rank_bound == 0:
        return
    tile = choose_tile(M, in_features, max(y.shape[1] for y in ys), rank_bound, run_length)
    v_GSMW = _group_scratch(x_MI, len(ys), tile, rank_bound)
    _launch_group_shrink(x_MI, v_GSMW, token_slots_M, tables, tile)
    _launch_group_expand(ys, x_MI, v_GSMW, token_slots_M, tables, biases, tile)


def shrink_linears(
    x_MI: torch.Tensor, token_slots_M: torch.Tensor, tables: Sequence[LinearTables], rank_bound: int
) -> torch.Tensor:
    """v [map, split, M, width] of the rows of a decode step, whose splits are still to be added up; see
    ``add_lora_linears``. Only the lanes that an adapter has are written. The kernel that was launched last must not be
    one that writes slots or tables: they are read before it has ended."""
    M, in_features = x_MI.shape
    tile = choose_tile(M, in_features, in_features, rank_bound, 1)
    v_GSMW = _group_scratch(x_MI, len(tables), tile, rank_bound)
    _launch_group_shrink(x_MI, v_GSMW, token_slots_M, tables, tile, is_early=True)
    return v_GSMW


def _group_scratch(x_MI: torch.Tensor, num_maps: int, tile: LinearTile, rank_bound: int) -> torch.Tensor:
    block_r = max(tile.shrink_r, tile.expand_r)
    width = cdiv(rank_bound, block_r) * block_r
    v_dtype = x_MI.dtype if tile.splits == 1 else torch.float32
    return torch.empty(num_maps, tile.splits, x_MI.shape[0], width, dtype=v_dtype, device=x_MI.device)


# define and impl instead of custom_op, whose wrapper costs ten times as much a call: a decode step makes hundreds.
torch.library.define(
    "moegraft::add_lora_linear",
    "(Tensor(a!) y, Tensor x, Tensor token_slots, Tensor pool, Tensor page_table, Tensor factors, Tensor? bias, "
    "int page_elems, int rank_bound, int run_length, int[] slice_starts=[]) -> ()",
)
torch.library.impl("moegraft::add_lora_linear", "default", run_lora_linear)


torch.library.register_fake("moegraft::add_lora_linear", lambda *tensors_and_sizes: None)

torch.library.define(
    "moegraft::add_lora_linears",
    "(Tensor(a!)[] ys, Tensor x, Tensor token_slots, Tensor pool, Tensor page_table, Tensor[] factors, "
    "Tensor?[] biases, int page_elems, int rank_bound, int run_length) -> ()",
)
torch.library.impl("moegraft::add_lora_linears", "default", run_lora_linears)
torch.library.register_fake("moegraft::add_lora_linears", lambda *tensors_and_sizes: None)


def _check(y_MO: torch.Tensor, x_MI: torch.Tensor, token_slots_M: torch.Tensor, tables: LinearTables) -> None:
    M = x_MI.shape[0]
    if y_MO.dim() != 2 or y_MO.shape[0] != M:
        raise ValueError(f"add_lora_linear: y {list(y_MO.shape)}, expected [{M}, out], as x has {M} rows")
    check_token_slots("add_lora_linear", token_slots_M, M)
    if x_MI.dtype != tables.pool.dtype:
        raise ValueError(f"add_lora_linear: x is {x_MI.dtype}, the adapters are {tables.pool.dtype}")
    if M and (x_MI.stride(1) != 1 or y_MO.stride(1) != 1):
        raise ValueError(f"add_lora_linear: rows of x {x_MI.stride()} and y {y_MO.stride()} must be contiguous")


@lru_cache(maxsize=4096)
def choose_tile(num_rows: int, in_features: int, out_features: int, rank_bound: int, run_length: int) -> LinearTile:
    """Decode: small tiles, a program for every row that may lead. Prefill: tiles that one sequence mostly fills."""
    choose = _prefill_tile if run_length >= 32 else _decode_tile
    tile = choose(num_rows, rank_bound, run_length)
    shrink_k = min(tile.shrink_k, max(16, next_power_of_2(in_features)))
    # A batch of one adapter keeps one program a row tile busy: it must still fill the device.
    programs, splits = cdiv(num_rows, tile.shrink_m) * cdiv(rank_bound, tile.shrink_r), 1
    while splits < tile.splits and splits * programs < _WAVE and in_features >= 2 * splits * shrink_k:
        splits *= 2
    expand_n = min(tile.expand_n, max(16, next_power_of_2(out_features)))
    return replace(tile, shrink_k=shrink_k, splits=splits, expand_n=expand_n)


@lru_cache(maxsize=4096)
def sliced_tile(
    num_rows: int, in_features: int, out_features: int, rank_bound: int, run_length: int, starts: tuple[int, ...]
) -> LinearTile:
    """The shrink of all slices at once, and an expand whose blocks of columns lie in one slice each."""
    if not starts:
        return choose_tile(num_rows, in_features, out_features, rank_bound, run_length)
    shrink = choose_tile(num_rows, in_features, out_features, rank_bound * (len(starts) + 1), run_length)
    expand = choose_tile(num_rows, in_features, out_features, rank_bound, run_length)
    common = math.gcd(*starts)
    if len(starts) > len(groups.Slices._fields) or common % _SLICE_ALIGN or not 0 < max(starts) < out_features:
        raise ValueError(
            f"add_lora_linear: slices begin at columns {list(starts)} of {out_features}, expected at most "
            f"{len(groups.Slices._fields)} multiples of {_SLICE_ALIGN}"
        )
    return replace(
        shrink,
        expand_m=expand.expand_m,
        expand_r=expand.expand_r,
        expand_n=math.gcd(expand.expand_n, common),
        expand_steps=expand.expand_steps,
    )


def _slices(starts: tuple[int, ...]) -> groups.Slices:
    never = (2**31 - 1,) * (len(groups.Slices._fields) - len(starts))
    return groups.Slices(*starts, *never)


def _decode_tile(num_rows: int, rank_bound: int, run_length: int) -> LinearTile:
    """Splits are the most there may be: every program of the expand adds all of them up, so that they cost more than
    they gain where many rows lead or lanes are many."""
    is_narrow = rank_bound <= 16
    few_splits, few_rows = (4, 32) if is_narrow else (2, 4)
    return LinearTile(
        # A run has one leader, its first row: as many rows as a run is long lead about one slot.
        leaders=next_power_of_2(max(1, run_length) + 1) // 2,
        shrink_m=16,
        shrink_r=16 if is_narrow or num_rows <= 16 else min(64, next_power_of_2(rank_bound)),
        shrink_k=128,
        splits=8 if num_rows <= few_rows else few_splits,
        expand_m=16,
        expand_r=16 if is_narrow else 32,
        expand_n=256 if is_narrow and num_rows > 16 else 128,
        expand_steps=1,
    )


def _prefill_tile(num_rows: int, rank_bound: int, run_length: int) -> LinearTile:
    is_wide = rank_bound > 32
    return LinearTile(
        leaders=next_power_of_2(max(1, run_length) + 1) // 2,
        shrink_m=16 if is_wide else 32,
        shrink_r=64 if is_wide else max(16, next_power_of_2(rank_bound)),
        shrink_k=128,
        splits=4,
        expand_m=64 if is_wide and run_length >= 64 else 32,
        expand_r=64 if is_wide else max(16, next_power_of_2(rank_bound)),
        expand_n=128,
        # Many rows fill the device anyway: a program that walks several blocks finds slots and pages once.
        expand_steps=4 if num_rows >= 1024 else 1,
    )


def _launch_shrink(
    x_MI: torch.Tensor, v_SMW: torch.Tensor, token_slots_M: torch.Tensor, tables: LinearTables, tile: LinearTile
) -> None:
    (M, in_features), width = x_MI.shape, v_SMW.shape[2]
    rank_blocks = width // tile.shrink_r
    programs, rows = _row_tiles(M, tile.shrink_m, tile.leaders)
    shrink_kernel[(programs * rank_blocks * v_SMW.shape[0],)](
        v_SMW, groups.Rows(x_MI, None, x_MI.stride(0)), token_slots_M, _tables_group(tables), M, LENGTH=in_features,
        ALIGN=alignment(tables, in_features), RANK_BLOCKS=rank_blocks, BLOCK_R=tile.shrink_r, BLOCK_K=tile.shrink_k,
        num_stages=3, ROWS=rows, **_options(v_SMW, tables, tile),
    )  # fmt: skip


def _launch_expand(
    y_MO: torch.Tensor,
    v_SMW: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: LinearTables,
    bias_O: torch.Tensor | None,
    tile: LinearTile,
    slices: groups.Slices,
) -> None:
    M, out_features = y_MO.shape
    programs, rows = _row_tiles(M, tile.expand_m, tile.leaders)
    expand_kernel[(programs * cdiv(out_features, tile.expand_n * tile.expand_steps),)](
        groups.Rows(y_MO, None, y_MO.stride(0)), v_SMW, bias_O, token_slots_M, _tables_group(tables), M,
        COLUMNS=out_features, ALIGN=alignment(tables, out_features), BLOCK_R=tile.expand_r,
        BLOCK_N=tile.expand_n, STEPS_N=tile.expand_steps, num_stages=1, ROWS=rows, SLICES=slices,
        **_options(v_SMW, tables, tile),
    )  # fmt: skip


def _tables_group(tables: LinearTables) -> groups.Tables:
    return groups.Tables(
        tables.pool, tables.page_table, tables.factors, None, tables.page_table.stride(0), tables.factors.stride(0), 0
    )


def _options(v_SMW: torch.Tensor, tables: LinearTables, tile: LinearTile) -> dict[str, Any]:
    return {
        "PAGE_ELEMS": tables.page_elems, "V_WIDTH": v_SMW.shape[2], "SPLITS": v_SMW.shape[0],
        "PRECISION": dot_precision(tables.pool.dtype), "num_warps": tile.num_warps, **pdl_options(v_SMW.device),
    }  # fmt: skip


def group_tables(tables: Sequence[LinearTables]) -> tuple[groups.Tables, list[int]]:
    """(tables, elements from the descriptors of the first map to those of the second, third and fourth)."""
    first = tables[0]
    operands = groups.Tables(
        first.pool, first.page_table, first.factors, None, first.page_table.stride(0), first.factors.stride(0), 0
    )
    starts = [int(each.factors.storage_offset()) for each in tables] + [0] * (MAX_GROUP - len(tables))
    return operands, [start - starts[0] for start in starts[1:]]


def _group_options(x_MI: torch.Tensor, v_GSMW: torch.Tensor, page_elems: int, tile: LinearTile) -> dict[str, Any]:
    return {
        "PAGE_ELEMS": page_elems, "V_WIDTH": v_GSMW.shape[3], "SPLITS": v_GSMW.shape[1],
        "PRECISION": dot_precision(x_MI.dtype), "num_warps": tile.num_warps, **pdl_options(x_MI.device),
    }  # fmt: skip


def _launch_group_shrink(
    x_MI: torch.Tensor,
    v_GSMW: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: Sequence[LinearTables],
    tile: LinearTile,
    *,
    is_early: bool = False,
) -> None:
    (M, in_features), (G, splits, _, width) = x_MI.shape, v_GSMW.shape
    operands, shifts = group_tables(tables)
    options = _group_options(x_MI, v_GSMW, tables[0].page_elems, tile)
    rank_blocks = width // tile.shrink_r
    programs, rows = _row_tiles(M, tile.shrink_m, tile.leaders)
    shrink_group_kernel[(programs * rank_blocks * splits, G)](
        v_GSMW, groups.Rows(x_MI, None, x_MI.stride(0)), token_slots_M, operands, *shifts, M, LENGTH=in_features,
        ALIGN=alignment(tables[0], in_features), RANK_BLOCKS=rank_blocks, BLOCK_R=tile.shrink_r, BLOCK_K=tile.shrink_k,
        num_stages=3, ROWS=rows, EARLY=is_early, **options,
    )  # fmt: skip


def _launch_group_expand(
    ys: Sequence[torch.Tensor],
    x_MI: torch.Tensor,
    v_GSMW: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: Sequence[LinearTables],
    biases: Sequence[torch.Tensor | None],
    tile: LinearTile,
) -> None:
    M, absent = x_MI.shape[0], MAX_GROUP - len(ys)
    operands, shifts = group_tables(tables)
    options = _group_options(x_MI, v_GSMW, tables[0].page_elems, tile)
    programs, rows = _row_tiles(M, tile.expand_m, tile.leaders)
    columns = [y.shape[1] for y in ys] + [0] * absent
    alignments = [alignment(tables[0], count) if count else 1 for count in columns]
    outs = [groups.Rows(y, None, y.stride(0)) for y in ys] + [groups.Rows(ys[0], None, 0)] * absent
    blocks = sum(cdiv(count, tile.expand_n * tile.expand_steps) for count in columns)
    expand_group_kernel[(programs * blocks,)](
        *outs, v_GSMW, *biases, *[None] * absent, token_slots_M, operands, *shifts, M,
        **{f"COLUMNS{i}": count for i, count in enumerate(columns)},
        **{f"ALIGN{i}": each for i, each in enumerate(alignments)}, BLOCK_R=tile.expand_r,
        BLOCK_N=tile.expand_n, STEPS_N=tile.expand_steps, num_stages=1, ROWS=rows, SLICES=_slices(()), **options,
    )  # fmt: skip


def _row_tiles(num_rows: int, tile_m: int, leaders: int) -> tuple[int, groups.RowTile]:
    """(programs along the rows, their constants)."""
    leaders = min(leaders, tile_m)
    # A power of two, so that not every size of a small batch compiles kernels of its own.
    num_groups = cdiv(min(next_power_of_2(num_rows), tile_m), leaders)
    return cdiv(num_rows, tile_m) * num_groups, groups.RowTile(TILE_M=tile_m, GROUPS=num_groups, LEADERS=leaders)


def alignment(tables: LinearTables, row_len: int) -> int:
    """Elements, 16 bytes of them at most, that divide the address of every rank row of this length."""
    return math.gcd(row_len, tables.page_elems, 16 // tables.pool.element_size())

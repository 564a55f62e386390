"""Factors and saved parameters as torch tensors: views into the pool where the rows lie in one piece, else copies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moegraft.lora.bank.address_space import Placement
from moegraft.lora.bank.factors import from_bank_rows
from moegraft.lora.bank.layout import SavedEntry
from moegraft.lora.bank.pool import PagePool


def first_element(pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int) -> int | None:
    """Element of the pool where row 0 begins, if row j begins ``j * row_len`` behind it for every j; else None."""
    span = math.ceil(placement.rows / (pool.page_elems // row_len))
    used = tuple(pages[placement.first_page : placement.first_page + span])
    first = used[0]
    if span > 1 and (pool.page_elems % row_len or used != tuple(range(first, first + span))):
        return None
    return first * pool.page_elems + placement.offset


def gather_rows(pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int) -> torch.Tensor:
    """A copy of all rows of a factor that spans several pages: [rows, row_len]."""
    rows_per_page = pool.page_elems // row_len
    span = math.ceil(placement.rows / rows_per_page)
    used = pages[placement.first_page : placement.first_page + span]
    rows = torch.cat([pool.pages[page, : rows_per_page * row_len] for page in used])
    return rows.view(-1, row_len)[: placement.rows]


def factor_tensor(
    pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int, *, per_expert: bool
) -> tuple[torch.Tensor, bool]:
    """A factor as [copies, rank, row_len] or, not ``per_expert``, [rank, row_len]; and whether it is a view."""
    shape = (placement.copies, placement.rank, row_len) if per_expert else (placement.rank, row_len)
    start = first_element(pool, pages, placement, row_len)
    if start is None:
        return gather_rows(pool, pages, placement, row_len).view(shape), False
    strides = (placement.rank * row_len, row_len, 1) if per_expert else (row_len, 1)
    return pool.data.as_strided(shape, strides, start), True


def saved_tensor(
    pool: PagePool, pages: Sequence[int], placement: Placement, row_len: int, saved: SavedEntry
) -> tuple[torch.Tensor, bool]:
    """A saved parameter in its own shape and dtype, bit by bit; and whether it is a view."""
    start = first_element(pool, pages, placement, row_len)
    if start is None:
        return from_bank_rows(gather_rows(pool, pages, placement, row_len), saved.shape, saved.dtype), False
    bank_bytes, own_bytes = pool.data.dtype.itemsize, saved.dtype.itemsize
    data = pool.data.view(saved.dtype)
    pitch = row_len * bank_bytes // own_bytes
    strides = [1] * len(saved.shape)
    for dim in range(len(strides) - 2, -1, -1):
        strides[dim] = pitch if dim == len(strides) - 2 else strides[dim + 1] * saved.shape[dim + 1]
    return data.as_strided(saved.shape, strides, start * bank_bytes // own_bytes), True

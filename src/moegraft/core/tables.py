"""The device tables of the adapter bank: what a kernel needs to find a LoRA factor, as plain tensors.

Each resident adapter (a *slot*) is an address space of pages, as a process is for an operating system. A factor
(one A or B of one module) is a matrix of rank rows inside it; ``docs/adapter_bank.md`` has a worked example.

Address of rank row j of the expert at position p (``expert_index``), for a factor whose rows have ``row_len`` elements:

    row  = p * EXPERT_STRIDE + j                        0 <= j < RANK
    k    = page_elems // row_len                        rows never straddle a page
    page = page_table[slot, FIRST_PAGE + row // k]
    elem = page * page_elems + OFFSET + (row % k) * row_len

All tables keep their address for the life of the bank, so a captured CUDA graph sees adapters come and go.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class Field(enum.IntEnum):
    """Columns of a factor descriptor (int32 [..., NUM_FIELDS])."""

    FIRST_PAGE = 0  # index into the slot's row of page_table
    OFFSET = 1  # elements into that page; non-zero only where the whole factor fits behind it
    RANK = 2  # rank rows per expert; 0 = the adapter does not touch this factor
    EXPERT_STRIDE = 3  # rank rows between two experts: RANK, or 0 where one factor serves all experts
    LANE = 4  # first lane of the low-rank vector that a B factor reads (B_UP after B_GATE; else 0)


NUM_FIELDS = 8  # padded, so that a descriptor is 32 bytes


class ExpertsFactor(enum.IntEnum):
    """Rows of ``ExpertsTables.factors``; row lengths D, F, F, F, D, F, F, D. Gains have one row (DoRA)."""

    A13 = 0
    B_GATE = 1
    B_UP = 2
    A2 = 3
    B2 = 4
    GAIN_GATE = 5
    GAIN_UP = 6
    GAIN2 = 7


class LinearFactor(enum.IntEnum):
    """Rows of ``LinearTables.factors``; row lengths in_features, out_features, out_features."""

    A = 0
    B = 1
    GAIN = 2


@dataclass(frozen=True, kw_only=True)
class ExpertsTables:
    """Tables of one experts layer.

    pool [P * page_elems] compute dtype · page_table [slots, max_pages] int32 · factors [slots, 8, NUM_FIELDS] int32 ·
    expert_index [slots, E] int32 (position of an expert among those that the adapter holds, -1 = untouched).
    ``factors`` is a view into a larger tensor: use its strides.
    """

    pool: torch.Tensor
    page_table: torch.Tensor
    factors: torch.Tensor
    expert_index: torch.Tensor
    page_elems: int


@dataclass(frozen=True, kw_only=True)
class LinearTables:
    """Tables of one linear map: as ExpertsTables, with factors [slots, 3, NUM_FIELDS] and no experts."""

    pool: torch.Tensor
    page_table: torch.Tensor
    factors: torch.Tensor
    page_elems: int

"""Where the rank rows of a LoRA factor lie: the bank's tables, as core/tables.py has them."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import Constant

# Columns of a factor descriptor, and rows of ``ExpertsTables.factors``.
FIELD_FIRST_PAGE = Constant(0)
FIELD_OFFSET = Constant(1)
FIELD_RANK = Constant(2)
FIELD_EXPERT_STRIDE = Constant(3)
FIELD_LANE = Constant(4)
NUM_FIELDS = Constant(8)
B_GATE = Constant(1)
B_UP = Constant(2)
B2 = Constant(4)

GRANULE = Constant(16)


@triton.jit
def pad_to_granule(lanes):
    return (lanes + GRANULE - 1) // GRANULE * GRANULE


@triton.jit
def rank_row_elements(pages_ptr, skipped, offset, rows, live, ROW_LEN: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                      ALIGN: tl.constexpr):  # fmt: skip
    """Element index into the pool of each rank row, int64 (the formula of core/tables.py).

    ``pages_ptr``: where the slot's pages stand in the page table; ``skipped`` of them come before the factor's. All
    addresses are multiples of ALIGN: said here, since Triton 3.6 forgets what is said of another function's result.
    """
    rows_per_page: tl.constexpr = PAGE_ELEMS // ROW_LEN
    page = tl.load(pages_ptr + (skipped + rows // rows_per_page), mask=live, other=0)
    elements = page.to(tl.int64) * PAGE_ELEMS + offset + (rows % rows_per_page) * ROW_LEN
    if ALIGN > 1:
        elements = tl.multiple_of(elements, ALIGN)
    return elements


@triton.jit
def factor_row_elements(pages_ptr, factor_ptr, rows, live, ROW_LEN: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                        ALIGN: tl.constexpr):  # fmt: skip
    """The same of the factor of a descriptor."""
    first_page = tl.load(factor_ptr + FIELD_FIRST_PAGE)
    offset = tl.load(factor_ptr + FIELD_OFFSET)
    return rank_row_elements(pages_ptr + first_page, 0, offset, rows, live, ROW_LEN, PAGE_ELEMS, ALIGN)

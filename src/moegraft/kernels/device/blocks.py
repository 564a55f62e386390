"""Which block of which expert a program of a GEMM has."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import Constant

# Codes of WeightFormat.
DENSE = Constant(0)
INT8 = Constant(1)
FP8 = Constant(2)
INT4 = Constant(3)
MXFP4 = Constant(4)


@triton.jit
def grouped_order(pid, num_blocks, num_n, GROUP: tl.constexpr):
    """(block, n) of a program: GROUP blocks share each column tile of the weights before the next one is touched."""
    group_size = GROUP * num_n
    first_block = pid // group_size * GROUP
    blocks_in_group = min(num_blocks - first_block, GROUP)
    within = pid % group_size
    return first_block + within % blocks_in_group, within // blocks_in_group


@triton.jit
def find_block(block_ptr, count_ptr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(block, column tile, expert, first, end) of this program; first == end where it has nothing to do."""
    num_blocks = tl.load(count_ptr)
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    has_block = pid < num_blocks * num_n
    block, n = grouped_order(tl.where(has_block, pid, 0), num_blocks, num_n, GROUP)
    record_ptr = block_ptr + block * 8
    expert = tl.load(record_ptr + 0, mask=has_block, other=0)
    first = tl.load(record_ptr + 1, mask=has_block, other=0)
    end = tl.load(record_ptr + 2, mask=has_block, other=0)
    return block, n, expert, first, end


@triton.jit
def has_short_block(num_rows, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether half a block's rows are room enough: so it mostly is for the last block of an expert.

    Only where half a block is one matrix instruction of four warps, as the halves of a whole block are: a row's sums
    have the same bits in either.
    """
    if FORMAT == DENSE and BLOCK_M == 128:
        is_short = num_rows <= BLOCK_M // 2
    else:
        is_short: tl.constexpr = False  # type: ignore[no-redef]
    return is_short

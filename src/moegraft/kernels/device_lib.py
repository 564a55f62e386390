"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Constant(tl.constexpr):
    """A constant of a module. Triton compares each with a copy at every launch; by value that takes a microsecond."""

    def __copy__(self) -> Constant:
        return self

    def __ne__(self, other: object) -> bool:
        return self is not other and bool(super().__ne__(other))


# Columns of a factor descriptor and rows of ``ExpertsTables.factors``, as core/tables.py has them.
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

# Codes of ActivationKind.
SILU = Constant(0)
GELU = Constant(1)
GELU_TANH = Constant(2)
RELU2 = Constant(3)
SWIGLU_OAI = Constant(4)
SILU_CLAMPED = Constant(5)
SILU_SOFTCAPPED = Constant(6)


@triton.jit
def await_prior_kernel(PDL: tl.constexpr):
    """From here on, what the kernel before this one wrote can be read (and what it reads can be overwritten)."""
    if PDL:
        gdc_wait()


@triton.jit
def release_next_kernel(PDL: tl.constexpr):
    """Lets the next kernel start its prologue.

    Always called after ``await_prior_kernel``: so a running kernel knows that every kernel but the last one before it
    has completed, and may read their results without waiting.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def pad_to_granule(lanes):
    return (lanes + GRANULE - 1) // GRANULE * GRANULE


@triton.jit
def rank_row_elements(pages_ptr, factor_ptr, rows, live, ROW_LEN: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                      ALIGN: tl.constexpr):  # fmt: skip
    """Element index into the pool of each rank row, int64 (the formula of core/tables.py)."""
    rows_per_page: tl.constexpr = PAGE_ELEMS // ROW_LEN
    first_page = tl.load(factor_ptr + FIELD_FIRST_PAGE)
    offset = tl.load(factor_ptr + FIELD_OFFSET)
    page = tl.load(pages_ptr + first_page + rows // rows_per_page, mask=live, other=0)
    elements = page.to(tl.int64) * PAGE_ELEMS + offset + (rows % rows_per_page) * ROW_LEN
    return tl.multiple_of(elements, ALIGN)


@triton.jit
def grouped_order(pid, num_blocks, num_n, GROUP: tl.constexpr):
    """(block, n) of a program: GROUP blocks share each column tile of the weights before the next one is touched."""
    group_size = GROUP * num_n
    first_block = pid // group_size * GROUP
    blocks_in_group = min(num_blocks - first_block, GROUP)
    within = pid % group_size
    return first_block + within % blocks_in_group, within // blocks_in_group


@triton.jit
def load_lanes(segment_ptr, granule_ptr, element_ptr, lanes, lane_end):
    """(segment, granule of u, element of the pool where the row of B starts or -1) of some lanes."""
    live = lanes < lane_end
    segment = tl.load(segment_ptr + lanes, mask=live, other=-1)
    granule = tl.load(granule_ptr + lanes, mask=live, other=0)
    element = tl.load(element_ptr + lanes, mask=live, other=-1)
    return segment, granule, element


@triton.jit
def load_low_rank(u_ptr, pool_ptr, segment, granule, element, positions, row_segments, columns, columns_live,
                  BLOCK_L: tl.constexpr, U_WIDTH: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """(u [m, l], B [l, f]) for some lanes; u is zero in rows that do not belong to the lane's segment.

    The compiler cannot see that the lanes of a granule are neighbours in u and share a segment, nor that a row of B is
    aligned: it is told, on values computed here, so that both are read in whole vectors.
    """
    column = granule * GRANULE + tl.arange(0, BLOCK_L) % GRANULE
    column = tl.max_contiguous(tl.multiple_of(column, 16), 16)
    hit = tl.max_constancy(row_segments[:, None] == segment[None, :], [1, 16])
    u = tl.load(u_ptr + positions[:, None] * U_WIDTH + column[None, :], mask=hit, other=0.0)
    b_ptrs = pool_ptr + (element // ALIGN * ALIGN)[:, None] + columns[None, :]
    b = tl.load(b_ptrs, mask=(element >= 0)[:, None] & columns_live[None, :], other=0.0)
    return u, b


@triton.jit
def scaled(acc, scale):
    """acc * scale, rounded before anything is added to it.

    The compiler would make one instruction of a product and the bias behind it, but not where the lanes of LoRA come
    between the two: rows without adapter would have other bits in a batch with adapters.
    """
    return tl.fma(acc, scale, 0.0)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activate(gate, up, KIND: tl.constexpr, GATED: tl.constexpr, alpha, limit):
    """h = kind(gate) * up in float32; ungated: kind(gate). The reference: core/activation.py."""
    if KIND == SILU_SOFTCAPPED:
        capped = alpha * tanh(gate / alpha) / (1.0 + tl.exp(-gate))
        return capped * limit * tanh(up / limit)
    if (KIND == SWIGLU_OAI) | (KIND == SILU_CLAMPED):
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if KIND == SWIGLU_OAI:
        return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    if (KIND == SILU) | (KIND == SILU_CLAMPED):
        h = gate / (1.0 + tl.exp(-gate))
    elif KIND == GELU:
        h = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == GELU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        h = gate * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    else:
        positive = tl.maximum(gate, 0.0)
        h = positive * positive
    if GATED:
        h = h * up
    return h

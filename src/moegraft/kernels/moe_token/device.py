"""Device side of the layer of a single token. A program finds its experts and its adapter by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import activate, await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import (
    B2,
    B_GATE,
    B_UP,
    FIELD_EXPERT_STRIDE,
    FIELD_LANE,
    FIELD_RANK,
    NUM_FIELDS,
    factor_row_elements,
)
from moegraft.kernels.device.row_sums import load_choices, load_factors, row_sums


@triton.jit
def token_shrink_kernel(u_ptr, rows, ids_ptr, slot_ptr, tables, E: tl.constexpr, A: tl.constexpr,
                        PER_CHOICE: tl.constexpr, LENGTH: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                        LOW_RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    """Program (choice, part): u[choice, j] = A[j] . row for BLOCK_R rank rows j of the factor ``A``.

    ``PER_CHOICE``: each choice has a row of its own (h), else all share row 0 (x).
    """
    U_WIDTH: tl.constexpr = LOW_RANK.U_WIDTH
    ALIGN: tl.constexpr = LOW_RANK.ALIGN
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    choice = tl.program_id(0)
    expert = tl.load(ids_ptr + choice).to(tl.int32)
    slot = tl.load(slot_ptr)
    has_adapter = (expert >= 0) & (expert < E) & (slot >= 0)
    slot = tl.maximum(slot, 0)
    index = tl.load(tables.expert_index + slot * tables.stride_experts + expert, mask=has_adapter, other=-1)
    factor_ptr = tables.factors + slot * tables.stride_factors + A * NUM_FIELDS
    rank = tl.load(factor_ptr + FIELD_RANK)
    first = tl.program_id(1) * BLOCK_R
    if (index < 0) | (first >= rank):
        return
    j = first + tl.arange(0, BLOCK_R)
    j_live = j < rank
    elements = factor_row_elements(
        tables.pages + slot * tables.stride_pages, factor_ptr, index * tl.load(factor_ptr + FIELD_EXPERT_STRIDE) + j,
        j_live, LENGTH, PAGE_ELEMS, ALIGN,
    )  # fmt: skip
    x_ptr = rows.ptr
    if PER_CHOICE:
        x_ptr += choice.to(tl.int64) * rows.stride
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in tl.static_range(0, LENGTH, BLOCK_K):
        k_live = start + k < LENGTH
        x = tl.load(x_ptr + start + k, mask=k_live, other=0.0).to(tl.float32)
        a_ptrs = tables.pool + elements[:, None] + (start + k)[None, :]
        acc += tl.load(a_ptrs, mask=j_live[:, None] & k_live[None, :], other=0.0).to(tl.float32) * x[None, :]
    tl.store(u_ptr + choice * U_WIDTH + j, tl.sum(acc, 1).to(u_ptr.dtype.element_ty), mask=j_live)


@triton.jit
def _find_lanes(u_ptr, tables, slot, choices, lanes, expert, is_local, columns, columns_live, B: tl.constexpr,
                COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr, LOW_RANK: tl.constexpr):  # fmt: skip
    """(where u of each lane is, B [lanes, columns], whether there is such a lane)."""
    U_WIDTH: tl.constexpr = LOW_RANK.U_WIDTH
    ALIGN: tl.constexpr = LOW_RANK.ALIGN
    has_adapter = is_local & (expert * 0 + slot >= 0)
    slot = tl.maximum(slot, 0)
    index = tl.load(tables.expert_index + slot * tables.stride_experts + expert, mask=has_adapter, other=-1)
    factor_ptr = tables.factors + slot * tables.stride_factors + B * NUM_FIELDS
    live = (index >= 0) & (lanes < tl.load(factor_ptr + FIELD_RANK))
    elements = factor_row_elements(
        tables.pages + slot * tables.stride_pages, factor_ptr,
        index * tl.load(factor_ptr + FIELD_EXPERT_STRIDE) + lanes, live, COLUMNS, PAGE_ELEMS, ALIGN,
    )  # fmt: skip
    b_ptrs = tables.pool + elements[:, None] + columns[None, :]
    b = tl.load(b_ptrs, mask=live[:, None] & columns_live[None, :], other=0.0)
    return u_ptr + choices * U_WIDTH + tl.load(factor_ptr + FIELD_LANE) + lanes, b, live


@triton.jit
def _expand(found, factor):
    """Sum over lanes of factor * u * B, [columns].

    u is read once for each number of B: read once a lane, it is so small that the compiler would add up all lanes anew
    in each thread that needs the sum.
    """
    u_ptrs, b, live = found
    u_ptrs = u_ptrs[:, None] + tl.zeros_like(b).to(tl.int32)
    u = tl.load(u_ptrs, mask=live[:, None] & (tl.zeros_like(b).to(tl.int32) == 0), other=0.0).to(tl.float32)
    return tl.sum(b.to(tl.float32) * u * factor, 0)


@triton.jit
def token13_kernel(h_ptr, rows, w_ptr, weights, bias, router_weight_ptr, ids_ptr, slot_ptr, u_ptr, tables,
                   alpha, limit, SHAPE: tl.constexpr, LAYER: tl.constexpr, KIND: tl.constexpr, LOW_RANK: tl.constexpr,
                   TILE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[choice] = act(W13[e] x + b13[e] + B13 u), BLOCK_N columns of one choice a program.

    ``u_ptr`` None: without adapters, where the router is the kernel before this one. With them, that is the shrink,
    whose result is read last; LANES of its lanes are looked up before the base product, more of them behind it.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    GATED: tl.constexpr = SHAPE.GATED
    E: tl.constexpr = LAYER.E
    K: tl.constexpr = LAYER.K
    PAGE_ELEMS: tl.constexpr = LAYER.PAGE_ELEMS
    LANES: tl.constexpr = TILE.LANES
    RANK: tl.constexpr = TILE.RANK
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    if u_ptr is None:
        await_prior_kernel(PDL)
        release_next_kernel(PDL)
    choice = tl.program_id(0) // num_n
    n = tl.program_id(0) % num_n
    expert, is_local = load_choices(ids_ptr, choice, E, K)
    if is_local:
        f = n * BLOCK_N + tl.arange(0, BLOCK_N)
        f_live = f < COLUMNS
        if u_ptr is not None:
            slot = tl.load(slot_ptr)
            lanes = tl.arange(0, LANES)
            experts = expert + lanes * 0
            here = lanes >= 0
            up_lanes = _find_lanes(
                u_ptr, tables, slot, choice, lanes, experts, here, f, f_live, B_UP, COLUMNS, PAGE_ELEMS, LOW_RANK
            )
            gate_lanes = up_lanes
            if GATED:
                gate_lanes = _find_lanes(
                    u_ptr, tables, slot, choice, lanes, experts, here, f, f_live, B_GATE, COLUMNS, PAGE_ELEMS, LOW_RANK
                )
        gate, up = row_sums(rows, w_ptr, weights, ids_ptr, None, choice, n, SHAPE, E, K, TILE, False, PDL)
        if u_ptr is not None:
            await_prior_kernel(PDL)
            release_next_kernel(PDL)
            up += _expand(up_lanes, 1.0)
            if GATED:
                gate += _expand(gate_lanes, 1.0)
            for first in tl.static_range(LANES, RANK, LANES):
                up += _expand(_find_lanes(u_ptr, tables, slot, choice, lanes + first, experts, here, f, f_live, B_UP,
                                          COLUMNS, PAGE_ELEMS, LOW_RANK), 1.0)  # fmt: skip
                if GATED:
                    gate += _expand(_find_lanes(u_ptr, tables, slot, choice, lanes + first, experts, here, f, f_live,
                                                B_GATE, COLUMNS, PAGE_ELEMS, LOW_RANK), 1.0)  # fmt: skip
        if router_weight_ptr is not None:
            router_weight = tl.load(router_weight_ptr + choice).to(tl.float32)
            gate *= router_weight
            up *= router_weight
        if bias.ptr is not None:
            bias_ptrs = bias.ptr + expert * bias.stride_e + f * bias.stride_n
            if GATED:
                gate += tl.load(bias_ptrs, mask=f_live, other=0.0).to(tl.float32)
            up += tl.load(bias_ptrs + bias.up_offset, mask=f_live, other=0.0).to(tl.float32)
        if GATED:
            h = activate(gate, up, KIND, True, alpha, limit)
        else:
            h = activate(up, up, KIND, False, alpha, limit)
        tl.store(h_ptr + choice * COLUMNS + f, h.to(h_ptr.dtype.element_ty), mask=f_live)


@triton.jit
def token2_kernel(out_ptr, rows, w_ptr, weights, bias, router_weight_ptr, ids_ptr, slot_ptr, u_ptr, tables,
                  SHAPE: tl.constexpr, LAYER: tl.constexpr, LOW_RANK: tl.constexpr, TILE: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """out = sum over the choices of router weight * (W2[e] h + b2[e] + B2 u), BLOCK_N columns a program.

    The sum is float32 throughout. ``u_ptr`` None: h is what the kernel before this one writes, and the first weights
    are loaded before it is waited for; else that kernel is the shrink, which waited for h.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    CHOICES: tl.constexpr = TILE.CHOICES
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    E: tl.constexpr = LAYER.E
    K: tl.constexpr = LAYER.K
    PAGE_ELEMS: tl.constexpr = LAYER.PAGE_ELEMS
    LANES: tl.constexpr = TILE.LANES
    RANK: tl.constexpr = TILE.RANK
    n = tl.program_id(0)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_live = d < COLUMNS
    if u_ptr is not None:
        lane = tl.arange(0, CHOICES * LANES)
        choices = lane // LANES
        expert, is_local = load_choices(ids_ptr, choices, E, K)
        factor = load_factors(router_weight_ptr, choices, is_local)
        slot = tl.load(slot_ptr)
        found = _find_lanes(
            u_ptr, tables, slot, choices, lane % LANES, expert, is_local, d, d_live, B2, COLUMNS, PAGE_ELEMS, LOW_RANK
        )
    _, out = row_sums(
        rows, w_ptr, weights, ids_ptr, router_weight_ptr, 0, n, SHAPE, E, K, TILE, u_ptr is None, PDL
    )  # fmt: skip
    if u_ptr is not None:
        await_prior_kernel(PDL)
    release_next_kernel(PDL)
    if u_ptr is not None:
        out += _expand(found, factor[:, None])
        for first in tl.static_range(LANES, RANK, LANES):
            out += _expand(_find_lanes(u_ptr, tables, slot, choices, lane % LANES + first, expert, is_local, d, d_live,
                                       B2, COLUMNS, PAGE_ELEMS, LOW_RANK), factor[:, None])  # fmt: skip
    if bias.ptr is not None:
        choices = tl.arange(0, CHOICES)
        expert, is_local = load_choices(ids_ptr, choices, E, K)
        factor = load_factors(router_weight_ptr, choices, is_local)
        bias_ptrs = bias.ptr + expert[:, None] * bias.stride_e + d[None, :] * bias.stride_n
        b = tl.load(bias_ptrs, mask=is_local[:, None] & d_live[None, :], other=0.0).to(tl.float32)
        out += tl.sum(b * factor[:, None], 0)
    tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), mask=d_live)

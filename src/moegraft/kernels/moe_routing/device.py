"""Device side of the routing build. ``docs/kernels.md`` works an example."""

from __future__ import annotations

import triton
import triton.language as tl

from moegraft.kernels.device.common import await_prior_kernel, release_next_kernel
from moegraft.kernels.device.pages import (
    B2,
    B_GATE,
    B_UP,
    FIELD_EXPERT_STRIDE,
    FIELD_FIRST_PAGE,
    FIELD_LANE,
    FIELD_OFFSET,
    FIELD_RANK,
    GRANULE,
    NUM_FIELDS,
    pad_to_granule,
    rank_row_elements,
)


@triton.jit
def _load_experts(rows, ids_ptr, num_rows, E: tl.constexpr):
    """Expert of each row; E for sentinels and for rows past the end."""
    expert = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < E), expert, E)


@triton.jit
def _expert_extent(me, ids_ptr, num_rows, LAYER: tl.constexpr, BUILD: tl.constexpr):
    """(first position of the expert, its rows, first block, end of blocks, first segment, first tile, end of tiles).

    Every program finds its share of the lists by itself. ``DENSE``: the lists have no holes for experts without rows,
    which takes a histogram of all experts. Else the shares are bounds that hold for any expert sizes:
    floor((p + n) / m) - floor(p / m) + min(n, 1) >= ceil(n / m), min(p + n, (e + 1) S) - min(p, e S) >= min(n, S).
    """
    E: tl.constexpr = LAYER.E
    S: tl.constexpr = LAYER.S
    BLOCK_M: tl.constexpr = BUILD.BLOCK_M
    TILE_M: tl.constexpr = BUILD.TILE_M
    CHUNK: tl.constexpr = BUILD.CHUNK
    E_BINS: tl.constexpr = BUILD.E_BINS
    DENSE: tl.constexpr = BUILD.DENSE
    if DENSE:
        bins = tl.arange(0, E_BINS)
        counts = tl.zeros([E_BINS], tl.int32)
        for start in range(0, num_rows, CHUNK):
            expert = _load_experts(start + tl.arange(0, CHUNK), ids_ptr, num_rows, E)
            counts += tl.histogram(expert, E_BINS)
        is_before = bins < me
        blocks = (counts + BLOCK_M - 1) // BLOCK_M
        segments = tl.minimum(counts, S)
        first = tl.sum(tl.where(is_before, counts, 0), 0)
        num_mine = tl.sum(tl.where(bins == me, counts, 0), 0)
        first_block = tl.sum(tl.where(is_before, blocks, 0), 0)
        end_block = first_block + (num_mine + BLOCK_M - 1) // BLOCK_M
        first_segment = tl.sum(tl.where(is_before, segments, 0), 0)
        end_segment = first_segment + tl.minimum(num_mine, S)
        first_tile = first_segment + tl.sum(tl.where(is_before, counts // TILE_M, 0), 0)
        end_tile = first_tile + (end_segment - first_segment) + num_mine // TILE_M
    else:
        before = tl.zeros([CHUNK], tl.int32)
        mine = tl.zeros([CHUNK], tl.int32)
        for start in range(0, num_rows, CHUNK):
            expert = _load_experts(start + tl.arange(0, CHUNK), ids_ptr, num_rows, E)
            before += (expert < me).to(tl.int32)
            mine += (expert == me).to(tl.int32)
        first = tl.sum(before, 0)
        num_mine = tl.sum(mine, 0)
        end = first + num_mine
        first_block = first // BLOCK_M + tl.minimum(first, me)
        end_block = end // BLOCK_M + tl.minimum(end, me + 1)
        first_segment = tl.minimum(first, me * S)
        end_segment = tl.minimum(end, (me + 1) * S)
        first_tile = first // TILE_M + first_segment
        end_tile = end // TILE_M + end_segment
    return first, num_mine, first_block, end_block, first_segment, first_tile, end_tile


@triton.jit
def _collect_rows(me, first, ids_ptr, rows_ptr, num_rows, E: tl.constexpr, CHUNK: tl.constexpr):
    """Writes the expert's rows, ascending, from position ``first`` on."""
    for start in range(0, num_rows, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        is_mine = _load_experts(rows, ids_ptr, num_rows, E) == me
        position = first + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(rows_ptr + position, rows, mask=is_mine)
        first += tl.sum(is_mine.to(tl.int32), 0)


@triton.jit
def _sort_few(rows, live, first, slots_ptr, order_ptr, segment_ptr, K: tl.constexpr, FEW: tl.constexpr):
    """Sorts at most FEW ascending rows by comparing each with each; whatever is done after costs FEW, not S.

    Returns slot, rows and first position of segments [FEW], each at the place of its first row; elsewhere 0 rows.
    """
    slot = tl.where(live, tl.load(slots_ptr + rows // K, mask=live, other=-1), 2**31 - 1)
    place = tl.arange(0, FEW)
    is_earlier = (place[None, :] < place[:, None]) & (slot[None, :] == slot[:, None])
    sorted_place = tl.sum((is_earlier | (slot[None, :] < slot[:, None])).to(tl.int32), axis=1)
    tl.store(order_ptr + first + sorted_place, rows, mask=live)
    slot_at = tl.sum(tl.where(sorted_place[None, :] == place[:, None], slot[None, :], 0), axis=1)
    num_before = tl.sum((slot[None, :] < slot_at[:, None]).to(tl.int32), axis=1)
    num_same = tl.sum((slot[None, :] == slot_at[:, None]).to(tl.int32), axis=1)
    is_row = place < tl.sum(live.to(tl.int32), 0)
    tl.store(segment_ptr + first + place, first + num_before, mask=is_row)
    return slot_at, tl.where(is_row & (num_before == place), num_same, 0), first + place


@triton.jit
def _exclusive_sum(x):
    return tl.cumsum(x, 0) - x


@triton.jit
def _write_blocks(block_ptr, me, first, end, first_block, end_block, slot_rows, slot_first, lane13, granules13, lane2,
                  granules2, S: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Records of the expert's blocks; a block's lanes are those of the slots that have rows in it."""
    for start in range(first_block, end_block, 16):
        b = start + tl.arange(0, 16)
        live = b < end_block
        block_first = tl.minimum(first + (b - first_block) * BLOCK_M, end)
        block_end = tl.minimum(block_first + BLOCK_M, end)
        record = block_ptr + b * 8
        tl.store(record + 0, tl.zeros_like(b) + me, mask=live)
        tl.store(record + 1, block_first, mask=live)
        tl.store(record + 2, block_end, mask=live)
        if S > 0:
            has_rows = (slot_rows > 0)[None, :]
            not_before = has_rows & ((slot_first + slot_rows)[None, :] > block_first[:, None])
            not_after = has_rows & (slot_first[None, :] < block_end[:, None])
            for which in tl.static_range(2):
                lane_first = lane13 if which == 0 else lane2
                lane_end = lane_first + (granules13 if which == 0 else granules2) * GRANULE
                lanes_first = tl.min(tl.where(not_before, lane_first[None, :], 2**31 - 1), axis=1)
                lanes_end = tl.max(tl.where(not_after, lane_end[None, :], 0), axis=1)
                tl.store(record + 3 + 2 * which, lanes_first, mask=live)
                tl.store(record + 4 + 2 * which, lanes_end, mask=live)


@triton.jit
def _write_tiles(tile_ptr, me, first_tile, end_tile, slot, slot_rows, slot_first, has_work,
                 TILE_M: tl.constexpr):  # fmt: skip
    """Records of the tiles of the expert's segments that have LoRA work; the rest of its share is empty."""
    num_tiles = tl.where(has_work, (slot_rows + TILE_M - 1) // TILE_M, 0)
    record = tile_ptr + (first_tile + _exclusive_sum(num_tiles)) * 8
    for i in range(tl.max(num_tiles, 0)):
        live = i < num_tiles
        tl.store(record + i * 8 + 0, tl.zeros_like(slot_rows) + me, mask=live)
        tl.store(record + i * 8 + 1, slot, mask=live)
        tl.store(record + i * 8 + 2, slot_first + i * TILE_M, mask=live)
        tl.store(record + i * 8 + 3, tl.minimum(slot_first + (i + 1) * TILE_M, slot_first + slot_rows), mask=live)
        tl.store(record + i * 8 + 4, tl.zeros_like(slot_rows), mask=live)
        tl.store(record + i * 8 + 5, tl.zeros_like(slot_rows), mask=live)
    for start in range(first_tile + tl.sum(num_tiles, 0), end_tile, 32):
        t = start + tl.arange(0, 32)
        tl.store(tile_ptr + t * 8 + 2, tl.zeros_like(t), mask=t < end_tile)
        tl.store(tile_ptr + t * 8 + 3, tl.zeros_like(t), mask=t < end_tile)


@triton.jit
def _write_lanes(lists, tables, first_lane, granules, slot, slot_first, index, has_work, B_FIRST: tl.constexpr,
                 NUM_B: tl.constexpr, COLUMNS: tl.constexpr, PAGE_ELEMS: tl.constexpr,
                 LANES: tl.constexpr):  # fmt: skip
    """Every lane that the expert's slots bring to a B factor: its segment, its granule of u, where its row of B is."""
    for start in range(0, tl.max(granules, 0) * GRANULE, LANES):
        j = start + tl.arange(0, LANES)
        in_list = j[None, :] < (granules * GRANULE)[:, None]
        lanes = first_lane[:, None] + j[None, :]
        tl.store(lists.segment + lanes, slot_first[:, None] + tl.zeros_like(lanes), mask=in_list)
        for b in tl.static_range(NUM_B):
            factor = tables.factors + slot * tables.stride_factors + (B_FIRST + b) * NUM_FIELDS
            rank = tl.load(factor + FIELD_RANK, mask=has_work, other=0)
            stride = tl.load(factor + FIELD_EXPERT_STRIDE, mask=has_work, other=0)
            first_page = tl.load(factor + FIELD_FIRST_PAGE, mask=has_work, other=0)
            offset = tl.load(factor + FIELD_OFFSET, mask=has_work, other=0)
            granule = pad_to_granule(tl.load(factor + FIELD_LANE, mask=has_work, other=0)) // GRANULE
            live = in_list & (j[None, :] < rank[:, None])
            element = rank_row_elements(
                tables.pages + (slot * tables.stride_pages)[:, None], first_page[:, None], offset[:, None],
                (index * stride)[:, None] + j[None, :], live, COLUMNS, PAGE_ELEMS, 1,
            )  # fmt: skip
            # A granule that is dead for this factor reads columns that are sure to be written.
            in_rank = (j // GRANULE * GRANULE)[None, :] < rank[:, None]
            granule = tl.where(in_rank, granule[:, None] + (j // GRANULE)[None, :], 0)
            tl.store(lists.granule + b * lists.capacity + lanes, granule, mask=in_list)
            tl.store(lists.element + b * lists.capacity + lanes, tl.where(live, element, -1), mask=in_list)


@triton.jit
def _load_slots(slot, is_slot, me, tables):
    """(index of the expert among the slot's or -1, rank of the gate's B, of up's, of down's)."""
    ranks_ptr = tables.factors + slot * tables.stride_factors + FIELD_RANK
    index = tl.load(tables.expert_index + slot * tables.stride_experts + me, mask=is_slot, other=-1)
    rank_gate = tl.load(ranks_ptr + B_GATE * NUM_FIELDS, mask=is_slot, other=0)
    rank_up = tl.load(ranks_ptr + B_UP * NUM_FIELDS, mask=is_slot, other=0)
    rank_down = tl.load(ranks_ptr + B2 * NUM_FIELDS, mask=is_slot, other=0)
    return index, rank_gate, rank_up, rank_down


@triton.jit
def _write_lists(lists, lanes13, lanes2, tables, me, share, slot, slot_rows, slot_first, loaded, LAYER: tl.constexpr,
                 BUILD: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The expert's blocks, tiles and lanes, from its segments in the order of their slots."""
    GRANULES13: tl.constexpr = LAYER.GRANULES13
    GRANULES2: tl.constexpr = LAYER.GRANULES2
    S: tl.constexpr = LAYER.S
    BLOCK_M: tl.constexpr = BUILD.BLOCK_M
    TILE_M: tl.constexpr = BUILD.TILE_M
    GATED: tl.constexpr = LAYER.GATED
    F: tl.constexpr = LAYER.F
    PAGE_ELEMS: tl.constexpr = LAYER.PAGE_ELEMS
    D: tl.constexpr = LAYER.D
    first, end, first_block, end_block, first_segment, first_tile, end_tile = share
    index, rank_gate, rank_up, rank_down = loaded
    has_work = (slot_rows > 0) & (index >= 0)
    granules13 = tl.where(has_work, (tl.maximum(rank_gate, rank_up) + GRANULE - 1) // GRANULE, 0)
    granules2 = tl.where(has_work, (rank_down + GRANULE - 1) // GRANULE, 0)
    has_work = granules13 + granules2 > 0
    first_lane13 = first_segment * (GRANULES13 * GRANULE) + _exclusive_sum(granules13) * GRANULE
    first_lane2 = first_segment * (GRANULES2 * GRANULE) + _exclusive_sum(granules2) * GRANULE
    _write_blocks(
        lists.blocks, me, first, end, first_block, end_block, slot_rows, slot_first, first_lane13, granules13,
        first_lane2, granules2, S, BLOCK_M,
    )  # fmt: skip
    _write_tiles(lists.tiles, me, first_tile, end_tile, slot, slot_rows, slot_first, has_work, TILE_M)
    _write_lanes(
        lanes13, tables, first_lane13, granules13, slot, slot_first, index, has_work, B_UP - GATED,
        1 + GATED, F, PAGE_ELEMS, LANES,
    )  # fmt: skip
    _write_lanes(
        lanes2, tables, first_lane2, granules2, slot, slot_first, index, has_work, B2, 1, D, PAGE_ELEMS,
        LANES,
    )  # fmt: skip


@triton.jit
def _route_few(lists, lanes13, lanes2, tables, me, share, rows, live, slots_ptr, LAYER: tl.constexpr,
               BUILD: tl.constexpr):  # fmt: skip
    """An expert's share from at most FEW rows, ``rows`` where ``live``."""
    K: tl.constexpr = LAYER.K
    FEW: tl.constexpr = BUILD.FEW
    FEW_LANES: tl.constexpr = BUILD.FEW_LANES
    slot, slot_rows, slot_first = _sort_few(rows, live, share[0], slots_ptr, lists.order, lists.segment, K, FEW)
    loaded = _load_slots(slot, (slot_rows > 0) & (slot >= 0), me, tables)
    _write_lists(
        lists, lanes13, lanes2, tables, me, share, slot, slot_rows, slot_first, loaded, LAYER, BUILD, FEW_LANES
    )


@triton.jit
def _load_bins(row_ptrs, live, slots_ptr, K: tl.constexpr):
    """(row, bin of its slot): bin 0 for base rows."""
    row = tl.load(row_ptrs, mask=live, other=0)
    return row, tl.load(slots_ptr + row // K, mask=live, other=-1) + 1


@triton.jit
def _route_many(lists, lanes13, lanes2, tables, me, share, slots_ptr, LAYER: tl.constexpr,
                BUILD: tl.constexpr):  # fmt: skip
    """An expert's share from its rows at ``lists.rows``: counted in a bin a slot, then placed ROWS at a time."""
    S_BINS: tl.constexpr = BUILD.S_BINS
    ROWS: tl.constexpr = BUILD.ROWS
    K: tl.constexpr = LAYER.K
    S: tl.constexpr = LAYER.S
    LANES: tl.constexpr = BUILD.LANES
    first, end = share[0], share[1]
    place = tl.arange(0, ROWS)
    slot_rows = tl.zeros([S_BINS], tl.int32)
    for start in range(first, end, ROWS):
        live = start + place < end
        _, bin = _load_bins(lists.rows + start + place, live, slots_ptr, K)
        slot_rows += tl.histogram(bin, S_BINS, mask=live)
    slot_first = first + _exclusive_sum(slot_rows)
    next_position = slot_first
    for start in range(first, end, ROWS):
        live = start + place < end
        row, bin = _load_bins(lists.rows + start + place, live, slots_ptr, K)
        is_earlier = (place[None, :] < place[:, None]) & (bin[None, :] == bin[:, None])
        position = tl.gather(next_position, bin, 0) + tl.sum(is_earlier.to(tl.int32), axis=1)
        tl.store(lists.order + position, row, mask=live)
        tl.store(lists.segment + position, tl.gather(slot_first, bin, 0), mask=live)
        next_position += tl.histogram(bin, S_BINS, mask=live)
    slot = tl.arange(0, S_BINS) - 1
    loaded = _load_slots(slot, (slot >= 0) & (slot < S), me, tables)
    _write_lists(lists, lanes13, lanes2, tables, me, share, slot, slot_rows, slot_first, loaded, LAYER, BUILD, LANES)


@triton.jit
def route_kernel(lists, lanes13, lanes2, ids_ptr, slots_ptr, tables, num_rows, LAYER: tl.constexpr,
                 BUILD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program an expert: finds the expert's rows, sorts them by slot, writes its blocks, tiles and lanes.

    No program reads what another one writes. Up to FEW rows of an expert are compared with each other, which costs the
    same for any number of slots; more are counted in a bin a slot. ``ALL_FEW``: the whole batch has no more than FEW,
    so that an expert's are not collected first.
    """
    E: tl.constexpr = LAYER.E
    DENSE: tl.constexpr = BUILD.DENSE
    S: tl.constexpr = LAYER.S
    CHUNK: tl.constexpr = BUILD.CHUNK
    BLOCK_M: tl.constexpr = BUILD.BLOCK_M
    FEW: tl.constexpr = BUILD.FEW
    ALL_FEW: tl.constexpr = BUILD.ALL_FEW
    await_prior_kernel(PDL)
    release_next_kernel(PDL)
    me = tl.program_id(0)
    first, num_mine, first_block, end_block, first_segment, first_tile, end_tile = _expert_extent(
        me, ids_ptr, num_rows, LAYER, BUILD
    )
    end = first + num_mine
    if me == E - 1:
        tl.store(lists.counts, end_block)
        tl.store(lists.counts + 1, end_tile)
    if DENSE and num_mine == 0:
        return
    if S == 0:
        if num_mine > 0:
            _collect_rows(me, first, ids_ptr, lists.order, num_rows, E, CHUNK)
        _write_blocks(lists.blocks, me, first, end, first_block, end_block, 0, 0, 0, 0, 0, 0, S, BLOCK_M)
    else:
        share = (first, end, first_block, end_block, first_segment, first_tile, end_tile)
        few = tl.arange(0, FEW)
        if ALL_FEW:
            is_mine = _load_experts(few, ids_ptr, num_rows, E) == me
            _route_few(lists, lanes13, lanes2, tables, me, share, few, is_mine, slots_ptr, LAYER, BUILD)
        else:
            if num_mine > 0:
                _collect_rows(me, first, ids_ptr, lists.rows, num_rows, E, CHUNK)
                tl.debug_barrier()  # the rows come back through memory
            if num_mine <= FEW:
                rows = tl.load(lists.rows + first + few, mask=few < num_mine, other=0)
                _route_few(lists, lanes13, lanes2, tables, me, share, rows, few < num_mine, slots_ptr, LAYER, BUILD)
            else:
                _route_many(lists, lanes13, lanes2, tables, me, share, slots_ptr, LAYER, BUILD)

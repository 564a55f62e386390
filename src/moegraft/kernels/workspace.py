"""One allocation for everything a layer call needs between its first and its last kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from moegraft.core.routing import LANE_GRANULE, RECORD_INTS, Count, Lanes
from moegraft.kernels.moe_routing.host import RoutingBuffers
from moegraft.kernels.records import LowRank, QuantisedRows, cdiv, low_rank_width
from moegraft.tuning.tiles import MoETiles, TuningShape
from moegraft.tuning.weight_formats import stores_h, stores_x

_ALIGNMENT_BYTES = 256

Buffer = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, kw_only=True)
class LoRABuffers:
    """Views into a workspace for one routing; ``low_rank13`` and ``low_rank2`` are None without adapters."""

    routing: RoutingBuffers
    low_rank13: LowRank | None
    low_rank2: LowRank | None


@dataclass(frozen=True, kw_only=True)
class LayerBuffers(LoRABuffers):
    """Views into a workspace for one call of a layer; ``quantised_*``: of formats whose rows a kernel quantises."""

    h_NF: torch.Tensor
    y_ND: torch.Tensor
    quantised_x: QuantisedRows | None
    quantised_h: QuantisedRows | None


@dataclass(frozen=True)
class _Plan:
    """Where the buffers of a call lie: (size, strides, first element) by name, for each dtype; bytes in all."""

    views: tuple[tuple[torch.dtype, tuple[tuple[str, tuple[int, ...], tuple[int, ...], int], ...]], ...]
    num_bytes: int


def layer_buffers(
    shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, *, num_halves: int, with_base: bool = True
) -> dict[str, Buffer]:
    """Shape and dtype of every buffer of one call, by name; ``with_base``: also those of the GEMMs' results."""
    N, E, S = shape.num_tokens * shape.top_k, shape.num_experts, shape.num_slots
    buffers: dict[str, Buffer] = {
        "order": ((N,), torch.int32),
        "rows": ((N,), torch.int32),
        "segment": ((N,), torch.int32),
        "blocks": ((_max_groups(N, E, tiles.block_m), RECORD_INTS), torch.int32),
        "tiles": ((_max_groups(N, E * S, tiles.tile_m), RECORD_INTS), torch.int32),
        "counts": ((len(Count),), torch.int32),
    }
    if with_base:
        buffers |= {"h": ((N, shape.intermediate_size), dtype), "y": ((N, shape.hidden_size), dtype)}
        quantised = (
            ("_x", stores_x(shape, tiles), shape.num_tokens, shape.hidden_size),
            ("_h", stores_h(shape, tiles), N, shape.intermediate_size),
        )
        for name, is_stored, rows, columns in quantised:
            if is_stored:
                buffers["stored" + name] = ((rows, columns), torch.float8_e4m3fn)
                buffers["scale" + name] = ((rows, cdiv(columns, shape.scale_group or columns)), torch.float32)
    if S:
        segments = min(N, E * S)
        for name, rank, halves, tile in (
            ("13", shape.rank13, num_halves, tiles.shrink13),
            ("2", shape.rank2, 1, tiles.shrink2),
        ):
            width = low_rank_width(rank, num_halves=halves)
            lanes = segments * cdiv(rank, LANE_GRANULE) * LANE_GRANULE
            buffers["u" + name] = ((N, width), dtype)
            if tile.splits > 1:
                buffers["partial" + name] = ((tile.splits, N, width), torch.float32)
            buffers["lane_segment" + name] = ((lanes,), torch.int32)
            buffers["lane_granule" + name] = ((halves, lanes), torch.int32)
            buffers["lane_element" + name] = ((halves, lanes), torch.int64)
    return buffers


def _max_groups(num_rows: int, num_keys: int, group_rows: int) -> int:
    """A bound of the groups of at most ``group_rows`` rows that ``num_rows`` rows of ``num_keys`` kinds form.

    sum over kinds of ceil(n / g) <= floor(N / g) + kinds hit.
    """
    return num_rows // group_rows + min(num_rows, num_keys)


@lru_cache(maxsize=4096)
def _plan(shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, num_halves: int, *, with_base: bool = True) -> _Plan:
    """Cached by shape: a decode step asks for the same few again and again, and pays for a dictionary lookup."""
    views: dict[torch.dtype, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]] = {}
    offset = 0
    buffers = layer_buffers(shape, tiles, dtype, num_halves=num_halves, with_base=with_base)
    for name, (size, view_dtype) in buffers.items():
        strides = tuple([math.prod(size[i + 1 :]) for i in range(len(size))])
        views.setdefault(view_dtype, []).append((name, size, strides, offset // view_dtype.itemsize))
        num_bytes = math.prod(size) * view_dtype.itemsize
        offset += num_bytes + -num_bytes % _ALIGNMENT_BYTES
    return _Plan(tuple([(view_dtype, tuple(of_dtype)) for view_dtype, of_dtype in views.items()]), offset)


class Workspace:
    """A block of device memory that calls carve their buffers from, one call at a time on one stream.

    Graphs that were captured with a workspace keep reading it: it must outlive them, and it never grows by itself.
    """

    def __init__(self, num_bytes: int, device: torch.device | str) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    @classmethod
    def for_layer(
        cls, shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, device: torch.device | str, *, num_halves: int = 2
    ) -> Workspace:
        """Exactly large enough for one call of this shape."""
        return cls(_plan(shape, tiles, dtype, num_halves).num_bytes, device)

    @classmethod
    def for_lora(
        cls, shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, device: torch.device | str, *, num_halves: int = 2
    ) -> Workspace:
        """Exactly large enough for a routing and its low-rank rows: LoRA beside someone else's GEMMs."""
        return cls(_plan(shape, tiles, dtype, num_halves, with_base=False).num_bytes, device)

    def carve(self, shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, *, num_halves: int) -> LayerBuffers:
        """Views for one call of a layer. Raises ValueError where the workspace is too small."""
        views = self._views(_plan(shape, tiles, dtype, num_halves), shape)
        return LayerBuffers(
            routing=_routing(views),
            low_rank13=_low_rank(views, "13"),
            low_rank2=_low_rank(views, "2"),
            h_NF=views["h"],
            y_ND=views["y"],
            quantised_x=_quantised(views, "_x"),
            quantised_h=_quantised(views, "_h"),
        )

    def carve_lora(self, shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, *, num_halves: int) -> LoRABuffers:
        """Views for one routing and its low-rank rows. Raises ValueError where the workspace is too small."""
        views = self._views(_plan(shape, tiles, dtype, num_halves, with_base=False), shape)
        return LoRABuffers(routing=_routing(views), low_rank13=_low_rank(views, "13"), low_rank2=_low_rank(views, "2"))

    def _views(self, plan: _Plan, shape: TuningShape) -> dict[str, torch.Tensor]:
        if plan.num_bytes > self.memory.numel():
            raise ValueError(f"the workspace has {self.memory.numel()} bytes, a call of {shape} needs {plan.num_bytes}")
        views = {}
        for dtype, of_dtype in plan.views:
            memory = self.memory[: plan.num_bytes].view(dtype)
            for name, size, strides, first in of_dtype:
                views[name] = memory.as_strided(size, strides, first)
        return views


def _routing(views: Mapping[str, torch.Tensor]) -> RoutingBuffers:
    return RoutingBuffers(
        order=views["order"],
        rows=views["rows"],
        segment=views["segment"],
        blocks=views["blocks"],
        tiles=views["tiles"],
        counts=views["counts"],
        lanes13=_lanes(views, "13"),
        lanes2=_lanes(views, "2"),
    )


def _lanes(views: Mapping[str, torch.Tensor], name: str) -> Lanes | None:
    if "lane_segment" + name not in views:
        return None
    return Lanes(
        segment=views["lane_segment" + name],
        granule=views["lane_granule" + name],
        element=views["lane_element" + name],
    )


def _quantised(views: Mapping[str, torch.Tensor], name: str) -> QuantisedRows | None:
    if "stored" + name not in views:
        return None
    return QuantisedRows(stored_MI=views["stored" + name], scale_MQ=views["scale" + name])


def _low_rank(views: Mapping[str, torch.Tensor], name: str) -> LowRank | None:
    if "u" + name not in views:
        return None
    return LowRank(u_NW=views["u" + name], partial_SNW=views.get("partial" + name))

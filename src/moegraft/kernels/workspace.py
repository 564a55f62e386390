"""One allocation for everything a layer call needs between its first and its last kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moegraft.core.routing import LANE_GRANULE, RECORD_INTS, Count, Lanes, max_groups
from moegraft.kernels.launch import cdiv
from moegraft.kernels.moe_routing.host import RoutingBuffers
from moegraft.kernels.records import LowRank, low_rank_width
from moegraft.tuning.tiles import MoETiles, TuningShape

_ALIGNMENT_BYTES = 256

Buffer = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, kw_only=True)
class LayerBuffers:
    """Views into a workspace for one call; ``low_rank13`` and ``low_rank2`` are None without adapters."""

    routing: RoutingBuffers
    h_NF: torch.Tensor
    y_ND: torch.Tensor
    low_rank13: LowRank | None
    low_rank2: LowRank | None


def layer_buffers(shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, *, num_halves: int) -> dict[str, Buffer]:
    """Shape and dtype of every buffer of one call, by name."""
    N, E, S = shape.num_tokens * shape.top_k, shape.num_experts, shape.num_slots
    buffers: dict[str, Buffer] = {
        "order": ((N,), torch.int32),
        "rows": ((N,), torch.int32),
        "segment": ((N,), torch.int32),
        "blocks": ((max_groups(N, E, tiles.block_m), RECORD_INTS), torch.int32),
        "tiles": ((max_groups(N, E * S, tiles.tile_m), RECORD_INTS), torch.int32),
        "counts": ((len(Count),), torch.int32),
        "h": ((N, shape.intermediate_size), dtype),
        "y": ((N, shape.hidden_size), dtype),
    }
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


def _num_bytes(buffers: Mapping[str, Buffer]) -> int:
    return sum(_padded_bytes(buffer) for buffer in buffers.values())


def _padded_bytes(buffer: Buffer) -> int:
    shape, dtype = buffer
    return cdiv(math.prod(shape) * dtype.itemsize, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


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
        return cls(_num_bytes(layer_buffers(shape, tiles, dtype, num_halves=num_halves)), device)

    def carve(self, shape: TuningShape, tiles: MoETiles, dtype: torch.dtype, *, num_halves: int) -> LayerBuffers:
        """Views for one call. Raises ValueError where the workspace is too small."""
        buffers = layer_buffers(shape, tiles, dtype, num_halves=num_halves)
        needed = _num_bytes(buffers)
        if needed > self.memory.numel():
            raise ValueError(f"the workspace has {self.memory.numel()} bytes, a call of {shape} needs {needed}")
        views, offset = {}, 0
        for name, (view_shape, view_dtype) in buffers.items():
            end = offset + math.prod(view_shape) * view_dtype.itemsize
            views[name] = self.memory[offset:end].view(view_dtype).view(view_shape)
            offset += _padded_bytes((view_shape, view_dtype))
        routing = {name: views[name] for name in ("order", "rows", "segment", "blocks", "tiles", "counts")}
        return LayerBuffers(
            routing=RoutingBuffers(lanes13=_lanes(views, "13"), lanes2=_lanes(views, "2"), **routing),
            h_NF=views["h"],
            y_ND=views["y"],
            low_rank13=_low_rank(views, "13"),
            low_rank2=_low_rank(views, "2"),
        )


def _lanes(views: Mapping[str, torch.Tensor], name: str) -> Lanes | None:
    if "lane_segment" + name not in views:
        return None
    return Lanes(**{field: views[f"lane_{field}{name}"] for field in ("segment", "granule", "element")})


def _low_rank(views: Mapping[str, torch.Tensor], name: str) -> LowRank | None:
    if "u" + name not in views:
        return None
    return LowRank(u_NW=views["u" + name], partial_SNW=views.get("partial" + name))

"""Reads the tensors of an experts module, of all of it or of one rank's slice, and turns them into ``ExpertsLoRA``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from moegraft.core.cuts import pad_axis
from moegraft.core.errors import AdapterConfigError
from moegraft.core.halves import split_halves
from moegraft.lora.peft import fused
from moegraft.lora.peft.build import Read, cast, scalable, square_sums
from moegraft.lora.peft.names import Projection
from moegraft.lora.peft.plan import ExpertsPlan, FusedPair, Pair
from moegraft.lora.targets import ExpertsLoRA, ExpertsTarget
from moegraft.parallel.slices import WHOLE_EXPERTS, ExpertsSlice, Pieces, count, half_columns


def build_experts(
    plan: ExpertsPlan, read: Read, dtype: torch.dtype, mine: ExpertsSlice = WHOLE_EXPERTS
) -> ExpertsLoRA | None:
    """LoRA of an experts module: all projections over one list of experts. Raises AdapterTensorError.

    None where it touches none of this rank's experts.
    """
    experts, _ = mine.local_experts(_held_experts(plan))
    if not experts:
        return None
    sides = {cut.projection: cut.read(plan, read) for cut in _cuts(plan, mine, dtype)}
    gains = _gains(plan, sides, experts, read, mine) if plan.magnitudes else {}
    spread = {projection: (_spread(a, experts), _spread(b, experts)) for projection, (a, b) in sides.items()}
    a13, b_gate, b_up, up_lane = _join_gate_and_up(plan, spread)
    if a13 is not None and mine.low_rank is not None:
        a13 = pad_axis(a13, 1, mine.low_rank.of(_lanes(plan)).padded)
    a2, b2 = spread.get(Projection.DOWN, (None, None))
    columns, hidden = mine.columns(plan.target.intermediate_size), mine.hidden(plan.target.hidden_size)
    factors = {
        "a13": a13,
        "b_gate": _padded(b_gate, columns.padded),
        "b_up": _padded(b_up, columns.padded),
        "a2": _padded(a2, columns.padded),
        "b2": _padded(b2, hidden.padded),
        **gains,
    }
    file = next(info.file for info in plan.infos())
    return ExpertsLoRA(
        expert_ids=experts,
        up_lane=up_lane,
        **{
            name: cast(rows, dtype, f"{file}: {name} of {plan.target.name}", is_finite=name in ("a13", "a2"))
            for name, rows in factors.items()
            if rows is not None
        },
    )


def _gains(
    plan: ExpertsPlan,
    sides: Mapping[Projection, _Sides],
    experts: tuple[int, ...],
    read: Read,
    mine: ExpertsSlice,
) -> dict[str, torch.Tensor]:
    """DoRA's gains of ``ExpertsLoRA``: magnitude / ||W_e + B_e A_e||_row, 1 for experts without.

    Raises AdapterConfigError where ranks share the experts out.
    """
    target, infos = plan.target, next(iter(plan.magnitudes.values()))
    if mine is not WHOLE_EXPERTS or target.weights is None:
        where = next(iter(infos.values())).where
        raise AdapterConfigError(f"use_dora: {where}: DoRA on experts that ranks share out is not supported")
    weights, halves = target.weights(), partial(split_halves, num_halves=1 + target.has_gate)
    sizes = (target.intermediate_size, target.intermediate_size, target.hidden_size)
    found: dict[str, torch.Tensor] = {}
    for projection, magnitudes in plan.magnitudes.items():
        a_rows, b_rows = sides[projection]
        for position, expert in enumerate(a_rows.experts or ()):
            if projection is Projection.DOWN:
                weight = weights.w2_in_out_of(expert, torch.float32).T
            else:
                weight = weights.w13_in_out_of(expert, torch.float32).T
                if projection is not Projection.GATE_UP:
                    weight = halves(weight, 0, is_interleaved=target.is_interleaved)[projection is Projection.UP]
            sums = square_sums(weight, a_rows.rows[position].float(), b_rows.rows[position].float())
            gain = (read(magnitudes[expert].name).float() / sums.sqrt())[None]
            parts = {_GAINS[projection]: gain}
            if projection is Projection.GATE_UP:
                parts = dict(
                    zip(("gain_gate", "gain_up"), halves(gain, is_interleaved=target.is_interleaved), strict=True)
                )
            for name, part in parts.items():
                size = sizes[("gain_gate", "gain_up", "gain2").index(name)]
                found.setdefault(name, torch.ones(len(experts), 1, size))[experts.index(expert)] = part
    return found


_GAINS = {
    Projection.GATE: "gain_gate",
    Projection.UP: "gain_up",
    Projection.GATE_UP: "gain_gate",
    Projection.DOWN: "gain2",
}


def num_elems(plan: ExpertsPlan, mine: ExpertsSlice) -> int:
    """Elements of all factors that ``build_experts`` gives, without padding; from the plan alone."""
    if mine is WHOLE_EXPERTS:
        return sum([math.prod(info.shape) for info in plan.infos()])
    held = len(mine.local_experts(_held_experts(plan))[0])
    total = 0
    for cut in _cuts(plan, mine, torch.float32) if held else ():
        pair = plan.stacked.get(cut.projection)
        a_experts, b_experts = (held, held) if pair is None else [min(info.shape[0], held) for info in pair.infos]
        total += a_experts * (cut.lanes[1] - cut.lanes[0]) * count(cut.inputs)
        total += b_experts * cut.rank * count(cut.outputs)
    return total


def tensors_elsewhere(plan: ExpertsPlan, mine: ExpertsSlice) -> Iterator[str]:
    """Tensors that ``build_experts`` leaves to other ranks as a whole: those of single experts that live there."""
    if mine.experts is None:
        return
    nobody_here = not mine.local_experts(_held_experts(plan))[0]
    for pairs in plan.single.values():
        for expert, pair in pairs.items():
            if nobody_here or expert not in mine.experts:
                yield from (info.name for info in pair.infos)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rank rows of some local experts: [len(experts), r, n]; ``experts`` None: [1, r, n], one for all."""

    experts: tuple[int, ...] | None
    rows: torch.Tensor


_Sides = tuple[_Rows, _Rows]  # of A and of B


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """Which part of a projection's tensors a rank reads.

    ``experts``: global ids in local order · ``lanes``: of A's rank rows · ``inputs``, ``outputs``: of the free axes ·
    ``dtype``: what the rows will be cast to.
    """

    target: ExpertsTarget
    projection: Projection
    experts: tuple[int, ...]
    lanes: tuple[int, int]
    rank: int
    inputs: Pieces
    outputs: Pieces
    dtype: torch.dtype

    def read(self, plan: ExpertsPlan, read: Read) -> _Sides:
        """Both sides of the projection, in ``dtype`` where the file has it, else in float32 or wider."""
        if self.projection in plan.single:
            return self._single(plan.single[self.projection], read)
        if self.projection in plan.stacked:
            return self._stacked(plan.stacked[self.projection], read)
        return self._fused(next(pair for pair in plan.fused if pair.projection is self.projection), read)

    def _single(self, pairs: Mapping[int, Pair], read: Read) -> _Sides:
        """Experts of smaller rank get zero rows: exact, since a zero row of B undoes whatever A gives."""
        local = {expert: index for index, expert in enumerate(self.experts)}
        held = sorted((local[expert], pair) for expert, pair in pairs.items() if expert in local)
        first, last = self.lanes
        stored = {info.dtype for _, pair in held for info in pair.infos}
        wide = torch.float64 if torch.float64 in stored else torch.float32
        dtype = self.dtype if stored == {self.dtype} else wide
        a_rows = torch.zeros(len(held), last - first, sum(stop - start for start, stop in self.inputs), dtype=dtype)
        b_rows = torch.zeros(len(held), self.rank, sum(stop - start for start, stop in self.outputs), dtype=dtype)
        for position, (_, pair) in enumerate(held):
            lanes = (min(first, pair.rank), min(last, pair.rank))
            a = scalable(read(pair.a.name, {0: (lanes,), 1: self.inputs}), self.dtype)
            b = scalable(read(pair.b.name, {0: self.outputs}), self.dtype).T * pair.scale
            a_rows[position, : a.shape[0]] = a
            b_rows[position, : pair.rank] = b
        experts = tuple(expert for expert, _ in held)
        return _Rows(experts=experts, rows=a_rows), _Rows(experts=experts, rows=b_rows)

    def _stacked(self, pair: Pair, read: Read) -> _Sides:
        experts = _merge((expert, expert + 1) for expert in self.experts)
        a_experts, b_experts = (((0, 1),) if info.shape[0] == 1 else experts for info in pair.infos)
        a = scalable(read(pair.a.name, {0: a_experts, 1: (self.lanes,), 2: self.inputs}), self.dtype)
        b = scalable(read(pair.b.name, {0: b_experts, 1: self.outputs}), self.dtype).transpose(1, 2) * pair.scale
        return self._as_rows(a, pair.a.shape[0]), self._as_rows(b, pair.b.shape[0])

    def _fused(self, fused_pair: FusedPair, read: Read) -> _Sides:
        pair, num_experts = fused_pair.pair, self.target.num_experts

        def rows(lanes: tuple[int, int]) -> Pieces:
            return _merge((expert * self.rank + lanes[0], expert * self.rank + lanes[1]) for expert in self.experts)

        def columns(lanes: tuple[int, int]) -> Pieces:
            return _merge(
                (lane * num_experts + expert, lane * num_experts + expert + 1)
                for lane in range(*lanes)
                for expert in self.experts
            )

        every_lane = (0, self.rank)
        a_is_input = bool(fused_pair.a_is_input)
        a_lanes, b_lanes = (self.lanes, every_lane) if a_is_input else (every_lane, self.lanes)
        a_free, b_free = (self.inputs, self.outputs) if a_is_input else (self.outputs, self.inputs)
        side_in, side_out = fused.split_fused(
            scalable(read(pair.a.name, {0: rows(a_lanes), 1: a_free}), self.dtype),
            scalable(read(pair.b.name, {0: b_free, 1: columns(b_lanes)}), self.dtype),
            num_experts=len(self.experts),
            a_is_input=a_is_input,
        )
        return self._as_rows(side_in, num_experts + 1), self._as_rows(side_out * pair.scale, num_experts + 1)

    def _as_rows(self, rows: torch.Tensor, stored_experts: int) -> _Rows:
        return _Rows(experts=None if stored_experts == 1 else tuple(range(len(self.experts))), rows=rows)


def _cuts(plan: ExpertsPlan, mine: ExpertsSlice, dtype: torch.dtype) -> Iterator[_Cut]:
    target = plan.target
    F, D = target.intermediate_size, target.hidden_size
    experts = tuple(range(target.num_experts)) if mine.experts is None else mine.experts
    columns, hidden = mine.columns(F), mine.hidden(D)
    both = half_columns(columns, F, num_halves=2, is_interleaved=target.is_interleaved)
    ranks = {Projection(name): rank for name, rank in plan.ranks().items()}
    first_lane = {Projection.UP: ranks.get(Projection.GATE, 0)}
    for projection, rank in ranks.items():
        lanes = (0, rank)
        if mine.low_rank is not None and projection is not Projection.DOWN:
            part, first = mine.low_rank.of(_lanes(plan)), first_lane.get(projection, 0)
            lanes = (min(max(part.start - first, 0), rank), min(max(part.stop - first, 0), rank))
        is_down = projection is Projection.DOWN
        yield _Cut(
            target=target,
            projection=projection,
            experts=experts,
            lanes=lanes,
            rank=rank,
            inputs=columns.pieces if is_down else ((0, D),),
            outputs=hidden.pieces if is_down else both if projection is Projection.GATE_UP else columns.pieces,
            dtype=dtype,
        )


def _lanes(plan: ExpertsPlan) -> int:
    """Lanes of A of w13: of gate and up together, or of the one that serves both."""
    return sum([rank for name, rank in plan.ranks().items() if name != Projection.DOWN])


def _held_experts(plan: ExpertsPlan) -> tuple[int, ...]:
    """Global ids of all experts that the adapter touches, ascending."""
    if plan.stacked or plan.fused:
        return tuple(range(plan.target.num_experts))
    return tuple(sorted({expert for pairs in plan.single.values() for expert in pairs}))


def _merge(pieces: Iterable[tuple[int, int]]) -> Pieces:
    """Neighbours joined, so that they are read in one go."""
    merged: list[tuple[int, int]] = []
    for start, stop in pieces:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _spread(side: _Rows, experts: tuple[int, ...]) -> torch.Tensor:
    """Rows of all ``experts``, zero for those that this projection does not touch; one for all stays one."""
    if side.experts is None or side.experts == experts:
        return side.rows
    position = {expert: index for index, expert in enumerate(experts)}
    rows = side.rows.new_zeros(len(experts), *side.rows.shape[1:])
    rows[[position[expert] for expert in side.experts]] = side.rows
    return rows


def _join_gate_and_up(
    plan: ExpertsPlan, sides: Mapping[Projection, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
    """a13, b_gate, b_up, up_lane of ExpertsLoRA: one A for both where it was fused, else gate's rows before up's."""
    if Projection.GATE_UP in sides:
        shared, b13 = sides[Projection.GATE_UP]
        return shared, *split_halves(b13, num_halves=2, is_interleaved=plan.target.is_interleaved), 0
    gate, up = sides.get(Projection.GATE), sides.get(Projection.UP)
    if gate is None or up is None:
        a13 = gate[0] if gate else up[0] if up else None
        return a13, gate[1] if gate else None, up[1] if up else None, 0
    count = max(gate[0].shape[0], up[0].shape[0])
    a13 = torch.cat([a.expand(count, -1, -1) for a in (gate[0], up[0])], dim=1)
    return a13, gate[1], up[1], plan.ranks()[Projection.GATE]


def _padded(rows: torch.Tensor | None, size: int) -> torch.Tensor | None:
    return rows if rows is None or rows.shape[2] == size else pad_axis(rows, 2, size)

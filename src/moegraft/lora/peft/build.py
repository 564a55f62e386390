"""Reads what a plan names and turns it into the factors of ``moegraft.lora.targets``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moegraft.core.errors import AdapterTensorError
from moegraft.lora.peft import fused
from moegraft.lora.peft.plan import AdapterPlan, EmbeddingPlan, ExpertsPlan, FusedPair, LinearPlan, Pair
from moegraft.lora.peft.safetensors_file import TensorInfo, all_finite
from moegraft.lora.peft.sites import Projection
from moegraft.lora.targets import EmbeddingLoRA, ExpertsLoRA, ExpertsTarget, LinearLoRA

Read = Callable[[str], torch.Tensor]

# Rows of a base weight that are widened to float32 at a time (DoRA): bounds the memory for a large vocabulary.
_NORM_ROWS = 4096


def build_linear(plan: LinearPlan, read: Read, dtype: torch.dtype) -> LinearLoRA:
    """LoRA or DoRA (arXiv 2402.09353) of a linear map. Raises AdapterTensorError."""
    a, b = _read_pair(plan.pair, read)
    gain = None
    if plan.magnitude is not None:
        assert plan.target.weight is not None  # the plan checked it
        gain = read(plan.magnitude.name).to(b.dtype) / _row_norms(plan.target.weight(), a, b)
        b = b * gain
    return LinearLoRA(
        a=_cast(a, dtype, plan.pair.a.where),
        b=_cast(b, dtype, plan.pair.b.where),
        gain=None if plan.magnitude is None or gain is None else _cast(gain, dtype, plan.magnitude.where),
    )


def build_embedding(plan: EmbeddingPlan, read: Read, dtype: torch.dtype) -> EmbeddingLoRA:
    """LoRA of an embedding. Raises AdapterTensorError."""
    a, b = _read_pair(plan.pair, read)
    return EmbeddingLoRA(a=_cast(a, dtype, plan.pair.a.where), b=_cast(b, dtype, plan.pair.b.where))


def build_saved(
    plan: AdapterPlan, module: str, base: torch.Tensor, info: TensorInfo, read: Read
) -> torch.Tensor | None:
    """A saved parameter in the base's dtype; None where it equals the base's own, which PEFT saves along with LoRA.

    Raises AdapterTensorError; also where the module has LoRA and another base weight at once.
    """
    tensor = _cast(read(info.name), base.dtype, info.where)
    if not base.is_meta and torch.equal(tensor, base.detach().cpu()):
        return None
    if module in plan.linears or module in plan.embeddings:
        raise AdapterTensorError(f"{info.where}: differs from the base model's, and {module} has LoRA besides")
    return tensor


def build_experts(plan: ExpertsPlan, read: Read, dtype: torch.dtype) -> ExpertsLoRA:
    """LoRA of an experts module: all projections over one list of experts. Raises AdapterTensorError."""
    sides: dict[Projection, _Sides] = {}
    for projection, pairs in plan.single.items():
        sides[projection] = _single_rows(pairs, fused.sizes(plan.target, projection), read)
    for projection, pair in plan.stacked.items():
        sides[projection] = _stacked_rows(pair, read)
    for fused_pair in plan.fused:
        sides[fused_pair.projection] = _fused_rows(plan.target, fused_pair, read)
    experts = _union(plan.target, sides)
    spread = {projection: (_spread(a, experts), _spread(b, experts)) for projection, (a, b) in sides.items()}
    a13, b_gate, b_up, up_lane = _join_gate_and_up(plan.target, spread)
    a2, b2 = spread.get(Projection.DOWN, (None, None))
    file = plan.infos()[0].file.name
    factors = {"a13": a13, "b_gate": b_gate, "b_up": b_up, "a2": a2, "b2": b2}
    return ExpertsLoRA(
        expert_ids=experts,
        up_lane=up_lane,
        **{
            name: _cast(rows, dtype, f"{file}: {name} of {plan.target.name}")
            for name, rows in factors.items()
            if rows is not None
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rank rows of some experts: [len(experts), r, n]; ``experts`` None: [1, r, n], one for all."""

    experts: tuple[int, ...] | None
    rows: torch.Tensor


_Sides = tuple[_Rows, _Rows]  # of A and of B


def _single_rows(pairs: Mapping[int, Pair], sizes: tuple[int, int], read: Read) -> _Sides:
    """Experts of smaller rank get zero rows: exact, since a zero row of B undoes whatever A gives."""
    experts = tuple(sorted(pairs))
    rank = max(pair.rank for pair in pairs.values())
    a_rows, b_rows = (torch.zeros(len(experts), rank, size) for size in sizes)
    for position, expert in enumerate(experts):
        a, b = _read_pair(pairs[expert], read)
        a_rows[position, : a.shape[0]] = a
        b_rows[position, : b.shape[0]] = b
    return _Rows(experts=experts, rows=a_rows), _Rows(experts=experts, rows=b_rows)


def _stacked_rows(pair: Pair, read: Read) -> _Sides:
    a = _widen(read(pair.a.name))
    b = _widen(read(pair.b.name)).transpose(1, 2) * pair.scale
    return _as_rows(a), _as_rows(b)


def _fused_rows(target: ExpertsTarget, fused_pair: FusedPair, read: Read) -> _Sides:
    pair = fused_pair.pair
    side_in, side_out = fused.split_fused(
        _widen(read(pair.a.name)),
        _widen(read(pair.b.name)),
        num_experts=target.num_experts,
        a_is_input=bool(fused_pair.a_is_input),
    )
    everyone = tuple(range(target.num_experts))
    return _Rows(experts=everyone, rows=side_in), _Rows(experts=everyone, rows=side_out * pair.scale)


def _as_rows(rows: torch.Tensor) -> _Rows:
    return _Rows(experts=None if rows.shape[0] == 1 else tuple(range(rows.shape[0])), rows=rows)


def _union(target: ExpertsTarget, sides: Mapping[Projection, _Sides]) -> tuple[int, ...]:
    lists = [rows.experts for pair in sides.values() for rows in pair]
    if None in lists:
        return tuple(range(target.num_experts))
    return tuple(sorted({expert for experts in lists for expert in experts or ()}))


def _spread(side: _Rows, experts: tuple[int, ...]) -> torch.Tensor:
    """Rows of all ``experts``, zero for those that this projection does not touch; one for all stays one."""
    if side.experts is None or side.experts == experts:
        return side.rows
    position = {expert: index for index, expert in enumerate(experts)}
    rows = side.rows.new_zeros(len(experts), *side.rows.shape[1:])
    rows[[position[expert] for expert in side.experts]] = side.rows
    return rows


def _join_gate_and_up(
    target: ExpertsTarget, sides: Mapping[Projection, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
    """a13, b_gate, b_up, up_lane of ExpertsLoRA: one A for both where it was fused, else gate's rows before up's."""
    if Projection.GATE_UP in sides:
        shared, b13 = sides[Projection.GATE_UP]
        return shared, *fused.split_gate_up(b13, is_interleaved=target.is_interleaved), 0
    gate, up = sides.get(Projection.GATE), sides.get(Projection.UP)
    if gate is None or up is None:
        a13 = gate[0] if gate else up[0] if up else None
        return a13, gate[1] if gate else None, up[1] if up else None, 0
    count = max(gate[0].shape[0], up[0].shape[0])
    a13 = torch.cat([a.expand(count, -1, -1) for a in (gate[0], up[0])], dim=1)
    return a13, gate[1], up[1], gate[0].shape[1]


def _read_pair(pair: Pair, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and scale * B transposed [r, out], in float32 or wider."""
    return _widen(read(pair.a.name)), _widen(read(pair.b.name)).T * pair.scale


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||W + b^T a||_2 of each row: W [out, in], a [r, in], b [r, out] scaled."""
    norms = []
    for start in range(0, weight.shape[0], _NORM_ROWS):
        rows = weight[start : start + _NORM_ROWS].detach().to(device=a.device, dtype=b.dtype)
        delta = b[:, start : start + _NORM_ROWS].T @ a.to(b.dtype)
        norms.append(torch.linalg.vector_norm(rows + delta, dim=1))
    return torch.cat(norms)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _cast(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """To ``dtype``, contiguous. Raises AdapterTensorError where a value does not fit into it."""
    result = tensor.to(dtype).contiguous()
    if not all_finite(result):
        raise AdapterTensorError(f"{where}: a value, once scaled, is outside the range of {dtype}")
    return result

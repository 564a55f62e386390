"""Reads what a plan names, of all of it or of one rank's slice: linear maps, embeddings, saved parameters."""

from __future__ import annotations

import torch

from moegraft.core.errors import AdapterConfigError, AdapterTensorError
from moegraft.lora.peft.factors import Read, cast, widen
from moegraft.lora.peft.plan import AdapterPlan, EmbeddingPlan, LinearPlan, Pair
from moegraft.lora.peft.safetensors_file import TensorInfo
from moegraft.lora.slicing import Cuts, cut_lanes, cut_tensor
from moegraft.lora.targets import EmbeddingLoRA, LinearLoRA
from moegraft.parallel.rank_slice import WHOLE_LINEAR, LinearSlice, ParameterSlice, Pieces

# Rows of a base weight that are widened to float32 at a time (DoRA): bounds the memory for a large vocabulary.
_NORM_ROWS = 4096


def build_linear(plan: LinearPlan, read: Read, dtype: torch.dtype, mine: LinearSlice = WHOLE_LINEAR) -> LinearLoRA:
    """LoRA or DoRA (arXiv 2402.09353) of a linear map. Raises AdapterTensorError or AdapterConfigError."""
    gain = None
    if plan.magnitude is None:
        a, b = _read_pair(plan.pair, read, mine)
    else:
        # The norm of a row of W + BA takes all of A; what this rank does not keep of it is dropped again.
        a, b = _read_pair(plan.pair, read, LinearSlice(outputs=mine.outputs))
        magnitude = read(plan.magnitude.name, _cut(0, mine.outputs))
        gain = magnitude.to(b.dtype) / _row_norms(_base_rows(plan, mine), a, b)
        b = b * gain
        a = cut_tensor(cut_lanes(a, mine.lanes), _cut(1, mine.inputs))
    return LinearLoRA(
        a=cast(a, dtype, plan.pair.a.where),
        b=cast(b, dtype, plan.pair.b.where),
        gain=None if plan.magnitude is None or gain is None else cast(gain, dtype, plan.magnitude.where),
    )


def build_embedding(
    plan: EmbeddingPlan, read: Read, dtype: torch.dtype, mine: LinearSlice = WHOLE_LINEAR
) -> EmbeddingLoRA:
    """LoRA of an embedding. Raises AdapterTensorError."""
    a, b = _read_pair(plan.pair, read, mine)
    return EmbeddingLoRA(a=cast(a, dtype, plan.pair.a.where), b=cast(b, dtype, plan.pair.b.where))


def build_saved(
    plan: AdapterPlan,
    module: str,
    base: torch.Tensor,
    info: TensorInfo,
    read: Read,
    mine: ParameterSlice | None = None,
) -> torch.Tensor | None:
    """A saved parameter in the base's dtype; None where it equals the base's own, which PEFT saves along with LoRA.

    Raises AdapterTensorError; also where the module has LoRA and another base weight at once.
    """
    cuts = {} if mine is None else {mine.axis: mine.pieces}
    tensor = cast(read(info.name, cuts), base.dtype, info.where)
    if not base.is_meta and torch.equal(tensor, cut_tensor(base.detach(), cuts).cpu()):
        return None
    if module in plan.linears or module in plan.embeddings:
        raise AdapterTensorError(f"{info.where}: differs from the base model's, and {module} has LoRA besides")
    return tensor


def _read_pair(pair: Pair, read: Read, mine: LinearSlice) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and scale * B transposed [r, out], in float32 or wider."""
    lanes = None if mine.lanes is None else mine.lanes.of(pair.rank)
    cuts = {**_cut(0, None if lanes is None else lanes.pieces), **_cut(1, mine.inputs)}
    a = widen(read(pair.a.name, cuts))
    if lanes is not None and lanes.padding:
        a = torch.cat([a, a.new_zeros(lanes.padding, a.shape[1])])
    return a, widen(read(pair.b.name, _cut(0, mine.outputs))).T * pair.scale


def _cut(axis: int, pieces: Pieces | None) -> Cuts:
    return {} if pieces is None else {axis: pieces}


def _base_rows(plan: LinearPlan, mine: LinearSlice) -> torch.Tensor:
    """The rows of the base weight that this rank has outputs of; whole rows, since their norms are wanted."""
    target = plan.target
    assert target.weight is not None  # the plan checked it
    weight, rows = target.weight(), mine.num_outputs(target.out_features)
    if tuple(weight.shape) == (target.out_features, target.in_features):
        return cut_tensor(weight, _cut(0, mine.outputs))
    if tuple(weight.shape) == (rows, target.in_features):
        return weight
    assert plan.magnitude is not None
    raise AdapterConfigError(
        f"use_dora: {plan.magnitude.where} needs whole rows of the base weight of {target.name}, "
        f"[{target.out_features} or {rows}, {target.in_features}]; this rank has {list(weight.shape)}"
    )


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||W + b^T a||_2 of each row: W [out, in], a [r, in], b [r, out] scaled."""
    norms = []
    for start in range(0, weight.shape[0], _NORM_ROWS):
        rows = weight[start : start + _NORM_ROWS].detach().to(device=a.device, dtype=b.dtype)
        delta = b[:, start : start + _NORM_ROWS].T @ a.to(b.dtype)
        norms.append(torch.linalg.vector_norm(rows + delta, dim=1))
    return torch.cat(norms)

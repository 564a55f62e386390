"""Checks one adapter's tensors against the layout and lays each of them out as a matrix of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from moegraft.core.errors import AdapterMismatchError, AdapterTensorError
from moegraft.core.tables import ExpertsFactor, LinearFactor
from moegraft.lora.bank.layout import BankLayout, FactorRows
from moegraft.lora.targets import AdapterWeights, EmbeddingLoRA, ExpertsLoRA, ExpertsTarget, LinearLoRA


def collect_factors(layout: BankLayout, weights: AdapterWeights) -> list[FactorRows]:
    """Every factor of an adapter. Raises AdapterTensorError or AdapterMismatchError, naming module and factor."""
    factors: list[FactorRows] = []
    for module, part in weights.unfinished.items():
        raise AdapterTensorError(f"{part.where}: DoRA of {module} has the norms of one rank only; expected finish_dora")
    for module, experts in weights.experts.items():
        factors += _experts_factors(layout, module, experts)
    for module, linear in weights.linears.items():
        if module not in layout.linears:
            raise AdapterMismatchError(f"the base model has no linear map {module!r}")
        factors += _matrix_factors(layout, module, linear)
    for module, embedding in weights.embeddings.items():
        if module not in layout.embeddings:
            raise AdapterMismatchError(f"the base model has no embedding {module!r}")
        factors += _matrix_factors(layout, module, embedding)
    for module, params in weights.saved.items():
        for param, tensor in params.items():
            factors.append(_saved_factor(layout, module, param, tensor))
    return factors


def _experts_factors(layout: BankLayout, module: str, lora: ExpertsLoRA) -> Iterator[FactorRows]:
    target = layout.experts.get(module)
    if target is None:
        raise AdapterMismatchError(f"the base model has no experts module {module!r}")
    tensors = {
        ExpertsFactor.A13: lora.a13,
        ExpertsFactor.B_GATE: lora.b_gate,
        ExpertsFactor.B_UP: lora.b_up,
        ExpertsFactor.A2: lora.a2,
        ExpertsFactor.B2: lora.b2,
        ExpertsFactor.GAIN_GATE: lora.gain_gate,
        ExpertsFactor.GAIN_UP: lora.gain_up,
        ExpertsFactor.GAIN2: lora.gain2,
    }
    held = {factor: tensor for factor, tensor in tensors.items() if tensor is not None}
    _check_expert_ids(module, target, lora, any_factor=bool(held))
    first = layout.module_entries(module).start
    for factor, tensor in held.items():
        entry = layout.entries[first + factor]
        where = f"{module} {entry.label}"
        num_held = len(lora.expert_ids)
        if tensor.dim() != 3 or tensor.shape[0] not in (1, num_held) or tensor.shape[2] != entry.row_len:
            wanted = f"[{num_held} or 1, rank, {entry.row_len}]"
            raise AdapterTensorError(f"{where}: shape {list(tensor.shape)}, expected {wanted}")
        _check_rank_and_dtype(layout, where, tensor, rank=tensor.shape[1])
        yield FactorRows(
            entry=first + factor,
            rank=tensor.shape[1],
            copies=tensor.shape[0],
            lane=lora.up_lane if factor is ExpertsFactor.B_UP else 0,
            rows=tensor.detach().reshape(-1, entry.row_len),
        )
    _check_partners(module, target, lora)


def _check_expert_ids(module: str, target: ExpertsTarget, lora: ExpertsLoRA, *, any_factor: bool) -> None:
    ids = lora.expert_ids
    if any_factor and not ids:
        raise AdapterTensorError(f"{module}: holds factors but no expert ids")
    if any(left >= right for left, right in itertools.pairwise(ids)):
        raise AdapterTensorError(f"{module}: expert ids {list(ids)} are not strictly ascending")
    if ids and (ids[0] < 0 or ids[-1] >= target.num_experts):
        raise AdapterMismatchError(f"{module}: expert ids {ids[0]}..{ids[-1]}, the base has {target.num_experts}")


def _check_partners(module: str, target: ExpertsTarget, lora: ExpertsLoRA) -> None:
    """An A without a B, a B that reads lanes which its A lacks, a gate where the expert has none."""
    if lora.b_gate is not None and not target.has_gate:
        raise AdapterMismatchError(f"{module} b_gate: the base model's experts have no gate")
    if (lora.a13 is None) != (lora.b_gate is None and lora.b_up is None):
        raise AdapterTensorError(f"{module}: a13 needs b_gate or b_up beside it, and they need a13")
    if (lora.a2 is None) != (lora.b2 is None):
        raise AdapterTensorError(f"{module}: a2 and b2 come together or not at all")
    gains = (("gain_gate", lora.gain_gate, lora.b_gate), ("gain_up", lora.gain_up, lora.b_up))
    for name, gain, b in (*gains, ("gain2", lora.gain2, lora.b2)):
        if gain is not None and (b is None or gain.shape[1] != 1):
            raise AdapterTensorError(f"{module} {name}: shape {list(gain.shape)}, expected one row beside a B")
    pairs = (
        ("b_gate", lora.b_gate, "a13", lora.a13, 0),
        ("b_up", lora.b_up, "a13", lora.a13, lora.up_lane),
    )
    for b_name, b, a_name, a, lane in pairs:
        if a is not None and b is not None and (lane < 0 or lane + b.shape[1] > a.shape[1] * target.lane_shares):
            raise AdapterTensorError(
                f"{module} {b_name}: reads lanes {lane} to {lane + b.shape[1]}, {a_name} has "
                f"{a.shape[1] * target.lane_shares}"
            )
    if lora.a2 is not None and lora.b2 is not None and lora.a2.shape[1] != lora.b2.shape[1]:
        raise AdapterTensorError(f"{module}: a2 has rank {lora.a2.shape[1]}, b2 has rank {lora.b2.shape[1]}")


def _matrix_factors(layout: BankLayout, module: str, lora: LinearLoRA | EmbeddingLoRA) -> Iterator[FactorRows]:
    first = layout.module_entries(module).start
    tensors = {LinearFactor.A: lora.a, LinearFactor.B: lora.b}
    if isinstance(lora, LinearLoRA) and lora.gain is not None:
        tensors[LinearFactor.GAIN] = lora.gain
    rank = lora.a.shape[0] if lora.a.dim() else 0
    shares = layout.linears[module].lane_shares if module in layout.linears else 1
    ranks = {LinearFactor.A: rank, LinearFactor.B: rank}
    if shares > 1 and lora.b.dim() and -(-lora.b.shape[0] // shares) == rank:
        ranks[LinearFactor.B] = lora.b.shape[0]
    for factor, tensor in tensors.items():
        entry = layout.entries[first + factor]
        where = f"{module} {entry.label}"
        expected = [entry.row_len] if factor is LinearFactor.GAIN else [ranks[factor], entry.row_len]
        if list(tensor.shape) != expected:
            raise AdapterTensorError(f"{where}: shape {list(tensor.shape)}, expected {expected}")
        _check_rank_and_dtype(layout, where, tensor, rank=rank)
        rows = tensor.detach().reshape(-1, entry.row_len)
        yield FactorRows(entry=first + factor, rank=rows.shape[0], copies=1, lane=0, rows=rows)


def _check_rank_and_dtype(layout: BankLayout, where: str, tensor: torch.Tensor, *, rank: int) -> None:
    if rank < 1:
        raise AdapterTensorError(f"{where}: rank {rank}, expected at least 1")
    if tensor.dtype != layout.dtype:
        raise AdapterTensorError(f"{where}: dtype {tensor.dtype}, expected {layout.dtype}")


def _saved_factor(layout: BankLayout, module: str, param: str, tensor: torch.Tensor) -> FactorRows:
    saved = layout.saved_entry(module, param)
    if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
        raise AdapterTensorError(
            f"{module}.{param}: {list(tensor.shape)} {tensor.dtype}, expected {list(saved.shape)} {saved.dtype}"
        )
    row_len = layout.entries[saved.index].row_len
    rows = _as_bank_rows(tensor.detach(), saved.rows, row_len, layout.dtype)
    return FactorRows(entry=saved.index, rank=saved.rows, copies=1, lane=0, rows=rows)


def _as_bank_rows(tensor: torch.Tensor, rows: int, row_len: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's bits as [rows, row_len] of ``dtype``; each row is padded to whole elements of the bank."""
    if rows == 0:
        return torch.empty(0, row_len, dtype=dtype)
    row_bytes = tensor.numel() // rows * tensor.dtype.itemsize
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).reshape(rows, row_bytes)
    padding = row_len * dtype.itemsize - row_bytes
    if padding:
        bits = F.pad(bits, (0, padding))
    return bits.view(dtype)


def from_bank_rows(rows: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of ``_as_bank_rows``: a copy's [rows, row_len] back to the parameter's shape and dtype."""
    row_bytes = math.prod(shape) // rows.shape[0] * dtype.itemsize
    return rows.contiguous().view(torch.uint8)[:, :row_bytes].contiguous().view(dtype).reshape(shape)

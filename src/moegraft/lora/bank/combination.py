"""Several adapters as one (PEFT's ``cat``): A and B side by side along the rank, the weights folded into B."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from moegraft.core.errors import BatchError
from moegraft.core.tables import ExpertsFactor, LinearFactor
from moegraft.files import limits
from moegraft.lora.bank.handle import AdapterHandle
from moegraft.lora.bank.layout import read_rows
from moegraft.lora.targets import AdapterWeights, EmbeddingLoRA, ExpertsLoRA, LinearLoRA

if TYPE_CHECKING:
    from moegraft.lora.bank.bank import AdapterBank


Combination = tuple[tuple[str, float], ...]
"""Adapters that add up: (name, weight)."""


class Part(NamedTuple):
    """An adapter of a combination, its weight, and its pages on the host."""

    handle: AdapterHandle
    weight: float
    image: torch.Tensor


class _Lanes(NamedTuple):
    """The first projections of one part: A of gate and of up [h|1, r, D], B of both [h|1, r, F]; None: not touched.

    ``shares_a``: gate and up have one A.
    """

    a_gate: torch.Tensor | None
    b_gate: torch.Tensor | None
    a_up: torch.Tensor | None
    b_up: torch.Tensor | None
    shares_a: bool


def combine(bank: AdapterBank, adapters: Sequence[tuple[str, float]]) -> AdapterWeights:
    """What ``adapters`` (name, weight) add together, in the bank's dtype: delta = Σ weight · B A.

    The rank of a module is the sum of theirs. Raises UnknownAdapterError; BatchError where one of them does more than
    add a delta, or a weighted B is out of range.
    """
    for name, _ in adapters:
        check_combines(bank, name)
    parts = [Part(bank.get(name), weight, bank.image(name)) for name, weight in adapters]
    modules = dict.fromkeys(module for part in parts for module in part.handle.ranks)
    layout = bank.layout
    return AdapterWeights(
        experts={module: _experts(bank, module, parts) for module in modules if module in layout.experts},
        linears={
            module: LinearLoRA(**_matrices(bank, module, parts)) for module in modules if module in layout.linears
        },
        embeddings={
            module: EmbeddingLoRA(**_matrices(bank, module, parts)) for module in modules if module in layout.embeddings
        },
        is_combined=True,
    )


def check_combines(bank: AdapterBank, name: str) -> None:
    """Raises UnknownAdapterError; BatchError, by the adapter's name and what it has, for more than deltas."""
    handle = bank.get(name)
    layout, refusal = bank.layout, f"adapters=: {handle.name!r} cannot be combined with others: it"
    if handle.saved:
        module, param = min(handle.saved)
        raise BatchError(f"{refusal} replaces {module}.{param} (modules_to_save)")
    if handle.tokens:
        raise BatchError(f"{refusal} replaces rows of {min(handle.tokens)} (trainable_token_indices)")
    for module, ranks in handle.ranks.items():
        if any(ranks[ExpertsFactor.GAIN_GATE if module in layout.experts else LinearFactor.GAIN :]):
            raise BatchError(f"{refusal} has DoRA on {module}")
        target = layout.experts.get(module) or layout.linears.get(module)
        if target is not None and target.lane_shares > 1:
            raise BatchError(f"{refusal} is fully sharded, and this rank has a part of the lanes of {module}")


def _matrices(bank: AdapterBank, module: str, parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    held = [part for part in parts if module in part.handle.ranks]
    return {
        "a": torch.cat([_factor(bank, part, module, LinearFactor.A)[0] for part in held]),
        "b": torch.cat([_weighted(_factor(bank, part, module, LinearFactor.B)[0], part, module) for part in held]),
    }


def _experts(bank: AdapterBank, module: str, parts: Iterable[Part]) -> ExpertsLoRA:
    held = [part for part in parts if module in part.handle.ranks]
    experts = tuple(sorted({expert for part in held for expert in part.handle.expert_ids[module]}))

    def read(part: Part, factor: ExpertsFactor) -> torch.Tensor | None:
        if not part.handle.ranks[module][factor]:
            return None
        rows, own = _factor(bank, part, module, factor), part.handle.expert_ids[module]
        if factor in (ExpertsFactor.B_GATE, ExpertsFactor.B_UP, ExpertsFactor.B2):
            rows = _weighted(rows, part, module)
        if own == experts:
            return rows
        spread = rows.new_zeros(len(experts), *rows.shape[1:])
        spread[[experts.index(expert) for expert in own]] = rows
        return spread

    up_entry = bank.layout.factor_entry(module, ExpertsFactor.B_UP)
    first = [_lanes(part, up_entry, read) for part in held if part.handle.ranks[module][ExpertsFactor.A13]]
    a13, b_gate, b_up, up_lane = _join(first)
    return ExpertsLoRA(
        expert_ids=experts,
        a13=a13,
        b_gate=b_gate,
        b_up=b_up,
        up_lane=up_lane,
        a2=_cat(read(part, ExpertsFactor.A2) for part in held),
        b2=_cat(read(part, ExpertsFactor.B2) for part in held),
    )


def _lanes(part: Part, up_entry: int, read: Callable[[Part, ExpertsFactor], torch.Tensor | None]) -> _Lanes:
    a13, b_gate, b_up = (read(part, factor) for factor in (ExpertsFactor.A13, ExpertsFactor.B_GATE, ExpertsFactor.B_UP))
    assert a13 is not None
    placement = part.handle.space.placements.get(up_entry)
    up_lane = 0 if placement is None else placement.lane
    a_gate = None if b_gate is None else a13[:, : b_gate.shape[1]]
    a_up = None if b_up is None else a13[:, up_lane : up_lane + b_up.shape[1]]
    shares_a = a_gate is not None and a_up is not None and up_lane == 0 and a_gate.shape == a_up.shape
    return _Lanes(a_gate, b_gate, a_up, b_up, shares_a)


def _join(
    parts: Sequence[_Lanes],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
    """a13, b_gate, b_up and up_lane: one A where every part has one for gate and up, else gate's lanes before up's."""
    b_gate, b_up = _cat(part.b_gate for part in parts), _cat(part.b_up for part in parts)
    a_gate = _cat(part.a_gate for part in parts)
    if parts and all(part.shares_a for part in parts):
        return a_gate, b_gate, b_up, 0
    a13 = _cat([a_gate, _cat(part.a_up for part in parts)])
    return a13, b_gate, b_up, 0 if b_gate is None or b_up is None else b_gate.shape[1]


def _cat(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Along the rank. One factor that serves all experts stays one where all of them do."""
    held = [tensor for tensor in tensors if tensor is not None]
    if not held:
        return None
    count = max(tensor.shape[0] for tensor in held)
    return torch.cat([tensor.expand(count, -1, -1) for tensor in held], dim=1).contiguous()


def _factor(bank: AdapterBank, part: Part, module: str, factor: ExpertsFactor | LinearFactor) -> torch.Tensor:
    """[copies, rank, row_len]; one copy where a factor serves all experts, or there are none."""
    entry = bank.layout.factor_entry(module, factor)
    placement, row_len = part.handle.space.placements[entry], bank.layout.entries[entry].row_len
    rows = read_rows(part.image, placement, row_len, bank.layout.rows_per_page(entry))
    return rows.view(placement.copies, placement.rank, row_len)


def _weighted(b: torch.Tensor, part: Part, module: str) -> torch.Tensor:
    if part.weight == 1:
        return b
    result = (b.float() * part.weight).to(b.dtype)
    if not result.isfinite().all():
        raise BatchError(
            f"adapters=: B of {part.handle.name!r} on {module}, times {part.weight}, is outside the range of {b.dtype}"
        )
    return result


def parse_combination(entry: Iterable[object], loaded: str) -> Combination:
    """One row's adapters: names, or (name, weight); each name once. Raises BatchError."""
    parts = []
    for item in itertools.islice(entry, limits.MAX_COMBINED + 1):
        name, weight = (item, 1.0) if isinstance(item, str) else _pair(item)
        if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BatchError(
                f"adapters=: found {item!r} among the adapters of one row, expected a name or (name, weight); "
                f"loaded: {loaded}"
            )
        if not abs(weight) < limits.MAX_COMBINED_WEIGHT:  # false for NaN as well
            raise BatchError(f"adapters=: {name!r} has the weight {weight}, expected a finite number")
        parts.append((name, float(weight)))
    if not 1 <= len(parts) <= limits.MAX_COMBINED or len({name for name, _ in parts}) < len(parts):
        raise BatchError(
            f"adapters=: found {[name for name, _ in parts]} for one row, expected 1 to {limits.MAX_COMBINED} names"
        )
    return tuple(parts)


def _pair(item: object) -> tuple[object, object]:
    return (item[0], item[1]) if isinstance(item, tuple | list) and len(item) == 2 else (None, None)

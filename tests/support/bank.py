"""A small base model for the adapter bank, random adapters for it, and the address formula in plain Python."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch

from moegraft.core.tables import ExpertsFactor, Field, LinearFactor
from moegraft.lora.bank import AdapterBank, AdapterHandle, BankLayout
from moegraft.lora.targets import (
    AdapterWeights,
    EmbeddingLoRA,
    EmbeddingTarget,
    ExpertsLoRA,
    ExpertsTarget,
    LinearLoRA,
    LinearTarget,
    ModelTargets,
)

HIDDEN = 8


def make_targets() -> ModelTargets:
    """Two experts modules of different sizes (one without a gate), linear maps, an embedding, saveable parameters."""
    linears = (
        LinearTarget(name="q", in_features=HIDDEN, out_features=20),
        LinearTarget(name="odd", in_features=7, out_features=3),
        LinearTarget(name="router", in_features=HIDDEN, out_features=5, router=True),
    )
    return ModelTargets(
        model_type="tiny",
        experts={
            "layers.0": ExpertsTarget(name="layers.0", num_experts=5, hidden_size=HIDDEN, intermediate_size=12),
            "layers.1": ExpertsTarget(
                name="layers.1", num_experts=3, hidden_size=HIDDEN, intermediate_size=6, has_gate=False
            ),
        },
        linears={linear.name: linear for linear in linears},
        embeddings={"embed": EmbeddingTarget(name="embed", num_embeddings=33, embedding_dim=HIDDEN)},
        saveable={
            "norm": {"weight": torch.zeros(HIDDEN, dtype=torch.bfloat16)},
            "router": {"weight": torch.zeros(5, HIDDEN), "bias": torch.zeros(5), "calls": torch.tensor(0)},
            "conv": {"weight": torch.zeros(4, 2, 3, dtype=torch.bfloat16), "mask": torch.zeros(3, dtype=torch.bool)},
            "empty": {"weight": torch.zeros(0, HIDDEN)},
        },
    )


def make_bank(
    dtype: torch.dtype = torch.float32,
    *,
    pages: int = 64,
    page_bytes: int = 384,
    max_slots: int = 4,
    device: str = "cpu",
) -> AdapterBank:
    """A bank of ``pages`` small pages, poisoned, so that most factors span several of them."""
    layout = BankLayout(make_targets(), dtype=dtype, page_bytes=page_bytes)
    return AdapterBank(
        layout, capacity_bytes=pages * layout.page_bytes, device=device, max_slots=max_slots, poison=True
    )


def random_weights(rng: random.Random, *, dtype: torch.dtype = torch.float32, max_rank: int = 6) -> AdapterWeights:
    """An adapter that touches a random part of ``make_targets()``; nothing at all, now and then."""
    targets = make_targets()
    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def some(names: Iterable[str]) -> list[str]:
        return [name for name in names if rng.random() < 0.5]

    def bits(like: torch.Tensor) -> torch.Tensor:
        if like.dtype == torch.bool:
            return torch.rand(like.shape, generator=generator) < 0.5
        return (torch.randn(like.shape, generator=generator) * 100).to(like.dtype)

    def experts(target: ExpertsTarget) -> ExpertsLoRA:
        ids = tuple(sorted(rng.sample(range(target.num_experts), rng.randint(1, target.num_experts))))
        hidden, inter = target.hidden_size, target.intermediate_size
        gate = rng.randint(1, max_rank) if target.has_gate and rng.random() < 0.7 else 0
        up = rng.randint(1, max_rank) if not gate or rng.random() < 0.7 else 0
        down = rng.randint(0, max_rank)
        up_lane = gate if rng.random() < 0.5 else 0

        def copies() -> int:
            return rng.choice((len(ids), 1))

        return ExpertsLoRA(
            expert_ids=ids,
            a13=draw(copies(), max(gate, up_lane + up), hidden),
            b_gate=draw(copies(), gate, inter) if gate else None,
            b_up=draw(copies(), up, inter) if up else None,
            up_lane=up_lane,
            a2=draw(copies(), down, inter) if down else None,
            b2=draw(copies(), down, hidden) if down else None,
            gain_gate=draw(copies(), 1, inter) if gate and rng.random() < 0.3 else None,
            gain2=draw(copies(), 1, hidden) if down and rng.random() < 0.3 else None,
        )

    def linear(target: LinearTarget) -> LinearLoRA:
        rank = rng.randint(1, max_rank)
        gain = draw(target.out_features) if rng.random() < 0.5 else None
        return LinearLoRA(a=draw(rank, target.in_features), b=draw(rank, target.out_features), gain=gain)

    rank = rng.randint(1, max_rank)
    saved = {
        module: {param: bits(params[param]) for param in some(params)} for module, params in targets.saveable.items()
    }
    return AdapterWeights(
        experts={name: experts(targets.experts[name]) for name in some(targets.experts)},
        linears={name: linear(targets.linears[name]) for name in some(targets.linears)},
        embeddings={name: EmbeddingLoRA(a=draw(rank, 33), b=draw(rank, HIDDEN)) for name in some(targets.embeddings)},
        saved={module: params for module, params in saved.items() if params},
    )


def expected_factors(weights: AdapterWeights) -> dict[tuple[str, ExpertsFactor | LinearFactor], torch.Tensor]:
    """Every LoRA factor of an adapter under (module, factor), in the shape that ``AdapterBank.factor`` promises."""
    found: dict[tuple[str, ExpertsFactor | LinearFactor], torch.Tensor | None] = {}
    for module, lora in weights.experts.items():
        for factor in ExpertsFactor:
            found[module, factor] = getattr(lora, factor.name.lower())
    for module, linear in weights.linears.items():
        found[module, LinearFactor.A] = linear.a
        found[module, LinearFactor.B] = linear.b
        found[module, LinearFactor.GAIN] = None if linear.gain is None else linear.gain[None]
    for module, embedding in weights.embeddings.items():
        found[module, LinearFactor.A] = embedding.a
        found[module, LinearFactor.B] = embedding.b
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def all_factors(bank: AdapterBank) -> list[tuple[str, ExpertsFactor | LinearFactor]]:
    layout = bank.layout
    keys: list[tuple[str, ExpertsFactor | LinearFactor]] = []
    keys += [(module, factor) for module in layout.experts for factor in ExpertsFactor]
    keys += [(module, factor) for module in layout.linears for factor in LinearFactor]
    keys += [(module, factor) for module in layout.embeddings for factor in (LinearFactor.A, LinearFactor.B)]
    return keys


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, NaN included; they may be on different devices."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    flat = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


def assert_content(bank: AdapterBank, handle: AdapterHandle, weights: AdapterWeights) -> None:
    """Every factor and saved parameter of a resident adapter reads back bit by bit, and nothing else is there."""
    expected = expected_factors(weights)
    for module, factor in all_factors(bank):
        stored = bank.factor(handle, module, factor)
        wanted = expected.get((module, factor))
        assert (stored is None) == (wanted is None), f"{handle.name}: {module} {factor!r}"
        assert stored is None or wanted is None or same_bits(stored, wanted), f"{handle.name}: {module} {factor!r}"
    for module, params in bank.layout.saved.items():
        for param in params:
            stored = bank.saved(handle, module, param)
            wanted = weights.saved.get(module, {}).get(param)
            assert (stored is None) == (wanted is None), f"{handle.name}: {module}.{param}"
            assert stored is None or wanted is None or same_bits(stored, wanted), f"{handle.name}: {module}.{param}"


def rows_by_formula(bank: AdapterBank, *, slot: int, entry: int, row_len: int, position: int) -> list[list[float]]:
    """The rank rows of the expert at ``position``, read one by one as ``core/tables.py`` says."""
    pool, page_table = bank.pool.data, bank.tables.page_table
    page_elems = bank.layout.page_elems
    fields = bank.tables.factors[slot, entry].tolist()
    rows = []
    for j in range(fields[Field.RANK]):
        row = position * fields[Field.EXPERT_STRIDE] + j
        k = page_elems // row_len
        page = int(page_table[slot, fields[Field.FIRST_PAGE] + row // k])
        elem = page * page_elems + fields[Field.OFFSET] + (row % k) * row_len
        rows.append(pool[elem : elem + row_len].tolist())
    return rows

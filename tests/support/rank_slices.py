"""A small layer, and what a rank of a world holds of it. Imports little: every rank of a test imports it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moegraft.core.cuts import cut_tensor
from moegraft.core.errors import AdapterTensorError
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.peft import load_peft_adapter
from moegraft.lora.targets import (
    AdapterWeights,
    EmbeddingTarget,
    ExpertsTarget,
    LinearTarget,
    ModelTargets,
    finish_dora,
    local_targets,
)
from moegraft.parallel import (
    LinearSlice,
    ParallelConfig,
    ParallelGroups,
    ParameterSlice,
    RankSlice,
    Share,
    column_parallel,
    experts_slice,
    row_parallel,
)

EXPERTS = "model.layers.0.mlp.experts"
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


def make_targets(
    *, num_experts: int = 6, hidden: int = 10, inter: int = 19, vocabulary: int = 33, **experts: bool
) -> ModelTargets:
    """A layer whose sizes no world divides."""
    generator = torch.Generator().manual_seed(3)
    shapes = {Q_PROJ: (14, hidden), O_PROJ: (hidden, 14), HEAD: (vocabulary, hidden)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return ModelTargets(
        model_type="mixtral",
        experts={
            EXPERTS: ExpertsTarget(
                name=EXPERTS, num_experts=num_experts, hidden_size=hidden, intermediate_size=inter, **experts
            )
        },
        linears={
            name: LinearTarget(
                name=name,
                in_features=weight.shape[1],
                out_features=weight.shape[0],
                weight=lambda weight=weight: weight,
            )
            for name, weight in weights.items()
        },
        embeddings={EMBED: EmbeddingTarget(name=EMBED, num_embeddings=vocabulary, embedding_dim=hidden)},
        saveable={HEAD: {"weight": weights[HEAD]}, "model.norm": {"weight": torch.ones(hidden)}},
    )


def make_rank_slice(
    targets: ModelTargets, tp: Share, ep: Share, *, fully_sharded: bool = False, experts: tuple[int, ...] | None = None
) -> RankSlice:
    """q column parallel, o row parallel, head and embedding along the vocabulary."""
    linears = targets.linears
    return RankSlice(
        experts={
            name: experts_slice(
                num_experts=target.num_experts,
                intermediate_size=target.intermediate_size,
                tp=tp,
                ep=ep,
                experts=experts,
                fully_sharded=fully_sharded,
            )
            for name, target in targets.experts.items()
        },
        linears={
            Q_PROJ: column_parallel(linears[Q_PROJ].out_features, tp, fully_sharded=fully_sharded),
            O_PROJ: row_parallel(
                linears[O_PROJ].in_features, linears[O_PROJ].out_features, tp, fully_sharded=fully_sharded
            ),
            HEAD: column_parallel(linears[HEAD].out_features, tp, fully_sharded=fully_sharded),
            EMBED: LinearSlice(inputs=tp.of(targets.embeddings[EMBED].num_embeddings).pieces),
        },
        saved={(HEAD, "weight"): ParameterSlice(axis=0, pieces=tp.of(linears[HEAD].out_features).pieces)},
    )


def check_bank_takes(targets: ModelTargets, mine: RankSlice, weights: AdapterWeights, bytes_held: int) -> None:
    bank = AdapterBank(
        BankLayout(local_targets(targets, mine), dtype=torch.float32), capacity_bytes=2**22, device="cpu"
    )
    bank.load("a", weights)
    bank.check_integrity()
    assert bank.info("a").num_bytes == bytes_held


def targets_of_rank(mine: RankSlice) -> ModelTargets:
    """With base weights of which a rank has its rows (q), or its columns (o)."""
    targets = make_targets()
    linears = dict(targets.linears)
    for name, axis, pieces in (
        (Q_PROJ, 0, mine.linears[Q_PROJ].outputs),
        (O_PROJ, 1, mine.linears[O_PROJ].inputs),
    ):
        assert pieces is not None
        weight = cut_tensor(linears[name].weight(), {axis: pieces})  # type: ignore[misc]
        linears[name] = replace(linears[name], weight=lambda weight=weight: weight)  # type: ignore[misc]
    return replace(targets, linears=linears)


def load_dora(folder: Path, fully_sharded: bool) -> tuple[AdapterWeights, int]:
    """In every rank: its slice of an adapter with DoRA, finished with the others; and how many exchanges that took."""
    groups = ParallelGroups.create(ParallelConfig(tp=2, ep=dist.get_world_size() // 2))
    mine = make_rank_slice(
        make_targets(), Share(groups.tp.size, groups.tp.rank), Share(1, 0), fully_sharded=fully_sharded
    )
    targets = targets_of_rank(mine)
    weights, report = load_peft_adapter(folder, targets, dtype=torch.float32, rank_slice=mine)
    assert set(weights.linears) == {Q_PROJ} and set(weights.unfinished) == {O_PROJ}
    bank = AdapterBank(
        BankLayout(local_targets(targets, mine), dtype=torch.float32), capacity_bytes=2**22, device="cpu"
    )
    try:
        bank.load("a", weights)
    except AdapterTensorError as error:
        assert "o_proj has the norms of one rank only; expected finish_dora" in str(error)
    else:
        raise AssertionError("the bank took an adapter that is not finished")
    finished = finish_dora(weights, groups)
    assert finish_dora(finished, groups) is finished
    check_bank_takes(targets, mine, finished, report.bytes_held)
    return finished, groups.control.traffic.calls["all_reduce"]

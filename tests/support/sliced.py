"""Adapter folders of every layout for the layer of ``rank_slices``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moegraft.lora.targets import ModelTargets
from support.adapters import PREFIX, TensorFactory, write_adapter
from support.families import LegacyNames
from support.rank_slices import EMBED, EXPERTS, HEAD, O_PROJ, Q_PROJ

NAMES = LegacyNames(gate="gate_proj", up="up_proj", down="down_proj")


def _per_expert(folder: Path, targets: ModelTargets) -> Path:
    target, factory = targets.experts[EXPERTS], TensorFactory()
    for expert in range(target.num_experts):
        factory.expert(EXPERTS, expert, target, NAMES, r=3)
    return write_adapter(folder, factory.tensors, r=3, use_rslora=True)


def _partial_mixed_ranks(folder: Path, targets: ModelTargets) -> Path:
    """Some experts, some projections of them, a rank of its own for each."""
    target, factory = targets.experts[EXPERTS], TensorFactory()
    hidden, inter = target.hidden_size, target.intermediate_size
    ranks = {}
    for expert, projection, r in (
        (0, "gate_proj", 3),
        (1, "gate_proj", 1),
        (1, "up_proj", 4),
        (3, "down_proj", 2),
        (4, "up_proj", 2),
        (4, "down_proj", 5),
    ):
        module = f"{EXPERTS}.{expert}.{projection}"
        sizes = (inter, hidden) if projection == "down_proj" else (hidden, inter)
        factory.linear(module, *sizes, r=r)
        ranks[module] = r
    return write_adapter(folder, factory.tensors, rank_pattern=ranks, alpha_pattern={f"{EXPERTS}.1.up_proj": 7})


def _fused(version: str) -> Callable[[Path, ModelTargets], Path]:
    def write(folder: Path, targets: ModelTargets) -> Path:
        """Rank-major B; the version of PEFT says which side A lies on where the shapes do not."""
        target, factory = targets.experts[EXPERTS], TensorFactory()
        hidden, inter, E = target.hidden_size, target.intermediate_size, target.num_experts
        halves = 2 if target.has_gate else 1
        is_input = (version == "0.19.1") != target.is_transposed
        sizes13, sizes2 = (hidden, halves * inter), (inter, hidden)
        factory.fused(f"{EXPERTS}.base_layer", E, *(sizes13 if is_input else sizes13[::-1]), r=3)
        factory.fused(EXPERTS, E, *(sizes2 if is_input else sizes2[::-1]), r=3)
        params = ["mlp.experts.gate_up_proj" if target.has_gate else "mlp.experts.up_proj", "mlp.experts.down_proj"]
        return write_adapter(folder, factory.tensors, r=3, peft_version=version, target_parameters=params)

    return write


def _shared_outer(folder: Path, targets: ModelTargets) -> Path:
    target, factory = targets.experts[EXPERTS], TensorFactory()
    hidden, inter, E = target.hidden_size, target.intermediate_size, target.num_experts
    tensors = {}
    for projection, a_shape, b_shape in (
        ("w1", (1, 3, hidden), (E, inter, 3)),
        ("w3", (1, 3, hidden), (E, inter, 3)),
        ("w2", (E, 3, inter), (1, hidden, 3)),
    ):
        tensors[f"{PREFIX}{EXPERTS}.{projection}.lora_A.weight"] = factory.draw(*a_shape)
        tensors[f"{PREFIX}{EXPERTS}.{projection}.lora_B.weight"] = factory.draw(*b_shape)
    return write_adapter(folder, tensors, r=3)


def _linears(folder: Path, targets: ModelTargets) -> Path:
    """Linear maps, a head and an embedding, and a parameter that is replaced as a whole."""
    factory = TensorFactory()
    for name in (Q_PROJ, O_PROJ, HEAD):
        factory.linear(name, targets.linears[name].in_features, targets.linears[name].out_features, r=3)
    embed = targets.embeddings[EMBED]
    factory.tensors[f"{PREFIX}{EMBED}.lora_embedding_A"] = factory.draw(3, embed.num_embeddings)
    factory.tensors[f"{PREFIX}{EMBED}.lora_embedding_B"] = factory.draw(embed.embedding_dim, 3)
    factory.tensors[f"{PREFIX}model.norm.weight"] = factory.draw(embed.embedding_dim)
    return write_adapter(folder, factory.tensors, r=3)


def _dora_and_saved(folder: Path, targets: ModelTargets) -> Path:
    factory = TensorFactory()
    for name in (Q_PROJ, O_PROJ):
        factory.linear(name, targets.linears[name].in_features, targets.linears[name].out_features, r=3)
        factory.tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = factory.draw(targets.linears[name].out_features)
    factory.tensors[f"{PREFIX}{HEAD}.weight"] = factory.draw(*targets.saveable[HEAD]["weight"].shape)
    return write_adapter(folder, factory.tensors, r=3, use_dora=True)


ADAPTERS: dict[str, Callable[[Path, ModelTargets], Path]] = {
    "per_expert_rslora": _per_expert,
    "partial_mixed_ranks": _partial_mixed_ranks,
    "fused": _fused("0.19.1"),
    "fused_old": _fused("0.18.0"),
    "shared_outer": _shared_outer,
    "linears": _linears,
    "dora_and_saved": _dora_and_saved,
}

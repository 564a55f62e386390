"""What an adapter may touch in a base model, as plain data: integrations fill it, the loader and the bank read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from moegraft.core.cuts import cut_tensor
from moegraft.core.errors import AdapterTensorError, ParallelError
from moegraft.formats.base import ExpertsWeights
from moegraft.parallel.groups import ParallelGroups
from moegraft.parallel.slices import ExpertsSlice, LinearSlice, ParameterSlice, Pieces, RankSlice, count


@dataclass(frozen=True, kw_only=True)
class ExpertsTarget:
    """One fused experts module.

    ``w13_param`` / ``w2_param`` are the parameter names inside the module (``gate_up_proj`` or, without a gate,
    ``up_proj``; ``down_proj``). Stored shapes: [E, G*F, D] and [E, D, F]; transposed: [E, D, G*F] and [E, F, D].
    ``is_interleaved``: gate and up alternate along the G*F axis (gpt-oss) instead of standing one after the other.

    ``weights`` gives the base weights on demand (DoRA norms).

    What one rank of a fully sharded world holds: ``output_size`` columns of D of B of w2 (None: all of them), and one
    of ``lane_shares`` shares of the rank rows of A of w13.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True
    is_transposed: bool = False
    is_interleaved: bool = False
    w13_param: str = "gate_up_proj"
    w2_param: str = "down_proj"
    weights: Callable[[], ExpertsWeights] | None = field(default=None, compare=False, repr=False)
    output_size: int | None = None
    lane_shares: int = 1


@dataclass(frozen=True, kw_only=True)
class LinearTarget:
    """One linear map y = x W^T (+ b): an nn.Linear, a router's weight Parameter, or an lm_head.

    ``param`` is the Parameter's name inside the module (``weight``); ``weight`` gives it on demand (DoRA norms).
    ``router``: what multiplies with ``param`` does not call the module as an nn.Linear (a router that keeps a
    Parameter), so the weight itself gets the delta. ``lane_shares``: A holds one of so many shares of its rank rows
    (fully sharded). ``has_bias``: where ``ModelTargets.saveable`` has a ``bias`` of the map, whether the model has one;
    otherwise it stands there as zeros, for what an adapter adds. ``tower``: the vision tower that the map is part of,
    whose rows are patches of images; None where they are tokens.
    """

    name: str
    in_features: int
    out_features: int
    param: str = "weight"
    router: bool = False
    weight: Callable[[], torch.Tensor] | None = None
    lane_shares: int = 1
    has_bias: bool = True
    tower: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingTarget:
    """One token embedding [num_embeddings, embedding_dim]; ``scale``: of its rows, and so of their delta."""

    name: str
    num_embeddings: int
    embedding_dim: int
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelTargets:
    """All that adapters can touch, by full module name (as in ``model.named_modules()``).

    ``saveable``: parameters that ``modules_to_save`` may replace: module name -> {parameter or buffer name: tensor}
    (routers, norms, embeddings, lm_head, biases of linear maps; never experts). ``model_type`` is transformers'
    ``config.model_type``.
    ``left_out``: modules that exist and that no adapter may touch, by name, with the reason ("belongs to ...").
    """

    model_type: str
    experts: Mapping[str, ExpertsTarget] = field(default_factory=dict)
    linears: Mapping[str, LinearTarget] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingTarget] = field(default_factory=dict)
    saveable: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def towers(self) -> tuple[str, ...]:
        """Vision towers of which linear maps are served."""
        return tuple(dict.fromkeys(t.tower for t in self.linears.values() if t.tower is not None))


@dataclass(frozen=True, kw_only=True)
class ExpertsLoRA:
    """The LoRA of one experts module, ready for the bank. The scale is folded into every ``b_*``.

    Held experts h: ``expert_ids`` ascending; a factor has h leading entries, or exactly 1 where one factor is shared
    by all experts (shared-outer). Rows are rank rows: ``a13`` [h|1, R13, D], ``b_gate`` [h|1, r_gate, F],
    ``b_up`` [h|1, r_up, F], ``a2`` [h|1, r2, F], ``b2`` [h|1, r2, D].

        gate += b_gate[e].T @ (a13[e] @ x)[0 : r_gate]
        up   += b_up[e].T   @ (a13[e] @ x)[up_lane : up_lane + r_up]
        down += b2[e].T     @ (a2[e] @ h)

    ``up_lane`` is 0 where gate and up share one A, else r_gate. An expert without a gate has only ``b_up``.
    Experts of smaller rank are zero-padded to the largest rank of their projection.

    DoRA: ``gain_gate`` and ``gain_up`` [h|1, 1, F], ``gain2`` [h|1, 1, D] = magnitude / ||W_e + B_e A_e||_row scale
    each projection as a whole, biases aside, when its delta has been added; 1 for experts without DoRA.
    """

    expert_ids: tuple[int, ...]
    a13: torch.Tensor | None = None
    b_gate: torch.Tensor | None = None
    b_up: torch.Tensor | None = None
    up_lane: int = 0
    a2: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    gain_gate: torch.Tensor | None = None
    gain_up: torch.Tensor | None = None
    gain2: torch.Tensor | None = None

    @property
    def has_gains(self) -> bool:
        """Whether it is DoRA."""
        return any(gain is not None for gain in (self.gain_gate, self.gain_up, self.gain2))


@dataclass(frozen=True, kw_only=True)
class LinearLoRA:
    """LoRA of a linear map: ``y += b.T @ (a @ x)`` with ``a`` [r, in], ``b`` [r, out] (scale folded in).

    DoRA: ``gain`` [out] = magnitude / ||W + scale*B*A||_row, already folded into ``b``;
    then ``y += (gain - 1) * (y_base - bias)`` comes on top.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingLoRA:
    """LoRA of an embedding: ``y += b.T @ a[:, token]`` with ``a`` [r, V], ``b`` [r, D] (scale folded in)."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """One adapter, parsed and checked against the base model; on the CPU, in the bank's dtype.

    ``saved``: module name -> {parameter name: full replacement tensor} (``modules_to_save``). ``unfinished``: maps that
    wait for ``finish_dora``, on ranks that have only some columns of their base weights. ``tokens``: modules whose LoRA
    puts rows in place of the base's. ``is_combined``: made of loaded adapters, and listed by no one.
    """

    experts: Mapping[str, ExpertsLoRA] = field(default_factory=dict)
    linears: Mapping[str, LinearLoRA] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingLoRA] = field(default_factory=dict)
    saved: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    unfinished: Mapping[str, UnfinishedDora] = field(default_factory=dict)
    tokens: frozenset[str] = frozenset()
    is_combined: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in it, once it is finished."""
        records = (*self.experts.values(), *self.linears.values(), *self.embeddings.values())
        factors = [value for record in records for value in vars(record).values() if isinstance(value, torch.Tensor)]
        factors += [tensor for params in self.saved.values() for tensor in params.values()]
        return sum(tensor.nbytes for tensor in factors) + sum(part.num_bytes for part in self.unfinished.values())


def local_targets(targets: ModelTargets, mine: RankSlice) -> ModelTargets:
    """What this rank's ``BankLayout`` is made of. An adapter is checked against ``targets``, kept as these.

    Raises ParallelError where the rank would hold nothing of a module.
    """
    return replace(
        targets,
        experts={
            name: local_experts(t, mine.experts[name]) if name in mine.experts else t
            for name, t in targets.experts.items()
        },
        linears={
            name: _local_linear(t, mine.linears[name]) if name in mine.linears else t
            for name, t in targets.linears.items()
        },
        embeddings={
            name: _local_embedding(t, mine.linears[name]) if name in mine.linears else t
            for name, t in targets.embeddings.items()
        },
        saveable={
            module: {
                param: _local_parameter(tensor, mine.saved[module, param]) if (module, param) in mine.saved else tensor
                for param, tensor in params.items()
            }
            for module, params in targets.saveable.items()
        },
    )


def local_experts(target: ExpertsTarget, mine: ExpertsSlice) -> ExpertsTarget:
    """One experts module as this rank holds it; its experts are numbered from 0."""
    _check(target.name, "experts", mine.num_experts(target.num_experts))
    return replace(
        target,
        num_experts=mine.num_experts(target.num_experts),
        intermediate_size=mine.columns(target.intermediate_size).padded,
        output_size=None if mine.low_rank is None else mine.hidden(target.hidden_size).padded,
        lane_shares=1 if mine.low_rank is None else mine.low_rank.world,
    )


def _local_linear(target: LinearTarget, mine: LinearSlice) -> LinearTarget:
    return replace(
        target,
        in_features=_check(target.name, "input features", mine.num_inputs(target.in_features)),
        out_features=_check(target.name, "output features", mine.num_outputs(target.out_features)),
        lane_shares=1 if mine.lanes is None else mine.lanes.world,
    )


def _local_embedding(target: EmbeddingTarget, mine: LinearSlice) -> EmbeddingTarget:
    return replace(
        target,
        num_embeddings=_check(target.name, "vocabulary", mine.num_inputs(target.num_embeddings)),
        embedding_dim=_check(target.name, "columns", mine.num_outputs(target.embedding_dim)),
    )


def _local_parameter(tensor: torch.Tensor, mine: ParameterSlice) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[mine.axis] = count(mine.pieces)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _check(module: str, what: str, size: int) -> int:
    if size == 0:
        raise ParallelError(f"this rank would hold no {what} of {module}: more ranks than there are to share out")
    return size


@dataclass(frozen=True, kw_only=True)
class UnfinishedDora:
    """A row-parallel map with DoRA, as one rank reads it.

    a [r, I of the rank] · b [r, O of the rank], scaled, not yet multiplied with the gain · magnitude [O] ·
    square_sums_O: float64, of the rank's columns of each row of W + BA · outputs: of O, None for all · ``dtype`` that
    the factors will have · ``where``: file and tensor, for messages.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor
    square_sums_O: torch.Tensor
    outputs: Pieces | None
    dtype: torch.dtype
    where: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors and of the gain that it will be."""
        return (self.a.numel() + self.b.numel() + self.b.shape[1]) * self.dtype.itemsize

    def finish(self, square_sums_O: torch.Tensor) -> LinearLoRA:
        """With the sums of all ranks. Raises AdapterTensorError where a gain or a factor is out of range."""
        gain_O = self.magnitude.double() / square_sums_O.sqrt()
        if self.outputs is not None:
            gain_O = cut_tensor(gain_O, {0: self.outputs})
        factors = {"a": self.a, "b": self.b * gain_O.to(self.b.dtype), "gain": gain_O}
        cast = {name: tensor.to(self.dtype).contiguous() for name, tensor in factors.items()}
        for name, tensor in cast.items():
            if not tensor.isfinite().all():
                raise AdapterTensorError(f"{self.where}: {name}, once scaled, is outside the range of {self.dtype}")
        return LinearLoRA(**cast)


def finish_dora(weights: AdapterWeights, groups: ParallelGroups) -> AdapterWeights:
    """The adapter with the norms of all ranks: what the bank takes. Nothing to do where none is missing.

    Collective, one all-reduce over the control group: every rank has read its slice of the same adapter, and knows
    that the others have. Raises AdapterTensorError as ``UnfinishedDora.finish``.
    """
    if not weights.unfinished:
        return weights
    parts = [weights.unfinished[module] for module in sorted(weights.unfinished)]
    # The ranks of every expert-parallel place bring the same columns once more.
    sums = groups.control.all_reduce(torch.cat([part.square_sums_O for part in parts])) / groups.ep.size
    each = sums.split([part.square_sums_O.shape[0] for part in parts])
    finished = {
        module: part.finish(own) for module, part, own in zip(sorted(weights.unfinished), parts, each, strict=True)
    }
    return replace(weights, linears={**weights.linears, **finished}, unfinished={})

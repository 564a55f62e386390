"""Reads what a plan names, of all of it or of one rank's slice: linear maps, embeddings, saved parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from moegraft.core.cuts import Cuts, cut_axis, cut_tensor
from moegraft.core.errors import AdapterConfigError, AdapterTensorError
from moegraft.files import TensorInfo, shorten
from moegraft.lora.peft.plan import AdapterPlan, EmbeddingPlan, LinearPlan, Pair, TokensPlan
from moegraft.lora.targets import EmbeddingLoRA, EmbeddingTarget, LinearLoRA, UnfinishedDora
from moegraft.parallel.slices import WHOLE_LINEAR, LinearSlice, ParameterSlice, Pieces

# Rows of a base weight that are widened to float32 at a time (DoRA): bounds the memory for a large vocabulary.
_NORM_ROWS = 4096


class Read(Protocol):
    """Reads a tensor by its full name, or cuts of it; on the CPU, in the file's dtype."""

    def __call__(self, name: str, cuts: Cuts | None = None, /) -> torch.Tensor: ...


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """To float32 or wider."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def scalable(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What may be multiplied by a scale and then cast to ``dtype``, rounded once.

    The tensor itself where it has that dtype, since torch multiplies 16-bit floats by a number in float32; else float32
    or wider.
    """
    return tensor if tensor.dtype is dtype else widen(tensor)


def cast(tensor: torch.Tensor, dtype: torch.dtype, where: TensorInfo | str, *, is_finite: bool = False) -> torch.Tensor:
    """To ``dtype``, contiguous. Raises AdapterTensorError where a value does not fit into it.

    ``is_finite``: whether all values are known to be, as those that were read and not scaled.
    """
    result = tensor.to(dtype).contiguous()
    if (is_finite and tensor.dtype is dtype) or not result.numel():
        return result
    if not torch.stack(torch.aminmax(result)).isfinite().all():  # one pass and no mask; a NaN comes out of both
        raise AdapterTensorError(f"{where}: a value, once scaled, is outside the range of {dtype}")
    return result


def build_linear(
    plan: LinearPlan, read: Read, dtype: torch.dtype, mine: LinearSlice = WHOLE_LINEAR
) -> LinearLoRA | UnfinishedDora:
    """LoRA or DoRA (arXiv 2402.09353) of a linear map. Raises AdapterTensorError or AdapterConfigError.

    UnfinishedDora where this rank has only its columns of the base weight.
    """
    gain = None
    if plan.parts:
        a, b = _read_parts(plan, read)
        a, b = cut_tensor(_own_lanes(a, mine), _cut(1, mine.inputs)), cut_tensor(b, _cut(1, mine.outputs))
    elif plan.magnitude is None:
        a, b = _read_pair(plan.pair, read, mine)
    else:
        weight = _base_weight(plan, mine)
        if weight.shape[1] != plan.target.in_features:
            return _unfinished(plan, read, dtype, mine, weight)
        # The norm of a row of W + BA takes all of A; what this rank does not keep of it is dropped again.
        a, b = _read_pair(plan.pair, read, LinearSlice(outputs=mine.outputs))
        magnitude = read(plan.magnitude.name, _cut(0, mine.outputs))
        gain = magnitude.to(b.dtype) / square_sums(weight, a, b).sqrt()
        b = b * gain
        a = cut_tensor(_own_lanes(a, mine), _cut(1, mine.inputs))
    return LinearLoRA(
        a=cast(a, dtype, plan.pair.a),
        b=cast(b, dtype, plan.pair.b),
        gain=None if plan.magnitude is None or gain is None else cast(gain, dtype, plan.magnitude),
    )


def _read_parts(plan: LinearPlan, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r of all parts, in] and scale * B transposed, zero outside of each part's block of outputs."""
    sides = [(*_read_pair(pair, read, WHOLE_LINEAR), start) for pair, start in plan.parts]
    b = sides[0][1].new_zeros(plan.pair.rank, plan.target.out_features)
    lane = 0
    for _, rows, start in sides:
        b[lane : lane + rows.shape[0], start : start + rows.shape[1]] = rows
        lane += rows.shape[0]
    return torch.cat([a for a, _, _ in sides]), b


def _unfinished(
    plan: LinearPlan, read: Read, dtype: torch.dtype, mine: LinearSlice, weight: torch.Tensor
) -> UnfinishedDora:
    """``weight``: all rows, this rank's columns."""
    assert plan.magnitude is not None
    a, b = _read_pair(plan.pair, read, LinearSlice(inputs=mine.inputs))
    return UnfinishedDora(
        a=a,
        b=cut_tensor(b, _cut(1, mine.outputs)),
        magnitude=read(plan.magnitude.name),
        square_sums_O=square_sums(weight, a, b).double(),
        outputs=mine.outputs,
        dtype=dtype,
        where=plan.magnitude.where,
    )


def build_embedding(
    plan: EmbeddingPlan, read: Read, dtype: torch.dtype, mine: LinearSlice = WHOLE_LINEAR
) -> EmbeddingLoRA:
    """LoRA of an embedding. Raises AdapterTensorError."""
    a, b = _read_pair(plan.pair, read, mine)
    return EmbeddingLoRA(a=cast(a, dtype, plan.pair.a), b=cast(b * plan.target.scale, dtype, plan.pair.b))


def check_twins(twins: Iterable[tuple[TensorInfo, TensorInfo]], read: Read) -> None:
    """Tensors that are one parameter under two names. Raises AdapterTensorError where they differ."""
    for one, other in twins:
        if not torch.equal(read(one.name), read(other.name)):
            raise AdapterTensorError(f"{one.where}: differs from {shorten(other.name)}, the same parameter")


def build_tokens(
    plan: TokensPlan, base: torch.Tensor, read: Read, dtype: torch.dtype, mine: LinearSlice = WHOLE_LINEAR
) -> EmbeddingLoRA | LinearLoRA:
    """Rows of an embedding or head as LoRA: one lane a row, which adds what the row differs from the base's.

    So a few rows cost no copy of the vocabulary. ``base``: the whole weight. Raises AdapterConfigError or
    AdapterTensorError.
    """
    target, tokens = plan.target, torch.tensor(plan.tokens)
    rows = target.num_embeddings if isinstance(target, EmbeddingTarget) else target.out_features
    if base.is_meta or base.shape[0] != rows or hasattr(base, "to_local"):
        raise AdapterConfigError(f"trainable_token_indices: {plan.info.where} needs the base weight of {target.name}")
    stored = read(plan.info.name)
    difference = widen(stored) - widen(base.detach()[tokens.to(base.device)].cpu())
    lanes = torch.zeros(len(tokens), rows, dtype=dtype)
    lanes[torch.arange(len(tokens)), tokens] = 1
    if isinstance(target, EmbeddingTarget):
        a, b = lanes, cast(difference * target.scale, dtype, plan.info)
    else:
        a, b = cast(difference, dtype, plan.info), lanes
    a, b = cut_tensor(_own_lanes(a, mine), _cut(1, mine.inputs)), cut_tensor(b, _cut(1, mine.outputs))
    return EmbeddingLoRA(a=a, b=b) if isinstance(target, EmbeddingTarget) else LinearLoRA(a=a, b=b)


def lora_param(plan: AdapterPlan, module: str) -> str | None:
    """The parameter of a module that its LoRA is on; None without."""
    if module in plan.linears:
        return plan.linears[module].target.param
    return "weight" if module in plan.embeddings else None


def build_bias(plan: LinearPlan, base: torch.Tensor, read: Read, mine: ParameterSlice | None = None) -> torch.Tensor:
    """The bias of a linear map with the scaled one of lora_B added, in the dtype of ``base``, which may be cut already.

    Raises AdapterConfigError where the base's cannot be read, or AdapterTensorError.
    """
    assert plan.bias is not None
    if base.is_meta:
        raise AdapterConfigError(f"lora_bias: {plan.bias.where} needs the bias of {plan.target.name}")
    cuts = {} if mine is None else {mine.axis: mine.pieces}
    added = widen(read(plan.bias.name, cuts)) * plan.pair.scale
    own = base.detach() if base.shape == added.shape else cut_tensor(base.detach(), cuts)
    return cast(widen(own.cpu()) + added, base.dtype, plan.bias)


def build_saved(
    plan: AdapterPlan,
    module: str,
    param: str,
    base: torch.Tensor,
    info: TensorInfo,
    read: Read,
    mine: ParameterSlice | None = None,
) -> torch.Tensor | None:
    """A saved parameter in the base's dtype; None where it equals the base's own, which PEFT saves along with LoRA.

    A module with LoRA whose base weight is another one than the model's (a vocabulary that was resized, whose new rows
    are drawn anew each time): as PEFT, the file's weight, and the LoRA merged into it in float32. Raises
    AdapterTensorError.
    """
    cuts = {} if mine is None else {mine.axis: mine.pieces}
    stored = read(info.name, cuts)
    has_lora = lora_param(plan, module) == param
    if not base.is_meta:
        own = cut_tensor(base.detach(), cuts).cpu()
        # Beside LoRA the copy may have been rounded to another dtype: it is the base's own in the narrower one.
        if torch.equal(stored.to(own.dtype), own) or (has_lora and torch.equal(stored, own.to(stored.dtype))):
            return None
    if not has_lora:
        return cast(stored, base.dtype, info)
    if mine is not None or not _is_merged(plan, module, info):
        raise AdapterTensorError(f"{info.where}: differs from the base model's, and {module} has LoRA besides")
    return cast(widen(stored) + _whole_delta(plan, module, read), base.dtype, info)


def _is_merged(plan: AdapterPlan, module: str, info: TensorInfo) -> bool:
    """Whether this parameter, which the LoRA of its module is on, can take it."""
    linear = plan.linears.get(module)
    return len(info.shape) == 2 and (linear is None or linear.magnitude is None)


def _whole_delta(plan: AdapterPlan, module: str, read: Read) -> torch.Tensor:
    """scale * B A, as the weight of the module is stored: [out, in], or [V, D] of an embedding."""
    if module in plan.linears:
        a, b = _read_pair(plan.linears[module].pair, read, WHOLE_LINEAR)
        return b.T @ a
    a, b = _read_pair(plan.embeddings[module].pair, read, WHOLE_LINEAR)
    return a.T @ b


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


def _base_weight(plan: LinearPlan, mine: LinearSlice) -> torch.Tensor:
    """The rows of the base weight that this rank has outputs of; or all rows, where it has only its columns of them."""
    target = plan.target
    assert target.weight is not None and plan.magnitude is not None  # the plan checked it
    weight = target.weight()
    if hasattr(weight, "to_local"):  # a DTensor; its class takes a while to import
        weight = weight.to_local()
    shape, whole = tuple(weight.shape), (target.out_features, target.in_features)
    if shape == whole:
        return cut_tensor(weight, _cut(0, mine.outputs))
    here = {(mine.num_outputs(whole[0]), whole[1]), (whole[0], mine.num_inputs(whole[1]))}
    if shape in here:
        return weight
    expected = " or ".join(str(list(sizes)) for sizes in [whole, *sorted(here - {whole})])
    raise AdapterConfigError(
        f"use_dora: {plan.magnitude.where} needs the base weight of {target.name} as {expected}; this rank has "
        f"{list(shape)}"
    )


def square_sums(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||W + b^T a||^2 of each row: W [out, in], a [r, in], b [r, out] scaled."""
    sums = []
    for start in range(0, weight.shape[0], _NORM_ROWS):
        rows = weight[start : start + _NORM_ROWS].detach().to(device=a.device, dtype=b.dtype)
        delta = b[:, start : start + _NORM_ROWS].T @ a.to(b.dtype)
        sums.append((rows + delta).square_().sum(dim=1))
    return torch.cat(sums)


def _own_lanes(a_RI: torch.Tensor, mine: LinearSlice) -> torch.Tensor:
    """The share of A's rank rows, zero rows behind them up to the common length."""
    if mine.lanes is None:
        return a_RI
    part = mine.lanes.of(a_RI.shape[0])
    return cut_axis(a_RI, 0, part.start, part.stop, part.padding)

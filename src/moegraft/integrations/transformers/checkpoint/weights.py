"""Experts of one layer, from the tensors of a checkpoint to a weight format, without ever being dequantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moegraft.core.errors import CheckpointError
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts, Int4Matrix
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts
from moegraft.integrations.transformers.checkpoint.plan import PackedLayer
from moegraft.integrations.transformers.checkpoint.scheme import PARTS, Layout, Scheme
from moegraft.integrations.transformers.checkpoint.unpack import int4_matrix

Read = Callable[[str], torch.Tensor]


class LayerReader:
    """Stacks the tensors of one layer on a device. Raises CheckpointError that names the tensor."""

    def __init__(self, layer: PackedLayer, read: Read, device: torch.device) -> None:
        self.layer = layer
        self.target = layer.target
        self._read = read
        self._device = device
        self.first_of = ("gate", "up") if layer.target.has_gate else ("up",)

    @property
    def num_halves(self) -> int:
        """G."""
        return len(self.first_of)

    def has(self, part: str) -> bool:
        """Whether every matrix has this part. Raises where only some have it."""
        holders = {key: part in tensors for key, tensors in self.layer.matrices.items()}
        if len(set(holders.values())) > 1:
            key = min(key for key, has in holders.items() if not has)
            raise CheckpointError(f"{self.target.name}: {key[1]} of expert {key[0]} has no {part}, other experts have")
        return any(holders.values())

    def first(self, part: str, *, axis: int) -> torch.Tensor:
        """[E, ...] of gate and up, one behind the other along ``axis`` of a matrix; of up alone without a gate."""
        return self._stacked(part, self.first_of, axis)

    def of(self, projection: str, part: str) -> torch.Tensor:
        """[E, ...] of one projection."""
        return self._stacked(part, (projection,), 0)

    def second(self, part: str) -> torch.Tensor:
        """[E, ...] of down."""
        return self._stacked(part, ("down",), 0)

    def fused(self, name: str) -> torch.Tensor | None:
        """A tensor of all experts; None where there is none."""
        tensor = self.layer.fused.get(name)
        return None if tensor is None else self._read(tensor).to(self._device)

    def _stacked(self, part: str, projections: Sequence[str], axis: int) -> torch.Tensor:
        stacked = None
        for expert in range(self.target.num_experts):
            tensors = [self._one(expert, projection, part) for projection in projections]
            if any(tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype for tensor in tensors):
                names = " and ".join(self.layer.matrices[expert, projection][part] for projection in projections)
                raise CheckpointError(f"{names}: differ in shape or dtype, {[tuple(t.shape) for t in tensors]}")
            joined = torch.cat(tensors, dim=axis) if len(tensors) > 1 else tensors[0]
            if stacked is None:
                sizes = (self.target.num_experts, *joined.shape)
                stacked = torch.empty(sizes, dtype=joined.dtype, device=self._device)
            if joined.shape != stacked.shape[1:] or joined.dtype != stacked.dtype:
                name = self.layer.matrices[expert, projections[0]][part]
                found, expected = f"{tuple(joined.shape)} {joined.dtype}", f"{tuple(stacked.shape[1:])} {stacked.dtype}"
                raise CheckpointError(f"{name}: found {found}, expected {expected} as of the experts before it")
            stacked[expert] = joined
        assert stacked is not None  # a layer has experts
        return stacked

    def _one(self, expert: int, projection: str, part: str) -> torch.Tensor:
        tensor = self._read(self.layer.matrices[expert, projection][part])
        return tensor.reshape(1) if tensor.dim() == 0 else tensor


def read_layer(
    layer: PackedLayer, scheme: Scheme, read: Read, *, dtype: torch.dtype, device: torch.device
) -> ExpertsWeights:
    """The weights of one layer on ``device``. ``dtype``: of the activations, and so of the biases.

    Raises CheckpointError: tensors that do not fit the layer or each other.
    """
    reader = LayerReader(layer, read, device)
    try:
        weights = _READERS[scheme.layout](reader, scheme, dtype)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{layer.target.name}: stored as {scheme.description}: {error}") from error
    target = layer.target
    found = (weights.num_experts, weights.hidden_size, weights.intermediate_size)
    expected = (target.num_experts, target.hidden_size, target.intermediate_size)
    if found != expected:
        raise CheckpointError(f"{target.name}: found {found} experts, hidden and expert size, expected {expected}")
    return weights


def _fp8(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    scale = "weight_scale_inv" if scheme.layout is Layout.FP8_BLOCKS else "weight_scale"
    if reader.layer.fused:
        first, second = reader.target.w13_param, reader.target.w2_param
        tensors = [reader.fused(name) for name in (first, second, f"{first}_scale_inv", f"{second}_scale_inv")]
        w13, w2, w13_scale, w2_scale = (tensor for tensor in tensors if tensor is not None)
        biases = [reader.fused(f"{name}_bias") for name in (first, second)]
    else:
        w13, w2 = reader.first("weight", axis=0), reader.second("weight")
        w13_scale, w2_scale = reader.first(scale, axis=0), reader.second(scale)
        biases = [None, None]
    weights = Fp8Experts.from_checkpoint(
        w13=w13,
        w2=w2,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        block_size=scheme.block_size,
        num_halves=reader.num_halves,
        b13=None if biases[0] is None else biases[0].to(dtype),
        b2=None if biases[1] is None else biases[1].to(dtype),
    )
    static = next((name for name in ("input_scale", "activation_scale") if reader.has(name)), None)
    if scheme.is_static != (static is not None):
        found, expected = ("none", "some") if scheme.is_static else (static, "none")
        raise ValueError(f"found {found} as static scales of activations, quantization_config says {expected}")
    if static is not None:
        weights = weights.with_static_scales(reader.first(static, axis=0), reader.second(static))
    return weights


def _int8(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    return Int8Experts.from_checkpoint(
        w13=reader.first("weight", axis=0),
        w2=reader.second("weight"),
        w13_scale=reader.first("weight_scale", axis=0),
        w2_scale=reader.second("weight_scale"),
        num_halves=reader.num_halves,
    )


def _int4(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    parts = sorted(part for part in PARTS[scheme.layout].known if reader.has(part))
    w13 = [int4_matrix(scheme, {part: reader.of(projection, part) for part in parts}) for projection in reader.first_of]
    w2 = int4_matrix(scheme, {part: reader.second(part) for part in parts})
    return Int4Experts(w13=_joined(w13), w2=w2, num_halves=reader.num_halves)


def _joined(halves: list[Int4Matrix]) -> Int4Matrix:
    """Gate and up as one matrix. A half whose zero points are all 8 has none: it gets them back beside one that has."""
    if len({half.zeros is None for half in halves}) > 1:
        eights = [torch.full_like(half.scales, 8, dtype=torch.uint8) for half in halves]
        halves = [
            replace(half, zeros=zeros) if half.zeros is None else half
            for half, zeros in zip(halves, eights, strict=True)
        ]
    return Int4Matrix.cat_rows(halves)


def _mxfp4(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    tensors = {name: reader.fused(name) for name in reader.layer.fused}
    biases = {name for name in tensors if name.endswith("_bias")}
    found = {name: t.to(dtype) if name in biases else t for name, t in tensors.items() if t is not None}
    return MXFP4Experts.from_checkpoint(found)


_READERS: dict[Layout, Callable[[LayerReader, Scheme, torch.dtype], ExpertsWeights]] = {
    Layout.GPTQ: _int4,
    Layout.AWQ: _int4,
    Layout.PACKED_INT4: _int4,
    Layout.INT8: _int8,
    Layout.FP8: _fp8,
    Layout.FP8_BLOCKS: _fp8,
    Layout.MXFP4: _mxfp4,
}

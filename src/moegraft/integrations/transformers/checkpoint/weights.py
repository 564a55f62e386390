"""Experts of one layer, from the tensors of a checkpoint to a weight format, without ever being dequantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moegraft.core.errors import CheckpointError
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import SYMMETRIC_ZERO, Int4Experts, Int4Matrix
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts, MXFP4Matrix
from moegraft.formats.nvfp4 import NVFP4Experts
from moegraft.integrations.transformers.checkpoint.plan import PackedLayer
from moegraft.integrations.transformers.checkpoint.scheme import Layout, Scheme
from moegraft.integrations.transformers.checkpoint.unpack import (
    check_block_scales,
    int4_matrix,
    nvfp4_parts,
    read_scale,
    unfit,
)

Read = Callable[[str], torch.Tensor]


class LayerReader:
    """Tensors of one layer, on a device. Raises CheckpointError that names the tensor."""

    def __init__(self, layer: PackedLayer, read: Read, device: torch.device) -> None:
        self.layer = layer
        self.target = layer.target
        self.first_of = ("gate", "up") if layer.target.has_gate else ("up",)
        self._read = read
        self._device = device
        self._seen: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {}

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

    def name(self, expert: int, projection: str, part: str) -> str:
        """Facts of a tensor in the checkpoint."""
        return self.layer.matrices[expert, projection][part]

    def one(self, expert: int, projection: str, part: str) -> torch.Tensor:
        """A part of one matrix; all experts have it in one shape and dtype."""
        tensor = self._read(self.name(expert, projection, part))
        found = (tuple(tensor.shape), tensor.dtype)
        expected = self._seen.setdefault((projection, part), found)
        if found != expected:
            raise CheckpointError(
                f"{self.name(expert, projection, part)}: found {list(found[0])} {found[1]}, "
                f"expected {list(expected[0])} {expected[1]}, as experts before it have"
            )
        return (tensor.reshape(1) if tensor.dim() == 0 else tensor).to(self._device)

    def first(self, part: str) -> torch.Tensor:
        """[E, ...] of gate and up, one behind the other along a matrix's first axis; of up alone without a gate."""
        return self._stacked(part, self.first_of)

    def second(self, part: str) -> torch.Tensor:
        """[E, ...] of down."""
        return self._stacked(part, ("down",))

    def scales(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``first`` and ``second`` give them, in float32."""
        return self._stacked(part, self.first_of, is_scale=True), self._stacked(part, ("down",), is_scale=True)

    def fused(self, name: str) -> torch.Tensor | None:
        """A tensor of all experts, on the CPU; None where there is none."""
        tensor = self.layer.fused.get(name)
        return None if tensor is None else self._read(tensor)

    def fused_scales(self, *names: str) -> list[torch.Tensor]:
        """Tensors that must be there, in float32 on the device of the layer."""
        found = []
        for name in (self.layer.fused[name] for name in names):
            with unfit(name):
                found.append(self.to_device(read_scale(self._read(name))))
        return found

    def _scale(self, expert: int, projection: str, part: str) -> torch.Tensor:
        scale = self.one(expert, projection, part)
        with unfit(self.name(expert, projection, part)):
            return read_scale(scale)

    def _stacked(self, part: str, projections: Sequence[str], *, is_scale: bool = False) -> torch.Tensor:
        one = self._scale if is_scale else self.one
        stacked = None
        for expert in range(self.target.num_experts):
            tensors = [one(expert, projection, part) for projection in projections]
            if any(tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype for tensor in tensors):
                names = " and ".join(self.name(expert, projection, part) for projection in projections)
                raise CheckpointError(f"{names}: differ in shape or dtype, {[tuple(t.shape) for t in tensors]}")
            joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            if stacked is None:
                sizes = (self.target.num_experts, *joined.shape)
                stacked = torch.empty(sizes, dtype=joined.dtype, device=self._device)
            stacked[expert] = joined
        assert stacked is not None  # a layer has experts
        return stacked

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Onto the device of the layer."""
        return tensor.to(self._device)


def read_layer(layer: PackedLayer, read: Read, *, dtype: torch.dtype, device: torch.device) -> ExpertsWeights:
    """The weights of one layer on ``device``. ``dtype``: of the activations, and so of the biases.

    Raises CheckpointError: tensors that do not fit the layer or each other.
    """
    reader, scheme = LayerReader(layer, read, device), layer.scheme
    with unfit(f"{layer.target.name}: stored as {scheme.description}"):
        weights = _READERS[scheme.layout](reader, scheme, dtype)
    target = layer.target
    found = (weights.num_experts, weights.hidden_size, weights.intermediate_size)
    expected = (target.num_experts, target.hidden_size, target.intermediate_size)
    if found != expected:
        raise CheckpointError(f"{target.name}: found {found} experts, hidden and expert size, expected {expected}")
    return weights


def _fp8(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    scale = "weight_scale_inv" if scheme.layout is Layout.FP8_BLOCKS else "weight_scale"
    if reader.layer.fused:
        if reader.target.is_interleaved or reader.target.is_transposed:
            raise ValueError("found fused experts of a model that interleaves gate and up, or transposes its weights")
        first, second = reader.target.w13_param, reader.target.w2_param
        names = (first, second, f"{first}_bias", f"{second}_bias")
        w13, w2, b13, b2 = (None if tensor is None else reader.to_device(tensor) for tensor in map(reader.fused, names))
        w13_scale, w2_scale = reader.fused_scales(f"{first}_scale_inv", f"{second}_scale_inv")
        assert w13 is not None and w2 is not None  # planned so
        if reader.layer.is_turned:
            w13, w2 = (tensor.view(torch.uint8).mT.contiguous().view(tensor.dtype) for tensor in (w13, w2))
            w13_scale, w2_scale = (scale.mT if scale.dim() == 3 else scale for scale in (w13_scale, w2_scale))
    else:
        w13, w2, b13, b2 = reader.first("weight"), reader.second("weight"), None, None
        w13_scale, w2_scale = reader.scales(scale)
    weights = Fp8Experts.from_checkpoint(
        w13=w13,
        w2=w2,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        block_size=scheme.block_size,
        num_halves=reader.num_halves,
        b13=None if b13 is None else b13.to(dtype),
        b2=None if b2 is None else b2.to(dtype),
    )
    if reader.layer.fused:
        static_of = [f"{name}_activation_scale" for name in (reader.target.w13_param, reader.target.w2_param)]
        return weights.with_static_scales(*reader.fused_scales(*static_of)) if scheme.is_static else weights
    static = next((name for name in ("input_scale", "activation_scale") if reader.has(name)), None)
    if scheme.is_static != (static is not None):
        found, expected = ("none", "some") if scheme.is_static else (static, "none")
        raise ValueError(f"found {found} as static scales of activations, quantization_config says {expected}")
    if static is not None:
        weights = weights.with_static_scales(*reader.scales(static))
    return weights


def _nvfp4(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    codes, whole, invert = nvfp4_parts(scheme)
    scales = [read("weight_scale") for read in (reader.first, reader.second)]
    for scale in scales:
        check_block_scales(scale)
    for part in ("input_scale", "input_global_scale"):
        if reader.has(part):
            reader.scales(part)  # checked, and not used: activations are read as they are
    w13_global, w2_global = (scale.reciprocal() if invert else scale for scale in reader.scales(whole))
    return NVFP4Experts.from_checkpoint(
        w13=reader.first(codes),
        w2=reader.second(codes),
        w13_scale=scales[0],
        w2_scale=scales[1],
        w13_global=w13_global,
        w2_global=w2_global,
        num_halves=reader.num_halves,
    )


def _int8(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    w13_scale, w2_scale = reader.scales("weight_scale")
    return Int8Experts.from_checkpoint(
        w13=reader.first("weight"),
        w2=reader.second("weight"),
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        num_halves=reader.num_halves,
    )


def _int4(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    """Expert by expert: while numbers are put into their new order, they take many times their packed size."""
    parts = sorted(part for part in scheme.parts.known if reader.has(part))

    def matrix(expert: int, projection: str) -> Int4Matrix:
        name = reader.name(expert, projection, scheme.parts.marker)
        with unfit(f"{name}: not stored as {scheme.description}"):
            return int4_matrix(scheme, {part: reader.one(expert, projection, part) for part in parts})

    experts = range(reader.target.num_experts)
    w13 = [Int4Matrix.cat_rows(_alike([matrix(e, projection) for projection in reader.first_of])) for e in experts]
    w2 = [matrix(e, "down") for e in experts]
    return Int4Experts(w13=Int4Matrix.stack(_alike(w13)), w2=Int4Matrix.stack(_alike(w2)), num_halves=reader.num_halves)


def _alike(matrices: list[Int4Matrix]) -> list[Int4Matrix]:
    """A matrix whose zero points are all 8 is kept without any: beside one that has some, it gets them back."""
    some = next((matrix.zeros for matrix in matrices if matrix.zeros is not None), None)
    if some is None:
        return matrices
    eights = torch.full_like(some, SYMMETRIC_ZERO)
    return [replace(matrix, zeros=eights) if matrix.zeros is None else matrix for matrix in matrices]


def _mxfp4(reader: LayerReader, scheme: Scheme, dtype: torch.dtype) -> ExpertsWeights:
    """Expert by expert, as int4. gpt-oss alternates gate and up, and the files have its weights as [out, in]."""
    E, D, F = reader.target.num_experts, reader.target.hidden_size, reader.target.intermediate_size
    if not reader.target.is_interleaved:
        raise ValueError("found a model that does not interleave gate and up, expected gpt-oss")
    tensors = {name: tensor for name in reader.layer.fused if (tensor := reader.fused(name)) is not None}
    for name, tensor in tensors.items():
        rows, columns = (2 * F, D) if name.startswith(reader.target.w13_param) else (D, F)
        expected = {"blocks": (E, rows, columns // 32, 16), "scales": (E, rows, columns // 32), "bias": (E, rows)}
        if tuple(tensor.shape) != expected[name.rpartition("_")[2]]:
            raise ValueError(f"found {name} {tuple(tensor.shape)}, expected {expected[name.rpartition('_')[2]]}")
    layers = []
    for expert in range(E):
        mine = {name: reader.to_device(tensor[expert : expert + 1]) for name, tensor in tensors.items()}
        mine |= {name: tensor.to(dtype) for name, tensor in mine.items() if name.endswith("_bias")}
        layers.append(MXFP4Experts.from_checkpoint(mine))
    return MXFP4Experts(
        w13=_cat_experts([layer.w13 for layer in layers]),
        w2=_cat_experts([layer.w2 for layer in layers]),
        b13=torch.cat([layer.b13 for layer in layers if layer.b13 is not None]),
        b2=torch.cat([layer.b2 for layer in layers if layer.b2 is not None]),
    )


def _cat_experts(matrices: list[MXFP4Matrix]) -> MXFP4Matrix:
    return MXFP4Matrix.stack([matrix.at(0) for matrix in matrices])


_READERS: dict[Layout, Callable[[LayerReader, Scheme, torch.dtype], ExpertsWeights]] = {
    Layout.GPTQ: _int4,
    Layout.AWQ: _int4,
    Layout.PACKED_INT4: _int4,
    Layout.INT8: _int8,
    Layout.FP8: _fp8,
    Layout.FP8_BLOCKS: _fp8,
    Layout.MXFP4: _mxfp4,
    Layout.NVFP4: _nvfp4,
    Layout.PACKED_NVFP4: _nvfp4,
}

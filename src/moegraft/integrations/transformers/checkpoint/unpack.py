"""Quantised linear maps back to plain weights [out, in]: what stands beside the experts is served unquantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from moegraft.core.errors import CheckpointError
from moegraft.formats.int4 import Int4Matrix
from moegraft.formats.nvfp4 import dequantise
from moegraft.formats.scaled import spread_blocks
from moegraft.integrations.transformers.checkpoint.scheme import Layout, Scheme

_ONE_AXIS = frozenset({"g_idx", "weight_g_idx", "weight_shape"})


@contextmanager
def unfit(where: str) -> Iterator[None]:
    """What formats and torch raise over tensors that do not fit becomes a CheckpointError that names ``where``."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def dequantise_linear(scheme: Scheme, parts: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    """W [out, in] in float32 from the tensors of one matrix, by their last names.

    Raises CheckpointError where their shapes do not fit each other; the message begins with ``where``.
    """
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(parts.items()))
    with unfit(f"{where}: {shapes} are no matrix stored as {scheme.description}"):
        if scheme.format_name == "int4":
            return int4_matrix(scheme, parts).values(torch.float32)
        if scheme.format_name == "nvfp4":
            return _nvfp4(scheme, parts)
        return _scaled(scheme, parts)


def nvfp4_parts(scheme: Scheme) -> tuple[str, str, bool]:
    """(last name of the codes, of the scale of the whole matrix, whether that divides instead of multiplying)."""
    if scheme.layout is Layout.PACKED_NVFP4:
        return "weight_packed", "weight_global_scale", True
    return "weight", "weight_scale_2", False


def check_block_scales(scale: torch.Tensor) -> None:
    """Raises ValueError for scales that are no finite e4m3."""
    if scale.dtype is not torch.float8_e4m3fn or bool(scale.float().isnan().any()):
        raise ValueError(f"found scales of {scale.dtype}, expected torch.float8_e4m3fn without NaN")


def _nvfp4(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    codes, whole, divides = nvfp4_parts(scheme)
    if parts[codes].dim() != 2 or parts[codes].dtype is not torch.uint8 or parts[whole].numel() != 1:
        raise ValueError(f"found {codes} in {parts[codes].dtype}, expected bytes on 2 axes and one scale of them all")
    check_block_scales(parts["weight_scale"])
    of_all = read_scale(parts[whole]).reshape(())
    return dequantise(parts[codes], parts["weight_scale"], of_all.reciprocal() if divides else of_all)


def int4_matrix(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> Int4Matrix:
    """One matrix. Raises ValueError for act-order and for what does not fit."""
    for name, tensor in parts.items():
        axes = 1 if name in _ONE_AXIS else 2
        if tensor.dim() != axes:
            raise ValueError(f"found {name} of shape {tuple(tensor.shape)}, expected {axes} axes")
    scales = parts["weight_scale" if scheme.layout is Layout.PACKED_INT4 else "scales"]
    if not scales.is_floating_point():
        raise ValueError(f"found scales of {scales.dtype}, expected floating point")
    group = max(scheme.group_size, 0)
    if scheme.layout is Layout.PACKED_INT4:
        num_inputs = _num_inputs(parts["weight_packed"], parts.get("weight_shape"))
        _check_groups(parts["weight_scale"].shape[-1], num_inputs, group)
        return Int4Matrix.from_compressed_tensors(
            parts["weight_packed"],
            parts["weight_scale"],
            parts.get("weight_zero_point"),
            parts.get("weight_g_idx"),
            num_inputs=num_inputs,
            group=group,
        )
    _check_groups(
        parts["scales"].shape[-2], parts["qweight"].shape[-2] * (8 if scheme.layout is Layout.GPTQ else 1), group
    )
    if scheme.layout is Layout.AWQ:
        return Int4Matrix.from_awq(parts["qweight"], parts["qzeros"], parts["scales"], group=group)
    return Int4Matrix.from_gptq(
        parts["qweight"],
        parts["qzeros"],
        parts["scales"],
        parts.get("g_idx"),
        group=group,
        zero_offset=1 if scheme.zeros_plus_one else 0,
    )


def _num_inputs(packed: torch.Tensor, shape: torch.Tensor | None) -> int:
    """Columns of a matrix of compressed-tensors; ``shape``: its weight_shape, rows and columns."""
    rows, places = packed.shape[0], 8 * packed.shape[1]
    if shape is None:
        return places
    if shape.dtype not in (torch.int32, torch.int64) or len(shape) != 2:
        raise ValueError(f"found weight_shape {tuple(shape.shape)} of {shape.dtype}, expected two integers")
    found = shape.tolist()
    if found[0] != rows or not 0 <= places - found[1] < 8:
        raise ValueError(f"found weight_shape {found}, expected [{rows}, {max(places - 7, 0)} to {places}]")
    return int(found[1])


def read_scale(scale: torch.Tensor) -> torch.Tensor:
    """Float32 scales; some checkpoints store the bytes of E8M0 as integers.

    Raises ValueError for other integers, and for the byte that stands for NaN.
    """
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if not scale.is_floating_point():
        raise ValueError(f"found scales of {scale.dtype}, expected floating point or E8M0 bytes")
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("found a scale that is NaN (an E8M0 byte of 255), expected finite ones")
    return scale


def _check_groups(found: int, num_inputs: int, group: int) -> None:
    expected = -(-num_inputs // group) if group else 1
    if found != expected:
        raise ValueError(f"found scales of {found} groups, expected {expected}")


def _scaled(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if parts["weight"].dtype is not scheme.weight_dtype or parts["weight"].dim() != 2:
        found = f"weight of {parts['weight'].dtype} with {parts['weight'].dim()} axes"
        raise ValueError(f"found {found}, expected {scheme.weight_dtype} with 2")
    weight_OI = parts["weight"].float()
    scale = read_scale(parts["weight_scale_inv" if scheme.layout is Layout.FP8_BLOCKS else "weight_scale"])
    if scheme.block_size is None:
        if scale.numel() not in (1, weight_OI.shape[0]):
            raise ValueError(f"found {scale.numel()} scales, expected 1 or {weight_OI.shape[0]}")
        return weight_OI * scale.reshape(-1, 1)
    expected = tuple(-(-size // block) for size, block in zip(weight_OI.shape, scheme.block_size, strict=True))
    if tuple(scale.shape) != expected:
        raise ValueError(f"found scales {tuple(scale.shape)}, expected {expected}")
    return weight_OI * spread_blocks(scale, *weight_OI.shape, block_size=scheme.block_size)

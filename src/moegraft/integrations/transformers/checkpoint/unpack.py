"""Quantised linear maps back to plain weights [out, in]: what stands beside the experts is served unquantised."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moegraft.core.errors import CheckpointError
from moegraft.formats.int4 import Int4Matrix
from moegraft.integrations.transformers.checkpoint.scheme import Layout, Scheme


def dequantise_linear(scheme: Scheme, parts: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    """W [out, in] in float32 from the tensors of one matrix, by their last names.

    Raises CheckpointError where their shapes do not fit each other; the message begins with ``where``.
    """
    try:
        if scheme.format_name == "int4":
            return int4_matrix(scheme, parts).values(torch.float32)
        return _scaled(scheme, parts)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(parts.items()))
        raise CheckpointError(f"{where}: {shapes} are no matrix stored as {scheme.description}: {error}") from error


def int4_matrix(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> Int4Matrix:
    """One matrix, or several along leading axes. Raises ValueError for act-order and for what does not fit."""
    group = max(scheme.group_size, 0)
    if scheme.layout is Layout.PACKED_INT4:
        shapes = parts.get("weight_shape")
        num_inputs = 8 * parts["weight_packed"].shape[-1] if shapes is None else int(shapes[..., -1].max())
        if not 0 <= 8 * parts["weight_packed"].shape[-1] - num_inputs < 8:
            raise ValueError(f"found weight_shape with {num_inputs} inputs")
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


def read_scale(scale: torch.Tensor) -> torch.Tensor:
    """Float32 scales; some checkpoints store the bytes of E8M0 as integers. Raises ValueError for other integers."""
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if not scale.is_floating_point():
        raise ValueError(f"found scales of {scale.dtype}, expected floating point or E8M0 bytes")
    return scale.float()


def _check_groups(found: int, num_inputs: int, group: int) -> None:
    expected = -(-num_inputs // group) if group else 1
    if found != expected:
        raise ValueError(f"found scales of {found} groups, expected {expected}")


def _scaled(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight_OI = parts["weight"].float()
    scale = read_scale(parts["weight_scale_inv" if scheme.layout is Layout.FP8_BLOCKS else "weight_scale"])
    if scheme.block_size is None:
        if scale.numel() not in (1, weight_OI.shape[0]):
            raise ValueError(f"found {scale.numel()} scales, expected 1 or {weight_OI.shape[0]}")
        return weight_OI * scale.reshape(-1, 1)
    expected = tuple(-(-size // block) for size, block in zip(weight_OI.shape, scheme.block_size, strict=True))
    if tuple(scale.shape) != expected:
        raise ValueError(f"found scales {tuple(scale.shape)}, expected {expected}")
    rows, columns = scheme.block_size
    scale = scale.repeat_interleave(rows, 0)[: weight_OI.shape[0]].repeat_interleave(columns, 1)
    return weight_OI * scale[:, : weight_OI.shape[1]]

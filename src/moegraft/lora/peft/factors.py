"""What both builders share: how tensors are read, widened and cast."""

from __future__ import annotations

from typing import Protocol

import torch

from moegraft.core.errors import AdapterTensorError
from moegraft.lora.peft.safetensors_file import all_finite
from moegraft.lora.slicing import Cuts


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


def cast(tensor: torch.Tensor, dtype: torch.dtype, where: str, *, is_finite: bool = False) -> torch.Tensor:
    """To ``dtype``, contiguous. Raises AdapterTensorError where a value does not fit into it.

    ``is_finite``: whether all values are known to be, as those that were read and not scaled.
    """
    result = tensor.to(dtype).contiguous()
    if not (is_finite and tensor.dtype is dtype) and not all_finite(result):
        raise AdapterTensorError(f"{where}: a value, once scaled, is outside the range of {dtype}")
    return result

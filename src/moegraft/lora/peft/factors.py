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


def cast(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """To ``dtype``, contiguous. Raises AdapterTensorError where a value does not fit into it."""
    result = tensor.to(dtype).contiguous()
    if not all_finite(result):
        raise AdapterTensorError(f"{where}: a value, once scaled, is outside the range of {dtype}")
    return result

"""Parameters that a parallel plan of transformers has shared out, without importing DTensor where there is none."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this process holds its part."""
    return hasattr(tensor, "placements")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, sharing its memory; the tensor itself where it is whole."""
    return cast("torch.Tensor", cast("Any", tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter put together from all ranks; collective where it is sharded."""
    return cast("torch.Tensor", cast("Any", tensor).full_tensor()) if is_sharded(tensor) else tensor


def has_plan(model: nn.Module) -> bool:
    """Whether transformers has shared the model out among several processes."""
    return getattr(model, "_device_mesh", None) is not None or any(map(is_sharded, model.parameters()))

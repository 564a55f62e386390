"""What every launch needs to know about the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def has_hopper_features(device: torch.device) -> bool:
    """Programmatic dependent launch and TMA: compute capability 9.0 and later."""
    return device.type == "cuda" and _capability(device.index or 0) >= (9, 0)


def pdl_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: the PDL constexpr, and the launch option where the device has it."""
    return {"PDL": True, "launch_pdl": True} if has_hopper_features(device) else {"PDL": False}


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: float32 stays float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n < 2."""
    return 1 << max(0, n - 1).bit_length()

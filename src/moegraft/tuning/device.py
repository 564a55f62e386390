"""What tile choice asks of the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

_RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, the system's own in every program (CUDA C++ Programming Guide, 16.7)."""


@dataclass(frozen=True, kw_only=True)
class TuningDevice:
    """``name``: as torch gives it · ``shared_memory``: bytes that a program may have."""

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def has_wgmma(self) -> bool:
        """Matrix instructions of four warps, which read both operands from shared memory."""
        return self.capability[0] == 9


H200 = TuningDevice(name="NVIDIA H200", capability=(9, 0), shared_memory=227 * 1024)
"""What tiles were measured on; a GPU with as much gets them as they are."""


@lru_cache(maxsize=1)
def tuning_device() -> TuningDevice:
    """The process's GPU; where there are several, they are taken to be alike. Without one, the limits of an H200."""
    if not torch.cuda.is_available():
        return replace(H200, name="cpu")
    found = torch.cuda.get_device_properties()
    return TuningDevice(
        name=found.name,
        capability=(found.major, found.minor),
        shared_memory=found.shared_memory_per_multiprocessor - _RESERVED_BYTES,
    )

"""Casts to fp8 in Triton's interpreter, as the hardware makes them.

The interpreter (3.4 to 3.9) loses the carry where rounding up reaches the next power of two, and rounds ties up and
subnormal numbers down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_fp8_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, casts from float32 to e4m3 are torch's."""
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source != tl.float32 or target != tl.float8e4nv:
            return original(data, source, target, rounding_mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)

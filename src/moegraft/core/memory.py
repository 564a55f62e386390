"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
_UNITS |= {prefix + "ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgt")}
_UNITS |= {prefix + "b": 1000 ** (power + 1) for power, prefix in enumerate("kmgt")}
_LARGEST = 2**60


def parse_bytes(size: int | str) -> int:
    """Bytes of ``size``: a positive int, or a string such as ``"2GiB"`` or ``"1.5 GB"``. Raises ValueError."""
    expected = "expected bytes or a number with KiB, MiB, GiB, KB, MB or GB"
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zA-Z]*)\s*", size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"found the size {size!r}, {expected}")
        size = int(float(match[1]) * unit)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"found the size {size!r}, {expected}")
    if size < 1:
        raise ValueError(f"found a size of {size} bytes, expected at least 1")
    if size >= _LARGEST:
        raise ValueError(f"found a size of 2^{size.bit_length() - 1} bytes or more, expected less than 2^60")
    return size


def format_bytes(num_bytes: int) -> str:
    """``num_bytes`` for people: ``1.5 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"

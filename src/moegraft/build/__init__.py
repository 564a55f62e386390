"""The one place that composes: oracle, then format, then layer."""

from moegraft.build.layers import (
    build_fused_moe,
    build_fused_moe_with_lora,
    build_parallel_moe,
    linear_punica_for,
    punica_for,
    take_slice,
)

__all__ = [
    "build_fused_moe",
    "build_fused_moe_with_lora",
    "build_parallel_moe",
    "linear_punica_for",
    "punica_for",
    "take_slice",
]

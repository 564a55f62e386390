"""The one place that composes: oracle, then format, then layer."""

from moegraft.build.layers import build_fused_moe, build_fused_moe_with_lora, punica_for

__all__ = ["build_fused_moe", "build_fused_moe_with_lora", "punica_for"]

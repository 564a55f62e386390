"""Storage formats of expert weights, as objects with an inverse."""

FORMAT_NAMES = ("dense", "fp8", "int8", "int4", "mxfp4", "nvfp4")
"""Every ``ExpertsWeights.format_name``."""

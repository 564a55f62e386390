"""Shipped test tools: case tables, workloads, poisoned allocations, one error metric, the merged-weights oracle."""

from moegraft.testing.cases import MOE_CASES, LoRASpec, MoECase, MoEInputs, Routing, make_inputs, make_lora
from moegraft.testing.errors import assert_close, assert_close_delta, relative_error
from moegraft.testing.moe_reference import ExpertsFactors, ExpertsWeights, SupportsExpertsLoRA, moe_reference
from moegraft.testing.poison import poison_allocations
from moegraft.testing.workloads import Popularity, draw_adapters

__all__ = [
    "MOE_CASES",
    "ExpertsFactors",
    "ExpertsWeights",
    "LoRASpec",
    "MoECase",
    "MoEInputs",
    "Popularity",
    "Routing",
    "SupportsExpertsLoRA",
    "assert_close",
    "assert_close_delta",
    "draw_adapters",
    "make_inputs",
    "make_lora",
    "moe_reference",
    "poison_allocations",
    "relative_error",
]

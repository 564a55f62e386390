"""moegraft on transformers models."""

from moegraft.integrations.transformers.checkpoint import is_quantised, load_quantised
from moegraft.integrations.transformers.explain import Explanation, LayerChoice
from moegraft.integrations.transformers.graft import GraftedModel, attach
from moegraft.integrations.transformers.parallel.calls import init_parallel

__all__ = [
    "Explanation",
    "GraftedModel",
    "LayerChoice",
    "attach",
    "init_parallel",
    "is_quantised",
    "load_quantised",
]

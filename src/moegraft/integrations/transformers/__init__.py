"""moegraft on transformers models."""

from moegraft.integrations.transformers.checkpoint import is_quantised, load_quantised
from moegraft.integrations.transformers.explain import Explanation, LayerChoice
from moegraft.integrations.transformers.graft import GraftedModel, attach

__all__ = ["Explanation", "GraftedModel", "LayerChoice", "attach", "is_quantised", "load_quantised"]

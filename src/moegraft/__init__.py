"""moegraft: many LoRA adapters on one Mixture-of-Experts model, in one batch.

What needs transformers is looked up on first use, so that the layers and kernels work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moegraft.integrations.transformers import GraftedModel, attach, init_parallel, load_quantised
    from moegraft.parallel import ParallelConfig
    from moegraft.serving.engine import Engine
    from moegraft.serving.requests import SamplingParams

__all__ = [
    "Engine",
    "GraftedModel",
    "ParallelConfig",
    "SamplingParams",
    "attach",
    "init_parallel",
    "load_quantised",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "ParallelConfig":
        from moegraft.parallel import ParallelConfig

        return ParallelConfig
    if name == "SamplingParams":
        from moegraft.serving.requests import SamplingParams

        return SamplingParams
    if name == "Engine":
        from moegraft.serving.engine import Engine

        return Engine
    if name in __all__:
        from moegraft.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'moegraft' has no attribute {name!r}")

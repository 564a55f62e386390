"""moegraft: many LoRA adapters on one Mixture-of-Experts model, in one batch.

``attach`` and ``load_quantised`` need transformers and are looked up on first use, so that the layers and kernels work
without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moegraft.integrations.transformers import GraftedModel, attach, load_quantised

__all__ = ["GraftedModel", "attach", "load_quantised"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from moegraft.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'moegraft' has no attribute {name!r}")

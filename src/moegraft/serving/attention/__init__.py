"""Paged attention behind transformers' own model code: a registered function, and the step that it is given.

Each token is a row of the batch, so that q, k, v are [T, heads, 1, size]. The step that is passed to the model's
forward as the keyword argument ``paged`` arrives here unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from moegraft.core.errors import UnsupportedModelError
from moegraft.serving.attention.latents import LatentExpansion

IMPLEMENTATION = "moegraft_paged"


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention. window: a query sees this many keys, itself included; None all before it.
    softcap: scores x become softcap * tanh(x / softcap). sinks_H: a score per head that takes part in the softmax and
    has no value. latents: how heads are made of what pages keep; keys and values are then latents and rotated keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None
    latents: LatentExpansion | None = None


class AttentionStep(Protocol):
    """A step of the model, as attention layers see it."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Keeps the new keys and values, and gives [T, Hq, Cv]; all arguments are [T, heads, 1, size]."""


def paged_attention(  # noqa: PLR0913  # as transformers calls it
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    paged: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls; see ``AttentionInterface``."""
    if paged is None:
        raise UnsupportedModelError(
            f"the model's attention is {IMPLEMENTATION!r}, which serves an engine's steps only; close the engine first"
        )
    if attention_mask is not None or kwargs.get("block_indices") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} brings a mask of its own, which pages do not serve")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or None,
        softcap=softcap or None,
        sinks_H=s_aux,
        latents=expansion if isinstance(expansion := vars(module).get("expand_kv"), LatentExpansion) else None,
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return paged.attend(layer, query, key, value, options)[:, None], None


AttentionInterface.register(IMPLEMENTATION, paged_attention)

"""The quantisation of rows in plain torch."""

from __future__ import annotations

import torch

from moegraft.formats.fp8 import quantise_rows


def moe_quantise_reference(
    x_MI: torch.Tensor, *, group_size: int = 0, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Semantics: see ``host.moe_quantise``. (stored [M, I], scale [M, Q])."""
    return quantise_rows(x_MI, group_size=group_size or None, static_scale=static_scale)

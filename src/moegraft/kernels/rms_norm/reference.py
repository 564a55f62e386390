"""RMS norms in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch


def rms_norm_reference(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, *, adds_one: bool = False, rounds_first: bool = False
) -> torch.Tensor:
    """Semantics: see ``host.rms_norm``."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        y = y.to(x.dtype).float()
    if weight_D is not None:
        y = y * (weight_D.float() + 1.0 if adds_one else weight_D.float())
    return y.to(x.dtype)

"""Rotary embeddings in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, has_half: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Semantics: see ``host.rotary``."""
    if has_half:
        cos, sin = (torch.cat([angle, angle], dim=-1) for angle in (cos, sin))
    cos, sin, turned = cos[:, None], sin[:, None], cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, rest = x[..., :turned], x[..., turned:]
        a, b = first.chunk(2, dim=-1)
        return torch.cat([first * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)

    return turn(q), turn(k)

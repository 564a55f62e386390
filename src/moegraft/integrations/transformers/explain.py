"""Which backend serves each layer, and why every other was refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moegraft.oracle import Decision, Rejection


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The oracle's word on one experts layer."""

    layer: str
    backend: str
    format_name: str
    device: str
    rejections: tuple[Rejection, ...]

    @classmethod
    def of(cls, layer: str, decision: Decision) -> LayerChoice:
        return cls(
            layer=layer,
            backend=decision.backend,
            format_name=decision.request.format_name,
            device=str(decision.request.device),
            rejections=decision.rejections,
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One choice a layer, in the order of the model; prints as text."""

    choices: tuple[LayerChoice, ...]

    def __iter__(self) -> Iterator[LayerChoice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            lines.append(f"{choice.layer}: {choice.backend} ({choice.format_name} weights on {choice.device})")
            lines += [f"    not {rejection.backend}: {rejection.reason}" for rejection in choice.rejections]
        return "\n".join(lines)

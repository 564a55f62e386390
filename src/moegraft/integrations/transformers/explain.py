"""Which backend serves each layer, and why every other was refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from moegraft.core.config import BackendRequest, DeviceTarget
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers.host.storage import host_experts
from moegraft.integrations.transformers.host.targets import experts_per_token, find_unsupported
from moegraft.oracle import Decision, Rejection, select_experts


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The oracle's word on one experts layer.

    ``kept_by``: who holds its weights, "transformers" (parameters of the module) or "moegraft" (packed, as
    ``load_quantised`` leaves them, or a rank's slice).
    """

    layer: str
    backend: str
    format_name: str
    device: str
    kept_by: str
    rejections: tuple[Rejection, ...]

    @classmethod
    def of(cls, layer: str, decision: Decision, *, is_ours: bool) -> LayerChoice:
        return cls(
            layer=layer,
            backend=decision.backend,
            format_name=decision.request.format_name,
            device=str(decision.request.device),
            kept_by="moegraft" if is_ours else "transformers",
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
            weights = f"{choice.format_name} weights on {choice.device}, kept by {choice.kept_by}"
            lines.append(f"{choice.layer}: {choice.backend} ({weights})")
            lines += [f"    not {rejection.backend}: {rejection.reason}" for rejection in choice.rejections]
        return "\n".join(lines)


def explain_structure(model: PreTrainedModel, packed: Mapping[str, str]) -> Explanation:
    """What ``attach`` would choose for a model of which only the structure is there: shapes, a device and dtypes.

    ``packed``: name of an experts module -> name of the format in which ``load_quantised`` would keep it. Raises
    UnsupportedModelError or NoBackendError.
    """
    reason = find_unsupported(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    top_k, choices = experts_per_token(model), []
    for name, host in host_experts(model).items():
        request = BackendRequest(
            config=host.config(top_k, host.dtype(model)),
            device=DeviceTarget.of(host.device),
            format_name=packed.get(name, "dense"),
        )
        choices.append(LayerChoice.of(name, select_experts(request), is_ours=name in packed))
    return Explanation(choices=tuple(choices))

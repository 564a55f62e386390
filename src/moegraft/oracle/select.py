"""The oracle: an ordered table of experts classes and one walk through it."""

from __future__ import annotations

from dataclasses import dataclass

from moegraft.core.config import BackendRequest
from moegraft.core.errors import NoBackendError
from moegraft.moe.experts import (
    FusedMoEExpertsModular,
    MarlinExperts,
    TorchExperts,
    TritonExperts,
    UnfusedOAITritonExperts,
)

# The order of preference; the first that can serve the request is taken.
EXPERTS_CLASSES: tuple[type[FusedMoEExpertsModular], ...] = (
    TritonExperts,
    MarlinExperts,
    UnfusedOAITritonExperts,
    TorchExperts,
)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A backend that was not taken, and why."""

    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The chosen experts class and what became of every other."""

    request: BackendRequest
    experts_cls: type[FusedMoEExpertsModular]
    rejections: tuple[Rejection, ...]

    @property
    def backend(self) -> str:
        return self.experts_cls.__name__


def select_experts(
    request: BackendRequest,
    *,
    backend: str | None = None,
    classes: tuple[type[FusedMoEExpertsModular], ...] = EXPERTS_CLASSES,
) -> Decision:
    """The decision for one layer; ``backend`` asks for a class by name.

    Raises NoBackendError: with the reason where the named class cannot serve the request, with every reason where
    none can.
    """
    names = [cls.__name__ for cls in classes]
    if backend is not None and backend not in names:
        raise NoBackendError(f"no backend is called {backend!r}; there are {', '.join(names)}")
    chosen: type[FusedMoEExpertsModular] | None = None
    rejections = []
    for cls in classes:
        reason = why_not(cls, request)
        if reason is not None and backend == cls.__name__:
            raise NoBackendError(f"{backend} cannot serve {request.format_name} experts on {request.device}: {reason}")
        if reason is None and backend not in (None, cls.__name__):
            reason = f"{backend} was asked for by name"
        elif reason is None and chosen is not None:
            reason = f"{chosen.__name__} comes first in the order of preference"
        if reason is None:
            chosen = cls
        else:
            rejections.append(Rejection(backend=cls.__name__, reason=reason))
    if chosen is None:
        reasons = "; ".join(f"{r.backend}: {r.reason}" for r in rejections)
        raise NoBackendError(f"no backend serves {request.format_name} experts on {request.device}: {reasons}")
    return Decision(request=request, experts_cls=chosen, rejections=tuple(rejections))


def why_not(cls: type[FusedMoEExpertsModular], request: BackendRequest) -> str | None:
    """Why a class cannot serve the request; None where it can, whatever the order of preference says."""
    if request.needs_delta:
        if cls.is_monolithic:
            return "it is monolithic: no delta can be added inside"
        if not cls.supports_lora():
            return "it does not take LoRA"
        if request.fully_sharded and not cls.adds_lora_separately():
            return "it adds deltas inside its GEMMs, where ranks of fully sharded LoRA cannot exchange low-rank rows"
    if request.ep_size > 1 and cls.is_monolithic:
        return f"it is monolithic: rows cannot be sent to {request.ep_size} ranks between routing and experts"
    ok, reason = cls.is_supported_config(request)
    return None if ok else reason


def why_no_dora(
    cls: type[FusedMoEExpertsModular], classes: tuple[type[FusedMoEExpertsModular], ...] = EXPERTS_CLASSES
) -> str | None:
    """Why adapters with DoRA on experts cannot be served by a class, and which can; None where they are."""
    if cls.scales_lora():
        return None
    others = " or ".join(repr(other.__name__) for other in classes if other.scales_lora())
    return f"{cls.__name__} adds deltas and scales no rows: attach with backend={others}"

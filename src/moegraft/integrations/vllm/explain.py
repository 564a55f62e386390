"""What the plug-in would serve of a checkpoint, and why not the rest; without vLLM and without weights."""

from __future__ import annotations

from dataclasses import dataclass

from moegraft.integrations.vllm.versions import SWITCH, wanted_mode, why_not
from moegraft.lora.targets import ModelTargets


@dataclass(frozen=True, kw_only=True)
class Service:
    """One kind of module in vLLM. ``reason``: why vLLM's own path serves it; empty where the plug-in does."""

    part: str
    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PluginExplanation:
    """``absent``: why the plug-in leaves this environment's vLLM as it is, and so would not come to the rest."""

    absent: str | None
    services: tuple[Service, ...]


def explain_plugin(targets: ModelTargets, *, quantisation: str) -> PluginExplanation:
    """For a model's targets; ``quantisation``: the method of its checkpoint, empty where there is none."""
    heads = sum(name.rpartition(".")[2] == "lm_head" for name in targets.linears)
    experts, linears = len(targets.experts), len(targets.linears) - heads
    of_experts = f"{quantisation} weights, which vLLM's kernels read in a form of their own" if quantisation else ""
    of_linears = ""
    if not experts and wanted_mode() != "all":
        of_linears = f"a model without experts, which {SWITCH}=all includes"
    services = (
        Service(part="experts", count=experts, reason=of_experts),
        Service(part="linear maps", count=linears, reason=of_linears),
        Service(
            part="embeddings and heads",
            count=len(targets.embeddings) + heads,
            reason="in vLLM's buffers, by its kernels",
        ),
    )
    return PluginExplanation(absent=why_not(), services=tuple(service for service in services if service.count))

"""What the plug-in would serve of a checkpoint, and why not the rest; without vLLM and without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def explain_plugin(targets: ModelTargets, *, quantisation: Mapping[str, Any] | None) -> PluginExplanation:
    """For a model's targets; ``quantisation``: the fields of its checkpoint's ``quantization_config``."""
    heads = sum(name.rpartition(".")[2] == "lm_head" for name in targets.linears)
    experts, linears = len(targets.experts), len(targets.linears) - heads
    of_experts = "" if quantisation is None else _why_not_weights(quantisation)
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


def _why_not_weights(fields: Mapping[str, Any]) -> str:
    """Empty where ``quantised`` reads experts of such a checkpoint."""
    method = str(fields.get("quant_method", "quantised"))[:40]
    if method == "mxfp4":
        return ""
    if method == "fp8":
        return "" if fields.get("weight_block_size") == [128, 128] else "fp8 weights without blocks of 128 x 128"
    if method in ("gptq", "awq"):
        is_read = fields.get("bits", fields.get("w_bit")) == 4 and not fields.get("desc_act")
        return "" if is_read else f"{method} weights of other than 4 bits, or in act-order"
    if method == "compressed-tensors" and fields.get("format") == "pack-quantized":
        bits = [_bits(group) for group in (fields.get("config_groups") or {}).values()]
        return "" if set(bits) == {4} else "packed weights of other than 4 bits"
    return f"{method} weights, which vLLM's kernels read in a form of their own"


def _bits(group: Any) -> Any:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights.get("num_bits") if isinstance(weights, Mapping) else None

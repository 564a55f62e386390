"""What the plug-in knows of versions of vLLM and reads of its configuration, and the switch: all in one place."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

SWITCH = "MOEGRAFT_VLLM"
"""``off``: vLLM as it is · ``lora`` (default): engines with LoRA on MoE models · ``all``: also engines without LoRA,
and LoRA on dense models."""
MEMORY = "MOEGRAFT_VLLM_MEMORY"
"""Memory of adapters on each GPU (``4GiB``); by default as much as ``max_loras`` adapters of ``max_lora_rank`` need."""
MODES = ("off", "lora", "all")

TESTED = ("0.26", "0.33")
"""Versions, by major and minor, that the tests have run: the first each time, the second by hand."""


def wanted_mode() -> str:
    """The switch. Raises ValueError for a word that it does not know."""
    mode = os.environ.get(SWITCH, "lora")
    if mode not in MODES:
        raise ValueError(f"{SWITCH}={mode!r}, expected one of {', '.join(MODES)}")
    return mode


def wanted_memory() -> str | None:
    """Memory of adapters, as people write it."""
    return os.environ.get(MEMORY)


def installed_version() -> str | None:
    """vLLM's, without importing it."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def why_not_version(found: str | None) -> str | None:
    """Why a version is not served."""
    if found is None:
        return "vLLM is not installed"
    series = re.match(r"\d+\.\d+", found)
    if series is None or series[0] not in TESTED:
        return f"this is vLLM {found}, known are {', '.join(TESTED)}"
    return None


def why_not() -> str | None:
    """Why this process keeps vLLM as it is; None where the plug-in goes in."""
    if wanted_mode() == "off":
        return f"{SWITCH}=off"
    reason = why_not_version(installed_version())
    if reason is None and find_spec("triton") is None:
        reason = "triton cannot be imported"
    return reason


def why_not_device() -> str | None:
    """Why layers of this process's device are not served. Triton's interpreter serves CPUs, for tests."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        if not current_platform.has_device_capability(80):
            return "it needs a GPU of compute capability 8.0"
        return None
    if current_platform.is_cpu() and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on CUDA devices, this is {current_platform.device_name}"


def why_not_lora(lora_config: Any, dtype: torch.dtype) -> str | None:
    """Why LoRA of an engine is not served."""
    if lora_config.fully_sharded_loras:
        return "fully_sharded_loras is vLLM's own"
    if lora_config.lora_dtype != dtype:
        return f"adapters are {lora_config.lora_dtype}, the model is {dtype}"
    return why_not_device()


def current_config() -> Any:
    """The engine's configuration while its model is built, or None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def prepare_mapping(punica_wrapper: Any) -> None:
    """Once, before the first batch: slots of rows that no batch has stated yet are the base's."""
    punica_wrapper.token_mapping_meta.token_lora_mapping.fill_(-1)


def finish_mapping(punica_wrapper: Any, num_rows: int) -> None:
    """After each change: rows behind the batch's, which padded graphs run too, are the base's.

    vLLM leaves the mapping as it was where no row has an adapter, and a graph that was captured with LoRA reads it.
    """
    meta = punica_wrapper.token_mapping_meta
    meta.token_lora_mapping[0 if bool(meta.no_lora_flag_cpu) else num_rows :].fill_(-1)


def mapping_of(punica_wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots of all rows, int32 on the device, −1 = base; a flag on the CPU, whether no row has an adapter)."""
    meta = punica_wrapper.token_mapping_meta
    return meta.token_lora_mapping, meta.no_lora_flag_cpu


def is_skipped(device: torch.device, no_lora: torch.Tensor, idle: torch.Tensor) -> bool:
    """Whether a layer adds nothing: no row has an adapter, or (``idle``) none that is active touches the layer, which
    a graph that is being captured cannot count on."""
    if bool(no_lora):
        return True
    return bool(idle) and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

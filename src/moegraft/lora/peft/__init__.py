"""Reads LoRA adapters that PEFT saved, for transformers 4 or 5. ``docs/peft_checkpoints.md`` says what it takes."""

from __future__ import annotations

from moegraft.lora.peft.inspection import AdapterInspection, ModuleSummary, inspect_peft_adapter
from moegraft.lora.peft.loader import PeftAdapter, load_peft_adapter
from moegraft.lora.peft.report import LoadReport

__all__ = [
    "AdapterInspection",
    "LoadReport",
    "ModuleSummary",
    "PeftAdapter",
    "inspect_peft_adapter",
    "load_peft_adapter",
]

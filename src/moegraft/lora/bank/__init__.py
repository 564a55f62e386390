"""The adapter bank: page pool -> adapter handle -> batch. ``docs/adapter_bank.md`` has a worked example."""

from moegraft.lora.bank.bank import AdapterBank, BankMemory
from moegraft.lora.bank.handle import AdapterBatch, AdapterHandle, AdapterInfo, NewAdapter
from moegraft.lora.bank.layout import BankLayout
from moegraft.lora.bank.pool import PagePool

__all__ = [
    "AdapterBank",
    "AdapterBatch",
    "AdapterHandle",
    "AdapterInfo",
    "BankLayout",
    "BankMemory",
    "NewAdapter",
    "PagePool",
]

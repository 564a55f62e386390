"""Punica wrappers: the LoRA primitives, one class per kind of device."""

from moegraft.lora.punica.base import PunicaWrapperBase
from moegraft.lora.punica.cpu import PunicaWrapperCPU
from moegraft.lora.punica.gpu import PunicaWrapperGPU

__all__ = ["PunicaWrapperBase", "PunicaWrapperCPU", "PunicaWrapperGPU"]

"""What the name of a tensor says by itself: which module, which factor, how deep in PEFT's nested wrappers."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

PREFIX = "base_model.model."


class Factor(enum.StrEnum):
    """What a tensor is to its module. SAVED: no LoRA factor but a whole parameter."""

    A = "lora_A"
    B = "lora_B"
    A_BIAS = "lora_A.bias"
    B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    SAVED = "saved"


_SUFFIXES = {
    ".lora_A.weight": Factor.A,
    ".lora_B.weight": Factor.B,
    ".lora_A.bias": Factor.A_BIAS,
    ".lora_B.bias": Factor.B_BIAS,
    ".lora_embedding_A": Factor.EMBEDDING_A,
    ".lora_embedding_B": Factor.EMBEDDING_B,
    ".lora_magnitude_vector": Factor.MAGNITUDE,
    ".lora_magnitude_vector.weight": Factor.MAGNITUDE,  # PEFT before 0.12
}
_BASE_LAYERS = re.compile(r"((?:\.base_layer)*)$")
# ``modules_to_save`` and the adapter's name stand between module and parameter where a state dict was saved raw.
_SAVED_INFIX = re.compile(r"\.modules_to_save(?:\.default)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorKey:
    """A tensor's name, taken apart.

    ``module``: as in the model that was trained, without PEFT's prefix and without its wrappers.
    ``depth``: how many ``base_layer`` stood behind it; a fused experts module with LoRA on two parameters is wrapped
    twice. ``param``: the parameter's name, for SAVED only.
    """

    name: str
    module: str
    factor: Factor
    depth: int = 0
    param: str = ""


def parse_key(name: str) -> TensorKey:
    """Takes a tensor's name apart. Whatever is no LoRA factor is a saved parameter, to be looked up by its name."""
    path = name.removeprefix(PREFIX)
    for suffix, factor in _SUFFIXES.items():
        if path.endswith(suffix):
            module, depth = _unwrap(path.removesuffix(suffix))
            return TensorKey(name=name, module=module, factor=factor, depth=depth)
    module, _, param = path.rpartition(".")
    module, depth = _unwrap(_SAVED_INFIX.sub("", module))
    return TensorKey(name=name, module=module, factor=Factor.SAVED, depth=depth, param=param)


def _unwrap(module: str) -> tuple[str, int]:
    wrappers = _BASE_LAYERS.search(module)
    assert wrappers is not None  # the expression matches the empty string
    return module[: wrappers.start()], wrappers.group(1).count(".base_layer")

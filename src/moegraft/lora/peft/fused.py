"""Fused experts parameters (PEFT's ``target_parameters``): which parameter a pair belongs to, and which way it lies.

One pair holds the factors of all E experts: A has E*r rows, expert-major, A_e = A[e*r : (e+1)*r]; B has E*r columns,
rank-major, B_e = B[:, e::E]. The delta in the parameter's stored layout is scale * P_e or its transpose, with
P_e = B_e A_e, and which of them depends on the version of PEFT that trained it:

| PEFT               | parameter stored [E, out, in] | stored [E, in, out] |
|--------------------|-------------------------------|---------------------|
| up to 0.18         | P_e^T                         | P_e^T               |
| 0.19.0             | P_e^T                         | P_e                 |
| 0.19.1 and later   | P_e                           | P_e^T               |

The delta of the map out <- in is P_e where A's free axis is the input (``a_is_input``) and P_e^T where it is the
output: then A and B swap roles. The shapes tell which, unless input and output have the same size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.core.errors import AdapterConfigError, AdapterTensorError
from moegraft.files import TensorInfo, shorten
from moegraft.lora.peft.config import PeftConfig
from moegraft.lora.peft.names import Projection, first_projection
from moegraft.lora.targets import ExpertsTarget


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedTensors:
    """One A and B for all experts, before their role is known. ``module`` and ``depth`` as in keys.TensorKey."""

    module: str
    depth: int
    a: TensorInfo
    b: TensorInfo

    @property
    def where(self) -> str:
        """Both tensors, for messages."""
        return f"{self.a.where} {list(self.a.shape)} and {shorten(self.b.name)} {list(self.b.shape)}"


def sizes(target: ExpertsTarget, projection: Projection) -> tuple[int, int]:
    """(in, out) of one projection of an expert."""
    if projection is Projection.DOWN:
        return target.intermediate_size, target.hidden_size
    halves = 2 if projection is Projection.GATE_UP else 1
    return target.hidden_size, halves * target.intermediate_size


def assign_roles(
    target: ExpertsTarget, config: PeftConfig, pairs: Sequence[FusedTensors]
) -> list[tuple[Projection, FusedTensors]]:
    """Which of the module's two parameters each pair belongs to.

    PEFT wraps the parameter that the module declares first (gate_up or up) inside the other, so that it is the one
    with ``base_layer`` in its name. Where only one was targeted there is no ``base_layer``, and ``target_parameters``
    tells which it was. Shapes overrule the order, since the two parameters of a gated expert always differ in shape.
    """
    if not pairs:
        return []
    first = first_projection(target)
    if len(pairs) > 2 or max(pair.depth for pair in pairs) > 1:
        deepest = max(pairs, key=lambda pair: pair.depth)
        raise AdapterTensorError(f"{deepest.where}: LoRA on more than the two weights of {target.name}")
    if len(pairs) == 2:
        inner, outer = sorted(pairs, key=lambda pair: -pair.depth)
        if not _fits(target, first, inner) and _fits(target, first, outer) and _fits(target, Projection.DOWN, inner):
            inner, outer = outer, inner
        return [(first, inner), (Projection.DOWN, outer)]
    return [(_role_of_only_pair(target, config, pairs[0]), pairs[0])]


def _role_of_only_pair(target: ExpertsTarget, config: PeftConfig, pair: FusedTensors) -> Projection:
    first = first_projection(target)
    named = [
        projection
        for projection, param in ((first, target.w13_param), (Projection.DOWN, target.w2_param))
        if config.names_parameter(f"{pair.module}.{param}")
    ]
    if len(named) == 1:
        return named[0]
    fitting = [projection for projection in (first, Projection.DOWN) if _fits(target, projection, pair)]
    if len(fitting) == 1:
        return fitting[0]
    if len(named) == 2:  # the other parameter's pair is not in the file
        return first if pair.depth else Projection.DOWN
    raise AdapterConfigError(
        f"target_parameters names neither {target.w13_param} nor {target.w2_param} of {pair.module}, and the shapes "
        f"of {pair.where} do not tell which it is; expected shapes for {_wanted(target, first)} "
        f"or {_wanted(target, Projection.DOWN)}"
    )


def fused_rank(target: ExpertsTarget, projection: Projection, pair: FusedTensors) -> int:
    """The rank of one expert, checked against both shapes. Raises AdapterTensorError."""
    if len(pair.a.shape) == len(pair.b.shape) == 2 and _fits(target, projection, pair):
        rows = pair.a.shape[0]
        if rows == pair.b.shape[1] and rows and rows % target.num_experts == 0:
            return rows // target.num_experts
    raise AdapterTensorError(f"{pair.where}: expected {_wanted(target, projection)} of {target.name}, one r")


def a_is_input(target: ExpertsTarget, projection: Projection, pair: FusedTensors) -> bool | None:
    """Whether A's free axis is the input of the map; None where the shape cannot tell."""
    size_in, size_out = sizes(target, projection)
    return None if size_in == size_out else pair.a.shape[1] == size_in


def version_a_is_input(peft_version: str | None, *, is_transposed: bool) -> bool:
    """The table above. Adapters older than 0.18 name no version."""
    version = _parse_version(peft_version)
    if is_transposed:
        return version != (0, 19, 0)
    return version >= (0, 19, 1)


def split_fused(
    a: torch.Tensor, b: torch.Tensor, *, num_experts: int, a_is_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E*r, .], B [., E*r] -> rank rows of the input side [E, r, in] and of the output side [E, r, out]."""
    a_rows = a.reshape(num_experts, a.shape[0] // num_experts, a.shape[1])
    # Transposed as one matrix first: torch does that in blocks, many times faster than a copy with three strides.
    b_rows = b.T.contiguous().reshape(b.shape[1] // num_experts, num_experts, b.shape[0]).transpose(0, 1)
    return (a_rows, b_rows) if a_is_input else (b_rows, a_rows)


def _fits(target: ExpertsTarget, projection: Projection, pair: FusedTensors) -> bool:
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return False
    size_in, size_out = sizes(target, projection)
    return (pair.a.shape[1], pair.b.shape[0]) in ((size_in, size_out), (size_out, size_in))


def _wanted(target: ExpertsTarget, projection: Projection) -> str:
    size_in, size_out = sizes(target, projection)
    rows = f"{target.num_experts}*r"
    return f"{projection} A [{rows}, {size_in}] and B [{size_out}, {rows}] (or {size_in} and {size_out} swapped)"


def _parse_version(peft_version: str | None) -> tuple[int, int, int]:
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?", peft_version or "0.0")
    assert match is not None  # config.parse_config checked it
    major, minor, patch = match.groups(default="0")
    return int(major), int(minor), int(patch)

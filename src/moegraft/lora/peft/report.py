"""What a load did, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The result of loading one adapter.

    ``tensors_applied`` equals ``tensors_in_file`` less ``tensors_elsewhere``, which belong to experts of other ranks,
    and less ``tensors_left_out``, on modules that are not served and that ``skip_unserved`` has left out: any other
    tensor that cannot be applied is an error. ``left_out``: those modules -> why they are not served.
    ``bytes_in_file``: of the weight files. ``bytes_read``: of tensors, by this rank. ``bytes_held``: of what it keeps.
    ``experts``: module -> projection (``gate``, ``up``, ``gate_up``, ``down``) -> rank of one expert, the largest where
    they differ. ``linears``, ``embeddings``: module -> rank. ``tokens``: module -> rows that are replaced. ``saved``:
    module -> parameters that are replaced. Modules by their names in the base model. ``notes``: decisions worth
    knowing.
    """

    name: str
    path: str
    peft_version: str | None
    tensors_in_file: int
    tensors_applied: int
    bytes_in_file: int
    tensors_elsewhere: int = 0
    tensors_left_out: int = 0
    bytes_read: int = 0
    bytes_held: int = 0
    experts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    linears: Mapping[str, int] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    saved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

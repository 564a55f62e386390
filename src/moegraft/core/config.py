"""Frozen descriptions of a Mixture-of-Experts layer. Plain data: no tensors, no devices.

Shape letters used in the whole project:
T tokens · K experts per token · N = T*K routed rows · E experts · D hidden size · F expert intermediate size
S adapters in a batch · r rank of one adapter · G = 2 (gate and up) or 1 (no gate)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

_RESERVED_SHARED_MEMORY = 1024
"""Bytes of a multiprocessor's, the system's own in every program (CUDA C++ Programming Guide, 16.7)."""


class ActivationKind(enum.StrEnum):
    """Function applied to the gate half (or to the only half where the expert has no gate)."""

    SILU = "silu"
    GELU = "gelu"  # exact, erf
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"  # relu(x)**2
    SWIGLU_OAI = "swiglu_oai"  # gpt-oss: clamped, (up + 1) * gate * sigmoid(alpha * gate)
    SILU_CLAMPED = "silu_clamped"  # DeepSeek-V4: silu(min(gate, limit)) * clamp(up, -limit, limit)
    SILU_SOFTCAPPED = "silu_softcapped"  # Inkling 2: softcap(gate, alpha) * sigmoid(gate) * softcap(up, limit)
    CLAMPED_SILU = "clamped_silu"  # Step-3.7: min(silu(gate), limit) * clamp(up, -limit, limit)

    @property
    def needs_gate(self) -> bool:
        """Whether the formula is of gate and up together."""
        return self in _OF_BOTH_HALVES


_OF_BOTH_HALVES = frozenset(
    {
        ActivationKind.SWIGLU_OAI,
        ActivationKind.SILU_CLAMPED,
        ActivationKind.SILU_SOFTCAPPED,
        ActivationKind.CLAMPED_SILU,
    }
)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """``h = kind(gate) * up`` where ``gated``, else ``h = kind(u)``.

    ``alpha``: read by SWIGLU_OAI and SILU_SOFTCAPPED; ``limit``: by those, SILU_CLAMPED and CLAMPED_SILU. Raises
    ValueError for a kind that needs a gate and has none.
    """

    kind: ActivationKind = ActivationKind.SILU
    gated: bool = True
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.kind.needs_gate and not self.gated:
            raise ValueError(f"activation {self.kind.value} is of gate and up: found gated=False")

    @property
    def num_halves(self) -> int:
        """G of the shape legend."""
        return 2 if self.gated else 1


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and options of one experts layer; the same record describes it to the oracle and to the kernels.

    ``batch_invariant``: a row has the same bits whichever rows are with it, for some of the speed of small batches.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = Activation()
    has_bias: bool = False
    dtype: torch.dtype = torch.float32
    apply_router_weight_on_input: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True, kw_only=True)
class DeviceTarget:
    """Where a layer runs, as data: what the oracle, tile choice and launches ask of a device.

    ``capability``: CUDA's (major, minor) · ``has_triton``: triton can be imported · ``name``: as torch gives it ·
    ``num_sms``: multiprocessors · ``shared_memory``: bytes of it that a program may have · ``memory``: bytes of the
    device. Of anything but a GPU, or where nobody asks, the last three are 0.
    """

    kind: str
    capability: tuple[int, int] | None = None
    has_triton: bool = False
    name: str = ""
    num_sms: int = 0
    shared_memory: int = 0
    memory: int = 0

    @classmethod
    def of(cls, device: torch.device) -> DeviceTarget:
        """The target behind a torch device. Cached: a launch pays for a dictionary lookup."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _target_of(device)

    @property
    def has_hopper_features(self) -> bool:
        """Programmatic dependent launch and TMA."""
        return self.capability is not None and self.capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        """Matrix instructions of four warps, which read both operands from shared memory."""
        return self.capability is not None and self.capability[0] == 9

    def __str__(self) -> str:
        return self.kind if self.capability is None else f"{self.kind} sm{self.capability[0]}{self.capability[1]}"


@lru_cache(maxsize=64)
def _target_of(device: torch.device) -> DeviceTarget:
    has_triton = find_spec("triton") is not None
    if device.type != "cuda":
        return DeviceTarget(kind=device.type, has_triton=has_triton, name=device.type)
    found = torch.cuda.get_device_properties(device)
    return DeviceTarget(
        kind="cuda",
        capability=(found.major, found.minor),
        has_triton=has_triton,
        name=found.name,
        num_sms=found.multi_processor_count,
        shared_memory=found.shared_memory_per_multiprocessor - _RESERVED_SHARED_MEMORY,
        memory=found.total_memory,
    )


@dataclass(frozen=True, kw_only=True)
class BackendRequest:
    """What the oracle is asked: which experts class can serve this layer.

    ``config`` has the sizes of the rank's own slice. ``tp_size``, ``ep_size``: ranks that share every expert, and that
    share the experts out. ``lora``: adapters may come; ``adapters_touch_experts``: and they may bring deltas of the
    experts, not of other modules only. ``fully_sharded``: the ranks of ``tp_size`` share the low-rank side too.
    """

    config: MoEConfig
    device: DeviceTarget
    format_name: str = "dense"
    lora: bool = True
    adapters_touch_experts: bool = True
    tp_size: int = 1
    ep_size: int = 1
    fully_sharded: bool = False

    @property
    def needs_delta(self) -> bool:
        """Whether the experts class must take LoRA."""
        return self.lora and self.adapters_touch_experts

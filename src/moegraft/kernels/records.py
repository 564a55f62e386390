"""What host functions share: tensors that kernels take together, and what every launch needs to know.

Shape letters: T tokens · K experts per token · N = T*K routed rows · E experts · D hidden size · F intermediate size ·
G = 2 (gate and up) or 1 · S adapter slots · L lanes · W columns of the low-rank rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from moegraft.core.config import Activation, DeviceTarget
from moegraft.core.halves import half_strides
from moegraft.core.routing import LANE_GRANULE, Lanes
from moegraft.core.tables import ExpertsTables
from moegraft.kernels.device import groups
from moegraft.tuning.weight_formats import WeightFormat as WeightFormat


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """E, D, F of an experts layer, and whether it has a gate."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What the numbers of quantised w13 and w2 mean. Scales and zeros lie as the format's class in ``formats`` says.

    ``scale_group``: inputs that share a scale, 0 where all of a column do. ``hidden_size``, ``intermediate_size``: D
    and F, which packed tensors need not show. ``input_scale13``, ``input_scale2``: static scales of the rows that the
    GEMMs read, of formats that quantise them; without, each row (or group of it) is scaled by its largest number.
    """

    format: WeightFormat
    scales13: torch.Tensor
    scales2: torch.Tensor
    hidden_size: int
    intermediate_size: int
    zeros13: torch.Tensor | None = None
    zeros2: torch.Tensor | None = None
    scale_group: int = 0
    input_scale13: torch.Tensor | None = None
    input_scale2: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """Base weights of one experts layer, read in place in whichever layout the checkpoint has.

    ``w13`` [E, G*F, D] and ``w2`` [E, D, F]; transposed: [E, D, G*F] and [E, F, D]. ``b13`` [E, G*F], ``b2`` [E, D].
    ``is_interleaved``: gate and up alternate along G*F instead of standing one after the other. With a
    ``quantisation``, w13 and w2 are as its format stores them.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    activation: Activation = field(default_factory=Activation)
    is_transposed: bool = False
    is_interleaved: bool = False
    quantisation: Quantisation | None = None
    format: WeightFormat = field(init=False)
    sizes: LayerSizes = field(init=False)

    def __post_init__(self) -> None:
        quantisation, gated = self.quantisation, self.activation.gated
        if quantisation is None:
            D, F = self.w13_EGFD.shape[2], self.w13_EGFD.shape[1] // (1 + gated)
        else:
            D, F = quantisation.hidden_size, quantisation.intermediate_size
        sizes = LayerSizes(num_experts=self.w13.shape[0], hidden_size=D, intermediate_size=F, gated=gated)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "format", WeightFormat.DENSE if quantisation is None else quantisation.format)

    @property
    def w13_EGFD(self) -> torch.Tensor:
        """[E, G*F, D] view."""
        return self.w13.mT if self.is_transposed else self.w13

    @property
    def w2_EDF(self) -> torch.Tensor:
        """[E, D, F] view."""
        return self.w2.mT if self.is_transposed else self.w2

    def half_strides(self, stride_gf: int) -> tuple[int, int]:
        """(stride along F, offset of up behind gate) in elements, from the stride along G*F."""
        num_halves, size = 1 + self.sizes.gated, self.sizes.intermediate_size
        return half_strides(stride_gf, size, num_halves=num_halves, is_interleaved=self.is_interleaved)


@dataclass(frozen=True, kw_only=True)
class LoRABatch:
    """The adapters of one call: bank tables, slot of each token [T] int32 (-1 = base), and what the host must know.

    ``rank13``, ``rank2``: no adapter that may be resident while this call, or a graph that captured it, runs has more
    rank rows in A13 or A2. They size buffers and grids; the kernels walk the true ranks. ``x_TD``: the rows that A13
    reads, where the base reads others (rows that were quantised on their way here).
    """

    tables: ExpertsTables
    token_slots_T: torch.Tensor
    rank13: int
    rank2: int
    x_TD: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.tables.page_table.shape[0]

    def row_alignment(self, row_len: int) -> int:
        """Elements, at most 16, that divide the address of every rank row of this length.

        A factor whose rows do not divide a page may begin at any multiple of 16 bytes in it, not of its row.
        """
        pool, page_elems = self.tables.pool, self.tables.page_elems
        limit = 16 if page_elems % row_len == 0 else 16 // pool.element_size()
        return math.gcd(row_len, page_elems, limit)


@dataclass(frozen=True, kw_only=True)
class Expand:
    """What a GEMM needs to add B u: the adapters, their low-rank rows [N, W] and the lanes of its factor.

    ``is_behind_routing``: a kernel ran between the routing and this GEMM, which may then read the routing at once.
    """

    lora: LoRABatch
    u_NW: torch.Tensor
    lanes: Lanes
    is_behind_routing: bool = True


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """``u_NW``: low-rank rows in the compute dtype · ``partial_SNW``: float32 [splits, N, W], None for one split."""

    u_NW: torch.Tensor
    partial_SNW: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class QuantisedRows:
    """``stored_MI``: rows in fp8 · ``scale_MQ``: float32, one a row or one a group of its columns."""

    stored_MI: torch.Tensor
    scale_MQ: torch.Tensor


def tables_group(lora: LoRABatch | None) -> groups.Tables:
    """The tables as kernels take them; without adapters, nothing to read."""
    if lora is None:
        return groups.Tables(None, None, None, None, 0, 0, 0)
    tables = lora.tables
    return groups.Tables(
        tables.pool, tables.page_table, tables.factors, tables.expert_index, tables.page_table.stride(0),
        tables.factors.stride(0), tables.expert_index.stride(0),
    )  # fmt: skip


def lora_operands(expand: Expand | None, columns: int) -> tuple[groups.Expand, groups.LowRank]:
    """What the kernels of an expand to ``columns`` columns a half are given; without, nothing to read."""
    if expand is None:
        return groups.Expand(None, None, None, None, None, 0), groups.LowRank(0, 1)
    lora, lanes = expand.lora, expand.lanes
    return (
        groups.Expand(
            expand.u_NW, lora.tables.pool, lanes.segment, lanes.granule, lanes.element, lanes.segment.shape[0]
        ),
        groups.LowRank(expand.u_NW.shape[1], lora.row_alignment(columns)),
    )


def low_rank_width(rank: int, *, num_halves: int) -> int:
    """W for at most ``rank`` rank rows: each half is padded to whole granules, so that u can be read in vectors."""
    if rank == 0:
        return 0
    padded = -(-rank // LANE_GRANULE) * LANE_GRANULE
    return padded + LANE_GRANULE * (num_halves - 1)


def check_token_slots(op: str, token_slots_T: torch.Tensor, num_tokens: int) -> None:
    """Raises ValueError unless the slots are contiguous int32 [T]."""
    if token_slots_T.shape != (num_tokens,) or token_slots_T.dtype != torch.int32 or not token_slots_T.is_contiguous():
        raise ValueError(
            f"{op}: token_slots {list(token_slots_T.shape)} {token_slots_T.dtype} with strides "
            f"{list(token_slots_T.stride())}, expected [{num_tokens}] torch.int32, contiguous"
        )


def check_low_rank_size(op: str, num_rows: int, width: int) -> None:
    """Raises ValueError where an element of the low-rank rows is beyond the 32-bit offsets of the expand."""
    if num_rows * width >= 2**31:
        raise ValueError(f"{op}: {num_rows} rows with {width} low-rank columns, expected fewer than 2^31 elements")


@lru_cache(maxsize=64)
def pdl_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: the PDL constexpr, and the launch option where the device has it."""
    return {"PDL": True, "launch_pdl": True} if DeviceTarget.of(device).has_hopper_features else {"PDL": False}


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: float32 stays float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n < 2."""
    return 1 << max(0, n - 1).bit_length()

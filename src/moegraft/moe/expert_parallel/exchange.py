"""What the expert-parallel pairs share: where experts stand, which adapters rows carry, how many rows each rank sends.

Rows travel with their choices and their adapter: header and activations side by side as bytes, so that one collective
carries them.

Shape letters: T tokens · K experts per token · R ranks of the expert-parallel group · S rows sent · M rows received ·
D hidden size · B bytes of a row
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.core.config import MoEConfig
from moegraft.core.errors import BatchError
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts, dequantise_rows, quantise_rows
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.rows import BASE_SLOT, base_slots
from moegraft.moe.layer import FusedMoEPrepareAndFinalize, weighs_input
from moegraft.parallel.collectives import Communicator
from moegraft.parallel.groups import ParallelGroups
from moegraft.parallel.slices import ExpertMap, ExpertPlacement

Field = tuple[torch.dtype, int]
"""dtype and width of one field of a row."""

ROW_ALIGN = 4
"""Bytes. Fields of four bytes an element come first, so each stands where its dtype wants it."""


class RowCodec(ABC):
    """How the activations of a row are sent."""

    @abstractmethod
    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]: ...

    @abstractmethod
    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The fields of each row."""

    @abstractmethod
    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """[M, D] as the GEMM reads it."""


@dataclass(frozen=True)
class PlainRows(RowCodec):
    """As they are: what LoRA, and GEMMs over unquantised activations, read."""

    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]:
        return ((dtype, hidden_size),)

    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x_SD,)

    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return fields[0]


@dataclass(frozen=True)
class Fp8Rows(RowCodec):
    """e4m3 values and their float32 scales; decoding gives the bits of ``Fp8Experts.quantise_input``."""

    group_size: int | None
    static_scale: torch.Tensor | None

    def fields(self, hidden_size: int, dtype: torch.dtype) -> tuple[Field, ...]:
        num_groups = 1 if self.group_size is None else -(-hidden_size // self.group_size)
        return (torch.float32, num_groups), (torch.float8_e4m3fn, hidden_size)

    def encode(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stored_SD, scale_SQ = quantise_rows(x_SD, group_size=self.group_size, static_scale=self.static_scale)
        return scale_SQ, stored_SD

    def decode(self, fields: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scale_MQ, stored_MD = fields
        return dequantise_rows(stored_MD, scale_MQ, dtype)


def codec_for(weights: ExpertsWeights) -> RowCodec:
    """fp8 weights meet fp8 activations, which may be sent as such; all others read activations as they are."""
    if isinstance(weights, Fp8Experts):
        return Fp8Rows(weights.group_size, weights.x_scale)
    return PlainRows()


def pack_rows(fields: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [S, B] from fields [S, width]."""
    parts = [_bytes_of(field) for field in fields]
    padding = -sum(part.shape[1] for part in parts) % ROW_ALIGN
    if padding:
        parts.append(parts[0].new_zeros(parts[0].shape[0], padding))
    return torch.cat(parts, dim=1)


def _bytes_of(field: torch.Tensor) -> torch.Tensor:
    # For no row, or one, contiguous() leaves the strides of an expanded tensor as they are, and a view refuses them.
    if field.numel() == 0:
        return field.new_empty(field.shape[0], field.shape[1] * field.itemsize, dtype=torch.uint8)
    if field.stride(-1) != 1:
        field = field.clone(memory_format=torch.contiguous_format)
    return field.contiguous().view(torch.uint8)


def unpack_rows(packed_MB: torch.Tensor, fields: Sequence[Field]) -> list[torch.Tensor]:
    """Inverse of ``pack_rows``: views [M, width]."""
    views, start = [], 0
    for dtype, width in fields:
        stop = start + width * dtype.itemsize
        views.append(packed_MB[:, start:stop].view(dtype))
        start = stop
    return views


@dataclass(frozen=True, kw_only=True)
class ReceivedRows:
    """One part: weights [M, K], ids [M, K] int32 of local experts (-1: elsewhere), adapter ids [M], encoded fields."""

    codec: RowCodec
    weights_MK: torch.Tensor
    ids_MK: torch.Tensor
    adapter_M: torch.Tensor
    encoded: tuple[torch.Tensor, ...]


def pack_routed_rows(
    codec: RowCodec, x_SD: torch.Tensor, weights_SK: torch.Tensor, ids_SK: torch.Tensor, adapter_S: torch.Tensor
) -> torch.Tensor:
    """uint8 [S, B]: a header of 8 K + 4 bytes (router weights, expert ids, adapter id), then the activations."""
    return pack_rows([weights_SK.float(), ids_SK.int(), adapter_S.int()[:, None], *codec.encode(x_SD)])


def unpack_routed_rows(
    codec: RowCodec, packed_MB: torch.Tensor, *, top_k: int, hidden_size: int, dtype: torch.dtype
) -> ReceivedRows:
    """Inverse of ``pack_routed_rows``, as views."""
    header = ((torch.float32, top_k), (torch.int32, top_k), (torch.int32, 1))
    weights_MK, ids_MK, adapter_M1, *encoded = unpack_rows(packed_MB, (*header, *codec.fields(hidden_size, dtype)))
    return ReceivedRows(
        codec=codec, weights_MK=weights_MK, ids_MK=ids_MK, adapter_M=adapter_M1.squeeze(1), encoded=tuple(encoded)
    )


@dataclass(frozen=True, kw_only=True)
class JoinedRows:
    """All parts, one after the other. ``is_quantised``: x is what the format makes of the unquantised rows; base rows
    of those that came quantised are not read."""

    x_MD: torch.Tensor
    unquantised_MD: torch.Tensor
    weights_MK: torch.Tensor
    ids_MK: torch.Tensor
    adapter_M: torch.Tensor
    is_quantised: bool


def join_rows(parts: Sequence[ReceivedRows], codec: RowCodec, dtype: torch.dtype) -> JoinedRows:
    """``codec``: the format's own; rows of other parts came unquantised and are quantised here as it says."""
    plain = [part.codec.decode(part.encoded, dtype) for part in parts]
    if isinstance(codec, PlainRows):
        x_MD = unquantised_MD = _join(plain)
    else:
        x_MD = _join(
            [
                rows if part.codec is codec else codec.decode(codec.encode(rows), dtype)
                for part, rows in zip(parts, plain, strict=True)
            ]
        )
        unquantised_MD = _join(plain) if len(plain) > 1 else x_MD
    return JoinedRows(
        x_MD=x_MD,
        unquantised_MD=unquantised_MD,
        weights_MK=_join([part.weights_MK for part in parts]),
        ids_MK=_join([part.ids_MK for part in parts]),
        adapter_M=_join([part.adapter_M for part in parts]),
        is_quantised=not isinstance(codec, PlainRows),
    )


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class ExpertParallelPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """A pair whose ranks hold different experts. All ranks of the world call it together, layer by layer.

    ``weights``: this rank's experts, in the order of their local ids; their format says how rows are sent. Inside an
    expert-parallel rank the F of its experts may be shared by a tensor-parallel group, whose ranks bring the same rows.
    Raises ValueError where map, groups and weights do not fit.
    """

    def __init__(
        self, config: MoEConfig, weights: ExpertsWeights, groups: ParallelGroups, expert_map: ExpertMap
    ) -> None:
        if expert_map.num_ranks != groups.ep.size:
            raise ValueError(f"the expert map is for {expert_map.num_ranks} ranks, the group has {groups.ep.size}")
        held = len(expert_map.experts_of_rank[groups.ep.rank])
        if weights.num_experts != held:
            raise ValueError(f"the weights are of {weights.num_experts} experts, the map gives this rank {held}")
        self.expert_map = expert_map
        self.most_held = max(map(len, expert_map.experts_of_rank))
        self.weight_on_input = weighs_input(config)
        self.codec: RowCodec = codec_for(weights)
        self.ep = groups.ep
        self.tp = groups.tp
        self.placement = ExpertPlacement.of(expert_map, weights.device)


@dataclass(frozen=True, kw_only=True)
class RowParts:
    """This rank's rows by the way they are sent: one part, or base rows and rows with an adapter.

    has_adapters: of any rank's rows · codecs: of each part · is_in_part_PT: the rows of each part, bool; None for one
    part · adapter_T: id of each row's adapter, int32.
    """

    has_adapters: bool
    codecs: tuple[RowCodec, ...]
    is_in_part_PT: torch.Tensor | None
    adapter_T: torch.Tensor


def split_rows(codec: RowCodec, num_rows: int, context: MoELoRAContext | None, device: torch.device) -> RowParts:
    """Base rows as the format sends them; rows with an adapter unquantised, since LoRA reads them so.

    What receives a row with an adapter quantises it itself: no row is sent twice. Raises BatchError for a context
    that has no adapter ids to send.
    """
    if context is None:
        adapter_T = base_slots(num_rows, device)
        return RowParts(has_adapters=False, codecs=(codec,), is_in_part_PT=None, adapter_T=adapter_T)
    group = context.group
    if group is None:
        raise BatchError("rows that travel between ranks need adapter ids: acquire the batch from a CollectiveBank")
    adapter_T, has_adapters = group.id_of_slot[context.rows.slots_M.long()], bool(group.ids)
    if isinstance(codec, PlainRows) or not has_adapters:
        return RowParts(has_adapters=has_adapters, codecs=(codec,), is_in_part_PT=None, adapter_T=adapter_T)
    has_adapter_T = adapter_T != BASE_SLOT
    return RowParts(
        has_adapters=True,
        codecs=(codec, PlainRows()),
        is_in_part_PT=torch.stack([~has_adapter_T, has_adapter_T]),
        adapter_T=adapter_T,
    )


def slots_of(adapter_M: torch.Tensor, context: MoELoRAContext | None) -> torch.Tensor:
    """[M] int32: this rank's slots of the adapters that rows brought along."""
    if context is None or context.group is None:
        return base_slots(adapter_M.shape[0], adapter_M.device)
    return context.group.slot_of_id[adapter_M.long()]


def exchange_counts(ep: Communicator, sent_PR: torch.Tensor, parts: RowParts) -> tuple[list[list[int]], ...]:
    """(sent [P][R], received [P][R], [1][R] rows T of each rank): one small exchange between the hosts.

    ``sent_PR``: rows of each part for each rank; reading it is the one wait for the device. Raises BatchError where
    some ranks run a batch with adapters and others one without.
    """
    sent, ranks = sent_PR.tolist(), ep.size
    mine = torch.zeros(ranks, 4, dtype=torch.int64)
    mine[:, 0], mine[:, 1] = parts.has_adapters, parts.adapter_T.shape[0]
    mine[:, 2 : 2 + len(sent)] = torch.tensor(sent).t()
    theirs = ep.all_to_all(mine, [1] * ranks, [1] * ranks).t().tolist()
    other = [ep.ranks[i] for i, has_adapters in enumerate(theirs[0]) if has_adapters != parts.has_adapters]
    if other:
        kinds = ("without", "with") if parts.has_adapters else ("with", "without")
        raise BatchError(
            f"ranks {other} run a batch {kinds[0]} adapters, rank {ep.ranks[ep.rank]} one {kinds[1]}; acquire it on "
            "all ranks together, and pass its group on every rank"
        )
    return sent, theirs[2 : 2 + len(sent)], theirs[1:2]

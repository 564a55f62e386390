"""Rows with their choices and their adapter: packed to be sent, and part by part as the experts read them.

Shape letters: S rows sent · M rows received · K experts per token · D hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.moe.expert_parallel.packing import PlainRows, RowCodec, pack_rows, unpack_rows


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

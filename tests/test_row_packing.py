"""Rows as they are sent between ranks, and what cannot be sent; in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.formats import PACKS
from support.layers import build_layer, dense_weights

from moegraft.core.config import MoEConfig
from moegraft.core.errors import BatchError
from moegraft.formats.base import DenseExperts
from moegraft.moe.expert_parallel import AllToAllPrepareAndFinalize
from moegraft.moe.expert_parallel.exchange import (
    PlainRows,
    codec_for,
    pack_routed_rows,
    pack_rows,
    split_rows,
    unpack_routed_rows,
)
from moegraft.parallel import ParallelGroups
from moegraft.parallel.slices import ExpertMap
from moegraft.testing import MoECase, make_inputs

CONFIG = MoEConfig(num_experts=7, top_k=3, hidden_size=48, intermediate_size=24)
CASE = MoECase(name="rows", config=CONFIG)


def test_fields_without_rows_are_packed_whatever_their_strides() -> None:
    fields = [torch.ones(1, 3).expand(0, 3), torch.ones(1).expand(0, 1), torch.empty(0, 5, dtype=torch.bfloat16)]
    assert pack_rows(fields).shape == (0, 28)


@pytest.mark.parametrize("packing", [name for name in PACKS if name.startswith("fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 9])
def test_rows_in_fp8_arrive_as_the_layer_would_quantise_them(packing: str, dtype: torch.dtype, num_rows: int) -> None:
    """To the bit; and a kernel that quantises what arrived finds the same values again, under a rounded scale."""
    pack, S = PACKS[packing].pack, num_rows
    assert pack is not None
    case = replace(CASE, config=replace(CONFIG, dtype=dtype))
    weights = pack(dense_weights(case, make_inputs(case)))
    codec, x_SD = codec_for(weights), torch.randn(S, 300).mul(torch.logspace(-6, 6, S)[:, None]).to(dtype)
    packed = pack_routed_rows(codec, x_SD, torch.rand(S, 2), torch.full((S, 2), 3), torch.arange(S))
    rows = unpack_routed_rows(codec, packed, top_k=2, hidden_size=300, dtype=dtype)
    decoded_SD = codec.decode(rows.encoded, dtype)
    assert torch.equal(decoded_SD, weights.quantise_input(x_SD))
    assert rows.adapter_M.tolist() == list(range(S)) and rows.ids_MK.tolist() == [[3, 3]] * S
    again = codec.encode(decoded_SD)
    assert torch.equal(again[1].float(), rows.encoded[1].float())
    assert torch.allclose(again[0], rows.encoded[0], rtol=2**-8, atol=0)


def test_a_mapping_without_ids_cannot_travel() -> None:
    layer = build_layer(CASE)
    with layer.context() as context, pytest.raises(BatchError, match="acquire the batch from a CollectiveBank"):
        split_rows(PlainRows(), CASE.num_tokens, context, torch.device("cpu"))


def test_maps_and_weights_that_do_not_fit_are_refused() -> None:
    weights = DenseExperts(w13=torch.ones(2, 8, 6), w2=torch.ones(2, 6, 4))
    groups = ParallelGroups.alone()
    with pytest.raises(ValueError, match="the expert map is for 2 ranks, the group has 1"):
        AllToAllPrepareAndFinalize(CONFIG, weights, groups, ExpertMap.contiguous(4, 2))
    with pytest.raises(ValueError, match="the weights are of 2 experts, the map gives this rank 4"):
        AllToAllPrepareAndFinalize(CONFIG, weights, groups, ExpertMap.contiguous(4, 1))

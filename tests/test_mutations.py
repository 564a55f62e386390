"""The checks that everything rests on fail when the thing that they check is broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.layers import build_layer, check_layer
from support.mixed import MixedBatch, check_mixed_batch
from support.mutations import LAYER_MUTATIONS, MUTATIONS, Mutation

from moegraft.core.config import MoEConfig
from moegraft.testing import LoRASpec, MoECase

CASE = MoECase(
    name="mutated",
    config=MoEConfig(num_experts=5, top_k=2, hidden_size=16, intermediate_size=12),
    num_tokens=24,
    adapters=(LoRASpec(r_gate=4, r_up=4, r2=4), LoRASpec(r_gate=2, r_up=3, r2=1), LoRASpec(expert_ids=(1, 3))),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_sound_source_passes(mixed: MixedBatch) -> None:
    check_mixed_batch(mixed)
    check_layer(build_layer(CASE))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_model_check_notices(mixed: MixedBatch, mutation: Mutation) -> None:
    with mutation(), pytest.raises(AssertionError, match=r"^(delta: relative error|row 1 has no adapter)"):
        check_mixed_batch(mixed)
    check_mixed_batch(mixed)  # and nothing of the mutation stays behind


@pytest.mark.parametrize("num_tokens", [24, 100], ids=["few rows", "many rows"])
@pytest.mark.parametrize("mutation", LAYER_MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_layer_check_notices(mutation: Mutation, num_tokens: int) -> None:
    case = replace(CASE, num_tokens=num_tokens)
    with mutation(), pytest.raises(AssertionError):
        check_layer(build_layer(case))
    check_layer(build_layer(case))

"""Real adapters of several versions of PEFT and transformers, attached, against the logits of their own time."""

from __future__ import annotations

import pytest
import torch
from support.adapters import FIXTURE_NAMES, load_fixture

import moegraft

# As the fixtures promise: absolute, on logits of about 1. float32 on both sides, other versions of the libraries.
ATOL = 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


def test_there_are_eleven() -> None:
    assert len(FIXTURE_NAMES) == 11


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_mixed_batch_equals_the_original_library(name: str) -> None:
    fixture = load_fixture(name)
    rows = fixture.input_ids.shape[0]
    expected_delta = fixture.logits_adapter - fixture.logits_base
    assert expected_delta.abs().max() > 100 * ATOL

    with moegraft.attach(fixture.model, adapter_memory="16MiB") as graft:
        report = graft.load_adapter(fixture.adapter, name="a")
        assert report.tensors_applied == report.tensors_in_file > 0
        plain = graft(input_ids=fixture.input_ids).logits
        adapted = graft(input_ids=fixture.input_ids, adapters=["a"] * rows).logits
        # Every row of the fixture twice, side by side: with the adapter and without.
        twice = fixture.input_ids.repeat_interleave(2, dim=0)
        mixed = graft(input_ids=twice, adapters=["a", None] * rows).logits
        mixed_base = graft(input_ids=twice, adapters=[None, None] * rows).logits

    def within(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)

    within(plain, fixture.logits_base)
    within(adapted, fixture.logits_adapter)
    within(adapted - plain, expected_delta)
    within(mixed[0::2], fixture.logits_adapter)
    within(mixed[1::2], fixture.logits_base)
    within(mixed[0::2] - mixed[1::2], expected_delta)
    assert torch.equal(mixed[1::2], mixed_base[1::2])

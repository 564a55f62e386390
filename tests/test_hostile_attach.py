"""Every hostile adapter, through the whole way in: model, bank and the other adapters are as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import families, hostile

import moegraft
from moegraft.core.errors import AdapterNameError

IDS = torch.arange(3, 15).view(2, 6)


def _bank_state(graft: moegraft.GraftedModel) -> tuple[torch.Tensor, ...]:
    tables = graft.bank.tables
    return tuple(
        tensor.clone() for tensor in (graft.bank.pool.data, tables.page_table, tables.factors, tables.expert_index)
    )


def test_a_refused_adapter_changes_nothing(tmp_path: Path) -> None:
    model = families.build(hostile.FAMILY)
    graft = moegraft.attach(model, adapter_memory="4MiB")
    graft.load_adapter(hostile.good_adapter(tmp_path / "good"), name="good")
    graft.bank.pool.data.nan_to_num_()  # memory that holds nothing may hold NaN, which equals nothing
    before = _bank_state(graft)
    parameters = {name: (param, param.detach().clone()) for name, param in model.named_parameters()}
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    expected = graft(input_ids=IDS, adapters=["good", None]).logits

    refused = 0
    for case in hostile.hostile_cases(tmp_path / "cases"):
        with pytest.raises(case.error_type) as caught:
            graft.load_adapter(case.path, name="hostile")
        assert all(text in str(caught.value) for text in case.must_mention), case.name
        assert list(graft.adapters) == ["good"], case.name
        refused += 1

    assert refused >= 300
    graft.bank.check_integrity()
    assert all(torch.equal(old, new) for old, new in zip(before, _bank_state(graft), strict=True))
    for name, param in model.named_parameters():
        kept, values = parameters[name]
        assert param is kept, name
        assert torch.equal(param, values), name
    assert hooks == {name: list(module._forward_hooks) for name, module in model.named_modules()}
    assert torch.equal(graft(input_ids=IDS, adapters=["good", None]).logits, expected)
    graft.load_adapter(hostile.good_adapter(tmp_path / "second"), name="hostile")
    assert torch.equal(graft(input_ids=IDS, adapters=["hostile", None]).logits, expected)


def test_a_taken_name_changes_nothing(tmp_path: Path) -> None:
    graft = moegraft.attach(families.build(hostile.FAMILY), adapter_memory="4MiB")
    path = hostile.good_adapter(tmp_path / "good")
    graft.load_adapter(path, name="good")
    with pytest.raises(AdapterNameError, match="already loaded"):
        graft.load_adapter(path, name="good")
    assert list(graft.adapters) == ["good"]
    graft.bank.check_integrity()

"""What must not happen to a grafted model in silence: a second graft, other weights, copies, a fork, odd memory."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import VOCAB_SIZE
from support.mixed import MixedBatch, save_kinds

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import AdapterInUseError, AdapterMemoryError, BatchError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = "model.layers.0.mlp.experts"


class TestTwice:
    def test_a_part_of_a_grafted_model(self, graft: GraftedModel) -> None:
        with pytest.raises(UnsupportedModelError, match="is grafted already"):
            moegraft.attach(graft.model.model)

    def test_the_whole_around_a_grafted_part(self, mixed: MixedBatch) -> None:
        with (
            moegraft.attach(mixed.model.model, adapter_memory="4MiB"),
            pytest.raises(UnsupportedModelError, match="is grafted already: 'model'"),
        ):
            moegraft.attach(mixed.model)
        moegraft.attach(mixed.model, adapter_memory="4MiB").detach()

    def test_a_graft_that_was_lost_is_found(self, mixed: MixedBatch) -> None:
        moegraft.attach(mixed.model, adapter_memory="4MiB")
        found = GraftedModel.of(mixed.model)
        assert found is not None
        found.detach()
        assert GraftedModel.of(mixed.model) is None


def _assign(model: Any, name: str) -> None:
    parent, key = name.rsplit(".", 1)
    state = {key: model.get_parameter(name).detach().clone()}
    model.get_submodule(parent).load_state_dict(state, strict=False, assign=True)


REPLACED: dict[str, tuple[Callable[[Any], object], str]] = {
    "experts": (lambda model: _assign(model, f"{EXPERTS}.down_proj"), f"'{EXPERTS}.down_proj' was replaced"),
    "router": (lambda model: _assign(model, "model.layers.1.mlp.gate.weight"), "mlp.gate.weight' was replaced"),
    "projection": (
        lambda model: _assign(model, "model.layers.0.self_attn.q_proj.weight"),
        "q_proj.weight' was replaced",
    ),
    "module": (
        lambda model: setattr(model.model.layers[0].self_attn, "q_proj", torch.nn.Linear(32, 32)),
        "self_attn.q_proj' was replaced",
    ),
    "dtype": (lambda model: model.to(torch.bfloat16), r"were torch.float32 on cpu .* now torch.bfloat16"),
    "meta": (lambda model: model.to("meta"), "was replaced after attach"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_weights_that_were_replaced_are_noticed(mixed: MixedBatch, what: str) -> None:
    """By the next call and the next load; the way out is the one that the message names."""
    change, message = REPLACED[what]
    model = copy.deepcopy(mixed.model)
    graft = moegraft.attach(model, adapter_memory="4MiB")
    graft.load_adapter(mixed.adapters["fused"], name="fused")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        graft(input_ids=mixed.input_ids[:1], adapters=["fused"])
    with pytest.raises(UnsupportedModelError, match=message):
        graft.load_adapter(mixed.adapters["dora"], name="dora")
    assert graft.detach() is model
    assert not any(key.startswith("_moegraft") for module in model.modules() for key in vars(module))


def test_values_that_change_in_place_are_served(mixed: MixedBatch) -> None:
    model = copy.deepcopy(mixed.model)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
        found = graft(input_ids=mixed.input_ids[:1]).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=mixed.input_ids[:1]).logits)


def test_a_vocabulary_that_was_resized_is_noticed(mixed: MixedBatch, tmp_path: Any) -> None:
    model = copy.deepcopy(mixed.model)
    save_kinds(model, tmp_path, mixed.input_ids[:1])
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        graft.load_adapter(tmp_path / "embeddings", name="a")
        model.resize_token_embeddings(VOCAB_SIZE + 8)
        with pytest.raises(UnsupportedModelError, match="embed_tokens"):
            graft(input_ids=mixed.input_ids[:1], adapters=["a"])


@pytest.mark.parametrize("memory", ["1e3 GiB", float("nan"), -1, 0, True, None, "9" * 400, 2**70, 10**400])
def test_odd_memory_sizes(mixed: MixedBatch, memory: Any) -> None:
    with pytest.raises(ValueError, match=r"found (the|a) size"):
        moegraft.attach(mixed.model, adapter_memory=memory)
    assert GraftedModel.of(mixed.model) is None


def test_more_memory_than_the_machine_has(mixed: MixedBatch) -> None:
    with pytest.raises(AdapterMemoryError, match=r"1\d* bytes \(1024.0 TiB\) is asked for on cpu, which has \d+ bytes"):
        moegraft.attach(mixed.model, adapter_memory=2**50)
    assert GraftedModel.of(mixed.model) is None


@pytest.mark.parametrize("slots", [0, -1, 2.5, True, "many", 2**70])
def test_odd_numbers_of_adapters(mixed: MixedBatch, slots: Any) -> None:
    with pytest.raises(ValueError, match="max_slots is"):
        moegraft.attach(mixed.model, adapter_memory="4MiB", max_adapters=slots)


def test_the_meta_device_is_refused_before_weights_are_lost(mixed: MixedBatch) -> None:
    with pytest.raises(UnsupportedModelError, match="device='meta'"):
        moegraft.attach(mixed.model, device="meta")
    assert not any(param.is_meta for param in mixed.model.parameters())


@pytest.mark.parametrize("whole", [True, False], ids=["model", "part"])
@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_are_refused(graft: GraftedModel, make: Callable[[Any], Any], whole: bool) -> None:
    """A copy of the model would run without its adapters, in silence."""
    with pytest.raises(UnsupportedModelError, match="neither copied nor pickled"):
        make(graft)
    with pytest.raises(UnsupportedModelError, match="neither copied nor pickled"):
        make(graft.model if whole else graft.model.model)


def test_a_forked_process_is_told(graft: GraftedModel, mixed: MixedBatch) -> None:
    """It would wait for ever for a lock that a thread of its parent held."""
    graft.bank._lock.acquire()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        message = b"no error"
        try:
            graft.load_adapter(mixed.adapters["fused"], name="new")
        except UnsupportedModelError as error:
            message = str(error).encode()
        os.write(writing, message)
        os._exit(0)
    graft.bank._lock.release()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "which was forked from it" in pipe.read()
    os.waitpid(child, 0)


def test_detach_by_force(mixed: MixedBatch) -> None:
    graft = moegraft.attach(mixed.model, adapter_memory="4MiB")
    graft.load_adapter(mixed.adapters["fused"], name="fused")
    block = graft.batch(["fused"], 1)
    block.__enter__()
    with pytest.raises(AdapterInUseError, match="fused"):
        graft.detach()
    assert graft.adapters["fused"].in_use
    graft.detach(force=True)
    with torch.no_grad():
        assert (mixed.model(input_ids=mixed.input_ids).logits - mixed.base).abs().max() < 1e-5
    block.__exit__(None, None, None)
    with moegraft.attach(mixed.model, adapter_memory="4MiB") as again:
        again.load_adapter(mixed.adapters["fused"], name="fused")
        again(input_ids=mixed.input_ids[:1], adapters=["fused"])


@pytest.mark.parametrize("adapters", [5, ["fused", []], [{}, None], {"fused"}, {"fused": 1, "b": 2}, [b"fused", None]])
def test_odd_adapters(graft: GraftedModel, mixed: MixedBatch, adapters: Any) -> None:
    with pytest.raises(BatchError, match=r"adapters=( is a| has an entry|: found \[\] for one row)"):
        graft(input_ids=mixed.input_ids[:2], adapters=adapters)

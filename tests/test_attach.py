"""``moegraft.attach`` on a transformers model: what GraftedModel promises, and what it leaves behind: nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import TensorFactory, write_adapter
from support.families import VOCAB_SIZE, build
from support.mixed import KINDS, ROWS, MixedBatch, check_mixed_batch, random_ids, save_kinds
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import (
    AdapterError,
    AdapterFileError,
    AdapterInUseError,
    AdapterMismatchError,
    AdapterNameError,
    BatchError,
    NoBackendError,
    UnknownAdapterError,
    UnsupportedModelError,
)
from moegraft.lora.peft import LoadReport
from moegraft.moe.experts import TorchExperts
from moegraft.oracle import select_experts
from moegraft.oracle.select import EXPERTS_CLASSES
from moegraft.testing import relative_error

NUM_LAYERS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


class TestMixedBatch:
    def test_essential_check(self, mixed: MixedBatch) -> None:
        check_mixed_batch(mixed)

    def test_gives_transformers_own_output(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        out = graft(input_ids=mixed.input_ids, adapters=ROWS, output_hidden_states=True, output_router_logits=True)
        assert isinstance(out, MoeCausalLMOutputWithPast)
        assert len(out.hidden_states) == NUM_LAYERS + 1
        assert len(out.router_logits) == NUM_LAYERS
        assert out.past_key_values is not None
        assert not out.logits.requires_grad

    def test_ways_to_give_the_batch(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        ids = mixed.input_ids
        expected = graft(input_ids=ids, adapters=ROWS).logits
        embeds = graft.model.get_input_embeddings()(ids)
        assert torch.equal(graft(ids, adapters=list(ROWS)).logits, expected)
        assert torch.equal(graft(inputs_embeds=embeds, adapters=ROWS).logits, expected)
        assert torch.equal(graft(ids, None, adapters=iter_of(ROWS)).logits, expected)

    def test_without_adapters_the_base_model_runs(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        ids = mixed.input_ids
        plain = graft(input_ids=ids).logits
        assert torch.equal(graft(input_ids=ids, adapters=None).logits, plain)
        assert torch.equal(graft(input_ids=ids, adapters=[None] * len(ids)).logits, plain)
        with torch.no_grad():
            assert torch.equal(graft.model(input_ids=ids).logits, plain)
        assert relative_error(plain, mixed.base) < 1e-6

    def test_cached_decoding_step(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        """A prompt, then one token a row on its cache: the shape in which serving runs."""
        ids = mixed.input_ids
        whole = graft(input_ids=ids, adapters=ROWS).logits
        prompt = graft(input_ids=ids[:, :-1], adapters=ROWS, use_cache=True)
        step = graft(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, adapters=ROWS)
        torch.testing.assert_close(step.logits[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)

    def test_a_batch_inside_a_batch(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        """The innermost ``adapters=`` wins, all of it: None means base, not the batch around it."""
        ids = mixed.input_ids[:2]
        expected = {name: graft(input_ids=ids, adapters=[name, name]).logits for name in ("fused", "dora", None)}
        with graft.batch(["fused", "fused"]):
            assert torch.equal(graft(input_ids=ids, adapters=["dora", "dora"]).logits, expected["dora"])
            assert torch.equal(graft(input_ids=ids, adapters=[None, None]).logits, expected[None])
            assert torch.equal(graft(input_ids=ids).logits, expected["fused"])
        assert torch.equal(graft(input_ids=ids).logits, expected[None])

    def test_two_grafted_models_do_not_see_each_other(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        ids = mixed.input_ids[:2]
        with moegraft.attach(build("qwen3_moe"), adapter_memory="1MiB") as other:
            expected = other(input_ids=ids).logits
            with graft.batch(["fused", "fused"]):
                assert torch.equal(other(input_ids=ids).logits, expected)

    def test_a_mixture_of_lengths(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        """Left-padded rows, a position each: every row as if it were alone and unpadded."""
        ids, mask = mixed.input_ids.clone(), torch.ones_like(mixed.input_ids)
        for row in range(len(ids)):
            mask[row, : row % 4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = graft(input_ids=ids * mask, attention_mask=mask, position_ids=positions, adapters=ROWS).logits
        for row, name in enumerate(ROWS):
            start = row % 4
            alone = graft(input_ids=ids[row : row + 1, start:], adapters=[name]).logits[0]
            torch.testing.assert_close(found[row, start:], alone, rtol=1e-4, atol=1e-4)


def iter_of(rows: tuple[str | None, ...]) -> Any:
    return dict(enumerate(rows)).values()


class TestArguments:
    @pytest.mark.parametrize("adapters", [[], ["fused"], ["fused", None, "dora"]])
    def test_wrong_length(self, graft: GraftedModel, adapters: list[str | None]) -> None:
        with pytest.raises(BatchError, match=f"{len(adapters)} entries for a batch of 2 rows") as error:
            graft(input_ids=random_ids(2), adapters=adapters)
        assert_lists_what_is_loaded(error.value)

    def test_wrong_length_of_a_block(self, graft: GraftedModel) -> None:
        """Rows are only known when the model runs: 2 rows of 7 tokens for 4 entries."""
        with graft.batch(["fused"] * 4), pytest.raises(BatchError, match=r"4 entries, the model was given 2 rows of 7"):
            graft.model(input_ids=random_ids(2))

    def test_unknown_name(self, graft: GraftedModel) -> None:
        with pytest.raises(UnknownAdapterError, match="'sqrl'") as error:
            graft(input_ids=random_ids(2), adapters=["sqrl", None])
        assert_lists_what_is_loaded(error.value)
        with pytest.raises(UnknownAdapterError, match="'sqrl'") as error:
            graft.unload_adapter("sqrl")
        assert_lists_what_is_loaded(error.value)

    def test_a_string(self, graft: GraftedModel) -> None:
        with pytest.raises(BatchError, match="is a string, expected one entry a row"):
            graft(input_ids=random_ids(5), adapters="fused")

    def test_nothing_is_loaded(self) -> None:
        with moegraft.attach(build("mixtral"), adapter_memory="1MiB") as graft:
            with pytest.raises(UnknownAdapterError, match="loaded: none"):
                graft(input_ids=random_ids(1), adapters=["a"])
            with pytest.raises(BatchError, match="loaded: none"):
                graft(input_ids=random_ids(1), adapters=[None, None])

    @pytest.mark.parametrize("size", ["much", 0, "-1 GiB"])
    def test_adapter_memory(self, size: str | int) -> None:
        model = build("mixtral")
        with pytest.raises(ValueError, match="size"):
            moegraft.attach(model, adapter_memory=size)
        moegraft.attach(model, adapter_memory="1MiB").detach()

    def test_names(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        before = dict(graft.adapters)
        for name in ("fused", ""):
            with pytest.raises(AdapterNameError):
                graft.load_adapter(mixed.adapters["fused"], name=name)
        with pytest.raises(AdapterFileError, match="nowhere"):
            graft.load_adapter(mixed.adapters["fused"].parent / "nowhere")
        assert dict(graft.adapters) == before

    def test_the_folder_is_the_default_name(self, mixed: MixedBatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            assert graft.load_adapter(str(mixed.adapters["dora"]) + "/").name == "dora"
            assert list(graft.adapters) == ["dora"]


def assert_lists_what_is_loaded(error: BaseException) -> None:
    for name in ("fused", "per_expert", "dora"):
        assert name in str(error)


class TestLooking:
    def test_adapters_is_a_read_only_mapping(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        adapters = graft.adapters
        assert isinstance(adapters, Mapping)
        assert list(adapters) == list(mixed.adapters)
        with pytest.raises(TypeError):
            adapters["fused"] = adapters["dora"]  # type: ignore[index]
        with pytest.raises(AttributeError):
            graft.adapters = {}  # type: ignore[misc]
        info = adapters["per_expert"]
        assert info.source == str(mixed.adapters["per_expert"])
        assert set(info.ranks) == {f"model.layers.{i}.mlp.experts" for i in range(NUM_LAYERS)}
        assert set(info.ranks.values()) == {4}  # gate and up with 2 rank rows of their own in one A
        assert info.resident
        assert not info.in_use
        # r (2) times every input and output of gate, up and down of 7 experts in 2 layers, 4 bytes each
        assert info.num_bytes == 4 * NUM_LAYERS * 7 * 2 * 3 * (32 + 24)

    def test_report(self, mixed: MixedBatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            report = graft.load_adapter(mixed.adapters["fused"], name="fused")
        assert isinstance(report, LoadReport)
        assert report.tensors_applied == report.tensors_in_file == NUM_LAYERS * 2 * (2 + 1 + 2)
        assert report.linears["model.layers.0.self_attn.q_proj"] == 4

    def test_explain(self, graft: GraftedModel) -> None:
        explanation = graft.explain()
        assert [choice.layer for choice in explanation] == [f"model.layers.{i}.mlp.experts" for i in range(NUM_LAYERS)]
        others = {cls.__name__ for cls in EXPERTS_CLASSES} - {"TorchExperts"}
        for choice in explanation:
            assert (choice.backend, choice.format_name, choice.device) == ("TorchExperts", "dense", "cpu")
            assert {rejection.backend for rejection in choice.rejections} == others
            assert all(rejection.reason for rejection in choice.rejections)
        text = str(explanation)
        assert "model.layers.1.mlp.experts: TorchExperts (dense weights on cpu, kept by transformers)" in text
        assert all(f"not {name}: " in text for name in others)

    def test_a_backend_by_name(self) -> None:
        model = build("mixtral")
        with pytest.raises(NoBackendError, match=r"'Quantum'.*TorchExperts"):
            moegraft.attach(model, adapter_memory="1MiB", backend="Quantum")
        with moegraft.attach(model, adapter_memory="1MiB", backend="TorchExperts") as graft:
            assert {choice.backend for choice in graft.explain()} == {"TorchExperts"}


def test_the_state_dict_is_the_base_models(graft: GraftedModel, mixed: MixedBatch) -> None:
    """What is saved while adapters are loaded is the base checkpoint."""
    found, expected = graft.model.state_dict(), build("qwen3_moe").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Snapshot:
    """Everything of a model that attaching could leave behind."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.parameters = dict(model.named_parameters())
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modules = dict(model.named_modules())
        self.attributes = {name: set(vars(module)) for name, module in self.modules.items()}
        self.hooks = self.count_hooks(model)
        self.implementation = model.get_experts_implementation()
        self.config = model.config.to_dict()
        with torch.no_grad():
            self.logits = model(input_ids=ids).logits
        self.ids = ids

    @staticmethod
    def count_hooks(model: nn.Module) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

    def assert_same(self, model: PreTrainedModel) -> None:
        parameters = dict(model.named_parameters())
        assert parameters.keys() == self.parameters.keys()
        assert all(parameters[name] is self.parameters[name] for name in parameters)
        assert all(type(parameter) is nn.Parameter for parameter in parameters.values())
        state = model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(state[name], self.state[name]) for name in state)
        modules = dict(model.named_modules())
        assert modules == self.modules
        assert {name: set(vars(module)) for name, module in modules.items()} == self.attributes
        assert self.count_hooks(model) == self.hooks
        assert model.get_experts_implementation() == self.implementation
        assert model.config.to_dict() == self.config
        with torch.no_grad():
            assert torch.equal(model(input_ids=self.ids).logits, self.logits)


class TestDetach:
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_gives_the_original_back(self, tmp_path: Path, implementation: str) -> None:
        model = build("qwen3_moe")
        model.set_experts_implementation(implementation)
        before = Snapshot(model, random_ids())
        save_kinds(build("qwen3_moe"), tmp_path, before.ids)
        graft = moegraft.attach(model, adapter_memory="4MiB")
        for name in KINDS:
            graft.load_adapter(tmp_path / name)
        assert not torch.equal(graft(input_ids=before.ids, adapters=list(KINDS)[:2]).logits, before.logits)
        assert before.count_hooks(model) > 0
        assert graft.detach() is model
        assert graft.bank.pool.data.untyped_storage().size() == 0
        before.assert_same(model)
        assert graft.detach() is model  # twice is once

    def test_the_model_is_usable_and_can_be_grafted_again(self, mixed: MixedBatch) -> None:
        before = Snapshot(mixed.model, mixed.input_ids)
        for _ in range(2):
            check_mixed_batch(mixed)
        before.assert_same(mixed.model)

    def test_a_detached_graft_refuses(self, mixed: MixedBatch) -> None:
        graft = moegraft.attach(mixed.model, adapter_memory="4MiB")
        graft.detach()
        for call in (
            lambda: graft(input_ids=random_ids(), adapters=[None, None]),
            lambda: graft.generate(random_ids(), max_new_tokens=1),
            lambda: graft.load_adapter(mixed.adapters["fused"]),
        ):
            with pytest.raises(UnsupportedModelError, match="detached"):
                call()

    def test_not_during_a_batch(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        with graft.batch(["fused", "dora"]), pytest.raises(AdapterInUseError, match="fused, dora"):
            graft.detach()
        assert len(graft.adapters) == 3

    def test_an_exception_in_the_block_detaches(self, mixed: MixedBatch) -> None:
        before = Snapshot(mixed.model, mixed.input_ids)
        with pytest.raises(ZeroDivisionError), moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            graft.load_adapter(mixed.adapters["fused"])
            _ = 1 / 0
        before.assert_same(mixed.model)

    def test_unloading_the_last_adapter_takes_its_seams_out(self, mixed: MixedBatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            before = Snapshot(mixed.model, mixed.input_ids)
            for name, path in mixed.adapters.items():
                graft.load_adapter(path, name=name)
            assert Snapshot.count_hooks(mixed.model) > before.hooks
            for name in mixed.adapters:
                graft.unload_adapter(name)
            before.assert_same(mixed.model)
            graft.bank.check_integrity()

    def test_the_adapter_memory_is_given_back(self, mixed: MixedBatch) -> None:
        graft = moegraft.attach(mixed.model, adapter_memory="4MiB")
        graft.load_adapter(mixed.adapters["fused"])
        graft(input_ids=mixed.input_ids[:1], adapters=["fused"])
        bank = weakref.ref(graft.bank)
        graft.detach()
        del graft
        gc.collect()
        assert bank() is None


class TestRefused:
    def test_a_second_attach(self, graft: GraftedModel) -> None:
        with pytest.raises(UnsupportedModelError, match=r"Qwen3MoeForCausalLM is grafted already.*detach"):
            moegraft.attach(graft.model, adapter_memory="1MiB")
        assert len(graft.adapters) == 3

    def test_a_dense_model(self) -> None:
        config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForCausalLM(replace_vocab(config))
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) has no mixture-of-experts layer"):
            moegraft.attach(model)

    def test_another_implementation_of_the_experts(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        """Set from outside while adapters are loaded: theirs on the experts would be lost in silence."""
        expected = graft(input_ids=mixed.input_ids, adapters=ROWS).logits
        graft.model.set_experts_implementation("eager")
        with pytest.raises(UnsupportedModelError, match=r"set to 'eager'.*set_experts_implementation\('moegraft'\)"):
            graft(input_ids=mixed.input_ids, adapters=ROWS)
        graft.model.set_experts_implementation("moegraft")
        assert torch.equal(graft(input_ids=mixed.input_ids, adapters=ROWS).logits, expected)

    def test_experts_of_several_dtypes(self) -> None:
        model = build("mixtral")
        model.model.layers[1].mlp.experts.to(torch.bfloat16)
        with pytest.raises(UnsupportedModelError, match=r"bfloat16.*float32.*expected one"):
            moegraft.attach(model, adapter_memory="1MiB")
        model.model.layers[1].mlp.experts.to(torch.float32)
        moegraft.attach(model, adapter_memory="1MiB").detach()


def replace_vocab(config: LlamaConfig) -> LlamaConfig:
    config.vocab_size = VOCAB_SIZE
    return config


class TestGradients:
    """Training runs through transformers' own code; a batch of adapters is inference, whatever the grad mode is."""

    def test_attached_without_adapters(self, mixed: MixedBatch) -> None:
        model = mixed.model
        expected = gradients(model, mixed.input_ids)
        with moegraft.attach(model, adapter_memory="4MiB") as graft:
            for path in mixed.adapters.values():
                graft.load_adapter(path)
            found = gradients(model, mixed.input_ids)
        assert expected.keys() == found.keys()
        assert any(".experts." in name for name in expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_batch_needs_no_no_grad(self, graft: GraftedModel, mixed: MixedBatch) -> None:
        expected = graft(input_ids=mixed.input_ids, adapters=ROWS).logits
        assert torch.is_grad_enabled()
        with graft.batch(ROWS):
            found = graft.model(input_ids=mixed.input_ids).logits
        assert torch.equal(found, expected)

    def test_inference_mode(self, mixed: MixedBatch) -> None:
        ids = mixed.input_ids
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            with torch.inference_mode():
                for name, path in mixed.adapters.items():
                    graft.load_adapter(path, name=name)
                inside = graft(input_ids=ids, adapters=ROWS).logits
            assert inside.is_inference()
            assert torch.equal(graft(input_ids=ids, adapters=ROWS).logits, inside)
            graft.unload_adapter("dora")
            graft.load_adapter(mixed.adapters["dora"], name="dora")
            assert torch.equal(graft(input_ids=ids, adapters=ROWS).logits, inside)
        with torch.inference_mode():
            graft = moegraft.attach(mixed.model, adapter_memory="4MiB")
        for name, path in mixed.adapters.items():
            graft.load_adapter(path, name=name)
        assert torch.equal(graft(input_ids=ids, adapters=ROWS).logits, inside)
        graft.detach()


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_a_checkpoint_from_disk(mixed: MixedBatch, tmp_path: Path) -> None:
    """The four lines of the front page, on a saved model."""
    mixed.model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    check_mixed_batch(replace(mixed, model=model.eval()))


def test_a_broken_adapter_changes_nothing(graft: GraftedModel, mixed: MixedBatch, tmp_path: Path) -> None:
    before = graft(input_ids=mixed.input_ids, adapters=ROWS).logits
    factory = TensorFactory()
    factory.linear("model.layers.0.self_attn.q_proj", 31, 32)
    with pytest.raises(AdapterError, match="q_proj"):
        graft.load_adapter(write_adapter(tmp_path / "broken", factory.tensors, target_modules=["q_proj"]))
    assert list(graft.adapters) == list(mixed.adapters)
    assert torch.equal(graft(input_ids=mixed.input_ids, adapters=ROWS).logits, before)
    graft.bank.check_integrity()


class TestAdaptersThatTouchNoExpert:
    """``lora_experts=False``: what the user says of adapters that are loaded later."""

    class BaseOnly(TorchExperts):
        """Fast, and without LoRA."""

        @staticmethod
        def supports_lora() -> bool:
            return False

    @pytest.fixture(autouse=True)
    def _first_in_the_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        select = partial(select_experts, classes=(self.BaseOnly, *EXPERTS_CLASSES))
        monkeypatch.setattr("moegraft.build.layers.select_experts", select)

    def test_keep_the_fastest_backend(self, mixed: MixedBatch) -> None:
        names = [None if name is None else "dora" for name in ROWS]
        with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
            assert {choice.backend for choice in graft.explain()} == {"TorchExperts"}
            graft.load_adapter(mixed.adapters["dora"], name="dora")
            expected = graft(input_ids=mixed.input_ids, adapters=names).logits
        with moegraft.attach(mixed.model, adapter_memory="4MiB", lora_experts=False) as graft:
            assert {choice.backend for choice in graft.explain()} == {"BaseOnly"}
            graft.load_adapter(mixed.adapters["dora"], name="dora")
            assert torch.equal(graft(input_ids=mixed.input_ids, adapters=names).logits, expected)

    def test_others_are_refused_by_name(self, mixed: MixedBatch) -> None:
        with moegraft.attach(mixed.model, adapter_memory="4MiB", lora_experts=False) as graft:
            with pytest.raises(AdapterMismatchError, match=r"'sql' has LoRA on experts \(model\.layers\.0\."):
                graft.load_adapter(mixed.adapters["fused"], name="sql")
            assert not graft.adapters

    def test_a_class_without_lora_is_not_taken_by_name(self, mixed: MixedBatch) -> None:
        with pytest.raises(NoBackendError, match=r"^BaseOnly cannot serve dense experts on cpu: it does not take LoRA"):
            moegraft.attach(mixed.model, adapter_memory="4MiB", backend="BaseOnly")

"""Several adapters on one row, against PEFT's ``add_weighted_adapter(combination_type="cat")`` and merged weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.adapters import PREFIX, TensorFactory, expert_delta, random_ids, save_with_peft, write_adapter
from support.families import build
from transformers import PreTrainedModel

import moegraft
from moegraft import Engine, SamplingParams
from moegraft.core.errors import AdapterInUseError, BatchError, UnknownAdapterError
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import load_peft_adapter
from moegraft.serving.requests import FinishReason, Request

ATOL = 1e-4
IDS = random_ids()
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen3_moe")


@pytest.fixture(scope="module")
def folders(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two PEFT adapters of different ranks; three on experts, in three forms; three that cannot be combined."""
    root = tmp_path_factory.mktemp("combined")
    for seed, (name, r, extra) in enumerate(
        [
            ("style", 2, {"target_modules": ["q_proj", "o_proj", "embed_tokens"]}),
            ("domain", 3, {"target_modules": ["q_proj", "v_proj"]}),
            ("dora", 2, {"target_modules": ["q_proj"], "use_dora": True}),
            ("rows", 2, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}),
            ("saved", 2, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ]
    ):
        config = peft.LoraConfig(r=r, lora_alpha=4, **extra)
        save_with_peft(model, config, root / name, IDS, seed=seed)
    target = discover_targets(model).experts[EXPERTS]
    D, F, E = target.hidden_size, target.intermediate_size, target.num_experts
    for seed, name in enumerate(["fused", "some", "outer"]):
        factory = TensorFactory(seed)
        if name == "fused":
            factory.fused(f"{EXPERTS}.base_layer", E, D, 2 * F)
            factory.fused(EXPERTS, E, F, D)
        elif name == "some":
            for expert in (1, E - 1):
                factory.linear(f"{EXPERTS}.{expert}.gate_proj", D, F, r=3)
                factory.linear(f"{EXPERTS}.{expert}.up_proj", D, F, r=3)
        else:
            factory.tensors[f"{PREFIX}{EXPERTS}.w3.lora_A.weight"] = factory.draw(1, 2, D)
            factory.tensors[f"{PREFIX}{EXPERTS}.w3.lora_B.weight"] = factory.draw(E, F, 2)
            factory.tensors[f"{PREFIX}{EXPERTS}.w2.lora_A.weight"] = factory.draw(E, 2, F)
            factory.tensors[f"{PREFIX}{EXPERTS}.w2.lora_B.weight"] = factory.draw(1, D, 2)
        tensors = {key: 0.3 * tensor for key, tensor in factory.tensors.items()}
        write_adapter(root / name, tensors, r=3 if name == "some" else 2)
    return root


def merged(model: PreTrainedModel, folders: Path, weights: dict[str, float]) -> torch.Tensor:
    """Logits of the base with the weighted deltas of adapters of experts in its weights."""
    model = copy.deepcopy(model)
    targets, experts = discover_targets(model), model.get_submodule(EXPERTS)
    for name, weight in weights.items():
        lora = load_peft_adapter(folders / name, targets, dtype=torch.float32)[0].experts[EXPERTS]
        for expert in lora.expert_ids:
            deltas = expert_delta(lora, expert)
            F = targets.experts[EXPERTS].intermediate_size
            for part, rows in (("gate", slice(0, F)), ("up", slice(F, None))):
                if part in deltas:
                    experts.gate_up_proj.data[expert, rows] += weight * deltas[part]
            if "down" in deltas:
                experts.down_proj.data[expert] += weight * deltas["down"]
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
@pytest.mark.filterwarnings("ignore")
def test_equals_peft(model: PreTrainedModel, folders: Path, weights: tuple[float, float]) -> None:
    live = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders / "style", adapter_name="style")
    live.load_adapter(folders / "domain", adapter_name="domain")
    live.add_weighted_adapter(["style", "domain"], list(weights), "both", combination_type="cat")
    live.set_adapter("both")
    with torch.no_grad():
        expected = live.eval()(input_ids=IDS).logits
    with moegraft.attach(copy.deepcopy(model), adapter_memory="8MiB") as graft:
        base = graft(input_ids=IDS).logits
        for name in ("style", "domain"):
            graft.load_adapter(folders / name)
        entry = ["style", "domain"] if weights == (1.0, 1.0) else list(zip(("style", "domain"), weights, strict=True))
        found = graft(input_ids=IDS, adapters=[entry, None]).logits
        assert set(graft.adapters) == {"style", "domain"}
    torch.testing.assert_close(found[0], expected[0], atol=ATOL, rtol=0)
    assert torch.equal(found[1], base[1])
    assert (found[0] - base[0]).abs().max() > 100 * ATOL


@pytest.mark.parametrize(
    "weights",
    [
        {"fused": 1.0, "outer": 0.5},
        {"some": 2.0, "fused": -1.0},
        {"some": 1.0, "outer": 1.0, "fused": 1.0},
        {"outer": 0.5},
    ],
    ids="+".join,
)
def test_experts_equal_merged_weights(model: PreTrainedModel, folders: Path, weights: dict[str, float]) -> None:
    with moegraft.attach(copy.deepcopy(model), adapter_memory="8MiB") as graft:
        for name in weights:
            graft.load_adapter(folders / name)
        base = graft(input_ids=IDS).logits
        found = graft(input_ids=IDS, adapters=[None, list(weights.items())]).logits
    torch.testing.assert_close(found[1], merged(model, folders, weights)[1], atol=ATOL, rtol=0)
    assert torch.equal(found[0], base[0])
    assert (found[1] - base[1]).abs().max() > 100 * ATOL


def test_kept_by_version_and_forgotten_with_its_parts(model: PreTrainedModel, folders: Path) -> None:
    with moegraft.attach(copy.deepcopy(model), adapter_memory="8MiB", max_adapters=2) as graft:
        graft.load_adapter(folders / "fused")
        graft.load_adapter(folders / "some")
        first = graft(input_ids=IDS, adapters=[["fused", "some"], None]).logits
        held = {handle.name: handle.uid for handle in graft.bank.handles() if handle.is_combined}
        again = graft(input_ids=IDS, adapters=[["fused", "some"], ["fused", ("some", 0.5)]]).logits
        assert torch.equal(again[0], first[0])
        assert held.items() <= {handle.name: handle.uid for handle in graft.bank.handles()}.items()
        for weight in range(2, 9):  # no more are kept than adapters may be resident
            graft(input_ids=IDS, adapters=[[("fused", float(weight)), "some"], None])
        assert sum(handle.is_combined for handle in graft.bank.handles()) == 2
        graft.unload_adapter("some")
        assert [handle.name for handle in graft.bank.handles()] == ["fused"]
        graft.load_adapter(folders / "outer", "some")
        other = graft(input_ids=IDS, adapters=[["fused", "some"], None]).logits
        torch.testing.assert_close(other[0], merged(model, folders, {"fused": 1, "outer": 1})[0], atol=ATOL, rtol=0)
        graft.bank.check_integrity()


@pytest.mark.filterwarnings("ignore")
def test_an_engine_serves_them(model: PreTrainedModel, folders: Path) -> None:
    """PEFT's tokens; parts may be loaded on first use, replaced, taken away; what nobody uses is kept and bounded."""
    live = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders / "style", adapter_name="style")
    live.load_adapter(folders / "domain", adapter_name="domain")
    live.add_weighted_adapter(["style", "domain"], [1.0, -2.0], "both", combination_type="cat")
    live.set_adapter("both")
    live.eval()
    prompt = tuple(IDS[0].tolist())
    sizes = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    greedy = {"attention_mask": torch.ones(1, len(prompt)), **sizes}
    with torch.no_grad():
        expected = tuple(live.generate(input_ids=IDS[:1], **greedy)[0, len(prompt) :].tolist())
    entry, params = ["style", ("domain", -2.0)], SamplingParams(temperature=0, max_tokens=6, min_tokens=6)

    def run(*entries: Any) -> list[Any]:
        found = [each.outputs[0] for each in engine.generate([(prompt, entry) for entry in entries], params)]
        return [output.error or output.token_ids for output in found]

    options = {"adapter_memory": "8MiB", "max_adapters": 3, "page_size": 4, "max_model_len": 100}
    with Engine(copy.deepcopy(model), adapters_from=folders, **options) as engine:
        first, base, style = run(entry, None, "style")
        assert first == expected not in (base, style)
        assert run(entry, [("style", 1.0)], ["style", ("domain", 1.0)])[:2] == [expected, style]
        run(*(["style", ("domain", 0.1 * i)] for i in range(2, 7)))
        assert sum(handle.is_combined for handle in engine._graft.bank.handles()) == 3
        with pytest.raises(BatchError, match="'dora@1' cannot be combined"):
            run("dora"), run(["style", "dora"])
        assert "cannot be combined" in run(["style", "rows"])[0]  # not loaded before
        long = SamplingParams(temperature=0, max_tokens=60, min_tokens=60)
        stream = engine.submit(Request(request_id="1", prompt_ids=prompt, adapter=entry, sampling=long))
        assert stream.get(30) is not None
        engine.load_adapter("domain", folders / "style", replace=True)
        assert run(entry)[0] != expected
        with pytest.raises(AdapterInUseError, match="serves 1 requests"):
            engine.unload_adapter("style")
        with pytest.raises(UnknownAdapterError, match="no adapter 'gone'"):
            run(["domain", "gone"])
        engine.unload_adapter("style", force=True)
        assert [event.finish_reason for event in stream][-1] is FinishReason.CANCELLED
        assert [handle.name for handle in engine._graft.bank.handles()] == ["dora@1", "rows@1", "domain@2"]
        assert not engine._store._combined
        engine.check_integrity()


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        (["style", "dora"], BatchError, "'dora' cannot be combined with others: it has DoRA on model.layers.0"),
        (["style", "rows"], BatchError, "'rows' cannot be combined.*trainable_token_indices"),
        (["saved", "style"], BatchError, "'saved' cannot be combined.*replaces model.*norm.weight"),
        (["style", "style"], BatchError, "expected 1 to 16 names"),
        ([], BatchError, "expected 1 to 16 names"),
        (("style", 0.5), BatchError, "found 0.5 among the adapters of one row"),
        ([("style", float("nan"))], BatchError, "expected a finite number"),
        ([("style", 1e39)], BatchError, "expected a finite number"),
        (["style", "no"], UnknownAdapterError, "no adapter 'no' is loaded"),
    ],
)
def test_refused_by_name(
    model: PreTrainedModel, folders: Path, entry: object, error: type[Exception], words: str
) -> None:
    with moegraft.attach(copy.deepcopy(model), adapter_memory="8MiB") as graft:
        for name in ("style", "dora", "rows", "saved"):
            graft.load_adapter(folders / name)
        with pytest.raises(error, match=words):
            graft(input_ids=IDS, adapters=[entry, None])
        assert len(graft.bank.handles()) == 4

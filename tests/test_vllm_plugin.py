"""Real vLLM with the plug-in: logprobs of mixed batches against PEFT or merged weights, on tiny models.

One process of vLLM a model (``support.vllm_run``). Where vLLM is missing they fail: scripts/test.sh installs it.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import INT4, compressed, each_matrix, fp8_blocks, mxfp4
from support.fp8_truth import Rows, fp8_logits
from support.vllm_cpu import ROOT, environment, missing
from support.vllm_models import Case, Logits, by_merging, by_merging_stacked, by_peft, new_case

from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft.loader import load_peft_adapter

# float32 sums in other orders through two layers give about 3e-6; an adapter changes logprobs by more than 0.1.
TOL = 3e-5
PROMPTS = ([5, 6, 7, 8], [9, 10, 11])


@pytest.fixture(autouse=True)
def installed() -> None:
    reason = missing()
    assert reason is None, reason


def rows_of(*names: str | None) -> list[list[object]]:
    return [[name, prompt] for name in names for prompt in PROMPTS]


def attention(layers: int, rank: int, projections: str = "qkvo") -> dict[str, int]:
    return {f"model.layers.{i}.self_attn.{p}_proj": rank for i in range(layers) for p in projections}


def experts(layers: range, numbers: range, ranks: dict[str, int], block: str = "mlp") -> dict[str, int]:
    return {
        f"model.layers.{i}.{block}.experts.{e}.{projection}": rank
        for i in layers
        for e in numbers
        for projection, rank in ranks.items()
    }


def check(case: Case, rows: list[list[object]], found: list[dict[str, object]], tol: float = TOL) -> None:
    assert case.worst(rows, found) < tol
    base = [row for row in rows if row[0] is None]
    assert case.worst(base, [one for row, one in zip(rows, found, strict=True) if row[0] is None]) < tol
    for row, one in zip(rows, found, strict=True):  # the adapter shows
        if row[0] is not None:
            assert case.worst([[None, row[1]]], [one]) > max(1000 * TOL, 4 * tol)


def test_qwen3_moe_through_the_life_of_adapters(tmp_path: Path) -> None:
    """Ranks by pattern and rsLoRA, in one batch with an adapter of PEFT's; replaced in place, more adapters than slots,
    removed: their pages come back."""
    case = new_case("qwen3_moe", tmp_path)
    every = {"gate_proj": 4, "up_proj": 4, "down_proj": 3}
    maps = attention(2, 4) | experts(range(2), range(8), every) | {"lm_head": 4}
    case.truths["hand"] = by_merging(case.model, tmp_path / "hand", 1, maps, alpha=8.0, use_rslora=True)
    case.truths["peft"] = by_peft(
        case.model, tmp_path / "peft", 2, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5},
    )  # fmt: skip
    # One side of some experts, of unequal ranks.
    some = experts(range(1), range(1, 4), {"down_proj": 2}) | {"model.layers.1.mlp.experts.5.down_proj": 6}
    case.truths["some"] = by_merging(case.model, tmp_path / "some", 3, some, alpha=6.0)
    later = by_merging(case.model, tmp_path / "later", 4, experts(range(2), range(8), every), alpha=8.0)
    mixed, replaced = rows_of(None, "hand", "peft"), rows_of("hand")
    case.stages = [
        mixed,
        rows_of(None, "some", "hand"),
        {"replace": ["hand", str(tmp_path / "later")]},
        replaced,
        {"remove": "hand"},
        {"remove": "some"},
        {"remove": "peft"},
        rows_of(None),
    ]
    result = case.run()
    found, pages = result["stages"], result["pages"]
    ours = "moegraft.integrations.vllm"
    for name in (f"{ours}.experts.MoegraftExperts", f"{ours}.linear_layers.MergedQKVParallelLinearWithLoRA"):
        assert name in result["layers"]
    check(case, mixed, found[0])
    check(case, case.stages[1], found[1])
    assert case.worst(replaced, found[3]) > 1000 * TOL
    case.truths["hand"] = later
    check(case, replaced, found[3])
    assert case.worst(rows_of(None), found[7]) < TOL
    assert pages[0] > 0 and pages[-1] == 0
    assert "in place of" in case.log


def rounding_rows(case: Case, name: str | None) -> Logits:
    """The model with an adapter or without, whose experts' GEMMs read rows in fp8 too."""
    targets = discover_targets(case.model)
    adapter = None if name is None else load_peft_adapter(case.folder / name, targets, dtype=torch.float32)[0]
    return lambda ids: fp8_logits(case.model, targets, adapter, Rows(group=128), input_ids=ids)


FORMS = {
    "dense": None,
    "int4": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": dict(INT4), "input_activations": None, "output_activations": None,
            }},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"], "kv_cache_scheme": None,
        },
        partial(each_matrix, matrix=partial(compressed, form="pack-quantized", args=INT4)),
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
         "modules_to_not_convert": ["lm_head"] + [
             f"model.layers.{i}.{name}" for i in range(2)
             for name in ("block_sparse_moe.gate", *(f"self_attn.{p}_proj" for p in "qkvo"))
         ]},
        partial(each_matrix, matrix=fp8_blocks),
    ),
}  # fmt: skip
SIZES = {
    "int4": {"intermediate_size": 64},
    "fp8": {"hidden_size": 128, "intermediate_size": 128},
}


@pytest.mark.parametrize("form", [*(pytest.param(form, marks=pytest.mark.soak) for form in ("dense", "int4")), "fp8"])
def test_mixtral(tmp_path: Path, form: str) -> None:
    sizes = SIZES.get(form, {})
    case = new_case("mixtral", tmp_path, quantised=FORMS[form], **sizes)
    block = "block_sparse_moe"
    every = experts(range(2), range(4), {"w1": 2, "w2": 2, "w3": 2}, block)
    case.truths["all"] = by_merging(case.model, tmp_path / "all", 1, every | attention(2, 2, "qv"), alpha=4.0)
    case.truths["gate"] = by_merging(
        case.model, tmp_path / "gate", 2, experts(range(2), range(4), {"w1": 7}, block), alpha=7.0
    )  # fmt: skip
    case.stages = [rows_of(None, "all", "gate")]
    result = case.run()
    if form == "fp8":
        case.truths = {name: rounding_rows(case, name) for name in case.truths}
    # A row that lies between two numbers of fp8 may be rounded to either.
    check(case, case.stages[0], result["stages"][0], tol=0.02 if form == "fp8" else TOL)
    assert "moegraft.integrations.vllm.experts.MoegraftExperts" in result["layers"]


@pytest.mark.parametrize("form", [pytest.param("dense", marks=pytest.mark.soak), "mxfp4"])
def test_gpt_oss(tmp_path: Path, form: str) -> None:
    """Experts stacked in one tensor, gate and up alternating, with biases."""
    quantised = ({"quant_method": "mxfp4"}, mxfp4) if form == "mxfp4" else None
    case = new_case("gpt_oss", tmp_path, quantised=quantised)
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    case.truths["stacked"] = by_peft(
        case.model, tmp_path / "stacked", 1, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"],
        target_parameters=stacked,
    )  # fmt: skip
    case.truths["attention"] = by_peft(
        case.model, tmp_path / "attention", 2, r=2, lora_alpha=8, target_modules=["k_proj", "v_proj"],
        target_parameters=stacked[:1],
    )  # fmt: skip
    case.stages = [rows_of(None, "stacked", "attention")]
    result = case.run()
    check(case, case.stages[0], result["stages"][0])
    assert "moegraft.integrations.vllm.experts.MoegraftExperts" in result["layers"]


def test_deepseek_v3(tmp_path: Path) -> None:
    """Shared experts, a dense layer, groups of experts, a router with a bias."""
    case = new_case("deepseek_v3", tmp_path)
    every = experts(range(1, 2), range(8), {"gate_proj": 4, "up_proj": 4, "down_proj": 4})
    maps = {f"model.layers.{i}.self_attn.{p}": 4 for i in range(2) for p in ("q_b_proj", "o_proj")}
    shared = {f"model.layers.1.mlp.shared_experts.{p}_proj": 4 for p in ("gate", "up", "down")}
    dense = {f"model.layers.0.mlp.{p}_proj": 4 for p in ("gate", "down")}
    case.truths["all"] = by_merging(case.model, tmp_path / "all", 1, every | maps | shared | dense, alpha=4.0)
    case.truths["shared"] = by_merging(case.model, tmp_path / "shared", 2, shared, alpha=8.0)
    case.stages = [rows_of(None, "all", "shared")]
    check(case, case.stages[0], case.run()["stages"][0])


@pytest.mark.soak
def test_stacked_beside_single_experts(tmp_path: Path) -> None:
    """``enable_mixed_moe_lora_format``: one adapter of each kind in a batch."""
    case = new_case("qwen3_moe", tmp_path)
    every = experts(range(2), range(8), {"gate_proj": 3, "up_proj": 3, "down_proj": 3})
    case.truths["single"] = by_merging(case.model, tmp_path / "single", 1, every, alpha=6.0)
    stacked = {f"model.layers.{i}.mlp.experts": 4 for i in range(2)}
    case.truths["stacked_3d"] = by_merging_stacked(case.model, tmp_path / "stacked_3d", 2, stacked, alpha=8.0)
    case.options = {"enable_mixed_moe_lora_format": True}
    case.stages = [rows_of(None, "single", "stacked_3d")]
    check(case, case.stages[0], case.run()["stages"][0])


@pytest.mark.soak
def test_factors_that_all_experts_share(tmp_path: Path) -> None:
    """``enable_moe_shared_loras``: one A of gate, one of up and one B of down serve all experts."""
    case = new_case("qwen3_moe", tmp_path)
    stacked = {f"model.layers.{i}.mlp.experts": 4 for i in range(2)}
    case.truths["outer"] = by_merging_stacked(case.model, tmp_path / "outer", 1, stacked, alpha=8.0, shared=True)
    case.options = {"enable_moe_shared_loras": True}
    case.stages = [rows_of(None, "outer")]
    check(case, case.stages[0], case.run()["stages"][0])


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.soak
def test_two_ranks(tmp_path: Path, expert_parallel: bool) -> None:
    case = new_case("qwen3_moe", tmp_path)
    every = experts(range(2), range(8), {"gate_proj": 4, "up_proj": 4, "down_proj": 4})
    case.truths["all"] = by_merging(case.model, tmp_path / "all", 1, every | attention(2, 4), alpha=8.0)
    case.options = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    case.stages = [rows_of(None, "all")]
    check(case, case.stages[0], case.run()["stages"][0])


def test_switched_off_or_in_an_unknown_version_nothing_changes(tmp_path: Path) -> None:
    """In one process, in this order: off, an unknown version, on, on again; then parts that no small model reaches."""
    script = """
import os
import vllm.lora.utils as utils
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.custom_op import op_registry_oot
import moegraft.integrations.vllm as plugin
from moegraft.integrations.vllm import versions

def state():
    return utils._all_lora_classes, dict(op_registry_oot), LRUCacheWorkerLoRAManager._manager_cls

before = state()
os.environ["MOEGRAFT_VLLM"] = "off"
plugin.register()
assert state() == before
os.environ["MOEGRAFT_VLLM"] = "lora"
known, versions.installed_version = versions.installed_version, lambda: "0.1.0"
plugin.register()
assert state() == before
versions.installed_version = known
plugin.register()
after = state()
assert all(was != now for was, now in zip(before, after)), after
plugin.register()
assert state() == after

# Pages: the longest unused adapter leaves, and no more than must.
from types import SimpleNamespace
from vllm.lora.model_manager import AdapterLRUCache
from moegraft.core.errors import AdapterMemoryError
from moegraft.integrations.vllm.manager import PagedLoRAModelManager

class Pages:
    pool = SimpleNamespace(num_free=1, num_pages=9, page_bytes=1024)
    def drop(self, slot):
        self.pool.num_free += 3

manager = PagedLoRAModelManager.__new__(PagedLoRAModelManager)
manager.pages, manager._layers, manager._touched, manager.modules = Pages(), {}, {}, {}
manager.lora_index_to_id = [7, 8, 9]
manager._active_adapters = AdapterLRUCache(3, manager._deactivate_adapter)
for number in (8, 7, 9):
    manager._active_adapters[number] = None
manager._make_room(4, 9)
assert manager.lora_index_to_id == [7, None, 9] and list(manager._active_adapters.order) == [7, 9]
try:
    manager._make_room(9, 9)
except AdapterMemoryError:
    assert manager.lora_index_to_id == [None, None, 9]
else:
    raise AssertionError("no error")

# Rows behind the batch's, and all rows of a batch without adapters, are the base's.
import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
meta = LoRAKernelMeta.make(2, 8, "cpu")
wrapper = SimpleNamespace(token_mapping_meta=meta)
versions.prepare_mapping(wrapper)
meta.prepare_tensors(torch.tensor([1, -1, 0, 1]))
versions.finish_mapping(wrapper, 4)
assert meta.token_lora_mapping.tolist() == [1, -1, 0, 1, -1, -1, -1, -1]
meta.prepare_tensors(torch.tensor([-1, -1]))
versions.finish_mapping(wrapper, 2)
assert meta.token_lora_mapping.tolist() == [-1] * 8

# Engines of a data parallel group give their slots to other adapters.
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from moegraft.integrations.vllm.experts import why_not_experts
ranks = SimpleNamespace(dp_size=1)
moe = SimpleNamespace(activation=MoEActivation.SILU, is_lora_enabled=True, moe_parallel_config=ranks)
assert why_not_experts(moe) is None
ranks.dp_size = 2
assert "data parallelism" in why_not_experts(moe)
print("all seen")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "all seen" in done.stdout, done.stdout + done.stderr
    assert "moegraft leaves vLLM as it is: MOEGRAFT_VLLM=off" in done.stdout + done.stderr
    assert "moegraft leaves vLLM as it is: this is vLLM 0.1.0, known are 0.26, 0.33" in done.stdout + done.stderr


def test_the_server_loads_replaces_and_unloads(tmp_path: Path) -> None:
    """vLLM's own server, its engine in a process of its own, adapters through ``/v1/load_lora_adapter``."""
    case = new_case("qwen3_moe", tmp_path)
    every = experts(range(2), range(8), {"gate_proj": 2, "up_proj": 2, "down_proj": 2})
    first = by_merging(case.model, tmp_path / "first", 1, every | attention(2, 2), alpha=4.0)
    second = by_merging(case.model, tmp_path / "second", 2, every, alpha=4.0)
    with case.serve() as server:

        def logprobs_differ(model: str, truth: str | None) -> float:
            choice = server.complete(model, PROMPTS[0])
            return case.worst([[truth, PROMPTS[0]]], [choice])

        assert logprobs_differ("base", None) < TOL
        case.truths |= {"first": first, "second": second}
        assert server.post("/v1/load_lora_adapter", lora_name="a", lora_path=str(tmp_path / "first")) == 200
        assert logprobs_differ("a", "first") < TOL
        replaced = {"lora_name": "a", "lora_path": str(tmp_path / "second"), "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", **replaced) == 200
        assert logprobs_differ("a", "second") < TOL
        assert server.post("/v1/unload_lora_adapter", lora_name="a") == 200
        assert server.post("/v1/completions", model="a", prompt=PROMPTS[0]) == 404
        assert logprobs_differ("base", None) < TOL
        assert server.post("/v1/load_lora_adapter", lora_name="b", lora_path=str(tmp_path / "nowhere")) >= 400

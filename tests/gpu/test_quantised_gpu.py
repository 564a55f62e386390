"""Quantised checkpoints grafted on a GPU: the kernels serve them, and agree with the CPU's float32."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from support.adapters import save_with_peft
from support.checkpoints import QuantisedCheckpoint, write_checkpoint
from support.mixed import random_ids
from transformers import PreTrainedModel

import moegraft
from moegraft import GraftedModel
from moegraft.integrations.transformers.host.targets import discover_targets

pytestmark = pytest.mark.gpu

LAYOUTS = [
    "fp8 blocks",
    "fp8, static",
    "mxfp4",
    "gptq",
    "gptq, groups of 64, zero points",
    "awq",
    "compressed-tensors int4",
    "compressed-tensors int4, groups of 128",
    "compressed-tensors int4, whole channels, zero points",
    "compressed-tensors int8, tensor",
    "compressed-tensors fp8",
    "compressed-tensors fp8, tensor, static",
    "compressed-tensors fp8, blocks",
    "nvfp4 of modelopt",
    "compressed-tensors nvfp4",
]
NAMES = ("everything", None, "attention", "experts", "everything")
# Two layers in bfloat16 against float32; a delta that is missing would be an error of 1. Where activations are rounded
# to fp8 too, those near the edge of two codes go over it: torch's own operations in bfloat16 are off by up to 0.097.
TOL, TOL_FP8 = 0.1, 0.15


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantisedCheckpoint:
    """With three adapters beside it, made by PEFT for the unquantised model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    found = write_checkpoint(request.param, folder)
    experts = [
        f"{name}.{p}" for name, t in discover_targets(found.dense).experts.items() for p in (t.w13_param, t.w2_param)
    ]
    attention = ["q_proj", "o_proj"]
    configs = {
        "everything": LoraConfig(r=8, target_modules=attention, target_parameters=experts),
        "experts": LoraConfig(r=3, target_modules=[], target_parameters=experts),
        "attention": LoraConfig(r=4, target_modules=attention, use_dora=True),
    }
    for name, config in configs.items():
        save_with_peft(found.dense, config, folder / name, random_ids())
    return found


def attach(checkpoint: QuantisedCheckpoint, model: PreTrainedModel) -> GraftedModel:
    graft = moegraft.attach(model, adapter_memory="32MiB")
    for name in {name for name in NAMES if name is not None}:
        graft.load_adapter(checkpoint.path.parent / name)
    return graft


def test_agrees_with_the_cpu(checkpoint: QuantisedCheckpoint) -> None:
    ids = random_ids(len(NAMES), 12, seed=1)
    found, plain, expected, base = (
        logits
        for dtype, device in ((torch.bfloat16, "cuda"), (torch.float32, "cpu"))
        for logits in run(checkpoint, ids, dtype, device)
    )
    assert torch.equal(found[1], plain[1])
    for i, name in enumerate(NAMES):
        if name is not None:
            delta, truth = (found[i].float() - plain[i].float()).cpu(), expected[i] - base[i]
            # By token and in the median: in bfloat16 a token may go to another expert where two are nearly as good.
            error = ((delta - truth).norm(dim=-1) / truth.norm(dim=-1)).median()
            tol = TOL_FP8 if checkpoint.layout.format_name == "fp8" else TOL
            assert error < tol, f"row {i} ({name}): {error}"


def run(
    checkpoint: QuantisedCheckpoint, ids: torch.Tensor, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the mixed batch, and without adapters."""
    model = moegraft.load_quantised(checkpoint.path, dtype=dtype, device=device)
    with attach(checkpoint, model) as graft:
        (choice, *_) = graft.explain()
        assert choice.format_name == checkpoint.layout.format_name
        in_torch = device == "cpu" or choice.format_name == "nvfp4"  # which no kernel reads
        assert (choice.backend == "TorchExperts") == in_torch, str(graft.explain())
        ids = ids.to(device)
        mixed = graft(input_ids=ids, adapters=NAMES).logits
        assert torch.equal(mixed, graft(input_ids=ids, adapters=NAMES).logits)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert graft.generate(ids, adapters=NAMES, **options).shape == (len(NAMES), 16)
        return mixed, graft(input_ids=ids).logits


def test_a_model_that_moves_takes_its_experts_along(checkpoint: QuantisedCheckpoint) -> None:
    ids = random_ids(3).cuda()
    moved = moegraft.load_quantised(checkpoint.path).to("cuda")
    there = moegraft.load_quantised(checkpoint.path, device="cuda")
    assert torch.equal(moved(input_ids=ids).logits, there(input_ids=ids).logits)
    back = moved.to("cpu")(input_ids=ids.cpu()).logits
    assert torch.equal(back, moegraft.load_quantised(checkpoint.path)(input_ids=ids.cpu()).logits)

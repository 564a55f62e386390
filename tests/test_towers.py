"""LoRA on vision towers: every patch uses the adapter of the sequence that its image stands in, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_adapters import PEFT_MISTAKES, save_all_of
from support.zoo import IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, text_inputs, tiny_model
from transformers import PreTrainedModel

import moegraft
from moegraft.core.errors import BatchError

# Images of 4, 16 and 8 patches in the first row, one of 8 in the base's, one of 16 in the last: [t, h, w] each.
GRIDS = ([[1, 2, 2], [1, 4, 4], [1, 2, 4]], [[1, 2, 4]], [[1, 4, 4]])
ATOL = 1e-4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_vl_moe")


def inputs_of(model: PreTrainedModel, token: int = IMAGE_TOKEN) -> dict[str, torch.Tensor]:
    kind = "video" if token == VIDEO_TOKEN else "image"
    ids = text_inputs(model, length=19)["input_ids"]
    ids[ids == 0] = 5
    for row, grids in enumerate(GRIDS):
        at = 1
        for t, h, w in grids:
            ids[row, at] = VISION_START
            ids[row, at + 1 : at + 1 + t * h * w // 4] = token
            at += 2 + t * h * w // 4
    grid = torch.tensor([grid for grids in GRIDS for grid in grids])
    patch = model.config.vision_config.patch_size
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * patch * patch, generator=torch.Generator().manual_seed(2))
    values = "pixel_values_videos" if kind == "video" else "pixel_values"
    mask = torch.ones_like(ids)
    types = (ids == token).long() * (2 if kind == "video" else 1)
    return {
        "input_ids": ids, "attention_mask": mask, values: pixels, f"{kind}_grid_thw": grid, "mm_token_type_ids": types
    }  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("towers")
    return {
        name: save_all_of(tiny_model("qwen3_vl_moe"), folder / name, left_out=PEFT_MISTAKES, seed=seed)
        for seed, name in enumerate("ab")
    }


@pytest.mark.parametrize("token", [IMAGE_TOKEN, VIDEO_TOKEN])
def test_every_image_has_the_adapter_of_its_sequence(
    model: PreTrainedModel, adapters: dict[str, Any], token: int
) -> None:
    inputs = inputs_of(model, token)
    with moegraft.attach(model, adapter_memory="16MiB") as graft:
        for name, adapter in adapters.items():
            report = graft.load_adapter(adapter.path, name)
            assert any("visual" in module for module in graft.adapters[name].ranks) and not report.left_out
        plain = graft(**inputs).logits
        mixed = graft(**inputs, adapters=["a", None, "b"]).logits
        alone = {key: value for key, value in inputs.items() if key != "input_ids"}
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(BatchError, match="several in a batch, need: input_ids and one grid"):
            graft(**alone, inputs_embeds=embeds, adapters=["a", None, "b"])
        assert torch.equal(graft(**inputs).logits, plain)  # nothing is left of the pass that failed
    assert torch.equal(mixed[1], plain[1])
    for row, name in ((0, "a"), (2, "b")):
        torch.testing.assert_close(mixed[row], adapters[name].truth(**inputs)[row], atol=ATOL, rtol=0)
        assert (mixed[row] - plain[row]).abs().max() > 100 * ATOL


def test_the_tower_matters(model: PreTrainedModel, adapters: dict[str, Any], tmp_path: Path) -> None:
    """Without its part of an adapter the logits of a row with an image are others, those of text are not."""
    from safetensors.torch import load_file, save_file

    path = adapters["a"].path
    tensors = {k: v for k, v in load_file(path / "adapter_model.safetensors").items() if "visual" not in k}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    inputs = inputs_of(model)
    with moegraft.attach(model, adapter_memory="16MiB") as graft:
        graft.load_adapter(path, "whole")
        graft.load_adapter(tmp_path, "text")
        both = graft(**inputs, adapters=["whole", None, "text"]).logits
        text = [graft(**inputs, adapters=[name, None, None]).logits[0] for name in ("whole", "text")]
        ids = inputs["input_ids"][:1, :1]
        same = [graft(input_ids=ids, adapters=[name]).logits for name in ("whole", "text")]
        with torch.no_grad(), graft.batch(["whole"]):
            model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])  # alone: one adapter for all
    torch.testing.assert_close(both[0], text[0], atol=ATOL, rtol=0)
    assert (text[0] - text[1]).abs().max() > 100 * ATOL
    torch.testing.assert_close(same[0], same[1])

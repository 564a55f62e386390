"""``GraftedModel.generate``: a row keeps its adapter through padding, beams, several sequences and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.adapters import save_with_peft
from support.families import VOCAB_SIZE, build
from support.mixed import MixedBatch
from support.oracle import merge
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from moegraft import GraftedModel
from moegraft.core.errors import BatchError, UnknownAdapterError
from moegraft.integrations.transformers.host.targets import discover_targets
from moegraft.lora.peft import load_peft_adapter

NAMES = ("fused", None, "per_expert", "dora", "fused")
LENGTHS = (7, 4, 6, 3, 5)
NEW = 8
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :] = prompt
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class TestGreedy:
    def test_mixed_equals_each_alone(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        """Token by token, padded to the left in the batch and unpadded alone; and the adapters do differ."""
        found = graft.generate(**left_padded(prompts), adapters=NAMES, **GREEDY)[:, -NEW:]
        for row, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
            alone = graft.generate(prompt[None], adapters=[name], **GREEDY)
            assert torch.equal(found[row], alone[0, -NEW:]), f"row {row}, adapter {name}"
        plain = graft.generate(**left_padded(prompts), **GREEDY)[:, -NEW:]
        changed = (found != plain).any(dim=1).tolist()
        assert changed == [name is not None for name in NAMES]

    def test_equals_a_merged_model(self, graft: GraftedModel, mixed: MixedBatch, prompts: list[torch.Tensor]) -> None:
        found = graft.generate(**left_padded(prompts), adapters=NAMES, **GREEDY)[:, -NEW:]
        model = build("qwen3_moe")
        targets = discover_targets(model)
        for row, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
            merged = model
            if name is not None:
                merged = merge(model, targets, load_peft_adapter(mixed.adapters[name], targets, dtype=torch.float32)[0])
            assert torch.equal(found[row], merged.generate(prompt[None], **GREEDY)[0, -NEW:]), f"adapter {name}"

    def test_without_a_cache(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        batch = left_padded(prompts)
        cached = graft.generate(**batch, adapters=NAMES, **GREEDY)
        assert torch.equal(graft.generate(**batch, adapters=NAMES, use_cache=False, **GREEDY), cached)

    def test_rows_that_end_early(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        """A row that has ended is filled up while the others go on: the mapping does not move."""
        batch, options = left_padded(prompts), {"do_sample": False, "max_new_tokens": NEW}
        free = graft.generate(**batch, adapters=NAMES, **GREEDY)[:, -NEW:]
        end = int(free[0, 2])
        found = graft.generate(**batch, adapters=NAMES, eos_token_id=end, pad_token_id=0, **options)
        found = found[:, batch["input_ids"].shape[1] :]
        assert (found[0, 3:] == 0).all()
        for row in range(len(NAMES)):
            ends = (free[row] == end).nonzero().flatten().tolist()
            kept = min(ends[0] + 1 if ends else NEW, found.shape[1])
            assert torch.equal(found[row, :kept], free[row, :kept])

    def test_output_record(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        out = graft.generate(
            **left_padded(prompts), adapters=NAMES, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        assert out.sequences.shape == (len(NAMES), max(LENGTHS) + NEW)
        assert len(out.logits) == NEW

    def test_inputs_by_any_name(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        ids = prompts[0][None]
        expected = graft.generate(ids, adapters=["fused"], **GREEDY)
        assert torch.equal(graft.generate(inputs=ids, adapters=["fused"], **GREEDY), expected)
        assert torch.equal(graft.generate(ids, GenerationConfig(**GREEDY), adapters=["fused"]), expected)
        embeds = graft.model.get_input_embeddings()(ids)
        found = graft.generate(inputs_embeds=embeds, adapters=["fused"], **GREEDY)
        assert torch.equal(found, expected[:, ids.shape[1] :])


class TestSeveralSequences:
    def test_sampling_draws_the_same_numbers(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        """Rows are repeated side by side: a batch that was repeated by hand draws the same numbers."""
        batch, options = left_padded(prompts), {"do_sample": True, "top_k": 0, "max_new_tokens": NEW}
        torch.manual_seed(0)
        found = graft.generate(**batch, adapters=NAMES, num_return_sequences=3, **options)
        repeated = {key: tensor.repeat_interleave(3, dim=0) for key, tensor in batch.items()}
        names = [name for name in NAMES for _ in range(3)]
        torch.manual_seed(0)
        assert torch.equal(graft.generate(**repeated, adapters=names, **options), found)
        assert len(found.unique(dim=0)) > len(NAMES)

    @pytest.mark.parametrize("options", [{"do_sample": True}, {"do_sample": True, "num_beams": 3}], ids=["", "beams"])
    def test_every_sequence_was_scored_by_its_adapter(
        self, graft: GraftedModel, prompts: list[torch.Tensor], options: dict[str, Any]
    ) -> None:
        """Each step's logits of each sequence, against one forward pass over what was drawn."""
        ids = torch.stack([prompt[:3] for prompt in prompts])
        torch.manual_seed(1)
        out = graft.generate(
            ids,
            adapters=NAMES,
            num_return_sequences=2,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        names = [name for name in NAMES for _ in range(2)]
        whole = graft(input_ids=out.sequences, adapters=names).logits
        step_logits = torch.stack(out.logits, dim=1)
        beams = getattr(out, "beam_indices", None)
        for row, name in enumerate(names):
            for step in range(NEW):
                source = row if beams is None else int(beams[row, step])
                torch.testing.assert_close(
                    step_logits[source, step], whole[row, 2 + step], rtol=1e-4, atol=1e-4, msg=f"row {row}, {name}"
                )


class TestBeams:
    @pytest.mark.parametrize("returned", [1, 3])
    def test_mixed_equals_each_alone(self, graft: GraftedModel, prompts: list[torch.Tensor], returned: int) -> None:
        options = GREEDY | {"num_beams": 3, "num_return_sequences": returned}
        found = graft.generate(**left_padded(prompts), adapters=NAMES, **options)[:, -NEW:]
        for row, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
            alone = graft.generate(prompt[None], adapters=[name], **options)[:, -NEW:]
            assert torch.equal(found[row * returned : (row + 1) * returned], alone), f"row {row}, adapter {name}"


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("name", ["fused", "per_expert", None])
def test_streamer(graft: GraftedModel, prompts: list[torch.Tensor], name: str | None) -> None:
    streamer = Tokens()
    found = graft.generate(prompts[0][None], adapters=[name], streamer=streamer, **GREEDY)
    assert streamer.tokens == found[0].tolist()
    assert streamer.has_ended


class TestRefused:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("assistant_model", "the model itself"),
            ("prompt_lookup_num_tokens", 3),
            ("assistant_early_exit", 1),
            ("use_mtp", True),
            ("custom_generate", "some/repository"),
            ("token_healing", True),
        ],
    )
    def test_by_argument(self, graft: GraftedModel, prompts: list[torch.Tensor], option: str, value: Any) -> None:
        value = graft.model if option == "assistant_model" else value
        with pytest.raises(BatchError, match=rf"generate\({option}=.*leave the option out"):
            graft.generate(prompts[0][None], adapters=["fused"], max_new_tokens=2, **{option: value})
        assert not graft.adapters["fused"].in_use

    @pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "token_healing"])
    def test_by_generation_config(self, graft: GraftedModel, prompts: list[torch.Tensor], option: str) -> None:
        config = GenerationConfig(max_new_tokens=2, **{option: 3})
        for args, kwargs in (((config,), {}), ((), {"generation_config": config})):
            with pytest.raises(BatchError, match=option):
                graft.generate(prompts[0][None], *args, adapters=["fused"], **kwargs)
        with pytest.raises(BatchError, match="at most 2 positional"):
            graft.generate(prompts[0][None], None, None, adapters=["fused"])

    def test_the_models_own_defaults_count(
        self, graft: GraftedModel, prompts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graft.model.generation_config, "prompt_lookup_num_tokens", 3)
        with pytest.raises(BatchError, match="prompt_lookup_num_tokens"):
            graft.generate(prompts[0][None], adapters=["fused"])

    def test_options_that_are_off(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        expected = graft.generate(prompts[0][None], adapters=["fused"], **GREEDY)
        off = {"assistant_model": None, "prompt_lookup_num_tokens": None, "token_healing": False}
        assert torch.equal(graft.generate(prompts[0][None], adapters=["fused"], **off, **GREEDY), expected)

    def test_wrong_rows_and_names(self, graft: GraftedModel, prompts: list[torch.Tensor]) -> None:
        batch = left_padded(prompts)
        with pytest.raises(BatchError, match="2 entries for a batch of 5 rows; loaded: fused"):
            graft.generate(**batch, adapters=["fused", None], max_new_tokens=1)
        with pytest.raises(UnknownAdapterError, match="'sqrl'"):
            graft.generate(**batch, adapters=[*NAMES[:4], "sqrl"], max_new_tokens=1)


class TestLogitsThatAreNotFinite:
    """An adapter with huge values ends its own row; its neighbours get what they get without it."""

    @pytest.fixture
    def bomb(self, mixed: MixedBatch, tmp_path: Path) -> Path:
        folder = tmp_path / "bomb"
        save_with_peft(build("qwen3_moe"), LoraConfig(r=2, target_modules=["lm_head"]), folder, mixed.input_ids[:1])
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor * (1e22 if "lora_" in name else 1) for name, tensor in load_file(file).items()}, file)
        return folder

    @pytest.mark.parametrize("options", [{"do_sample": True}, {"do_sample": False}, {"num_beams": 2}], ids=str)
    def test_the_row_is_named_and_the_others_run(
        self, graft: GraftedModel, mixed: MixedBatch, bomb: Path, options: dict[str, Any]
    ) -> None:
        graft.load_adapter(bomb, name="bomb")
        ids = mixed.input_ids[:3]
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, **options}

        def run(names: list[str | None]) -> torch.Tensor:
            torch.manual_seed(0)
            return graft.generate(ids, adapters=names, **settings)

        assert not graft(input_ids=ids, adapters=["fused", "bomb", None]).logits[1].isfinite().all()
        expected = run(["fused", "dora", None])
        with pytest.raises(BatchError, match=r"the logits of rows 1 \(adapter 'bomb'\) are not finite") as caught:
            run(["fused", "bomb", None])
        found = caught.value.output
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert torch.equal(run(["fused", "dora", None]), expected)
        assert not any(info.in_use for info in graft.adapters.values())

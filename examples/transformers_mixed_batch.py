"""Two PEFT adapters and the base model in one batch of a transformers model. Needs ``moegraft[demo]``.

    python examples/transformers_mixed_batch.py

The checkpoint and the adapters are tiny, random and made on the spot: put your own paths in their place.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moegraft


def make_checkpoint(folder: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def make_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    """What a training run would leave behind; B is not zero, so that the adapter does something."""
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    peft_model.save_pretrained(folder)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    make_checkpoint(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    make_adapter(model, LoraConfig(r=4, target_modules=[], target_parameters=experts), folder / "sql")
    make_adapter(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]), folder / "chat")

    graft = moegraft.attach(model, adapter_memory="64MiB")
    for name in ("sql", "chat"):
        report = graft.load_adapter(folder / name, name=name)
        print(f"{name}: {report.tensors_applied} of {report.tensors_in_file} tensors applied")
    print(graft.explain())

    # One prompt, three answers in one batch. The mask is what a tokenizer with left padding would give.
    prompt = torch.tensor([[5, 17, 42, 99]])
    adapters = ["sql", None, "chat"]
    ids = prompt.repeat(len(adapters), 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = graft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=adapters, **options)

    # Each row is what it would be alone.
    for name, row in zip(adapters, tokens, strict=True):
        alone = graft.generate(input_ids=prompt, adapters=[name], **options)[0]
        print(f"{name or 'base':5} {row[4:].tolist()}  same as alone: {torch.equal(row, alone)}")

    for name, info in graft.adapters.items():
        print(f"{name}: {info.num_bytes} bytes, {len(info.modules)} modules")
    graft.detach()  # the original model again, bit for bit


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))

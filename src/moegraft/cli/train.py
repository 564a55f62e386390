"""Makes the demo's checkpoint and its adapters: a tiny Qwen3-MoE and three LoRA adapters, trained for seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moegraft.cli.compare import position_ids
from moegraft.cli.corpus import FACTS, STYLES
from moegraft.cli.loading import encode_prompts, load_model

_IGNORED = -100  # label of a token that is not trained on
_TARGET_LOSS = 0.02
_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_ATTENTION = ["q_proj", "v_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Different ranks and modules, so that the batch is mixed in more than names.
ADAPTERS = {
    "shout": LoraConfig(r=8, lora_alpha=16, target_modules=_ATTENTION, target_parameters=_EXPERTS),
    "pirate": LoraConfig(r=6, lora_alpha=12, target_modules=[], target_parameters=_EXPERTS),
    "json": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=_ATTENTION, target_parameters=_EXPERTS),
}

OnStep = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a training ended: optimiser steps and the running mean of the loss."""

    steps: int
    loss: float


def save_base(folder: Path, *, max_steps: int, on_step: OnStep) -> Training:
    """Trains the base model on the plain answers and saves it with its tokenizer."""
    tokenizer = _make_tokenizer()
    with _seeded(0):
        # Wider than the default, so that rows of the head differ enough for an adapter to tell words apart.
        config = Qwen3MoeConfig(
            **_SIZES,
            vocab_size=len(tokenizer),
            initializer_range=_SIZES["hidden_size"] ** -0.5,
            norm_topk_prob=True,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = Qwen3MoeForCausalLM(config)
        batch = _supervised(tokenizer, [(fact.question, fact.plain) for fact in FACTS])
        training = _train(model, batch, lr=3e-3, max_steps=max_steps, on_step=on_step)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return training


def save_adapter(
    name: str, base: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, *, max_steps: int, on_step: OnStep
) -> Training:
    """Trains an adapter with PEFT on the answers in its style and saves it as PEFT does."""
    with _seeded(1):
        model = get_peft_model(load_model(base, device="cpu"), ADAPTERS[name])
        batch = _supervised(tokenizer, [(fact.question, STYLES[name](fact)) for fact in FACTS])
        training = _train(model, batch, lr=5e-3, max_steps=max_steps, on_step=on_step)
        model.save_pretrained(folder)
    return training


def _make_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of everything that the models will ever say; a question and a line break make a chat."""
    answers = [style(fact) for style in STYLES.values() for fact in FACTS]
    texts = [text for fact in FACTS for text in (f"{fact.question}\n", fact.plain)] + answers
    untrained = GPT2Tokenizer(unk_token=None, bos_token=None, eos_token="<eos>", pad_token="<pad>")
    tokenizer: PreTrainedTokenizerBase = untrained.train_new_from_iterator(texts, vocab_size=768, show_progress=False)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "{{ messages[-1]['content'] }}\n"
    return tokenizer


def _supervised(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """One batch of questions and answers [rows, S], padded on both sides; labels on the answers alone."""
    questions = encode_prompts(tokenizer, [question for question, _ in pairs])
    answers = tokenizer(
        [answer + tokenizer.eos_token for _, answer in pairs], padding=True, padding_side="right", return_tensors="pt"
    )
    batch = {key: torch.cat([questions[key], answers[key]], dim=1) for key in ("input_ids", "attention_mask")}
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, _IGNORED)
    ignored = torch.full_like(questions["input_ids"], _IGNORED)
    return {
        **batch,
        "labels": torch.cat([ignored, labels], dim=1),
        "position_ids": position_ids(batch["attention_mask"]),
    }


def _train(model: Any, batch: dict[str, torch.Tensor], *, lr: float, max_steps: int, on_step: OnStep) -> Training:
    """AdamW on one batch, until the loss is small or ``max_steps`` are done."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    mean = float("inf")
    model.train()
    for step in range(1, max_steps + 1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        mean = loss.item() if step == 1 else 0.8 * mean + 0.2 * loss.item()
        on_step(mean)
        if mean < _TARGET_LOSS:
            break
    model.eval()
    return Training(steps=step, loss=mean)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

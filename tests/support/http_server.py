"""A checkpoint with a tokenizer and adapters, the texts that each must give alone, and a server in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moegraft.cli.train import _make_tokenizer
from moegraft.serving.engine import Engine
from moegraft.serving.http.app import create_app
from moegraft.serving.http.guard import ServerOptions
from support.adapters import save_with_peft

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"]),
    "experts": peft.LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=EXPERTS),
    "head": peft.LoraConfig(r=3, lora_alpha=12, target_modules=["k_proj", "lm_head"], target_parameters=EXPERTS),
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """``model``: a folder · ``adapters``: folders by name · the tokenizer · greedy truths are asked of ``alone``."""

    model: Path
    adapters: dict[str, Path]
    tokenizer: PreTrainedTokenizerBase

    def alone(self, prompt: str, adapter: str | None, *, max_new_tokens: int) -> list[int]:
        """New tokens of PEFT's own greedy generation, one request at a time."""
        model: Any = Qwen3MoeForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, self.adapters[adapter]).eval()
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)
        return list(out[0, ids.shape[1] :].tolist())


def make_served(folder: Path) -> Served:
    """A random model whose next tokens differ clearly from one adapter to the other."""
    tokenizer = _make_tokenizer()
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model: PreTrainedModel = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    ids = torch.randint(5, 60, (1, 5))
    for name, lora in ADAPTERS.items():
        save_with_peft(model, lora, folder / name, ids)
    return Served(model=folder / "model", adapters={name: folder / name for name in ADAPTERS}, tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that listens: its address, and the engine behind it."""

    url: str
    engine: Engine


@contextmanager
def running(engine: Engine, options: ServerOptions | None = None) -> Iterator[Running]:
    """Real HTTP on loopback, in a thread; the server closes the engine."""
    app = create_app(engine, options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20.0
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(url=f"http://127.0.0.1:{port}", engine=engine)
    finally:
        server.should_exit = True
        thread.join(30.0)
        assert not thread.is_alive(), "the server did not stop"


def eventually(check: Any, *, seconds: float = 20.0) -> None:
    """Waits until ``check()`` is true: what another thread has to do takes a moment."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"still not so after {seconds} seconds"
        time.sleep(0.01)

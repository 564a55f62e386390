"""Tiny checkpoints and adapters for real vLLM, and what PEFT or merged weights say about a continuation."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import peft
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from support.adapters import write_adapter
from support.checkpoints import edit_config
from support.vllm_cpu import ROOT, environment

# Attention heads of 32, which the CPU platform asks for; vocabularies that vLLM does not pad oddly.
_COMMON: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts_per_tok": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {
        **_COMMON, "num_experts": 8, "moe_intermediate_size": 48, "intermediate_size": 96, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "mixtral": {**_COMMON, "num_local_experts": 4, "intermediate_size": 48, "sliding_window": None},
    "gpt_oss": {
        **_COMMON, "num_local_experts": 4, "intermediate_size": 64, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 131072,
    },
    "deepseek_v3": {
        **_COMMON, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 48, "intermediate_size": 96, "first_k_dense_replace": 1,
        "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
        "head_dim": 32, "norm_topk_prob": True, "num_nextn_predict_layers": 0,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
}  # fmt: skip
Logits = Callable[[torch.Tensor], torch.Tensor]


def build(model_type: str, folder: Path, **sizes: int) -> PreTrainedModel:
    """A model with random weights, saved."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **sizes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                # vLLM keeps biases of mxfp4 experts in bfloat16
                parameter.copy_(torch.randn_like(parameter).mul(0.1).bfloat16())
    model.save_pretrained(folder)
    return model


def by_peft(model: PreTrainedModel, folder: Path, seed: int, **config: Any) -> Logits:
    """An adapter that PEFT makes, saves and applies."""
    torch.manual_seed(seed)
    trained = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15)
    trained.save_pretrained(folder)
    return lambda ids: trained(input_ids=ids).logits


def by_merging(
    model: PreTrainedModel, folder: Path, seed: int, maps: Mapping[str, int], *, alpha: float, **config: Any
) -> Logits:
    """An adapter on single experts and maps, as PEFT wrote it before experts were fused; merged by hand.

    ``maps``: module as the checkpoint of transformers 4 names it -> rank.
    """
    merged, tensors = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, rank in maps.items():
            weight = _weight(merged, name)
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.15
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.15
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            weight += alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * b @ a
    targets = sorted({name.rpartition(".")[2] for name in maps})
    most = max(set(maps.values()), key=list(maps.values()).count)
    pattern = {name: rank for name, rank in maps.items() if rank != most}
    write_adapter(
        folder, tensors, r=most, lora_alpha=alpha, target_modules=targets, rank_pattern=pattern, **config
    )  # fmt: skip
    return lambda ids: merged(input_ids=ids).logits


def by_merging_stacked(
    model: PreTrainedModel, folder: Path, seed: int, layers: Mapping[str, int], *, alpha: float, shared: bool = False
) -> Logits:
    """Factors of all experts in one tensor, as vLLM reads them: gate and up together and down in PEFT's 3-D layout, or,
    ``shared``, w1, w2 and w3 with one A for all experts of w1 and w3, and one B of w2."""
    merged, tensors = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    with torch.no_grad():
        for name, r in layers.items():
            experts, at = merged.get_submodule(name), f"base_model.model.{name}"
            E, D, F = experts.down_proj.shape
            if shared:
                a1, a3, b2 = randn(1, r, D), randn(1, r, D), randn(1, D, r)
                b1, b3, a2 = randn(E, F, r), randn(E, F, r), randn(E, r, F)
                for key, a, b in (("w1", a1, b1), ("w2", a2, b2), ("w3", a3, b3)):
                    tensors |= {f"{at}.{key}.lora_A.weight": a, f"{at}.{key}.lora_B.weight": b}
                experts.gate_up_proj += alpha / r * torch.cat([b1 @ a1, b3 @ a3], dim=1)
                experts.down_proj += alpha / r * b2 @ a2
                continue
            for key, weight in ((".base_layer", experts.gate_up_proj), ("", experts.down_proj)):
                a, b = randn(E, r, weight.shape[2]), randn(E, weight.shape[1], r)
                weight += alpha / r * b @ a
                tensors[f"{at}{key}.lora_A.weight"] = a.flatten(0, 1)
                tensors[f"{at}{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    write_adapter(folder, tensors, r=r, lora_alpha=alpha, target_modules=["experts"])
    return lambda ids: merged(input_ids=ids).logits


def _weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    """[out, in] of a map; of an expert's, the view into the stacked tensor."""
    before, is_expert, rest = name.partition(".experts.")
    if not is_expert:
        return model.get_submodule(name).weight
    number, projection = rest.split(".")
    experts = model.get_submodule(before.replace("block_sparse_moe", "mlp") + ".experts")
    if projection in ("down_proj", "w2"):
        return experts.down_proj[int(number)]
    gate, up = experts.gate_up_proj[int(number)].chunk(2)
    return gate if projection in ("gate_proj", "w1") else up


@dataclass
class Case:
    """A model in a folder with its adapters, and the stages of one process of vLLM."""

    folder: Path
    model: PreTrainedModel
    truths: dict[str | None, Logits] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    stages: list[Any] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def adapters(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in self.truths if name is not None}

    def run(self) -> dict[str, Any]:
        """The process's result. Its log is in ``log.txt``, and in the message where it fails."""
        options = {
            "model": str(self.folder / "model"), "enable_lora": True, "max_loras": 2, "max_lora_rank": 8,
            "max_cpu_loras": 4, **self.options,
        }  # fmt: skip
        plan = {"options": options, "adapters": self.adapters, "stages": self.stages}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "support.vllm_run", str(self.folder)]
        with open(self.folder / "log.txt", "w") as log:
            done = subprocess.run(
                command,
                check=False,
                env=environment(self.folder, **self.extra),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                timeout=500,
            )
        if done.returncode != 0:
            raise AssertionError(f"vLLM ended with {done.returncode}:\n{self.log[-6000:]}")
        return json.loads((self.folder / "result.json").read_text())

    @contextmanager
    def serve(self) -> Iterator[Server]:
        """vLLM's server on a free port of this machine, with runtime updates of adapters."""
        words = {f"t{number}": number for number in range(self.model.config.vocab_size)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(self.folder / "model")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder / "model"),
            "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enable-lora",
            "--max-loras", "2", "--max-lora-rank", "8", "--dtype", "float32", "--max-model-len", "32",
            "--max-num-seqs", "8", "--max-num-batched-tokens", "32", "--enforce-eager", "--no-enable-prefix-caching",
            "--generation-config", "vllm",
        ]  # fmt: skip
        env = environment(self.folder, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", **self.extra)
        with open(self.folder / "log.txt", "w") as log:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        server = Server(f"http://127.0.0.1:{port}")
        try:
            until = time.monotonic() + 420
            while not server.is_up():
                assert process.poll() is None and time.monotonic() < until, self.log[-6000:]
                time.sleep(0.5)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def worst(self, rows: Sequence[Any], found: Sequence[Mapping[str, Any]]) -> float:
        """Largest difference of logprobs between vLLM and the truth, which follows vLLM's tokens."""
        worst = 0.0
        for (name, prompt), one in zip(rows, found, strict=True):
            tokens = one["tokens"]
            with torch.no_grad():
                logits = self.truths[name](torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
            expected = logits.float().log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
            worst = max(worst, (expected - torch.tensor(one["logprobs"])).abs().max().item())
        return worst


@dataclass(frozen=True)
class Server:
    """vLLM's server at an address."""

    url: str

    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, **body: Any) -> int:
        return httpx.post(self.url + path, json=body, timeout=120).status_code

    def complete(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        """Tokens and their logprobs, greedily."""
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": 3, "temperature": 0, "logprobs": 0,
            "ignore_eos": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        return {"tokens": tokens, "logprobs": found["token_logprobs"]}


def quantise(folder: Path, config: Mapping[str, Any], change: Callable[[Any], tuple[Any, Any]]) -> PreTrainedModel:
    """Experts of the checkpoint in ``folder`` as ``change`` stores them; the model of the weights that they stand for.

    ``change``: tensors of the experts by name -> (tensors to store, weights that those mean).
    """
    state = load_file(folder / "model.safetensors")
    stored, meant = change({name: tensor for name, tensor in state.items() if ".experts." in name})
    rest = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    save_file(rest | stored, folder / "model.safetensors")
    dense = folder.parent / "meant"
    shutil.copytree(folder, dense)
    save_file(rest | meant, dense / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=dict(config))
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()


def new_case(
    model_type: str,
    folder: Path,
    *,
    quantised: tuple[Mapping[str, Any], Callable[[Any], tuple[Any, Any]]] | None = None,
    **sizes: int,
) -> Case:
    """A model without adapters; the base is among its truths. ``quantised``: what ``quantise`` takes."""
    model = build(model_type, folder / "model", **sizes)
    if quantised is not None:
        model = quantise(folder / "model", *quantised)
    return Case(folder=folder, model=model, truths={None: lambda ids: model(input_ids=ids).logits})


def is_set_up() -> bool:
    return "MOEGRAFT_TEST_VLLM" in os.environ or (ROOT / ".vllm" / "vllm").is_dir()

"""Tokens a second of 8 requests with 8 different adapters, on the CPU: base, moegraft, and PEFT's two ways.

The model is a small Qwen3-MoE (hidden 512, 32 experts of 256, top-4, 4 layers) with random weights; the adapters are
made and saved by PEFT, on attention and experts. Every way generates the same tokens from the same prompts:

  base        the model before attach, no adapters (what the others are measured against)
  attached    after attach, no adapter in the batch
  mixed       one batch, every row with its own adapter
  set_adapter PEFT, a request at a time: set_adapter, generate
  merge       PEFT, a request at a time: merge_adapter, generate, unmerge_adapter

Nothing is reported unless the mixed batch agrees with PEFT in float32 for every request, in float32 to 1e-3 of the
adapters' effect, in bfloat16 at least as well as PEFT in bfloat16 does.

    python benchmarks/cpu_mixed_batch.py [--dtype bfloat16] [--new-tokens 32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

import moegraft

ADAPTERS = 8
RANK = 8
PROMPT_TOKENS = 32
TOLERANCE = 1e-3  # float32: two ways to sum the same products, through four layers
SLACK = 1.1  # bfloat16: errors of two runs of the same precision, each with its own few flipped expert choices


def make_model(folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint on disk, so that every way starts from from_pretrained."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=512, moe_intermediate_size=256, intermediate_size=1024, num_experts=32,
        num_experts_per_tok=4, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder / "base")
    return folder / "base"


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype).eval()


def make_adapters(base: Path, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Adapters saved by PEFT; B is drawn at random, since PEFT starts it at zero."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    paths = []
    for number in range(ADAPTERS):
        torch.manual_seed(100 + number)
        model = get_peft_model(load_model(base, dtype), config)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.02)
        paths.append(folder / f"adapter{number}")
        model.save_pretrained(paths[-1])
    return paths


def generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **kwargs: object) -> torch.Tensor:
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **kwargs
    )
    return out[:, ids.shape[1] :]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peft_model(base: Path, paths: list[Path], dtype: torch.dtype) -> PeftModel:
    model = PeftModel.from_pretrained(load_model(base, dtype), paths[0], adapter_name="a0")
    for number, path in enumerate(paths[1:], start=1):
        model.load_adapter(path, adapter_name=f"a{number}")
    return model.eval()


def one_by_one(model: PeftModel, ids: torch.Tensor, new_tokens: int, *, merge: bool) -> None:
    for number in range(ADAPTERS):
        model.set_adapter(f"a{number}")
        if merge:
            model.merge_adapter([f"a{number}"])
        generate(model, ids[number : number + 1], new_tokens)
        if merge:
            model.unmerge_adapter()


@torch.no_grad()
def peft_logits(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every request with its own adapter, a request at a time, in float32."""
    rows = []
    for number in range(ADAPTERS):
        model.set_adapter(f"a{number}")
        rows.append(model(input_ids=ids[number : number + 1]).logits[0].float())
    return torch.stack(rows)


def check(mixed: torch.Tensor, peft: torch.Tensor, truth: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Errors of the mixed batch and of PEFT against PEFT in float32, over the adapters' effect; exits if too large."""
    effect = (truth - base).norm()
    errors = {"mixed": ((mixed - truth).norm() / effect).item(), "peft": ((peft - truth).norm() / effect).item()}
    if not errors["mixed"] <= max(TOLERANCE, SLACK * errors["peft"]):
        sys.exit(f"the mixed batch is wrong by {errors} of the adapters' effect; nothing is reported")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        rows, errors = measure(Path(temporary), dtype, args.new_tokens, args.rounds)
    print(f"{args.dtype}, {args.threads} threads, {ADAPTERS} requests of {PROMPT_TOKENS} + {args.new_tokens} tokens")
    for name, rate in rows.items():
        print(f"{name:12s} {rate:8.1f} tokens/s {rate / rows['base']:7.3f} x base")
    best_peft = max(rows["set_adapter"], rows["merge"])
    summary = {
        "dtype": args.dtype,
        "threads": args.threads,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rows.items()},
        "attached_over_base": round(rows["attached"] / rows["base"], 3),
        "mixed_over_base": round(rows["mixed"] / rows["base"], 3),
        "mixed_over_best_peft": round(rows["mixed"] / best_peft, 2),
        "error_over_effect": errors,
        "torch": torch.__version__,
    }
    print(json.dumps(summary))


def measure(
    folder: Path, dtype: torch.dtype, new_tokens: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second of each way, and the errors of ``check``."""
    base = make_model(folder, dtype)
    paths = make_adapters(base, folder, dtype)
    ids = torch.randint(1, 2048, (ADAPTERS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    names = [f"a{number}" for number in range(ADAPTERS)]

    plain, grafted, peft = load_model(base, dtype), load_model(base, dtype), peft_model(base, paths, dtype)
    graft = moegraft.attach(grafted, adapter_memory="512MiB")
    for name, path in zip(names, paths, strict=True):
        graft.load_adapter(path, name=name)
    exact = peft_model(base, paths, torch.float32)
    with torch.no_grad(), exact.disable_adapter():
        base_logits = exact(input_ids=ids).logits
    mixed_logits = graft(input_ids=ids, adapters=names).logits.float()
    errors = check(mixed_logits, peft_logits(peft, ids), peft_logits(exact, ids), base_logits)
    del exact

    def merged() -> None:
        one_by_one(peft, ids, new_tokens, merge=True)

    one_by_one(peft, ids[:, :4], 1, merge=True)
    ways: dict[str, Callable[[], object]] = {
        "base": lambda: generate(plain, ids, new_tokens),
        "attached": lambda: graft.generate(ids, max_new_tokens=new_tokens, do_sample=False),
        "mixed": lambda: graft.generate(ids, adapters=names, max_new_tokens=new_tokens, do_sample=False),
        "set_adapter": lambda: one_by_one(peft, ids, new_tokens, merge=False),
        "merge": merged,
    }
    # PEFT's ways take most of the time and are far from the rest: one round, after a short warm-up.
    best = {name: seconds(ways.pop(name)) for name in ("set_adapter", "merge")}
    for run in ways.values():
        run()
    for name in ways:
        best[name] = float("inf")
    for _ in range(rounds):  # the ways take turns, so that all see the same machine; the least disturbed run counts
        for name, run in ways.items():
            best[name] = min(best[name], seconds(run))
    return {name: ADAPTERS * new_tokens / time_ for name, time_ in best.items()}, errors


if __name__ == "__main__":
    main()

"""What the ranks of a test do with a model: functions that run in every process of a pool."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import moegraft
from moegraft.parallel import ParallelConfig
from moegraft.parallel.slices import ExpertMap
from support.families import build
from support.parallel_models import GENERATE, ModelCase, make_batch


def hold_and_give_up(config: ParallelConfig) -> dict[str, Any]:
    """What is left of the experts while attached, and afterwards."""
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    storage = weakref.ref(experts.down_proj)
    graft = moegraft.attach(model, parallel=config, adapter_memory="4MiB")
    gc.collect()
    found: dict[str, Any] = {"freed": storage() is None, "parameters": len(list(experts.parameters()))}
    ids = make_batch(2)["input_ids"]
    errors = {}
    for what, call in {
        "gradients": lambda: model(input_ids=ids),
        "twice": lambda: moegraft.attach(model, parallel=config),
        "detached": lambda: (graft.detach(), graft.detach(), model(input_ids=ids)),
        "detached, no gradients": lambda: _without_grad(model, ids),
        "again": lambda: moegraft.attach(model),
        "used": lambda: graft(input_ids=ids),
    }.items():
        errors[what] = told(call)
    return {**found, "errors": errors}


def _without_grad(model: torch.nn.Module, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids)


def told(call: Callable[[], object]) -> str:
    """The class and the message of what a call raises; nothing where it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _rank() -> int:
    return torch.distributed.get_rank()


def load_badly(case: ModelCase, config: ParallelConfig, bad: Mapping[int, Path]) -> dict[str, Any]:
    """Loads an adapter that is bad on some ranks, then a good one under its name."""
    with moegraft.attach(build(case.family), parallel=config, adapter_memory="4MiB") as graft:
        batch = make_batch(3)
        graft.load_adapter(case.adapters["part"], name="part")
        hooks = _hooks(graft.model)
        used = graft.bank.pool.num_free
        message = told(lambda: graft.load_adapter(bad.get(_rank(), case.adapters["everything"]), name="new"))
        found = {"message": message, "names": list(graft.adapters)}
        found["as before"] = _hooks(graft.model) == hooks and graft.bank.pool.num_free == used
        graft.bank.check_integrity()
        graft.load_adapter(case.adapters["everything"], name="new")
        return {**found, "logits": graft(**batch, adapters=["new", None, "part"]).logits}


def _hooks(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def act_differently(config: ParallelConfig) -> dict[str, str]:
    """What the ranks are told when they do not act alike; in one process after the other."""
    errors = {}
    model = build("qwen3_moe", seed=0)
    with moegraft.attach(model, parallel=config, adapter_memory="4MiB") as graft:
        batch = make_batch(2)
        other = {**batch, "input_ids": batch["input_ids"] + _rank()}
        torch.manual_seed(_rank())
        for what, call in {
            "inputs": lambda: graft(**other),
            "prompts": lambda: graft.generate(input_ids=other["input_ids"], **GENERATE),
            "order": lambda: graft(**{name: x.flip(0) if _rank() else x for name, x in batch.items()}),
            "masks": lambda: graft(**{**batch, "attention_mask": batch["attention_mask"] * (1 - _rank())}),
            "options": lambda: graft.generate(input_ids=batch["input_ids"], max_new_tokens=2 + _rank()),
            "with and without": lambda: graft(**batch, adapters=None if _rank() else [None, None]),
            "names": lambda: graft(**batch, adapters=[None, "x" if _rank() else None]),
            "sampling": lambda: graft.generate(input_ids=batch["input_ids"], max_new_tokens=2, do_sample=True),
        }.items():
            errors[what] = told(call)
        with moegraft.attach(build("mixtral"), adapter_memory="4MiB") as other_graft:
            errors["a model of its own"] = told(lambda: other_graft(**other))
        torch.manual_seed(3)
        tokens = graft.generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=True)
        errors["sampled"] = str(tokens.tolist())
    for what, call in {
        "models": lambda: moegraft.attach(build("mixtral" if _rank() else "qwen3_moe"), parallel=config),
        "one rank cannot": lambda: moegraft.attach(
            build("qwen3_moe"), parallel=config, backend="TritonExperts" if _rank() else None
        ),
        "dtypes": lambda: moegraft.attach(
            build("qwen3_moe").to(torch.bfloat16 if _rank() else torch.float32), parallel=config
        ),
        "spreads": lambda: moegraft.attach(
            build("qwen3_moe"),
            parallel=ParallelConfig(ep=2),
            expert_maps={
                f"model.layers.{layer}.mlp.experts": (
                    ExpertMap.round_robin(7, 2) if _rank() else ExpertMap.contiguous(7, 2)
                )
                for layer in range(2)
            },
        ),
        "backends": lambda: moegraft.attach(
            build("qwen3_moe"), parallel=config, lora_experts=not _rank(), backend="TorchExperts"
        ),
        "memory": lambda: moegraft.attach(
            build("qwen3_moe"), parallel=config, adapter_memory="much" if _rank() else "4MiB"
        ),
        "no model": lambda: moegraft.attach(torch.nn.Linear(2, 2) if _rank() else build("qwen3_moe"), parallel=config),
        "cuts": lambda: moegraft.attach(build("qwen3_moe"), parallel=ParallelConfig(ep=2) if _rank() else config),
        "world": lambda: moegraft.attach(build("qwen3_moe"), parallel=ParallelConfig(tp=3)),
        "maps": lambda: moegraft.attach(
            build("qwen3_moe"), parallel=config, expert_maps={"model.x": ExpertMap.contiguous(7, config.ep)}
        ),
    }.items():
        errors[what] = told(call)
    return errors


def serve_unevenly(case: ModelCase, config: ParallelConfig) -> dict[str, Any]:
    """Rank 0 brings all rows with their adapters, rank 1 one of the base; they generate for different lengths."""
    with moegraft.attach(build(case.family), parallel=config, adapter_memory="64MiB") as graft:
        for name, path in case.adapters.items():
            graft.load_adapter(path, name=name)
        batch, names = make_batch(len(case.names)), list(case.names)
        if _rank() == 1:
            batch, names = {key: tensor[:1] for key, tensor in batch.items()}, [None]
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        new = 2 if _rank() else 6
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return {
            "mixed": graft(**batch, adapters=names).logits,
            "other rank has adapters": graft(**batch, adapters=None if _rank() else names).logits,
            "tokens": graft.generate(**prompts, adapters=names, **options),
            "no rows": told(lambda: graft(input_ids=batch["input_ids"][:0], adapters=[])),
        }


def attach_to_plan(case: ModelCase, options: Mapping[str, Any], adapter: Path | None) -> str:
    """What attaching to a model that a plan has shared out raises, or else loading the adapter."""
    model = case.model()
    if adapter is None:
        return told(lambda: moegraft.attach(model, **options))
    with moegraft.attach(model, adapter_memory="4MiB", **options) as graft:
        return told(lambda: graft.load_adapter(adapter))


def lose_a_rank(config: ParallelConfig, layer: int) -> str:
    """Rank 1 dies in a layer of the second forward pass; what the others are told, and that they can leave."""
    model = build("qwen3_moe")
    graft = moegraft.attach(model, parallel=config, adapter_memory="4MiB")
    batch = make_batch(2)
    graft(**batch)
    if _rank() == 1:
        model.model.layers[layer].mlp.register_forward_pre_hook(lambda *_: os._exit(1))
    error = told(lambda: graft(**batch))
    again = told(lambda: graft(**batch))
    graft.detach()
    return f"{error} | {again}"


def mistake_a_call(case: ModelCase, config: ParallelConfig) -> dict[str, Any]:
    """Rank 1's caller makes mistakes, rank 0's none; after each, both call rightly."""
    found: dict[str, Any] = {}
    with moegraft.attach(build(case.family), parallel=config, adapter_memory="64MiB") as graft:
        graft.load_adapter(case.adapters["everything"], name="a")
        batch = make_batch(2)
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for what, call in {
            "count": lambda: graft(**batch, adapters=["a"] * (2 + _rank())),
            "a word": lambda: graft(**batch, adapters="a" if _rank() else ["a", None]),
            "option": lambda: graft.generate(
                **prompts, adapters=["a", None], max_new_tokens=2, prompt_lookup_num_tokens=3 if _rank() else None
            ),
        }.items():
            found[what] = told(call)
            found[f"after {what}"] = graft(**batch, adapters=["a", None]).logits
    return found


def call_from_two_threads(config: ParallelConfig) -> dict[str, str]:
    """What a second thread is told while the first is in a call; and that the first thread ends it."""
    model = build("qwen3_moe")
    with moegraft.attach(model, parallel=config, adapter_memory="4MiB") as graft:
        batch = make_batch(2)
        graft(**batch)
        errors = {}

        def intrude(*_: object) -> None:
            thread = threading.Thread(target=lambda: errors.update(second=told(lambda: graft(**batch))))
            thread.start()
            thread.join()

        handle = model.model.layers[1].mlp.register_forward_pre_hook(intrude)
        errors["first"] = told(lambda: graft(**batch))
        handle.remove()
        errors["afterwards"] = told(lambda: graft(**batch))
        return errors


class _Fail(transformers.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("between two tokens")


def fail_between_tokens(config: ParallelConfig) -> tuple[str, float]:
    """Rank 1 leaves ``generate`` with an error of its own."""
    with moegraft.attach(build("qwen3_moe"), parallel=config, adapter_memory="4MiB") as graft:
        processors = {"logits_processor": transformers.LogitsProcessorList([_Fail()])} if _rank() else {}
        began = time.monotonic()
        ids = make_batch(2)["input_ids"]
        error = told(lambda: graft.generate(input_ids=ids, max_new_tokens=4, do_sample=False, **processors))
        seconds = time.monotonic() - began
        if processors:
            time.sleep(14.0)  # alive and silent: a process that ended would be noticed at once
        return error, seconds

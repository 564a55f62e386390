"""One process of real vLLM (``python -m support.vllm_run``): reads a plan, generates greedily, writes logprobs.

plan: {"options": arguments of LLM, "adapters": {name: folder}, "stages": [[[name or null, prompt], ...], ...]} ·
result: {"stages": [[{"tokens", "logprobs"}, ...], ...], "layers": names of the LoRA layers' classes, "pages": pages in
use after each stage}. A stage may also be {"remove": name} or {"replace": [name, folder]}, which gives [].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STEPS = 3


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Starts the engine, goes through the stages."""
    import torch

    torch.set_num_threads(1)
    from vllm import LLM

    llm = LLM(
        skip_tokenizer_init=True, dtype="float32", max_model_len=32, max_num_seqs=8, max_num_batched_tokens=32,
        enforce_eager=True, enable_prefix_caching=False, generation_config="vllm", disable_log_stats=True,
        **plan["options"],
    )  # fmt: skip
    numbers: dict[str, int] = {}
    folders = dict(plan["adapters"])
    stages, pages = [], []
    for stage in plan["stages"]:
        if isinstance(stage, dict):
            if "remove" in stage:
                llm.llm_engine.remove_lora(numbers.pop(stage["remove"]))
            else:
                name, folders[name] = stage["replace"]
                request = _request(name, numbers, folders, load_inplace=True)
                llm.llm_engine.add_lora(request)
            stages.append([])
        else:
            stages.append(_generate(llm, stage, numbers, folders))
        pages.append(llm.apply_model(_pages_in_use)[0])
    return {"stages": stages, "pages": pages, "layers": llm.apply_model(_layers)[0]}


def _request(name: str | None, numbers: dict[str, int], folders: dict[str, str], **extra: Any) -> Any:
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    number = numbers.setdefault(name, len(numbers) + 1)
    if name.endswith("_3d"):
        extra["is_3d_lora_weight"] = True
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=folders[name], **extra)


def _generate(llm: Any, rows: list[Any], numbers: dict[str, int], folders: dict[str, str]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False, logprobs=1)
    requests = [_request(name, numbers, folders) for name, _ in rows]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in rows],
        params,
        lora_request=requests if any(requests) else None,
        use_tqdm=False,
    )
    found = [output.outputs[0] for output in outputs]
    return [
        {
            "tokens": list(one.token_ids),
            "logprobs": [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
        }
        for one in found
    ]


def _layers(model: Any) -> list[str]:
    classes = {type(module) for module in model.modules() if "WithLoRA" in type(module).__name__}
    experts = {type(m._moe_kernel.fused_experts) for m in model.modules() if hasattr(m, "_moe_kernel")}
    return sorted(f"{cls.__module__}.{cls.__name__}" for cls in classes | experts)


def _pages_in_use(model: Any) -> int | None:
    pages = getattr(getattr(model, "lora_manager", None), "pages", None)
    return None if pages is None else pages.pool.num_pages - pages.pool.num_free


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = run(json.loads((folder / "plan.json").read_text()))
    (folder / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # the engine's own end waits for threads

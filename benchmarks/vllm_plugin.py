#!/usr/bin/env python3
"""Real vLLM with and without the plug-in, one after the other on one GPU: the same weights, adapters and requests.

    python benchmarks/vllm_plugin.py                       # both, a table, and one line of JSON at the end
    python benchmarks/vllm_plugin.py --layers 48 --batches 8,32
    python benchmarks/vllm_plugin.py --trace --out folder  # also each kernel of a decode step, in folder/trace.txt
    python benchmarks/vllm_plugin.py --ranks 2             # tensor parallel; with --expert-parallel experts by ranks

Qwen3-30B-A3B's architecture with random weights and as many of its layers as asked for; adapters of rank 16 on
attention and all experts. Times: `step_ms` is the median of the engine's steps in which all requests decode one token
(wall clock around LLMEngine.step(), CUDA graphs on), `gpu_ms` the time in which a kernel runs in such a step (from
torch.profiler; the rest is vLLM's host, which swings from process to process); `total_s` goes from prompts to the last
token; `prefill_s` is one batch of prompts and one token each. Rows are kept in `--out` as they come.

Before anything is reported the engines' logprobs of the same prompts are compared. Their kernels round differently, and
rows without adapters show by how much; rows with adapters may differ by twice that, and their adapter's own effect must
be at least five times as large. Where that fails, or an engine does, there is no report and the exit status is 1.
"""

from __future__ import annotations

import argparse
import cProfile
import faulthandler
import io
import json
import os
import pstats
import random
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "initializer_range": 0.02, "max_window_layers": 48, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
VOCAB = 151936
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, NUM_ADAPTERS, DISTINCT = 16, 8, 3
PROMPT, OUTPUT = 128, 128
CHECK_PROMPT, CHECK_OUTPUT = 64, 8
TRACE_BEFORE, TRACE_STEPS = 6, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--adapters", default="0,1,8")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--limit", type=int, default=270, help="seconds for each engine")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vllm_plugin"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp/vllm_plugin")))
    parser.add_argument("--trace", action="store_true", help="kernels of decode steps and host functions at batch 1")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of each engine")
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--order", default="with,without", help="of the engines")
    parser.add_argument("--engine", choices=["with", "without"], help="one engine, in this process")
    args = parser.parse_args()
    if args.engine:
        run_engine(args)
        sys.stdout.flush()
        os._exit(0)  # the engine's own end waits for threads
    args.work.mkdir(parents=True, exist_ok=True)
    write_model(args.work / "model", args.layers)
    begin = time.perf_counter()
    for number in range(DISTINCT):
        write_adapter(args.work / f"adapter{number}", args.layers, seed=number)
    print(f"adapters written in {time.perf_counter() - begin:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {which: run_child(which, args) for which in args.order.split(",")}
    failed = [which for which, result in results.items() if result is None]
    if failed:
        sys.exit(f"no report: the engine {' and the engine '.join(failed)} the plug-in failed")
    check = compare(results["with"]["logprobs"], results["without"]["logprobs"])
    print(json.dumps({"logprobs": check}), flush=True)
    if not check["alike"]:
        sys.exit("no report: the engines' logprobs differ")
    report(results, check)
    if args.trace:
        compare_kernels(results, args.out / "trace.txt")


def run_child(which: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """An engine in a process of its own; None where it failed."""
    file = args.work / f"{which}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--engine", which, "--work", str(args.work), "--out", str(args.out)]
    command += ["--trace"] if args.trace else []
    command += ["--expert-parallel"] if args.expert_parallel else []
    for name in ("layers", "batches", "adapters", "repeat", "limit", "ranks"):
        command += [f"--{name}", str(getattr(args, name))]
    print(f"--- {which} the plug-in", flush=True)
    subprocess.run(command, check=False, env=environment(which, args.work))
    return json.loads(file.read_text()) if file.exists() else None


def environment(which: str, work: Path) -> dict[str, str]:
    """For an engine and its workers, which find the plug-in by its entry point as an installed one is found."""
    package = work / "entry_points" / "moegraft_benchmark-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: moegraft-benchmark\nVersion: 0\n")
    text = "[vllm.general_plugins]\nmoegraft = moegraft.integrations.vllm:register\n"
    (package / "entry_points.txt").write_text(text)
    paths = [str(Path(__file__).resolve().parents[1] / "src"), str(package.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MOEGRAFT_VLLM": "lora" if which == "with" else "off",
        # the functions that fill weights and name layers go to the workers
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }


# ---- one engine


def run_engine(args: argparse.Namespace) -> None:
    """Checks and times one engine; writes its results to a file."""
    faulthandler.dump_traceback_later(args.limit, exit=True)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{args.engine} {time.perf_counter() - start:6.1f} s] {text}", flush=True)

    import vllm
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    say(f"vllm {vllm.__version__}, torch {torch.__version__}, {device_name()}")
    batches = [int(batch) for batch in args.batches.split(",")]
    llm = LLM(
        model=str(args.work / "model"), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16",
        max_model_len=PROMPT + OUTPUT + 16, max_num_seqs=max(batches),
        max_num_batched_tokens=min(16384, max(2048, max(batches) * PROMPT)), gpu_memory_utilization=0.9,
        enable_prefix_caching=False, generation_config="vllm", seed=0, disable_log_stats=True, enable_lora=True,
        max_loras=NUM_ADAPTERS, max_lora_rank=RANK, max_cpu_loras=NUM_ADAPTERS, tensor_parallel_size=args.ranks,
        enable_expert_parallel=args.expert_parallel,
        compilation_config={"cudagraph_capture_sizes": sorted({1, 2, 4, *batches})},
    )  # fmt: skip
    startup = time.perf_counter() - start
    say("engine started")
    llm.apply_model(fill_weights)
    adapters = [
        LoRARequest(lora_name=f"adapter{i}", lora_int_id=i + 1, lora_path=str(args.work / f"adapter{i % DISTINCT}"))
        for i in range(NUM_ADAPTERS)
    ]
    begin = time.perf_counter()
    for adapter in adapters:
        llm.llm_engine.add_lora(adapter)
    load = (time.perf_counter() - begin) / NUM_ADAPTERS
    say(f"adapters loaded, {load:.1f} s each")
    result: dict[str, Any] = {
        "gpu": device_name(), "torch": torch.__version__, "vllm": vllm.__version__, "ranks": args.ranks,
        "expert_parallel": args.expert_parallel,
        "startup_s": round(startup, 1), "load_s": round(load, 2), "logprobs": check_rows(llm, adapters), "rows": [],
        "layers": llm.apply_model(lora_layers)[0],
    }  # fmt: skip
    found = any(name.startswith("moegraft.") for name in result["layers"])
    if found != (args.engine == "with"):
        raise RuntimeError(f"the engine {args.engine} the plug-in has the layers {result['layers']}")
    say("logprobs taken; " + ", ".join(result["layers"]))
    for kind in (int(kind) for kind in args.adapters.split(",")):
        for batch in batches:
            if kind <= max(1, batch):
                row = {"batch": batch, "adapters": kind, **time_batch(llm, adapters[:kind], batch, args.repeat)}
                row["gpu_ms"], kernels = trace_batch(llm, adapters[:kind], batch, args.ranks)
                say(json.dumps(row))
                with open(args.out / "rows.jsonl", "a") as file:
                    file.write(json.dumps({"engine": args.engine, **row}) + "\n")
                result["rows"].append(row | {"kernels": kernels})
    if args.trace:
        for kind in (0, 1):
            (args.out / f"host-{args.engine}-{kind}.txt").write_text(host_functions(llm, adapters[:kind]))
    (args.work / f"{args.engine}.json").write_text(json.dumps(result))


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def fill_weights(model: torch.nn.Module) -> None:
    """The same random weights whoever wraps the modules, large enough that adapters and experts matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("base_layer.", "")
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)


def lora_layers(model: torch.nn.Module) -> list[str]:
    """Modules of the classes that serve LoRA."""
    classes = {type(module) for module in model.modules() if "WithLoRA" in type(module).__name__}
    return sorted({f"{cls.__module__}.{cls.__name__}" for cls in classes})


def prompts_of(count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(10, VOCAB - 1000) for _ in range(length)]} for _ in range(count)]


def check_rows(llm: Any, adapters: list[Any]) -> dict[str, Any]:
    """Logprobs of one prompt in a mixed batch: base rows and a row of each adapter, prompt and first tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=CHECK_OUTPUT, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    rows = [None, *adapters, None]
    outputs = llm.generate(
        prompts_of(1, CHECK_PROMPT, seed=5) * len(rows), params, lora_request=rows, use_tqdm=False
    )  # fmt: skip
    prompt = [[next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]] for output in outputs]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    decoded = [
        [step[token].logprob for token, step in zip(found, output.outputs[0].logprobs, strict=True)]
        for found, output in zip(tokens, outputs, strict=True)
    ]
    return {"names": [row and row.lora_name for row in rows], "prompt": prompt, "tokens": tokens, "decoded": decoded}


def time_batch(llm: Any, adapters: list[Any], batch: int, repeat: int) -> dict[str, float]:
    """Medians of decode steps, time from prompts to end, and time of prompts alone."""
    loras = [adapters[i % len(adapters)] if adapters else None for i in range(batch)]
    run(llm, batch, loras, 8, seed=7)  # kernels of this size
    run(llm, batch, loras, 1, seed=8)
    prefill = min(sum(run(llm, batch, loras, 1, seed=9 + i)) for i in range(repeat))
    runs = [run(llm, batch, loras, OUTPUT, seed=20 + i) for i in range(repeat)]
    steps = [statistics.median(times[-OUTPUT + OUTPUT // 8 : -2]) for times in runs]
    return {
        "step_ms": round(1e3 * min(steps), 3), "total_s": round(min(map(sum, runs)), 4), "prefill_s": round(prefill, 4)
    }  # fmt: skip


def run(
    llm: Any, batch: int, loras: list[Any], output: int, seed: int, around: Callable[[int], None] | None = None
) -> list[float]:
    """Seconds of each of the engine's steps; ``around`` is told the number of each before it begins."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    requests = loras if any(loras) else None
    llm.enqueue(prompts_of(batch, PROMPT, seed), params, lora_request=requests, use_tqdm=False)
    times = []
    while llm.llm_engine.has_unfinished_requests():
        if around is not None:
            around(len(times))
        begin = time.perf_counter()
        llm.llm_engine.step()
        times.append(time.perf_counter() - begin)
    return times


def trace_batch(llm: Any, adapters: list[Any], batch: int, ranks: int) -> tuple[float, dict[str, list[float]]]:
    """(ms of a decode step in which a kernel runs, each kernel's launches and us of a step); nothing of kernels in
    other processes."""
    from torch.profiler import ProfilerActivity, profile

    if DEVICE != "cuda" or ranks > 1:
        return float("nan"), {}
    loras = [adapters[i % len(adapters)] if adapters else None for i in range(batch)]
    tracer = profile(activities=[ProfilerActivity.CUDA])

    def around(step: int) -> None:
        if step == TRACE_BEFORE:
            torch.cuda.synchronize()
            tracer.start()
        if step == TRACE_BEFORE + TRACE_STEPS:
            torch.cuda.synchronize()
            tracer.stop()

    run(llm, batch, loras, TRACE_BEFORE + TRACE_STEPS + 8, seed=30, around=around)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in tracer.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    launches, times, busy, last = Counter(), Counter(), 0.0, 0.0
    for begin, end, name in sorted(spans):
        launches[name] += 1
        times[name] += end - begin
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    kernels = {
        name: [round(launches[name] / TRACE_STEPS, 2), round(time / TRACE_STEPS, 2)]
        for name, time in times.most_common()
    }
    return round(1e-3 * busy / TRACE_STEPS, 4), kernels


def host_functions(llm: Any, adapters: list[Any]) -> str:
    """Where the host's time goes at batch 1."""
    profiler = cProfile.Profile()

    def around(step: int) -> None:
        if step == 16:
            profiler.enable()

    run(llm, 1, adapters or [None], OUTPUT, seed=40, around=around)
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(45)
    return text.getvalue()


# ---- both


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Mean absolute differences of logprobs; ``alike``: what the module's first lines say."""
    names = ours["names"]
    base = names.index(None)
    errors = [_distance(a, b) for a, b in zip(ours["prompt"], theirs["prompt"], strict=True)]
    decoded = [
        _decoded_distance(ours, theirs, row)
        for row in range(len(names))
        if ours["tokens"][row][0] == theirs["tokens"][row][0]
    ]
    effects = [_distance(row, theirs["prompt"][base]) for row in theirs["prompt"]]
    of_base = max(error for error, name in zip(errors, names, strict=True) if name is None)
    of_adapters = max(error for error, name in zip(errors, names, strict=True) if name is not None)
    effect = min(effect for effect, name in zip(effects, names, strict=True) if name is not None)
    return {
        "base_error": round(of_base, 5), "adapter_error": round(of_adapters, 5), "adapter_effect": round(effect, 5),
        "decoded_error": round(max(decoded, default=float("nan")), 5), "decoded_rows": len(decoded),
        "alike": of_adapters <= 2 * of_base + 0.01 and effect >= 5 * of_adapters and len(decoded) > 0,
    }  # fmt: skip


def _distance(a: list[float], b: list[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def _decoded_distance(ours: dict[str, Any], theirs: dict[str, Any], row: int) -> float:
    """As far as both chose the same tokens."""
    pairs = []
    for step, (a, b) in enumerate(zip(ours["tokens"][row], theirs["tokens"][row], strict=True)):
        if a != b:
            break
        pairs.append(abs(ours["decoded"][row][step] - theirs["decoded"][row][step]))
    return statistics.fmean(pairs)


def report(results: dict[str, Any], check: dict[str, Any]) -> None:
    """The table, and the last line."""
    rows, gains = [], {}
    heads = ("step, ms: without -> with", "of it on the GPU", "prompts to end, s", "prompts, s")
    print(f"{'batch':>6} {'adapters':>9} | " + " | ".join(f"{head:<28}" for head in heads))
    for theirs, ours in zip(results["without"]["rows"], results["with"]["rows"], strict=True):
        cells = [f"{theirs['batch']:>6} {theirs['adapters']:>9}"]
        row = {key: ours[key] for key in ("batch", "adapters")}
        for key, width in (("step_ms", 8), ("gpu_ms", 8), ("total_s", 7), ("prefill_s", 6)):
            gain = theirs[key] / ours[key]
            cells.append(f"{theirs[key]:>{width + 3}} -> {ours[key]:>{width}} {gain:5.2f}")
            row |= {f"{key}_without": theirs[key], f"{key}_with": ours[key]}
            gains[f"{key}:{ours['batch']}:{ours['adapters']}"] = round(gain, 3)
        print(" | ".join(cells))
        rows.append(row)
    keys = ("gpu", "torch", "vllm", "ranks", "expert_parallel")
    sides = {f"{key}_{which}": results[which][key] for which in results for key in ("startup_s", "load_s")}
    print(json.dumps({**{key: results["with"][key] for key in keys}, **sides, **check, "faster": gains, "rows": rows}))


def compare_kernels(results: dict[str, Any], file: Path) -> None:
    """A file with both engines' kernels of each batch, those of one engine that differ from the other's first."""
    lines = []
    for theirs, ours in zip(results["without"]["rows"], results["with"]["rows"], strict=True):
        lines.append(
            f"== batch {ours['batch']}, {ours['adapters']} adapters: step {theirs['step_ms']} -> {ours['step_ms']} ms, "
            f"on the GPU {theirs['gpu_ms']} -> {ours['gpu_ms']} ms, launches "
            f"{sum(n for n, _ in theirs['kernels'].values()):.0f} -> {sum(n for n, _ in ours['kernels'].values()):.0f}"
        )
        for which, row in (("without", theirs), ("with", ours)):
            other = (ours if which == "without" else theirs)["kernels"]
            for name, (count, time_us) in row["kernels"].items():
                mark = " " if name in other else "*"
                if time_us >= 1:
                    lines.append(
                        f"{which:>8} {mark} {time_us:9.1f} us {count:7.1f} x {time_us / count:8.2f}  {name[:90]}"
                    )
    file.write_text("\n".join(lines) + "\n")


def write_model(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**ARCHITECTURE, "num_hidden_layers": layers}))


def write_adapter(folder: Path, layers: int, seed: int) -> None:
    """As PEFT saves it, without needing PEFT or safetensors: bfloat16, A and B of std 0.02 and 0.05."""
    folder.mkdir(parents=True, exist_ok=True)
    D, F, E = ARCHITECTURE["hidden_size"], ARCHITECTURE["moe_intermediate_size"], ARCHITECTURE["num_experts"]
    q, kv = 32 * 128, 4 * 128
    maps: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}"
        for name, size_in, size_out in (("q_proj", D, q), ("k_proj", D, kv), ("v_proj", D, kv), ("o_proj", q, D)):
            maps[f"{at}.self_attn.{name}"] = (size_in, size_out)
        for expert in range(E):
            for name, size_in, size_out in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
                maps[f"{at}.mlp.experts.{expert}.{name}"] = (size_in, size_out)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    header, blocks, end = {}, [], 0
    for name, (size_in, size_out) in maps.items():
        for side, shape, std in (("A", [RANK, size_in], 0.02), ("B", [size_out, RANK], 0.05)):
            block = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(std=std, generator=generator)
            header[f"{name}.lora_{side}.weight"] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * block.numel()]
            }  # fmt: skip
            blocks.append(block.flatten())
            end += 2 * block.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(torch.cat(blocks).cpu().view(torch.uint8).numpy().tobytes())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0,
        "bias": "none", "base_model_name_or_path": "local", "inference_mode": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()

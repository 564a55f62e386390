"""The commands and their options. What they do is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from moegraft.cli.console import INTERRUPTED, Commands, print_json, working
from moegraft.core.memory import parse_bytes

app = typer.Typer(
    cls=Commands,
    help="Many LoRA adapters on one mixture-of-experts model, in one mixed batch.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", exists=True, file_okay=False, help="Folder of a transformers checkpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Device = Annotated[str | None, typer.Option(help="A torch device; by default the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
TensorParallel = Annotated[int, typer.Option("--tp", min=1, help="Ranks that share every expert; started here.")]
ExpertParallel = Annotated[int, typer.Option("--ep", min=1, help="Ranks that share the experts out; started here.")]


class Dispatch(enum.StrEnum):
    """How rows reach the experts of other ranks."""

    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"


class ToolParser(enum.StrEnum):
    """Ways in which models write tool calls."""

    HERMES = "hermes"


def _check_memory(value: str) -> str:
    try:
        parse_bytes(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


@app.command()
def demo(
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Keep the checkpoint and the adapters in this new folder."),
    ] = None,
    max_steps: Annotated[int, typer.Option(hidden=True, min=1)] = 200,
    as_json: Json = False,
) -> None:
    """Train a tiny Qwen3-MoE and three PEFT adapters, then answer one mixed batch and check it."""
    from moegraft.cli.demo import run_demo
    from moegraft.cli.tables import show_demo

    result = run_demo(keep, max_steps=max_steps)
    print_json(result) if as_json else show_demo(result)
    if not result.is_exact:
        raise typer.Exit(1)


@app.command()
def generate(  # noqa: PLR0913  # one parameter an option
    model: ModelFolder,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter folder; may be given several times.")
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="One adapter (or base) for each prompt; default: each with all."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the tokenizer's chat template.")] = False,
    skip_unserved: Annotated[
        bool, typer.Option("--skip-unserved", help="Leave out what adapters have on modules that are not served.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    adapter_memory: Annotated[str, typer.Option(callback=_check_memory, help="For adapters on the device.")] = "2GiB",
    tp: TensorParallel = 1,
    ep: ExpertParallel = 1,
    fully_sharded: Annotated[
        bool, typer.Option("--fully-sharded", help="With --tp: adapters are shared out on both sides.")
    ] = False,
    data_parallel: Annotated[
        bool, typer.Option("--data-parallel", help="With --ep: every rank answers some of the prompts.")
    ] = False,
    dispatch: Annotated[Dispatch, typer.Option(help="With --data-parallel: how rows reach their experts.")] = (
        Dispatch.ALL_TO_ALL
    ),
    as_json: Json = False,
) -> None:
    """Answer prompts with the base model and with adapters, greedily, in one mixed batch."""
    from moegraft.cli.generate import GenerateRequest, generate_answers, make_parallel, parse_adapters
    from moegraft.cli.tables import show_answers

    request = GenerateRequest(
        model=model,
        prompts=tuple(prompt),
        adapters=parse_adapters(adapter or []),
        use=tuple(use.split(",")) if use is not None else None,
        max_new_tokens=max_new_tokens,
        raw=raw,
        skip_unserved=skip_unserved,
        dtype=dtype,
        device=device,
        adapter_memory=adapter_memory,
        parallel=make_parallel(
            tp=tp, ep=ep, fully_sharded=fully_sharded, data_parallel=data_parallel, dispatch=dispatch.value
        ),
    )
    answers = generate_answers(request)
    print_json(answers) if as_json else show_answers(answers)


@app.command()
def serve(  # noqa: PLR0913  # one parameter an option
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", exists=True, file_okay=False, help="Folder of a transformers checkpoint."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Train the demo's model and adapters first, and serve them.")] = (
        False
    ),
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter folder; may be given several times.")
    ] = None,
    adapters_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False, help="A folder of adapters, each loaded when first named."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name of the base model, beside its folder's; several.")
    ] = None,
    kv_memory: Annotated[str, typer.Option(callback=_check_memory, help="For keys and values.")] = "1GiB",
    adapter_memory: Annotated[str, typer.Option(callback=_check_memory, help="For adapters on the device.")] = "2GiB",
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Tokens of a prompt and its answer.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences in one step.")] = 128,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one step.")] = 2048,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same answer, whatever else runs.")
    ] = False,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Adapters may be loaded over HTTP from below this only; several."),
    ] = None,
    tool_parser: Annotated[
        ToolParser | None, typer.Option(help="How tool calls are written, where the tokenizer does not say.")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For running requests after a signal to stop.")] = 60.0,
    dtype: Dtype = "auto",
    device: Device = None,
    tp: TensorParallel = 1,
    ep: ExpertParallel = 1,
    data_parallel: Annotated[
        bool, typer.Option("--data-parallel", help="With --ep: attention and pages of a request on one rank.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="With --tp: transformers' plan, which cuts attention and vocabulary too.")
    ] = False,
) -> None:
    """An OpenAI-compatible server in which every request names its adapter. Keys: MOEGRAFT_API_KEY,
    MOEGRAFT_ADMIN_KEY."""
    from moegraft.cli.generate import make_parallel, parse_adapters
    from moegraft.cli.serve import ServeRequest, run_serve, server_options

    options = server_options(
        host=host,
        port=port,
        served_names=tuple(name or ()),
        adapter_roots=tuple(adapter_root or ()),
        tool_parser=None if tool_parser is None else tool_parser.value,
        drain_seconds=drain_seconds,
    )
    engine = {
        "kv_memory": kv_memory,
        "adapter_memory": adapter_memory,
        "max_model_len": max_model_len,
        "max_rows": max_rows,
        "chunk_tokens": chunk_tokens,
        "batch_invariant": batch_invariant,
    }
    run_serve(
        ServeRequest(
            model=model,
            is_demo=demo,
            adapters=dict(parse_adapters(adapter or [])),
            adapters_from=adapters_from,
            options=options,
            dtype=dtype,
            device=device,
            engine=engine,
            parallel=make_parallel(tp=tp, ep=ep, fully_sharded=False, data_parallel=data_parallel),
            plan=plan,
        )
    )


@app.command()
def chat(
    model: Annotated[str | None, typer.Option(help="An adapter, or the base model; default: the first listed.")] = None,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
) -> None:
    """Talk to a running server. Key: MOEGRAFT_API_KEY."""
    from moegraft.cli.chat import run_chat

    run_chat(url, model, max_tokens=max_tokens, temperature=temperature)


@app.command("inspect")
def inspect_(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter saved by PEFT.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", exists=True, file_okay=False, help="The base model; its weights are not read."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What is in an adapter, where it would be applied, and what is wrong with it (exit code 1)."""
    from moegraft.cli.tables import show_inspection
    from moegraft.lora.peft import inspect_peft_adapter

    targets = None
    with working("Reading the adapter"):
        if base is not None:
            from moegraft.cli.structure import base_targets

            targets = base_targets(base)
        inspection = inspect_peft_adapter(adapter, targets)
    print_json({**vars(inspection), "ok": inspection.ok}) if as_json else show_inspection(inspection, base)
    if not inspection.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    model: ModelFolder,
    dtype: Dtype = "auto",
    device: Device = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that would share every expert.")] = 1,
    ep: Annotated[int, typer.Option("--ep", min=1, help="Ranks that would share the experts out.")] = 1,
    vllm: Annotated[bool, typer.Option("--vllm", help="What the plug-in for vLLM would serve, and why not.")] = False,
    as_json: Json = False,
) -> None:
    """Which backend serves each layer of a model, and why every other does not. Reads no weights."""
    from moegraft.cli.structure import explain_in_vllm, explain_model
    from moegraft.cli.tables import show_explanation, show_plugin
    from moegraft.parallel import ParallelConfig

    if vllm:
        with working("Building the model's structure"):
            plugin = explain_in_vllm(model)
        print_json(plugin) if as_json else show_plugin(plugin)
        return
    with working("Building the model's structure"):
        explanation = explain_model(model, dtype=dtype, device=device, parallel=ParallelConfig(tp=tp, ep=ep))
    print_json(explanation) if as_json else show_explanation(explanation)


@app.command()
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="E,D,F,K", help="Experts, hidden size, their width, experts a token; several times."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", exists=True, file_okay=False, help="A checkpoint, for the shapes of its layers."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="T,...", help="Tokens of a call; default: the powers of two up to 4096.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters in the calls that are measured.")] = 16,
    adapters: Annotated[int, typer.Option(min=0, help="How many of them; 0: the base alone.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="The table; default: in the folder that is always read."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this long; start again to go on.")] = None,
    as_json: Json = False,
) -> None:
    """Search the kernels' tile sizes for layers on this GPU, and keep them as a table. Ctrl-C keeps what is done."""
    from moegraft.cli.tables import show_tuning
    from moegraft.cli.tune import make_request, run_tune

    request = make_request(
        shapes=shape or [],
        model=model,
        tokens=tokens,
        rank=rank,
        num_adapters=adapters,
        output=output,
        seconds=seconds,
    )
    results = run_tune(request)
    print_json(results) if as_json else show_tuning(results)
    if any(result.is_interrupted for result in results):
        raise typer.Exit(INTERRUPTED)
    if any(result.table is None for result in results):
        raise typer.Exit(1)

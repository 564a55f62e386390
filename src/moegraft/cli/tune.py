"""``moegraft tune``: tiles of experts layers, searched on this GPU and kept as a table."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moegraft.cli.console import CommandError, first_line, progress_bars
from moegraft.core.config import DeviceTarget, MoEConfig
from moegraft.tuner.compiler import TileCompiler
from moegraft.tuner.search import Journal, Measure, TileSearch, Trial, Verdict
from moegraft.tuner.timer import TileTimer, TunedLayer
from moegraft.tuning.table import USER_TABLES, check_writable, forget_tables, write_table
from moegraft.tuning.tiles import TuningShape

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""An octave apart: every call with up to 6800 tokens has an entry near enough."""

MakeMeasure = Callable[[TunedLayer], Measure]


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What to tune, and where the table goes (by default to the user's tables). ``seconds``: for all layers."""

    layers: tuple[TunedLayer, ...]
    tokens: tuple[int, ...] = TOKENS
    output: Path | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TunedEntry:
    """One token count. ``heuristic_us`` is None where the heuristic's tiles do not run."""

    num_tokens: int
    us: float
    heuristic_us: float | None


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """One layer. ``table`` is None where no tiles were measured; not ``is_complete``: start again to go on."""

    layer: str
    table: Path | None
    state: Path
    entries: tuple[TunedEntry, ...]
    measured: int
    wrong: int
    failed: int
    is_complete: bool
    is_interrupted: bool = False


def make_request(
    *,
    shapes: Sequence[str],
    model: Path | None,
    tokens: str | None,
    rank: int,
    num_adapters: int,
    output: Path | None,
    seconds: float | None,
) -> TuneRequest:
    """The command's options, checked. Raises CommandError, and UnsupportedModelError for the model."""
    if bool(shapes) == (model is not None):
        raise CommandError("expected either --shape or --model")
    if seconds is not None and math.isnan(seconds):
        raise CommandError("found --seconds nan, expected a number")
    counts = TOKENS if tokens is None else parse_numbers(tokens, "--tokens")
    if output is not None and output.suffix != ".json":
        raise CommandError(f"found --output {output}, expected a name that ends in .json: others are not read")
    layers = tuple(parse_layer(text, rank=rank, num_adapters=num_adapters) for text in dict.fromkeys(shapes))
    if model is not None:
        layers = model_layers(model, rank=rank, num_adapters=num_adapters)
    if output is not None and len(layers) > 1:
        names = " and ".join(map(layer_name, layers))
        raise CommandError(f"found one --output for the layers {names}, expected one layer or no --output")
    return TuneRequest(layers=layers, tokens=counts, output=output, seconds=seconds)


def parse_layer(text: str, *, rank: int, num_adapters: int) -> TunedLayer:
    """A layer from ``E,D,F,K``: SiLU with a gate, bfloat16. Raises CommandError."""
    sizes = parse_numbers(text, "--shape")
    if len(sizes) != 4 or sizes[3] > sizes[0]:
        raise CommandError(
            f"found --shape {text}, expected E,D,F,K: experts, hidden size, their width, experts a token (at most E)"
        )
    E, D, F, K = sizes
    config = MoEConfig(num_experts=E, hidden_size=D, intermediate_size=F, top_k=K, dtype=torch.bfloat16)
    return TunedLayer(config=config, rank=rank, num_adapters=num_adapters)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive whole numbers of at most nine digits between commas. Raises CommandError."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", part, re.ASCII) for part in parts):
        raise CommandError(f"found {option} {text}, expected positive whole numbers between commas")
    return tuple(map(int, parts))


def model_layers(folder: Path, *, rank: int, num_adapters: int) -> tuple[TunedLayer, ...]:
    """The distinct experts layers of a checkpoint, which is not loaded. Raises CommandError, UnsupportedModelError."""
    from moegraft.cli.structure import hollow_model
    from moegraft.integrations.transformers import is_quantised
    from moegraft.integrations.transformers.host.storage import HostExperts
    from moegraft.integrations.transformers.host.targets import discover_targets, experts_per_token

    if is_quantised(folder):
        raise CommandError(f"{folder} is quantised: tables are for unquantised layers, tiles of others follow rules")
    model = hollow_model(folder)
    layers: dict[TuningShape, TunedLayer] = {}
    for name, target in discover_targets(model).experts.items():
        host = HostExperts.of(model.get_submodule(name))
        dtype = torch.float16 if host.dtype(model) is torch.float16 else torch.bfloat16
        config = replace(host.config(experts_per_token(model), dtype), has_bias=False)
        layer = TunedLayer(config=config, is_transposed=target.is_transposed, is_interleaved=target.is_interleaved)
        layer = replace(layer, rank=rank, num_adapters=num_adapters)
        layers.setdefault(layer.shape(1), layer)
    return tuple(layers.values())


def gpu_measure(layer: TunedLayer) -> Measure:
    """Times on the current GPU. Raises CommandError where the layer does not fit into its memory."""
    try:
        return TileTimer(layer, device="cuda")
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{layer_name(layer)} does not fit into the GPU's memory: {first_line(error)}") from error


def check_gpu() -> str:
    """The name of the GPU. Raises CommandError where there is none, or no triton."""
    if not torch.cuda.is_available():
        raise CommandError("tiles are measured on a CUDA device, torch finds none")
    if not DeviceTarget.of(torch.device("cuda")).has_triton:
        raise CommandError("the kernels need triton: pip install triton")
    return torch.cuda.get_device_name()


def run_tune(
    request: TuneRequest, device: str | None = None, make_measure: MakeMeasure = gpu_measure
) -> list[TuneResult]:
    """Searches layer after layer; each table is written when its search ends, also where it is interrupted.

    ``device``: the name in the table; by default the current GPU's, for which kernels are compiled side by side.
    Raises CommandError, TileTableError for a file in the table's place, DeviceLostError.
    """
    if device is not None:
        return _tune_layers(request, device, make_measure, None)
    device = check_gpu()
    with TileCompiler() as compiler:
        return _tune_layers(request, device, make_measure, compiler)


def _tune_layers(
    request: TuneRequest, device: str, make_measure: MakeMeasure, compiler: TileCompiler | None
) -> list[TuneResult]:
    deadline = None if request.seconds is None else time.monotonic() + request.seconds
    outputs = [request.output or USER_TABLES / table_name(device, layer) for layer in request.layers]
    for layer, output in zip(request.layers, outputs, strict=True):
        check_writable(output, device, layer.shape(1))
    results: list[TuneResult] = []
    for layer, output in zip(request.layers, outputs, strict=True):
        _make_room(output)
        shapes = [layer.shape(num_tokens) for num_tokens in dict.fromkeys(request.tokens)]
        journal = Journal(state_path(output), json.dumps([device, versions(), str(layer)]))
        prepare = partial(compiler.compile, layer) if compiler is not None else lambda trials: None
        search = TileSearch(shapes, make_measure(layer), journal, prepare)
        results.append(_search_layer(search, layer, output, device, deadline))
        if results[-1].is_interrupted:
            break
    return results


def _make_room(output: Path) -> None:
    """Raises CommandError where neither table nor state could be written, before hours go into them."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        state_path(output).touch()
    except OSError as error:
        raise CommandError(f"{output} cannot be written: {error.strerror}") from error


def _search_layer(
    search: TileSearch, layer: TunedLayer, output: Path, device: str, deadline: float | None
) -> TuneResult:
    is_complete = is_interrupted = False
    try:
        is_complete = _run_with_bar(search, layer, deadline)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:  # also where the GPU was lost: what was measured is measured
        entries = search.entries()
        if entries:
            today = date.today().isoformat()
            shape = layer.shape(1)
            write_table(output, device=device, date=today, versions=versions(), shape=shape, entries=entries)
            forget_tables()
    counts = search.counts
    return TuneResult(
        layer=layer_name(layer),
        table=output if entries else None,
        state=state_path(output),
        entries=tuple(
            TunedEntry(num_tokens=entry["num_tokens"], us=entry["us"], heuristic_us=entry.get("heuristic_us"))
            for entry in entries
        ),
        measured=counts[Verdict.MEASURED],
        wrong=counts[Verdict.WRONG],
        failed=counts[Verdict.FAILED],
        is_complete=is_complete,
        is_interrupted=is_interrupted,
    )


def _run_with_bar(search: TileSearch, layer: TunedLayer, deadline: float | None) -> bool:
    best: dict[TuningShape, float] = {}
    with progress_bars() as bars:
        bar = bars.add_task(layer_name(layer), total=search.max_trials, note="")

        def on_trial(trial: Trial) -> None:
            best[trial.shape] = min(trial.us, best.get(trial.shape, trial.us))
            note = f"{trial.shape.num_tokens} tokens: {best[trial.shape]:.1f} us"
            bars.update(bar, advance=1, note=note)

        return search.run(on_trial=on_trial, is_over=lambda: deadline is not None and time.monotonic() > deadline)


def layer_name(layer: TunedLayer) -> str:
    """``E,D,F,K``, as ``--shape`` takes it."""
    config = layer.config
    return f"{config.num_experts},{config.hidden_size},{config.intermediate_size},{config.top_k}"


def table_name(device: str, layer: TunedLayer) -> str:
    """File name of a layer's table on a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{layer_name(layer).replace(',', '-')}.json"


def state_path(output: Path) -> Path:
    """Finished trials, beside the table; may be deleted once the search is complete."""
    return output.with_name(f"{output.name}.trials.jsonl")


def versions() -> dict[str, str]:
    """A digest of what decides a kernel's time."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "moegraft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found

"""``moegraft demo``: a checkpoint and three adapters from nothing, one mixed batch, and what it is worth."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from moegraft.cli.compare import Comparison, MixedBatch, compare
from moegraft.cli.console import CommandError, first_line, progress_bars
from moegraft.cli.corpus import FACTS, STYLES, Fact
from moegraft.cli.loading import encode_prompts, load_model, load_tokenizer, quiet_transformers
from moegraft.cli.train import save_adapter, save_base
from moegraft.integrations.transformers import GraftedModel, attach

ASKED = ("france", "cat", "snow", "kenya")
NAMES = (None, *STYLES)
MAX_NEW_TOKENS = 32
SPEED_ROUNDS = 3
SPEED_REPEATS = 8  # of the batch, so that a step is more than its fixed cost


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the mixed batch. ``expected``: what the adapter (None: the base) was trained to say."""

    question: str
    adapter: str | None
    answer: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One adapter as it was loaded. ``ranks``: those that occur in it · ``num_bytes`` of its factors."""

    modules: int
    tensors: int
    num_bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Generated tokens per second of the same batch with and without adapters; medians."""

    rows: int
    new_tokens: int
    base: float
    mixed: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All that the demo shows. ``kept_in``: the folder of ``--keep``."""

    rows: tuple[Row, ...]
    comparison: Comparison
    speed: Speed
    seconds: float
    parameters: int
    facts: int
    adapters: dict[str, Loaded]
    kept_in: str | None
    is_exact: bool


def run_demo(keep: Path | None, *, max_steps: int) -> DemoResult:
    """Trains, saves, loads back, answers, compares and measures; on the CPU, with one thread."""
    if keep is not None:
        _make_empty(keep)
    quiet_transformers()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, progress_bars() as bars, _one_thread():
        folder = Path(temporary) if keep is None else keep
        _train_all(folder, max_steps, bars)
        tokenizer, graft, loaded = _load_all(folder)
        batch, rows = _answer(graft, tokenizer)
        task = bars.add_task("Each row alone, and in PEFT", total=len(rows), note="")
        comparison = compare(graft, batch, folder, lambda: bars.advance(task))
        speed = _measure(graft, batch, bars)
    return DemoResult(
        rows=rows,
        comparison=comparison,
        speed=speed,
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in graft.model.parameters()),
        facts=len(FACTS),
        adapters=loaded,
        kept_in=str(keep) if keep is not None else None,
        is_exact=comparison.is_exact,
    )


def make_demo(folder: Path, *, max_steps: int) -> None:
    """Trains and saves the demo's checkpoint (``base``) and adapters into a folder."""
    with progress_bars() as bars, _one_thread(), _saving(folder):
        _train_all(folder, max_steps, bars)


def _make_empty(folder: Path) -> None:
    """Raises CommandError before a minute goes into what could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_used = any(folder.iterdir())
    except OSError as error:
        raise CommandError(f"--keep {folder}: {error.strerror}") from error
    if is_used:
        raise CommandError(f"--keep {folder}: the folder is not empty")


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """A full disk is told by transformers as by the system, by safetensors in an error of its own."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise CommandError(f"{folder} cannot be written: {first_line(error)}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than products of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_all(folder: Path, max_steps: int, bars: Progress) -> None:
    tasks = {
        name: bars.add_task(f"Training {what}", total=max_steps, note="", start=False)
        for name, what in (("base", "the base model"), *((name, f"adapter {name} (PEFT)") for name in STYLES))
    }

    def train(name: str) -> None:
        task = tasks[name]
        bars.start_task(task)

        def on_step(loss: float) -> None:
            bars.update(task, advance=1, note=f"loss {loss:.3f}")

        base = folder / "base"
        with _saving(folder / name):
            if name == "base":
                training = save_base(base, max_steps=max_steps, on_step=on_step)
            else:
                tokenizer = load_tokenizer(base)
                training = save_adapter(name, base, folder / name, tokenizer, max_steps=max_steps, on_step=on_step)
        bars.update(task, total=training.steps)

    for name in tasks:
        train(name)


def _load_all(folder: Path) -> tuple[PreTrainedTokenizerBase, GraftedModel, dict[str, Loaded]]:
    graft = attach(load_model(folder / "base", device="cpu"), adapter_memory="64MiB")
    loaded = {}
    for name in STYLES:
        report = graft.load_adapter(folder / name, name=name)
        info = graft.adapters[name]
        loaded[name] = Loaded(
            modules=len(info.modules),
            tensors=report.tensors_applied,
            num_bytes=info.num_bytes,
            ranks=tuple(sorted(set(info.ranks.values()))),
        )
    return load_tokenizer(folder / "base"), graft, loaded


def _asked() -> list[tuple[Fact, str | None]]:
    facts = [fact for word in ASKED for fact in FACTS if word in fact.question]
    return [(fact, name) for fact in facts for name in NAMES]


def _answer(graft: GraftedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[MixedBatch, tuple[Row, ...]]:
    """The mixed batch with what was generated for it, and its rows as text."""
    asked = _asked()
    names = tuple(name for _, name in asked)
    questions = encode_prompts(tokenizer, [fact.question for fact, _ in asked])
    ids = graft.generate(**questions, adapters=names, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    batch = MixedBatch(
        names=names,
        prompt_ids=questions["input_ids"],
        prompt_mask=questions["attention_mask"],
        ids=ids,
        pad=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, questions["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = tuple(
        Row(
            question=fact.question,
            adapter=name,
            answer=text,
            expected=fact.plain if name is None else STYLES[name](fact),
        )
        for (fact, name), text in zip(asked, texts, strict=True)
    )
    return batch, rows


def _measure(graft: GraftedModel, batch: MixedBatch, bars: Progress) -> Speed:
    """Both ways in turn, so that whatever else the machine does meets both; every row runs to the last token."""
    names = list(batch.names) * SPEED_REPEATS
    inputs = {
        "input_ids": batch.prompt_ids.repeat(SPEED_REPEATS, 1),
        "attention_mask": batch.prompt_mask.repeat(SPEED_REPEATS, 1),
        "min_new_tokens": MAX_NEW_TOKENS,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    new_tokens = len(names) * MAX_NEW_TOKENS
    ways: dict[str, list[str | None]] = {"base": [None] * len(names), "mixed": names}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    task = bars.add_task("Measuring tokens/s", total=2 * SPEED_ROUNDS, note="")
    for _ in range(SPEED_ROUNDS):
        for way, adapters in ways.items():
            start = time.perf_counter()
            graft.generate(**inputs, adapters=adapters, do_sample=False)
            speeds[way].append(new_tokens / (time.perf_counter() - start))
            bars.advance(task)
    medians = {way: statistics.median(found) for way, found in speeds.items()}
    return Speed(rows=len(names), new_tokens=new_tokens, base=medians["base"], mixed=medians["mixed"])

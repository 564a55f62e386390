"""``moegraft generate``: prompts times adapters as one mixed batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from moegraft.cli.console import CommandError, progress_bars, stderr
from moegraft.cli.launch import run_on_ranks
from moegraft.cli.loading import encode_prompts, load_model, load_tokenizer, quiet_transformers, resolve_device
from moegraft.integrations.transformers import attach, init_parallel
from moegraft.parallel import ParallelConfig
from moegraft.parallel.groups import Dispatch

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The options. ``use``: one adapter name or ``base`` for each prompt; None: each prompt with base and with all.

    ``parallel``: ranks that share the model's experts.
    """

    model: Path
    prompts: tuple[str, ...]
    adapters: Mapping[str, Path]
    use: tuple[str, ...] | None
    max_new_tokens: int
    raw: bool
    dtype: str
    device: str | None
    adapter_memory: str
    skip_unserved: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row of the batch; ``adapter`` is None for the base model."""

    prompt: str
    adapter: str | None
    text: str
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The batch. ``seconds``: of generation alone."""

    rows: tuple[Answer, ...]
    seconds: float
    tokens_per_second: float


def parse_adapters(options: Sequence[str]) -> dict[str, Path]:
    """``name=path`` each. Raises CommandError."""
    adapters: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise CommandError(f"found --adapter {option}, expected NAME=PATH")
        if name == BASE or "," in name or name in adapters:
            raise CommandError(f"found --adapter {option}: a name is used once, has no comma and is not {BASE!r}")
        adapters[name] = Path(path)
    return adapters


def make_parallel(
    *, tp: int, ep: int, fully_sharded: bool, data_parallel: bool, dispatch: Dispatch = "all_to_all"
) -> ParallelConfig:
    """Raises CommandError for options that ask for nothing."""
    if fully_sharded and tp == 1:
        raise CommandError("found --fully-sharded without --tp, expected --tp of at least 2")
    if data_parallel and ep == 1:
        raise CommandError("found --data-parallel without --ep, expected --ep of at least 2")
    return ParallelConfig(tp=tp, ep=ep, fully_sharded=fully_sharded, data_parallel=data_parallel, dispatch=dispatch)


def pair_rows(request: GenerateRequest) -> list[tuple[str, str | None]]:
    """(prompt, adapter) of each row. Raises CommandError."""
    if request.use is None:
        return [(prompt, name) for prompt in request.prompts for name in (None, *request.adapters)]
    known = ", ".join([BASE, *request.adapters])
    if len(request.use) != len(request.prompts):
        raise CommandError(f"--use has {len(request.use)} names for {len(request.prompts)} prompts; known: {known}")
    unknown = [name for name in request.use if name not in (BASE, *request.adapters)]
    if unknown:
        raise CommandError(f"--use names {unknown[0]!r}, which no --adapter gives; known: {known}")
    names = [None if name == BASE else name for name in request.use]
    return list(zip(request.prompts, names, strict=True))


class _Steps(BaseStreamer):
    """Moves a bar at each decoding step."""

    def __init__(self, on_step: Callable[[], object]) -> None:
        self._on_step = on_step
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called once with the prompts, then with the new tokens of each step."""
        if self._has_prompt:
            self._on_step()
        self._has_prompt = True

    def end(self) -> None:
        """Called after the last step."""


def generate_answers(request: GenerateRequest) -> Answers:
    """Loads, attaches and generates greedily, on ranks of its own where there are several. Raises MoegraftError."""
    rows, size = pair_rows(request), request.parallel.world_size
    if size == 1:
        return _answer_rows(request, rows, None)
    return run_on_ranks(_answer_on_rank, request, size=size, device=resolve_device(request.device))


def _answer_on_rank(request: GenerateRequest, rank: int) -> Answers:
    """All answers, on every rank; with data parallelism, each rank has generated some of them."""
    rows, config = pair_rows(request), request.parallel
    device = init_parallel(resolve_device(request.device))
    if not config.data_parallel:
        return _answer_rows(request, rows, device)
    place = config.ep_rank_of(rank)
    mine = rows[place :: config.ep]
    # A rank without rows still has experts for those of others.
    found = _answer_rows(request, mine or [(rows[0][0], None)], device)
    gathered: list[Answers] = [found] * config.world_size
    dist.all_gather_object(gathered, found)
    answers = [gathered[index % config.ep * config.tp].rows[index // config.ep] for index in range(len(rows))]
    total = sum(answer.new_tokens for answer in answers)
    return Answers(rows=tuple(answers), seconds=found.seconds, tokens_per_second=total / found.seconds)


def _answer_rows(
    request: GenerateRequest, rows: Sequence[tuple[str, str | None]], device: torch.device | None
) -> Answers:
    """``device``: of this rank, which reads the model on the host and keeps a slice of it; None: one process."""
    quiet_transformers(keep_bars=not stderr.quiet)
    model = load_model(request.model, dtype=request.dtype, device=request.device if device is None else "cpu")
    tokenizer = load_tokenizer(request.model)
    batch = encode_prompts(tokenizer, [prompt for prompt, _ in rows], raw=request.raw)
    batch = {key: tensor.to(device or model.device) for key, tensor in batch.items()}
    parallel = None if device is None else request.parallel
    memory = request.adapter_memory
    with attach(model, adapter_memory=memory, parallel=parallel, device=device) as graft, progress_bars() as bars:
        task = bars.add_task("Loading adapters", total=len(request.adapters), note="", visible=bool(request.adapters))
        for name, path in request.adapters.items():
            report = graft.load_adapter(path, name=name, skip_unserved=request.skip_unserved)
            if report.left_out:
                found = f"{len(report.left_out)} modules that are not served, such as {next(iter(report.left_out))}"
                stderr.print(f"{name}: {found}, were left out", markup=False, highlight=False, soft_wrap=True)
            bars.advance(task)
        task = bars.add_task("Generating", total=request.max_new_tokens, note="steps")
        start = time.perf_counter()
        ids = graft.generate(
            **batch,
            adapters=[name for _, name in rows],
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            streamer=_Steps(lambda: bars.advance(task)),
        )
        new_ids = ids[:, batch["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
        bars.update(task, total=len(new_ids[0]), completed=len(new_ids[0]))  # all rows may have ended early
    answers = tuple(_answer(tokenizer, prompt, name, ids) for (prompt, name), ids in zip(rows, new_ids, strict=True))
    total = sum(answer.new_tokens for answer in answers)
    return Answers(rows=answers, seconds=seconds, tokens_per_second=total / seconds)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: str, adapter: str | None, new_ids: list[int]) -> Answer:
    """A row without what fills it up behind its end."""
    while new_ids and new_ids[-1] == tokenizer.pad_token_id:
        new_ids = new_ids[:-1]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return Answer(prompt=prompt, adapter=adapter, text=text, new_tokens=len(new_ids))

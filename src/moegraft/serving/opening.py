"""From a model to a runner with its pages: the same on every rank of an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moegraft.core.errors import ParallelError, UnsupportedModelError
from moegraft.core.memory import format_bytes, parse_bytes
from moegraft.integrations.transformers import GraftedModel, attach
from moegraft.parallel import Agreement, ParallelConfig
from moegraft.serving.config import EngineConfig
from moegraft.serving.kv_pool import bytes_per_page
from moegraft.serving.loading import load_model, load_planned
from moegraft.serving.ranks import Channel, Follower, RankRunner
from moegraft.serving.runner import Runner, longest_context

logger = logging.getLogger("moegraft.serving")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every rank of an engine is given: a checkpoint's folder or a model, and how the ranks share it.

    ``plan``: transformers' own tensor-parallel plan cuts the model, attention and vocabulary included.
    """

    model: str | os.PathLike[str] | PreTrainedModel
    config: EngineConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: bool = False
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        parallel = self.parallel
        if self.plan and (parallel.ep > 1 or parallel.tp == 1 or parallel.fully_sharded):
            raise ValueError("plan: transformers' plan needs tp of at least 2, and nothing else of parallel=")
        if parallel.data_parallel and parallel.ep == 1:
            raise ValueError("data_parallel: found ep=1, expected at least 2: these ranks bring rows of their own")
        if self.size > 1 and self.config.batch_invariant:
            raise ValueError("batch_invariant is not served over several ranks: their sums are no experts class's")

    @property
    def size(self) -> int:
        return self.parallel.world_size

    @property
    def target(self) -> torch.device:
        """The kind of device; of CUDA, this rank's own GPU is the current one."""
        if isinstance(self.model, PreTrainedModel) and self.device is None:
            return self.model.device
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """``max_model_len``: tokens of a sequence · ``channel``: between the ranks, None where there is one."""

    graft: GraftedModel
    runner: Runner
    num_pages: int
    max_rows: int
    max_model_len: int
    channel: Channel | None


def open_model(setup: Setup, names: Callable[[int], str], keep: Callable[[Callable[[], object]], object]) -> Opened:
    """Collective where there are several ranks. ``names``: lane -> the bank's name of an adapter · ``keep``: is given
    what closes each thing, as it is opened.

    Raises UnsupportedModelError, CheckpointError, NoBackendError or ParallelError.
    """
    config = setup.config
    graft = _attach(setup)
    keep(partial(graft.detach, force=setup.size > 1))
    groups = graft.layout.groups
    channel = Channel(groups) if setup.size > 1 else None
    where = f"rank {groups.rank} of {setup.size}"
    logger.info("%s: the model is attached", where)
    if setup.size > 1:
        groups.warm_up(graft.bank.pool.data.device)
        logger.info("%s: the groups are connected", where)
    sizes = config.batch_sizes
    if config.batch_invariant:
        sizes = (max(config.chunk_tokens, *sizes),) if sizes else (config.chunk_tokens,)
    runner = (Runner if channel is None else RankRunner)(
        graft,
        names=names,
        batch_sizes=sizes,
        max_rows=config.max_rows,
        row_by_row=config.batch_invariant,
        latent_cache=config.latent_cache,
    )
    keep(runner.close)
    logger.info("%s: the model has run", where)
    longest = longest_context(graft.model, runner.shapes)
    with Agreement(groups.control).step([0, 0]) as step:
        step.same("the options of their engine", lambda: config)
        slots = _num_slots(config, runner)
        step.words[:] = slots, _num_pages(config, runner, longest, slots)
    max_rows, num_pages = (min(words[i] for words in step.told) for i in range(2))
    max_model_len = min(config.max_model_len or longest, (num_pages - 1) * config.page_size)
    runner.open_pool(num_pages, config.page_size, max_rows)
    logger.info("%s: %d pages are open, and right", where, num_pages)
    # Captured decode steps have sizes of their own: a request's bits would follow how many others run.
    # Experts in torch's own operations copy their plan from the host, which no graph may capture.
    is_capturable = runner.states is None and all(choice.backend != "TorchExperts" for choice in graft.explain())
    # Rows that travel are counted on the host first; a plan of transformers gathers as it likes.
    is_capturable = is_capturable and not setup.parallel.data_parallel and not setup.plan
    if config.cuda_graphs and is_capturable and not config.batch_invariant and runner.device.type == "cuda":
        runner.open_graphs(max_model_len, config.chunk_tokens)
    return Opened(
        graft=graft,
        runner=runner,
        num_pages=num_pages,
        max_rows=max_rows,
        max_model_len=max_model_len,
        channel=channel,
    )


def follow(setup: Setup) -> None:
    """The life of a rank from 1 on: it opens the model together with rank 0, and runs its steps until that closes."""
    keys: dict[int, str] = {}
    opened = open_model(setup, keys.__getitem__, lambda close: None)
    assert opened.channel is not None and isinstance(opened.runner, RankRunner)
    Follower(opened.graft, opened.runner, opened.channel, keys).run()
    opened.runner.close()
    opened.graft.detach()


def follow_rank(setup: Setup, rank: int) -> None:
    """``follow`` in a process that the engine has started."""
    if setup.target.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // setup.size))
    follow(setup)


def _attach(setup: Setup) -> GraftedModel:
    config, model = setup.config, setup.model
    options: dict[str, Any] = {
        "adapter_memory": config.adapter_memory,
        "max_adapters": config.max_adapters,
        "backend": config.backend,
        "batch_invariant": config.batch_invariant,
    }
    if setup.size > 1 and not dist.is_initialized():
        raise ParallelError(f"{setup.size} ranks share a model that is in memory: start them with torchrun")
    if setup.size > 1 and not setup.plan:
        device = setup.target
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        options |= {"parallel": setup.parallel, "device": device}
    if isinstance(model, PreTrainedModel):
        return attach(model, **options)
    if setup.plan:
        return attach(load_planned(Path(model), dtype=setup.dtype, size=setup.size), **options)
    # Where there are several ranks, each loads the whole model on the host, and moves its slice.
    return attach(load_model(model, dtype=setup.dtype, device="cpu" if setup.size > 1 else setup.device), **options)


def _num_slots(config: EngineConfig, runner: Runner) -> int:
    """Sequences that run at once: ``max_rows``, or as many as have room for their states in half of the memory."""
    if runner.states is None:
        return config.max_rows
    memory, slot_bytes = parse_bytes(config.kv_memory), runner.states.bytes_per_slot
    slots = min(config.max_rows, memory // 2 // slot_bytes - 1)  # one is scratch
    if slots < 1:
        raise UnsupportedModelError(
            f"kv_memory is {format_bytes(memory)}, expected at least {format_bytes(4 * slot_bytes)}: recurrent layers "
            f"keep {format_bytes(slot_bytes)} a sequence"
        )
    return slots


def _num_pages(config: EngineConfig, runner: Runner, longest: int, max_rows: int) -> int:
    """Pages that the memory has room for, scratch included, and no more than all rows at full length could fill."""
    page_bytes = bytes_per_page(runner.shapes, config.page_size)
    memory = parse_bytes(config.kv_memory)
    if runner.states is not None:
        memory -= (max_rows + 1) * runner.states.bytes_per_slot
    if memory // page_bytes < 2:
        raise UnsupportedModelError(
            f"kv_memory leaves {format_bytes(memory)} for pages, expected room for at least 2 pages of "
            f"{config.page_size} tokens, each of {format_bytes(page_bytes)}"
        )
    pages_a_row = -(-min(config.max_model_len or longest, longest) // config.page_size)
    return min(memory // page_bytes, 1 + max_rows * pages_a_row)

"""Compiling the kernels of trials in parallel processes: they fill Triton's cache on disk for the one that measures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from types import TracebackType

import torch

from moegraft.kernels.records import MoEWeights
from moegraft.tuner.timer import Batch, TunedLayer, empty_bank, empty_weights, random_batch, run_batch
from moegraft.tuning.tiles import MoETiles, TuningShape

_CONTEXT_BYTES = 1 << 30
"""Bytes of device memory for a process and what one call needs beside the layer."""


class TileCompiler:
    """A ``tuner.search.Prepare`` for one layer after the other. Processes start with the first trials.

    They run the trials once, on memory of any content. Tiles that do not compile fail again, with their reason, in
    the process that measures.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def compile(self, layer: TunedLayer, trials: Sequence[tuple[TuningShape, MoETiles]]) -> None:
        """Returns when the kernels of all trials are in the cache, as far as they compile."""
        count = processes_for(layer) if self._num_processes is None else self._num_processes
        if count < 2 or len(trials) < 2:
            return
        if self._pool is None:
            # Spawned: CUDA does not survive a fork.
            self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
        try:
            list(self._pool.map(_compile, [(layer, shape, tiles) for shape, tiles in trials]))
        except BrokenProcessPool:  # memory ran out: go on with what one process compiles
            self._num_processes = 0

    def __enter__(self) -> TileCompiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def processes_for(layer: TunedLayer) -> int:
    """As many as there are processors to spare, and room for the layer in the GPU's free memory."""
    weights_bytes = 3 * layer.config.num_experts * layer.config.hidden_size * layer.config.intermediate_size * 2
    lora_bytes = 5 * layer.rank * layer.num_adapters * layer.config.num_experts * layer.config.hidden_size * 2
    free_bytes, _ = torch.cuda.mem_get_info()
    return min(len(os.sched_getaffinity(0)) - 1, free_bytes // (weights_bytes + lora_bytes + _CONTEXT_BYTES))


def _compile(trial: tuple[TunedLayer, TuningShape, MoETiles]) -> None:
    layer, shape, tiles = trial
    with contextlib.suppress(Exception):
        weights, make_batch = _dry_layer(layer)
        run_batch(weights, make_batch(shape.num_tokens), tiles)
        torch.cuda.synchronize()


@lru_cache(maxsize=1)
def _dry_layer(layer: TunedLayer) -> tuple[MoEWeights, Callable[[int], Batch]]:
    """(weights, batch of some tokens). Which kernels there are depends on no number in weights or adapters."""
    device = torch.device("cuda")
    bank = empty_bank(layer, device)
    return empty_weights(layer, device), lru_cache(maxsize=4)(
        lambda num_tokens: random_batch(layer, bank, num_tokens, device)
    )

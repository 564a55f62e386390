"""The side of a GraftedModel that deals with other ranks. With one process nothing is ever sent."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from moegraft.core.errors import BatchError, MoegraftError, ParallelError
from moegraft.integrations.transformers.generation import check_generation
from moegraft.integrations.transformers.parallel.layout import RankLayout
from moegraft.integrations.transformers.sites.call import batch_rows
from moegraft.lora.bank import AdapterBatch
from moegraft.lora.collective_bank import CollectiveBank, GroupBatch
from moegraft.parallel import Agreement, ParallelConfig, backend_of

INPUTS = ("inputs", "input_ids", "inputs_embeds")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131
"""2^64 over the golden ratio, as an int64: multiples of it spread over all bits."""


def init_parallel(
    device: torch.device | str | None = None, *, timeout_seconds: float = ParallelConfig().timeout_seconds
) -> torch.device:
    """Joins the world that torchrun started (``env://``) and gives this rank's device; a world that is there is kept.

    ``device``: "cpu" or "cuda", by default the GPUs where there are any. Ranks on GPUs talk over NCCL, rank r of a
    machine has its GPU r; ranks on the CPU talk over gloo. ``timeout_seconds``: of what transformers itself sends, as
    between two tokens of ``generate``, and under its plans; ``ParallelConfig.timeout_seconds`` is of what moegraft
    sends. Raises ParallelError where no launcher has started the process.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                backend_of(kind),
                init_method="env://",
                timeout=timedelta(seconds=timeout_seconds),
            )
        except (ValueError, RuntimeError) as error:
            raise ParallelError(
                f"no world to join ({str(error).splitlines()[0]}); start the processes with torchrun --nproc-per-node N"
            ) from error
    if kind != "cuda":
        return torch.device(kind)
    mine = torch.device("cuda", dist.get_node_local_rank(fallback_rank=dist.get_rank() % torch.cuda.device_count()))
    torch.cuda.set_device(mine)
    return mine


class RankCalls:
    """The calls of this rank: with other ranks, together with them or not at all.

    ``vocab_size``: token ids are below it, where that is known.
    """

    def __init__(self, adapters: CollectiveBank, layout: RankLayout, *, vocab_size: int | None = None) -> None:
        self.adapters = adapters
        self.layout = layout
        self.vocab_size = vocab_size
        self._agreement = Agreement(layout.groups.world, layout.groups.sharing)
        self._calling = threading.RLock()
        self._is_alone = not layout.is_parallel

    @contextmanager
    def acquire(
        self, names: Sequence[str | None], agreed: Sequence[str | None] | None = None
    ) -> Iterator[tuple[AdapterBatch, GroupBatch | None]]:
        """The adapters of this rank's rows and, where experts see rows of other ranks, those of all ranks' rows.

        ``agreed``: the latter, where the caller has agreed on them with the other ranks.
        """
        if self._is_alone or (agreed is not None and not self.layout.rows_travel):
            with self.adapters.bank.acquire(names) as batch:
                yield batch, None
        else:
            group = self.adapters.acquire(names) if agreed is None else self.adapters.acquire_agreed(names, agreed)
            with group:
                yield group.own, group if self.layout.rows_travel else None

    @contextmanager
    def refusing(self, *, names_given: bool) -> Iterator[None]:
        """Around checks of this rank's batch alone: where one raises, the ranks that go on to ``acquire`` raise too."""
        try:
            yield
        except Exception as error:
            if self.layout.is_parallel and (names_given or self.layout.rows_travel):
                self.adapters.refuse(error)
            raise

    @contextmanager
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Sequence[object] | None) -> Iterator[None]:
        """Around a call of the model; collective.

        Raises BatchError, on all ranks, where ranks that share their rows were given different ones, for token ids
        beyond the vocabulary, and for a batch without rows, which transformers cannot run: a rank without requests must
        take part. On this rank alone where another of its threads is in such a call.
        """
        if self._is_alone:
            yield
            return
        with self._one_thread():
            with self._agreement.step() as step:
                self._check_inputs(args, kwargs)
                step.same("their inputs", lambda: _inputs(args, kwargs, adapters), error=BatchError, sharing=True)
            yield

    @contextmanager
    def generation(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        adapters: Sequence[object] | None,
        defaults: GenerationConfig | None,
    ) -> Iterator[dict[str, Any]]:
        """Around ``generate``: gives the options under which ranks stay in step; collective.

        Raises BatchError as ``call``, for options that are not served with adapters, and where ranks that share their
        rows would sample different tokens; ParallelError where a rank is lost between two tokens.
        """
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
        samples = bool(kwargs.get("do_sample", getattr(given, "do_sample", False)))

        with self._one_thread():
            with self._agreement.step() as step:
                check_generation(args, kwargs, defaults)
                self._check_inputs(args, kwargs)
                step.same("their inputs", lambda: _inputs(args, kwargs, adapters), error=BatchError, sharing=True)
                if samples:
                    device = self.adapters.bank.pool.data.device
                    step.same(
                        "their random states (call torch.manual_seed with one seed on all of them before sampling)",
                        lambda: zlib.crc32(_random_state(device).numpy().tobytes()),
                        error=BatchError,
                        sharing=True,
                    )
            if not self.layout.rows_travel:
                yield kwargs
                return
            try:
                # A rank whose rows have ended runs on for the others, whose rows need its experts.
                yield {"synced_gpus": True, **kwargs}
            except RuntimeError as error:
                if isinstance(error, MoegraftError | torch.OutOfMemoryError):
                    raise
                # transformers asks over torch's own group whether all ranks are done.
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ParallelError(f"rank {self.layout.groups.rank}: generate failed: {first}") from error

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What would fail on this rank alone, in the middle of the forward pass, while others wait for it."""
        if not self.layout.is_parallel:
            return
        if self.layout.rows_travel and batch_rows(args, kwargs, INPUTS) == 0:
            raise BatchError("every rank needs a row: give a rank without requests one of the base model")
        for ids in (*args[:1], *(kwargs.get(name) for name in INPUTS)):
            if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.numel() and self.vocab_size:
                least, most = (int(bound) for bound in torch.aminmax(ids))
                if least < 0 or most >= self.vocab_size:
                    raise BatchError(f"token ids from {least} to {most}, the vocabulary has {self.vocab_size}")

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """The calls of all ranks meet in their order, and threads have none."""
        if not self.layout.is_parallel:
            yield
            return
        if not self._calling.acquire(blocking=False):
            raise BatchError("another thread is calling the model: with several ranks, call it from one at a time")
        try:
            yield
        finally:
            self._calling.release()


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Sequence[object] | None) -> object:
    """What the calls of ranks that share their rows must have alike: tensors, numbers and words, and whether there are
    adapters, of which the bank compares the names."""
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in sorted(given.items()) if isinstance(value, bool | int | float | str)}
    shapes = [(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]
    return shapes, _checksums(list(tensors.values())), plain, adapters is None


def _checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Checksums of the bits of each, in their order; one wait for the device."""
    sums = []
    for x in tensors:
        bits = x.detach().contiguous().view(_BITS[x.dtype.itemsize]).reshape(-1).long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        sums.append(((bits + 1) * (places * _ODD)).sum())
    return torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

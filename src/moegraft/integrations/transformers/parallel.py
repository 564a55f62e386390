"""The side of a GraftedModel that deals with other ranks. With one process nothing is ever sent."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from moegraft.core.errors import AdapterMismatchError, BatchError, MoegraftError, ParallelError
from moegraft.integrations.transformers.generation import batch_rows, check_generation
from moegraft.integrations.transformers.parallel_layout import RankLayout, in_words
from moegraft.lora.bank import AdapterBank, AdapterBatch
from moegraft.lora.collective_bank import CollectiveBank, GroupBatch
from moegraft.lora.peft import LoadReport, load_peft_adapter
from moegraft.lora.peft.loader import adapter_digest
from moegraft.lora.targets import AdapterWeights, ModelTargets
from moegraft.parallel import ParallelConfig, backend_of

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


class RankAdapters:
    """Loads, unloads and holds the adapters of this rank: with other ranks, together with them or not at all."""

    def __init__(
        self, bank: AdapterBank, targets: ModelTargets, layout: RankLayout, *, lora_experts: bool = True
    ) -> None:
        """``lora_experts``: whether adapters may touch experts."""
        self.bank = bank
        self.lora_experts = lora_experts
        self.targets = targets
        self.layout = layout
        self._collective = CollectiveBank(bank, layout.groups) if layout.is_parallel else None
        self._calling = threading.RLock()

    def load(self, path: str | os.PathLike[str], name: str, enter: Callable[[AdapterWeights], object]) -> LoadReport:
        """Reads this rank's slice of an adapter; ``enter`` puts it into the bank. Raises AdapterError."""

        def read() -> tuple[AdapterWeights, LoadReport]:
            weights, report = load_peft_adapter(
                path,
                self.targets,
                dtype=self.bank.layout.dtype,
                name=name,
                rank_slice=self.layout.mine,
                max_bytes=self.bank.pool.capacity_bytes,
            )
            self.layout.check_adapter(weights)
            if weights.experts and not self.lora_experts:
                raise AdapterMismatchError(
                    f"adapter {name!r} has LoRA on experts ({min(weights.experts)}), of which "
                    "attach(lora_experts=False) said that there would be none; attach without it"
                )
            return weights, report

        if self._collective is not None:
            return self._collective.load(name, read, digest=lambda: adapter_digest(path), install=enter)
        weights, report = read()
        enter(weights)
        return report

    def unload(self, name: str) -> None:
        """Raises UnknownAdapterError or AdapterInUseError."""
        (self._collective or self.bank).unload(name)

    @contextmanager
    def acquire(self, names: Sequence[str | None]) -> Iterator[tuple[AdapterBatch, GroupBatch | None]]:
        """The adapters of this rank's rows and, where experts see rows of other ranks, those of all ranks' rows."""
        if self._collective is None:
            with self.bank.acquire(names) as batch:
                yield batch, None
        else:
            with self._collective.acquire(names) as group:
                yield group.own, group if self.layout.rows_travel else None

    def pin(self, name: str) -> None:
        """Raises UnknownAdapterError or AdapterMemoryError."""
        (self._collective or self.bank).pin(name)

    @contextmanager
    def refusing(self, *, names_given: bool) -> Iterator[None]:
        """Around checks of this rank's batch alone: where one raises, the ranks that go on to ``acquire`` raise too."""
        try:
            yield
        except MoegraftError as error:
            if self._collective is not None and (names_given or self.layout.rows_travel):
                self._collective.refuse(error)
            raise

    @contextmanager
    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Sequence[str | None] | None
    ) -> Iterator[None]:
        """Around a call of the model; collective.

        Raises BatchError, on all ranks, where ranks that share their rows were given different ones, and for a batch
        without rows, which transformers cannot run: a rank without requests must take part. On this rank alone where
        another of its threads is in such a call.
        """
        with self._one_thread():
            self._agree(lambda: self._check_rows(args, kwargs), inputs=lambda: _inputs(args, kwargs, adapters))
            yield

    @contextmanager
    def generation(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        adapters: Sequence[str | None] | None,
        defaults: GenerationConfig | None,
    ) -> Iterator[dict[str, Any]]:
        """Around ``generate``: gives the options under which ranks stay in step; collective.

        Raises BatchError as ``call``, for options that are not served with adapters, and where ranks that share their
        rows would sample different tokens; ParallelError where a rank is lost between two tokens.
        """
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
        samples = bool(kwargs.get("do_sample", getattr(given, "do_sample", False)))

        def check() -> None:
            check_generation(args, kwargs, defaults)
            self._check_rows(args, kwargs)

        with self._one_thread():
            device = self.bank.pool.data.device
            self._agree(
                check,
                inputs=lambda: _inputs(args, kwargs, adapters),
                random_state=(lambda: _random_state(device).numpy().tobytes()) if samples else lambda: b"",
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

    def _check_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.layout.rows_travel and batch_rows(args, kwargs, INPUTS) == 0:
            raise BatchError("every rank needs a row: give a rank without requests one of the base model")

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

    def _agree(
        self,
        check: Callable[[], None],
        *,
        inputs: Callable[[], object],
        random_state: Callable[[], object] = lambda: b"",
    ) -> None:
        """``check`` on every rank: where it raises on one, all raise. Then ranks that share their rows compare."""
        if not self.layout.is_parallel:
            check()
            return
        groups = self.layout.groups
        shared = groups.tp if groups.config.data_parallel else groups.world
        failure: Exception | None = None
        words = [0, 0]
        try:
            check()
            if shared.size > 1:
                words = [zlib.crc32(repr(word()).encode()) for word in (inputs, random_state)]
        except Exception as error:
            failure = error
        votes = groups.world.all_gather(torch.tensor([[failure is not None, *words]])).tolist()
        if any(failed for failed, *_ in votes):
            self._raise_for_all(failure)
        for column, what in (
            (1, "were given different inputs"),
            (2, "have different random states: call torch.manual_seed with one seed on all of them before sampling"),
        ):
            if len({votes[rank][column] for rank in shared.ranks}) > 1:
                raise BatchError(f"ranks {list(shared.ranks)} share their rows, but {what}")

    def _raise_for_all(self, failure: Exception | None) -> None:
        messages = self.layout.groups.world.all_gather_object(in_words(failure))
        if failure is not None:
            raise failure
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise BatchError(f"rank {rank}: {message}")


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Sequence[str | None] | None) -> object:
    """What the calls of ranks that share their rows must have alike: tensors, numbers and words, and whether there are
    adapters, of which the bank compares the names."""
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in sorted(given.items()) if isinstance(value, bool | int | float | str)}
    shapes = [(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]
    return shapes, _checksums(list(tensors.values())), plain, adapters is None


def _checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Of the bits of each, in their order; one wait for the device."""
    sums = []
    for x in tensors:
        bits = x.detach().contiguous().view(_BITS[x.dtype.itemsize]).reshape(-1).long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        sums.append(((bits + 1) * (places * _ODD)).sum())
    return torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

"""The side of a GraftedModel that deals with other ranks. With one process nothing is ever sent."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from moegraft.core.errors import AdapterMismatchError, BatchError, ParallelError
from moegraft.integrations.transformers.generation import batch_rows
from moegraft.integrations.transformers.parallel_layout import RankLayout
from moegraft.lora.bank import AdapterBank, AdapterBatch
from moegraft.lora.collective_bank import CollectiveBank, GroupBatch
from moegraft.lora.peft import LoadReport, load_peft_adapter
from moegraft.lora.peft.digest import adapter_digest
from moegraft.lora.targets import AdapterWeights, ModelTargets

INPUTS = ("inputs", "input_ids", "inputs_embeds")


def init_parallel(device: torch.device | str | None = None) -> torch.device:
    """Joins the world that torchrun started (``env://``) and gives this rank's device; a world that is there is kept.

    ``device``: "cpu" or "cuda", by default the GPUs where there are any. Ranks on GPUs talk over NCCL, rank r of a
    machine has its GPU r; ranks on the CPU talk over gloo. Raises ParallelError where no launcher has started the
    process.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", init_method="env://")
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

    def load(self, path: str | os.PathLike[str], name: str, enter: Callable[[AdapterWeights], object]) -> LoadReport:
        """Reads this rank's slice of an adapter; ``enter`` puts it into the bank. Raises AdapterError."""

        def read() -> tuple[AdapterWeights, LoadReport]:
            weights, report = load_peft_adapter(
                path, self.targets, dtype=self.bank.layout.dtype, name=name, rank_slice=self.layout.mine
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

    def check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises BatchError where ranks that share their rows were given different ones; collective.

        And for a batch without rows, which transformers cannot run: a rank without requests must take part.
        """
        if self.layout.rows_travel and batch_rows(args, kwargs, INPUTS) == 0:
            raise BatchError("every rank needs a row: give a rank without requests one of the base model")
        found = [x for x in (*args[:1], *(kwargs.get(name) for name in INPUTS)) if isinstance(x, torch.Tensor)]
        self._check_same(
            lambda: [(tuple(x.shape), x.detach().double().sum().item()) for x in found],
            "were given different inputs",
        )

    def check_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], defaults: GenerationConfig | None
    ) -> dict[str, Any]:
        """The options of ``generate`` under which ranks stay in step.

        Raises BatchError as ``check_inputs``, and where ranks that share their rows would sample different tokens.
        """
        self.check_inputs(args, kwargs)
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or defaults
        if kwargs.get("do_sample", getattr(given, "do_sample", False)):
            device = self.bank.pool.data.device
            self._check_same(
                lambda: _random_state(device).numpy().tobytes(),
                "have different random states: call torch.manual_seed with one seed on all of them before sampling",
            )
        if not self.layout.rows_travel:
            return kwargs
        # A rank whose rows have ended runs on for the others, whose rows need its experts.
        return {"synced_gpus": True, **kwargs}

    def _check_same(self, words: Callable[[], object], what: str) -> None:
        groups = self.layout.groups
        shared = groups.tp if groups.config.data_parallel else groups.world
        if shared.size == 1:
            return
        mine = torch.tensor([zlib.crc32(repr(words()).encode())])
        if not bool((shared.all_gather(mine) == mine).all()):
            raise BatchError(f"ranks {list(shared.ranks)} share their rows, but {what}")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

"""A transformers model on several ranks, and in one process: what each makes of the same batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moegraft
from moegraft import GraftedModel
from moegraft.parallel import ParallelConfig
from moegraft.parallel.slices import ExpertMap
from support.families import VOCAB_SIZE, build

LENGTHS = (9, 7, 5, 8, 6)
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A family's model with adapters, by name. ``names``: the adapter of each row of the batch.

    ``config`` None: loaded from ``checkpoint`` with ``plan``, the arguments of from_pretrained.
    """

    family: str
    adapters: Mapping[str, Path]
    names: Sequence[str | None]
    config: ParallelConfig | None = None
    expert_maps: Mapping[str, ExpertMap] | None = None
    checkpoint: Path | None = None
    plan: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def rows(self, ep_rank: int) -> list[int]:
        """The rows of a rank: all, or where each brings its own, every ep-th."""
        everyone = list(range(len(self.names)))
        if self.config is None or not self.config.data_parallel:
            return everyone
        return everyone[ep_rank :: self.config.ep]

    def model(self) -> PreTrainedModel:
        if self.checkpoint is None:
            return build(self.family).to(self.device, self.dtype)
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, **dict(self.plan or {})).eval()


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A rank's rows: logits without and with adapters, generated tokens; what the rank holds, what serves it."""

    plain: torch.Tensor
    mixed: torch.Tensor
    tokens: torch.Tensor
    experts_bytes: int
    adapter_bytes: dict[str, int]
    pages: dict[str, int]
    backends: set[str]


def make_batch(num_rows: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of several lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = (LENGTHS * num_rows)[:num_rows]
    ids = torch.zeros(num_rows, max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def run_alone(case: ModelCase) -> ModelResult:
    """In one process, whatever the case's configuration."""
    with moegraft.attach(build(case.family).to(case.device, case.dtype), adapter_memory="64MiB") as graft:
        return _run(graft, case, list(range(len(case.names))))


def run_rank(case: ModelCase) -> ModelResult:
    """In every rank of a world."""
    model = case.model()
    options = {} if case.config is None else {"parallel": case.config, "expert_maps": case.expert_maps}
    with moegraft.attach(model, adapter_memory="64MiB", **options) as graft:
        return _run(graft, case, case.rows(graft.layout.groups.ep.rank))


def _run(graft: GraftedModel, case: ModelCase, rows: list[int]) -> ModelResult:
    for name, path in case.adapters.items():
        graft.load_adapter(path, name=name)
    batch = {key: tensor[rows].to(case.device) for key, tensor in make_batch(len(case.names)).items()}
    names = [case.names[row] for row in rows]
    prompts = {key: tensor for key, tensor in batch.items() if key != "position_ids"}
    result = ModelResult(
        plain=graft(**batch, adapters=[None] * len(rows)).logits.cpu(),
        mixed=graft(**batch, adapters=names).logits.cpu(),
        tokens=graft.generate(**prompts, **GENERATE, adapters=names).cpu(),
        experts_bytes=sum(site.base.method.experts.weights.num_bytes for site in graft._fittings.sites.values()),
        adapter_bytes={name: graft.adapters[name].num_bytes for name in graft.adapters},
        pages={name: graft.adapters[name].num_pages for name in graft.adapters},
        backends={choice.backend for choice in graft.explain()},
    )
    graft.bank.check_integrity()
    return result


def check_ranks(case: ModelCase, results: Sequence[ModelResult], alone: ModelResult, tol: float = 1e-4) -> None:
    """Logits, deltas and tokens as in one process; base rows as without adapters, bit for bit."""
    config = case.config or ParallelConfig(tp=len(results))
    for rank, result in enumerate(results):
        rows = case.rows(config.ep_rank_of(rank))
        for i, row in enumerate(rows):
            name = case.names[row]
            what = f"rank {rank}, row {row} ({name})"
            assert_within(result.plain[i], alone.plain[row], alone.plain[row], tol, what=f"{what} without adapters")
            if name is None:
                assert torch.equal(result.mixed[i], result.plain[i]), f"{what}: other bits than without adapters"
            else:
                expected = (alone.mixed[row] - alone.plain[row]).float()
                found = (result.mixed[i] - result.plain[i]).float()
                assert_within(found, expected, expected, tol, what=f"{what}, delta")
        if case.dtype == torch.float32:
            assert result.tokens.tolist() == alone.tokens[rows].tolist(), f"rank {rank} generated other tokens"


def assert_within(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, tol: float, *, what: str) -> None:
    largest = scale.abs().max().item()
    assert largest > 0.01, f"{what}: nothing to compare"
    error = (found.float() - expected.float()).abs().max().item()
    assert error <= tol * largest, f"{what}: {error} of {largest}"

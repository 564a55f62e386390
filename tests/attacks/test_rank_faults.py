"""Ranks of which one makes mistakes, drawn at random: all of them raise, together and soon, and all go on as before."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import WorldPool
from support.families import VOCAB_SIZE, build
from support.family_adapters import save_everything, save_part
from support.parallel_models import make_batch

import moegraft
from moegraft import GraftedModel
from moegraft.lora.peft.loader import PeftAdapter
from moegraft.parallel import ParallelConfig

pytestmark = [pytest.mark.attacks, pytest.mark.usefixtures("one_thread")]

# Every fault ends by a vote: nothing waits for the timeout of the groups, which is longer than this.
SECONDS = 20.0
CONFIGS = {
    "tensor parallel": ParallelConfig(tp=2),
    "data parallel": ParallelConfig(ep=2, data_parallel=True),
}
CALLS: dict[str, dict[str, Any]] = {
    "a number as adapters": {"adapters": 5},
    "an unhashable entry": {"adapters": ["a", []]},
    "a set": {"adapters": {"a", "b"}},
    "an unknown name": {"adapters": ["a", "nobody"]},
    "too many names": {"adapters": ["a", None, None]},
    "ids beyond the vocabulary": {"input_ids": torch.full((2, 3), VOCAB_SIZE)},
    "ids below zero": {"input_ids": torch.full((2, 3), -5)},
    "a string": {"adapters": "a"},
    "ids that have no shape": {"input_ids": "words"},
}
OTHERS = ("a missing folder", "a name that is no name", "memory", "an interrupt", "unload", "pin", "load twice")


def _fail_in_read(graft: GraftedModel, path: Path, error: BaseException) -> None:
    def build(*args: Any, **kwargs: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftAdapter, "build", build)
        graft.load_adapter(path, name="new")


def _act(graft: GraftedModel, what: str, is_victim: bool, paths: dict[str, Path]) -> None:
    """What all ranks do, and the victim wrongly."""
    if what in CALLS:
        good = {"input_ids": make_batch(2)["input_ids"], "adapters": ["a", None]}
        call = graft.generate if what.startswith("too") else graft
        call(**{**good, **(CALLS[what] if is_victim else {})})
    elif what == "unload":
        graft.unload_adapter("nobody" if is_victim else "a")
    elif what == "pin":
        graft.pin_adapter("nobody" if is_victim else "a")
    elif what == "load twice":
        graft.load_adapter(paths["b"], name="a" if is_victim else "new")
    elif what == "a name that is no name":
        graft.load_adapter(paths["b"], name="" if is_victim else "new")
    elif is_victim and what in ("memory", "an interrupt"):
        _fail_in_read(graft, paths["b"], MemoryError("none left") if what == "memory" else KeyboardInterrupt())
    else:
        graft.load_adapter(paths["b"] / ("nowhere" if is_victim else ""), name="new")


def _make_mistakes(config: ParallelConfig, paths: dict[str, Path], seed: int, faults: list[str]) -> list[str]:
    """What was not as it must be."""
    complaints, rng = [], random.Random(seed)
    rank = torch.distributed.get_rank()
    batch = {"input_ids": make_batch(2)["input_ids"], "adapters": ["a", None]}
    with moegraft.attach(build("qwen3_moe"), parallel=config, adapter_memory="64MiB") as graft:
        graft.load_adapter(paths["a"], name="a")
        expected = graft(**batch).logits
        for what in faults:
            is_victim = rng.randrange(2) == rank
            began = time.monotonic()
            try:
                _act(graft, what, is_victim, paths)
                complaints.append(f"{what}: no error")
            except BaseException as error:
                if not str(error) and not isinstance(error, KeyboardInterrupt):
                    complaints.append(f"{what}: an error without words: {error!r}")
            if time.monotonic() - began > SECONDS:
                complaints.append(f"{what}: took {time.monotonic() - began:.0f} s")
            graft.bank.check_integrity()
            if list(graft.adapters) != ["a"] or graft.adapters["a"].in_use or graft.adapters["a"].pinned:
                complaints.append(f"{what}: left {graft.adapters}")
            if not torch.equal(graft(**batch).logits, expected):
                complaints.append(f"{what}: other logits afterwards")
    return complaints


@pytest.mark.parametrize("layout", CONFIGS)
def test_a_mistake_on_one_rank(world2: WorldPool, tmp_path: Path, layout: str, request: pytest.FixtureRequest) -> None:
    paths = {"a": save_everything("qwen3_moe", tmp_path / "a").path, "b": save_part("qwen3_moe", tmp_path / "b").path}
    rounds = 20 if "attacks" in (request.config.getoption("-m") or "") else 1
    for seed in range(rounds):
        faults = [*CALLS, *OTHERS]
        random.Random(seed).shuffle(faults)
        assert world2.run(_make_mistakes, CONFIGS[layout], paths, seed, faults) == [[], []]

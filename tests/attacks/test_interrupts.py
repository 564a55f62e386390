"""Ctrl-C anywhere: KeyboardInterrupt at the n-th line or call inside moegraft, for many n, in everything that changes.

Whatever was begun is done or undone, and all that follows is right. By default a few points of every act are tried;
``pytest -m attacks`` tries every one.
"""

from __future__ import annotations

import gc
import inspect
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.mixed import MixedBatch

import moegraft
from moegraft import GraftedModel

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = 24
SOURCE = str(Path(moegraft.__file__).parent)
NAMES: list[str | None] = ["fused", None]


class Interrupter:
    """Counts the lines, calls and returns inside moegraft (and the context managers that it uses); raises at one."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.where = "nowhere"
        self.in_generator = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(SOURCE) and not file.endswith("contextlib.py"):
            return None
        if (event == "line" and _leaves_a_block(frame)) or (event == "return" and _is_generator(frame)):
            return self
        self.count += 1
        if self.count == self.at:
            self.where = f"{event} at {file.removeprefix(SOURCE)}:{frame.f_lineno} ({frame.f_code.co_name})"
            self.in_generator = _is_generator(frame)
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def run(self, act: Callable[[], object]) -> bool:
        """Whether ``act`` was interrupted; it may swallow nothing."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            act()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            _entered.clear()  # frames hold what they were doing
        # Python itself swallows what is raised while a generator that nobody reads on is closed.
        assert self.count < self.at or self.in_generator, f"the interrupt {self.where} was swallowed"
        return False


def _leaves_a_block(frame: FrameType) -> bool:
    """Whether a ``with`` statement is reached once more, to leave its block.

    A signal is never handled just there, where Python 3.11 would not run ``__exit__``.
    """
    seen = _entered.setdefault(frame, set())
    is_again = frame.f_lineno in seen
    seen.add(frame.f_lineno)
    return is_again and linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def _is_generator(frame: FrameType) -> bool:
    """What is raised as a generator yields would end it without its ``finally``; no signal is handled there."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


_entered: dict[FrameType, set[int]] = {}


def points(act: Callable[[], object], request: pytest.FixtureRequest) -> list[int]:
    """All points of an act, or a few of them that are other ones in each act."""
    counter = Interrupter(at=0)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        act()
    finally:
        sys.settrace(before)
        _entered.clear()
    everything = range(1, counter.count + 1)
    if "attacks" in (request.config.getoption("-m") or ""):
        return list(everything)
    return sorted(random.Random(counter.count).sample(everything, min(FEW, len(everything))))


class Watch:
    """A grafted model and what it must give."""

    def __init__(self, mixed: MixedBatch) -> None:
        self.mixed = mixed
        self.ids = mixed.input_ids[:2, :3]
        self.graft = moegraft.attach(mixed.model, adapter_memory="4MiB")
        for name, path in mixed.adapters.items():
            self.graft.load_adapter(path, name=name)
        self.expected = {name: self.logits(name) for name in (None, *mixed.adapters)}
        self.hooks = _hooks(mixed.model)
        self.free = self.graft.bank.pool.num_free

    def logits(self, name: str | None) -> torch.Tensor:
        return self.graft(input_ids=self.ids, adapters=[name, None]).logits

    def check(self, where: str) -> None:
        """Nothing is held, everything that is listed is right, and everything can be had again."""
        graft, mixed = self.graft, self.mixed
        gc.collect()  # contextlib leaves cycles of frames and exceptions behind, which may hold a batch
        graft.bank.check_integrity()
        held = [name for name, info in graft.adapters.items() if info.in_use]
        assert held == [], where
        with torch.no_grad():
            plain = mixed.model(input_ids=self.ids).logits
        assert torch.equal(plain, self.expected[None]), f"a batch stayed current: {where}"
        for name in graft.adapters:
            assert torch.equal(self.logits(name), self.expected[name]), f"{name} is wrong: {where}"
        for name, path in mixed.adapters.items():
            if name not in graft.adapters:
                graft.load_adapter(path, name=name)
                assert torch.equal(self.logits(name), self.expected[name]), f"{name} is wrong once more: {where}"
        assert graft.bank.pool.num_free == self.free, where
        assert _hooks(mixed.model) == self.hooks, where
        graft.bank.check_integrity()


def _hooks(model: torch.nn.Module) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.fixture
def watch(mixed: MixedBatch) -> Iterator[Watch]:
    watch = Watch(mixed)
    gc.collect()
    gc.freeze()
    yield watch
    gc.unfreeze()
    watch.graft.detach(force=True)


def _in_block(graft: GraftedModel, ids: torch.Tensor) -> None:
    with graft.batch(NAMES, 2), torch.no_grad():
        graft.model(input_ids=ids)


@pytest.mark.attacks
@pytest.mark.parametrize("act", ["call", "batch", "generate", "unload", "load", "pin", "adapters"])
def test_any_point(watch: Watch, act: str, request: pytest.FixtureRequest) -> None:
    graft, ids, path = watch.graft, watch.ids, watch.mixed.adapters["fused"]
    acts: dict[str, Callable[[], object]] = {
        "call": lambda: graft(input_ids=ids, adapters=NAMES),
        "batch": lambda: _in_block(graft, ids),
        "generate": lambda: graft.generate(ids, adapters=NAMES, max_new_tokens=2, do_sample=False),
        "unload": lambda: graft.unload_adapter("fused"),
        "load": lambda: graft.load_adapter(path, name="fused"),
        "pin": lambda: graft.pin_adapter("fused"),
        "adapters": lambda: graft.adapters,
    }

    def prepare() -> None:
        if act == "load" and "fused" in graft.adapters:
            graft.unload_adapter("fused")
        if act == "pin":
            graft.unpin_adapter("fused")
            graft.bank.evict("fused")

    prepare()
    for at in points(acts[act], request):
        watch.check("before")
        prepare()
        interrupter = Interrupter(at)
        if interrupter.run(acts[act]):
            watch.check(f"{act}, point {at}: {interrupter.where}")


@pytest.mark.attacks
def test_attach(mixed: MixedBatch, request: pytest.FixtureRequest) -> None:
    """The model is grafted, and ``GraftedModel.of`` finds by what, or as it was."""
    model, ids = mixed.model, mixed.input_ids[:2, :3]
    before = _state(model, ids)
    keep: list[GraftedModel] = []

    def attach() -> None:
        keep.append(moegraft.attach(model, adapter_memory="4MiB"))

    def leave() -> None:
        graft = GraftedModel.of(model)
        if graft is not None:
            graft.detach()
        keep.clear()

    found = points(attach, request)
    leave()
    for at in found:
        interrupter = Interrupter(at)
        interrupter.run(attach)
        leave()
        assert _state(model, ids) == before, interrupter.where
        with moegraft.attach(model, adapter_memory="4MiB") as graft:
            graft.load_adapter(mixed.adapters["fused"])
        assert _state(model, ids) == before, interrupter.where


@pytest.mark.attacks
def test_detach(mixed: MixedBatch, request: pytest.FixtureRequest) -> None:
    model, ids = mixed.model, mixed.input_ids[:2, :3]
    before = _state(model, ids)

    def begin() -> GraftedModel:
        graft = moegraft.attach(model, adapter_memory="4MiB")
        for name, path in mixed.adapters.items():
            graft.load_adapter(path, name=name)
        return graft

    graft = begin()
    found = points(graft.detach, request)
    for at in found:
        graft = begin()
        interrupter = Interrupter(at)
        interrupter.run(graft.detach)
        graft.detach()
        assert _state(model, ids) == before, interrupter.where


@torch.no_grad()
def _state(model: Any, ids: torch.Tensor) -> tuple[Any, ...]:
    return (
        model.get_experts_implementation(),
        _hooks(model),
        [(name, type(param), param.data_ptr()) for name, param in model.named_parameters()],
        model(input_ids=ids).logits.tolist(),
        [name for name, module in model.named_modules() if any(key.startswith("_moegraft") for key in vars(module))],
    )

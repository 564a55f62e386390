"""Saved modules whose instance has a forward of its own: the replacement runs, or the adapter is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig
from support.adapters import save_with_peft
from support.families import build
from support.mixed import random_ids
from torch import nn

import moegraft
from moegraft.core.errors import UnsupportedModelError
from moegraft.testing import assert_close_delta

pytestmark = pytest.mark.usefixtures("one_thread")
SAVED = ("lm_head", "norm", "gate", "embed_tokens")


def accelerate_hook(module: nn.Module) -> None:
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def wrapped(module: nn.Module) -> None:
    module.forward = torch.no_grad()(module.forward)  # type: ignore[method-assign]


def partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)  # type: ignore[method-assign]


def nested(module: nn.Module) -> None:
    inner = functools.partial(module.forward)
    module.forward = torch.no_grad()(inner)  # type: ignore[method-assign]


@pytest.mark.parametrize("way", [accelerate_hook, wrapped, partial, nested])
@torch.no_grad()
def test_a_forward_of_the_instance(tmp_path: Path, way: Callable[[nn.Module], None]) -> None:
    """Truth: PEFT's own, without the wrappers."""
    model, ids = build("qwen3_moe"), random_ids(2, 5)
    base = model(input_ids=ids).logits
    truth = save_with_peft(model, LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=[*SAVED]), tmp_path, ids)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SAVED:
            way(module)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        graft.load_adapter(tmp_path, "saved")
        for _ in range(2):  # the copies are made once
            found = graft(input_ids=ids, adapters=["saved", None]).logits
            assert_close_delta(found[0], base[0], truth[0], base[0], 1e-5)
            assert torch.equal(found[1], graft(input_ids=ids, adapters=[None, None]).logits[1])


def offloaded(module: nn.Module) -> None:
    weights = {name: param.detach().clone() for name, param in module.named_parameters()}
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))


class Opaque:
    """A callable that holds the module out of sight."""

    def __init__(self, module: nn.Module) -> None:
        self.run = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.run(x)
        return out


def opaque(module: nn.Module) -> None:
    module.forward = Opaque(module)  # type: ignore[assignment]


@pytest.mark.parametrize(("way", "message"), [(opaque, "forward of its own, a Opaque"), (offloaded, "is offloaded")])
def test_what_cannot_be_copied_is_refused_when_it_is_loaded(
    tmp_path: Path, way: Callable[[nn.Module], None], message: str
) -> None:
    model, ids = build("qwen3_moe"), random_ids(1, 3)
    with torch.no_grad():
        config = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["norm"])
        save_with_peft(model, config, tmp_path, ids)
    with moegraft.attach(model, adapter_memory="4MiB") as graft:
        way(model.model.norm)
        with pytest.raises(UnsupportedModelError, match=f"'model.norm' .*{message}"):
            graft.load_adapter(tmp_path, "saved")
        assert graft.adapters == {}

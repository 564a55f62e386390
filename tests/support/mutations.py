"""Faults that a system like this can have, each as a patch of one public seam of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from moegraft.core.config import Activation
from moegraft.core.halves import split_halves
from moegraft.core.tables import Field, LinearFactor
from moegraft.lora.bank.pool import DeviceTables
from moegraft.lora.peft.config import PeftConfig
from moegraft.lora.punica import PunicaWrapperCPU
from moegraft.lora.rows import BASE_SLOT, AdapterRows
from moegraft.moe.experts import TorchExperts, torch_experts

Mutation = Callable[[], AbstractContextManager[Any]]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def drop_w13_delta() -> AbstractContextManager[Any]:
    return patch.object(PunicaWrapperCPU, "add_lora_w13", _nothing)


def drop_w2_delta() -> AbstractContextManager[Any]:
    return patch.object(PunicaWrapperCPU, "add_lora_w2", _nothing)


def drop_linear_delta() -> AbstractContextManager[Any]:
    return patch.object(PunicaWrapperCPU, "add_lora_linear", _nothing)


def _remap(change: Callable[[tuple[int, ...]], dict[int, int]]) -> AbstractContextManager[Any]:
    """Slots of rows go through a dictionary that is made from the distinct slots of the batch."""
    original = AdapterRows.of

    def of(slots: Sequence[int], **options: Any) -> AdapterRows:
        swapped = change(tuple(sorted({slot for slot in slots if slot != BASE_SLOT})))
        return original([swapped.get(slot, slot) for slot in slots], **options)

    return patch.object(AdapterRows, "of", of)


def swap_adapters() -> AbstractContextManager[Any]:
    return _remap(lambda slots: dict(zip(slots, (*slots[1:], *slots[:1]), strict=True)))


def leak_into_base_rows() -> AbstractContextManager[Any]:
    return _remap(lambda slots: {BASE_SLOT: slots[0]} if slots else {})


@contextmanager
def delta_after_activation() -> Iterator[None]:
    """h = act(u) + delta of the up half, instead of act(u + delta)."""
    add_w13, activate = TorchExperts.apply_w13_lora, torch_experts.apply_activation
    pending: list[torch.Tensor] = []

    def keep_delta(self: TorchExperts, context: Any, u: torch.Tensor, x: torch.Tensor, segments: Any) -> None:
        pending.append(torch.zeros_like(u))
        add_w13(self, context, pending[-1], x, segments)

    def activate_then_add(u: torch.Tensor, activation: Activation, *, is_interleaved: bool = False) -> torch.Tensor:
        h = activate(u, activation, is_interleaved=is_interleaved)
        if pending:
            h += split_halves(pending.pop(), num_halves=activation.num_halves, is_interleaved=is_interleaved)[1]
        return h

    with ExitStack() as stack:
        stack.enter_context(patch.object(TorchExperts, "apply_w13_lora", keep_delta))
        stack.enter_context(patch.object(torch_experts, "apply_activation", activate_then_add))
        yield


def _rescale(change: Callable[[float], float]) -> AbstractContextManager[Any]:
    original = PeftConfig.scale
    return patch.object(PeftConfig, "scale", lambda self, module, rank: change(original(self, module, rank)))


def square_the_scale() -> AbstractContextManager[Any]:
    return _rescale(lambda scale: scale**2)


def forget_the_scale() -> AbstractContextManager[Any]:
    return _rescale(lambda scale: 1.0)


def scale_slightly_off() -> AbstractContextManager[Any]:
    """One part in a thousand: what an output tolerance would hide."""
    return _rescale(lambda scale: 1.001 * scale)


def swap_gate_and_up() -> AbstractContextManager[Any]:
    def swapped(u: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = split_halves(u, **kwargs)
        return up, gate

    return patch("moegraft.lora.punica.cpu.split_halves", swapped)


def _damage_tables(damage: Callable[[DeviceTables, int], None]) -> AbstractContextManager[Any]:
    """What kernels read about a slot is changed after it was filled in."""
    original = DeviceTables.fill

    def fill(self: DeviceTables, slot: int, *args: Any) -> None:
        original(self, slot, *args)
        damage(self, slot)

    return patch.object(DeviceTables, "fill", fill)


def drop_up_lane() -> AbstractContextManager[Any]:
    def damage(tables: DeviceTables, slot: int) -> None:
        tables.factors[slot, :, Field.LANE] = 0

    return _damage_tables(damage)


def mix_up_experts() -> AbstractContextManager[Any]:
    """Each expert gets the factors of its neighbour."""

    def damage(tables: DeviceTables, slot: int) -> None:
        for experts in tables.experts.values():
            experts.expert_index[slot] = experts.expert_index[slot].roll(1)

    return _damage_tables(damage)


def drop_dora_gain() -> AbstractContextManager[Any]:
    def damage(tables: DeviceTables, slot: int) -> None:
        for linear in tables.linears.values():
            linear.factors[slot, LinearFactor.GAIN, Field.RANK] = 0

    return _damage_tables(damage)


# Mutations of the experts layer alone: the layer's own check must notice them too.
LAYER_MUTATIONS: tuple[Mutation, ...] = (
    drop_w13_delta,
    drop_w2_delta,
    swap_adapters,
    leak_into_base_rows,
    delta_after_activation,
    swap_gate_and_up,
    drop_up_lane,
    mix_up_experts,
)
MUTATIONS: tuple[Mutation, ...] = (
    *LAYER_MUTATIONS,
    drop_linear_delta,
    drop_dora_gain,
    square_the_scale,
    forget_the_scale,
    scale_slightly_off,
)

"""Adapters in numbered slots over pages, as engines with slots of their own fill them; and maps of several slices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.kernels import DEVICE

from moegraft.core.errors import AdapterMemoryError
from moegraft.core.tables import ExpertsFactor, LinearFactor
from moegraft.integrations.vllm.pages import Part, SlotPages, no_rows
from moegraft.kernels.lora_linear.host import add_lora_linear
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.targets import ExpertsTarget, LinearTarget, ModelTargets
from moegraft.testing.errors import assert_close

TOL = 3e-6
IN, MAX_RANK = 40, 8
E, D, F = 4, IN, 24


def pages_for(widths: Sequence[int], **options: int) -> SlotPages:
    targets = ModelTargets(
        model_type="tiny",
        linears={"linear": LinearTarget(name="linear", in_features=IN, out_features=sum(widths))},
        experts={"experts": ExpertsTarget(name="experts", num_experts=E, hidden_size=D, intermediate_size=F)},
    )
    sizes = (
        (ExpertsFactor.A13, 2 * MAX_RANK), (ExpertsFactor.B_GATE, MAX_RANK), (ExpertsFactor.B_UP, MAX_RANK),
        (ExpertsFactor.A2, MAX_RANK), (ExpertsFactor.B2, MAX_RANK),
    )  # fmt: skip
    largest = {
        "linear": [
            Part(factor=LinearFactor.A, rank=MAX_RANK * len(widths), rows=no_rows),
            Part(factor=LinearFactor.B, rank=MAX_RANK, rows=no_rows),
        ],
        "experts": [Part(factor=factor, rank=rank, copies=E, rows=no_rows) for factor, rank in sizes],
    }
    return SlotPages(targets, largest, dtype=torch.float32, device=torch.device(DEVICE), **{"num_slots": 3, **options})


def linear_parts(widths: Sequence[int], rank: int, seed: int) -> tuple[list[Part], torch.Tensor, torch.Tensor]:
    """(parts, A [slices, r, in], B [r, out])."""
    generator = torch.Generator().manual_seed(seed)
    a_SRI = torch.randn(len(widths), rank, IN, generator=generator) / IN**0.5
    b_RO = torch.randn(rank, sum(widths), generator=generator)
    parts = [
        Part(factor=LinearFactor.A, rank=rank * len(widths), rows=lambda: a_SRI),
        Part(factor=LinearFactor.B, rank=rank, rows=lambda: b_RO),
    ]
    return parts, a_SRI, b_RO


@pytest.mark.parametrize("widths", [[48], [64, 32, 32], [16, 48], [32, 16, 16, 64]], ids=str)
@pytest.mark.parametrize(("run_length", "page_bytes"), [(1, 2048), (40, 2**18)])
def test_each_slice_reads_its_own_a(widths: list[int], run_length: int, page_bytes: int) -> None:
    """Two ranks, a slot that changes hands, and an empty one; factors over several pages, and many on one."""
    pages = pages_for(widths, page_bytes=page_bytes)
    held = {}
    for slot, rank, seed in ((0, 3, 1), (2, 8, 2), (0, 5, 3)):
        parts, *held[slot] = linear_parts(widths, rank, seed)
        pages.put(slot, {"linear": parts})
    slots = torch.tensor([0, 2, -1, 2, 1, 0, 0], dtype=torch.int32)
    x_MI, y_MO = torch.randn(7, IN), torch.randn(7, sum(widths))
    expected = y_MO.double().clone()
    starts = torch.tensor(widths).cumsum(0).tolist()
    for row, slot in enumerate(slots.tolist()):
        if slot in held:
            a_SRI, b_RO = (factor.double() for factor in held[slot])
            for a_RI, begin, end in zip(a_SRI, [0, *starts], starts, strict=False):
                expected[row, begin:end] += (a_RI @ x_MI[row].double()) @ b_RO[:, begin:end]
    y_MO = y_MO.to(DEVICE)
    add_lora_linear(
        y_MO, x_MI.to(DEVICE), slots.to(DEVICE), pages.tables.linears["linear"], rank_bound=MAX_RANK,
        run_length=run_length, slice_starts=tuple(starts[:-1]),
    )  # fmt: skip
    assert_close(y_MO.cpu(), expected, TOL)


def test_slices_that_no_block_can_follow_are_refused() -> None:
    pages = pages_for([48])
    y_MO, x_MI = torch.zeros(1, 48, device=DEVICE), torch.zeros(1, IN, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for starts in ((8,), (48,), (16, 24), (16, 16, 32, 32)):
        with pytest.raises(ValueError, match="slices begin at columns"):
            add_lora_linear(y_MO, x_MI, slots, pages.tables.linears["linear"], rank_bound=8, slice_starts=starts)


def test_experts_of_a_slot() -> None:
    """A of gate and up of their own, true rank below the largest, one side only; pages that do not lie together."""
    pages = pages_for([48], page_bytes=1024)
    scattered = pages.pool.allocate(9)
    pages.pool.free(scattered[::2])
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE)

    a13, b_gate, b_up = randn(E, 6, D), randn(E, 3, F), randn(E, 3, F)
    pages.put(1, {"experts": [
        Part(factor=ExpertsFactor.A13, rank=6, copies=E, rows=lambda: a13),
        Part(factor=ExpertsFactor.B_GATE, rank=3, copies=E, rows=lambda: b_gate),
        Part(factor=ExpertsFactor.B_UP, rank=3, copies=E, lane=3, rows=lambda: b_up),
    ]})  # fmt: skip
    w13, w2, x_TD = randn(E, 2 * F, D), randn(E, D, F), randn(2, D)
    ids = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32, device=DEVICE)
    weights = torch.full((2, 2), 0.5, device=DEVICE)
    slots = torch.tensor([1, -1], dtype=torch.int32, device=DEVICE)
    lora = LoRABatch(tables=pages.tables.experts["experts"], token_slots_T=slots, rank13=2 * MAX_RANK, rank2=MAX_RANK)
    found = fused_moe_lora(x_TD, MoEWeights(w13=w13, w2=w2), ids, weights, lora=lora)
    merged = w13 + torch.cat([b_gate.mT @ a13[:, :3], b_up.mT @ a13[:, 3:]], dim=1)
    for row, w13_of_row in ((0, merged), (1, w13)):
        expected = 0
        for expert in ids[row].tolist():
            gate, up = (w13_of_row[expert] @ x_TD[row]).chunk(2)
            expected = expected + 0.5 * w2[expert] @ (torch.nn.functional.silu(gate) * up)
        assert_close(found[row], expected, 1e-5)


def test_pages_follow_true_ranks_and_come_back() -> None:
    pages = pages_for([48])
    everything = pages.pool.num_free
    small, large = (linear_parts([48], rank, 0)[0] for rank in (1, MAX_RANK))
    pages.put(0, {"linear": small})
    assert pages.held(0) == pages.pages_of({"linear": small}) <= pages.pages_of({"linear": large})
    assert pages.pool.num_free == everything - pages.held(0)
    pages.drop(0)
    pages.drop(0)
    assert pages.pool.num_free == everything
    assert not pages.tables.factors.any()


def test_too_little_memory_is_refused() -> None:
    full = pages_for([48])
    one = full.pages_of_largest * full.layout.page_bytes
    with pytest.raises(AdapterMemoryError, match="holds no adapter of the largest rank"):
        pages_for([48], capacity_bytes=one - 1)
    pages = pages_for([48], capacity_bytes=one)
    everything = {"linear": linear_parts([48], MAX_RANK, 0)[0]}
    filler = {"linear": [Part(factor=LinearFactor.A, rank=pages.pool.num_pages * 10**6, rows=no_rows)]}
    pages.put(0, everything)
    with pytest.raises(AdapterMemoryError, match="pages are needed"):
        pages.put(1, filler)
    assert pages.held(1) == 0 < pages.held(0)

"""The LoRA primitives in plain torch, each against a loop over rows that reads the adapters as they were loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from support.layers import DELTA_TOL, MODULE, build_layer, with_dtype

from moegraft.core.config import MoEConfig
from moegraft.core.tables import ExpertsTables
from moegraft.kernels.records import LayerSizes
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.context import MoELoRAContext
from moegraft.lora.punica import PunicaWrapperCPU
from moegraft.lora.punica.cpu import LoRASegments, grouped_mm
from moegraft.lora.rows import AdapterRows, RankBounds
from moegraft.lora.targets import AdapterWeights, LinearLoRA, LinearTarget, ModelTargets
from moegraft.testing import ExpertsFactors, LoRASpec, MoECase, assert_close, poison_allocations

PUNICA = PunicaWrapperCPU()
DTYPES = [torch.float32, torch.bfloat16]
E, D, F = 4, 24, 10
SIZES = LayerSizes(num_experts=E, hidden_size=D, intermediate_size=F)
CASE = MoECase(
    name="primitives",
    config=MoEConfig(num_experts=E, top_k=2, hidden_size=D, intermediate_size=F),
    adapters=(
        LoRASpec(r_gate=3, r_up=5, r2=7),
        LoRASpec(r_gate=1, r_up=1, r2=1, shared_a13=True, expert_ids=(1, 3)),
        LoRASpec(r_gate=0, r_up=2, r2=0),
        LoRASpec(r_gate=4, r_up=0, r2=4, shared_outer=True),
    ),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def rows_of(bank: AdapterBank, names: Sequence[str | None], tokens: int = 1) -> Iterator[AdapterRows]:
    """``tokens`` rows of each name."""
    with bank.acquire(names) as batch:
        yield AdapterRows.of(batch.row_slots, device="cpu", lengths=tokens)


def align(expert_N: torch.Tensor, slot_N: torch.Tensor, rows: AdapterRows, tables: ExpertsTables) -> LoRASegments:
    context = MoELoRAContext(tables=tables, rows=rows, bounds=RankBounds(a13=9, a2=9), punica=PUNICA)
    return PUNICA.moe_lora_align_block_size(expert_N, slot_N, context, SIZES)


class TestAlign:
    """Rows sorted by (adapter, position of the expert in the adapter); base rows and foreign experts take no part."""

    @pytest.mark.parametrize("times", [1, 50], ids=["few rows", "many rows"])
    def test_worked_example(self, times: int) -> None:
        layer = build_layer(CASE)
        tables = layer.bank.experts_tables(MODULE)
        with rows_of(layer.bank, ["a1", "a0", None]) as rows:
            a1, a0, base = rows.slots_M.tolist()
            expert_N = torch.tensor([3, 1, 0, 2, 3, -1, 4, 2]).repeat(times)
            slot_N = torch.tensor([a1, a1, a1, a0, base, a0, a0, a0]).repeat(times)
            segments = align(expert_N, slot_N, rows, tables)
            adapter = {slot: number for number, slot in enumerate(segments.slots)}
        # a0 holds all experts; a1 holds 1 and 3 at positions 0 and 1, so that its expert 0 is the base's.
        expected = {0: (adapter[a1], 1), 1: (adapter[a1], 0), 3: (adapter[a0], 2), 7: (adapter[a0], 2)}
        found = segment_of_row(segments)
        assert found == {8 * i + row: segment for i in range(times) for row, segment in expected.items()}

    @pytest.mark.parametrize("num_rows", [0, 3])
    def test_nothing_takes_part(self, num_rows: int) -> None:
        layer = build_layer(CASE)
        tables = layer.bank.experts_tables(MODULE)
        with rows_of(layer.bank, ["a0"]) as rows:
            expert_N, slot_N = torch.full((num_rows,), E), torch.zeros(num_rows, dtype=torch.long)
            segments = align(expert_N, slot_N, rows, tables)
            y_NO, x_NI = torch.randn(num_rows, 2 * F), torch.randn(num_rows, D)
            before = y_NO.clone()
            PUNICA.add_lora_w13(y_NO, x_NI, segments, tables)
        assert segments.is_empty
        assert torch.equal(y_NO, before)


def segment_of_row(segments: LoRASegments) -> dict[int, tuple[int, int]]:
    """Row -> (adapter, position) of its one segment."""
    assert segments.position_G is not None
    assert len(segments.rows_L.unique()) == len(segments.rows_L) == segments.offsets[-1]
    adapters, positions = (segments.per_row(values).tolist() for values in (segments.adapter_G, segments.position_G))
    return dict(zip(segments.rows_L.tolist(), zip(adapters, positions, strict=True), strict=True))


def gather(factor: torch.Tensor | None, lora: ExpertsFactors, expert: int) -> torch.Tensor | None:
    if factor is None or expert not in lora.expert_ids:
        return None
    return factor[lora.expert_ids.index(expert) if len(factor) > 1 else 0].double()


def delta_w13(lora: ExpertsFactors, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    """[2 * F]: gate, then up."""
    delta_GF, a = torch.zeros(2, F, dtype=torch.float64), gather(lora.a13, lora, expert)
    for half, (factor, lane) in enumerate(((lora.b_gate, 0), (lora.b_up, lora.up_lane))):
        b = gather(factor, lora, expert)
        if a is not None and b is not None:
            delta_GF[half] = b.T @ (a @ x_D.double())[lane : lane + len(b)]
    return delta_GF.flatten()


def delta_w2(lora: ExpertsFactors, expert: int, h_F: torch.Tensor) -> torch.Tensor:
    a, b = gather(lora.a2, lora, expert), gather(lora.b2, lora, expert)
    return torch.zeros(D, dtype=torch.float64) if a is None or b is None else b.T @ (a @ h_F.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 4, 9, 60, 300])
@pytest.mark.parametrize("page_bytes", [1, 1 << 14])
def test_experts_primitives(dtype: torch.dtype, num_rows: int, page_bytes: int) -> None:
    layer = build_layer(with_dtype(CASE, dtype), page_bytes=page_bytes)
    tables, adapters = layer.bank.experts_tables(MODULE), layer.inputs.adapters
    generator = torch.Generator().manual_seed(num_rows)
    names = [None, "a0", "a1", "a2", "a3"]
    pick_N = torch.randint(5, (num_rows,), generator=generator)
    expert_N = torch.randint(-1, E + 1, (num_rows,), generator=generator)
    x_ND, h_NF = (torch.randn(num_rows, size, generator=generator).to(dtype) for size in (D, F))
    with rows_of(layer.bank, names) as rows, poison_allocations():
        slot_N = rows.slots_M[pick_N]
        segments = align(expert_N, slot_N, rows, tables)
        u_NGF, y_ND = torch.zeros(num_rows, 2 * F, dtype=dtype), torch.zeros(num_rows, D, dtype=dtype)
        PUNICA.add_lora_w13(u_NGF, x_ND, segments, tables)
        PUNICA.add_lora_w2(y_ND, h_NF, segments, tables)
        alternating_NGF = torch.zeros_like(u_NGF)
        PUNICA.add_lora_w13(alternating_NGF, x_ND, segments, tables, is_interleaved=True)

    expected_u, expected_y = torch.zeros(num_rows, 2 * F).double(), torch.zeros(num_rows, D).double()
    for n, (pick, expert) in enumerate(zip(pick_N.tolist(), expert_N.tolist(), strict=True)):
        if pick > 0 and 0 <= expert < E:
            expected_u[n] = delta_w13(adapters[pick - 1], expert, x_ND[n])
            expected_y[n] = delta_w2(adapters[pick - 1], expert, h_NF[n])
    assert_close(u_NGF, expected_u, DELTA_TOL[dtype], what="w13")
    assert_close(y_ND, expected_y, DELTA_TOL[dtype], what="w2")
    assert torch.equal(alternating_NGF, torch.stack(u_NGF.split(F, dim=1), dim=2).flatten(1))


O_FEATURES, I_FEATURES = 20, 12


def linear_bank(dtype: torch.dtype, *, with_gain: bool, ranks: Sequence[int]) -> tuple[AdapterBank, list[LinearLoRA]]:
    """Adapter i has rank ``ranks[i]``; with_gain: every other one is DoRA."""
    target = LinearTarget(name="q", in_features=I_FEATURES, out_features=O_FEATURES)
    other = LinearTarget(name="k", in_features=I_FEATURES, out_features=O_FEATURES)
    layout = BankLayout(
        ModelTargets(model_type="plain", linears={"q": target, "k": other}), dtype=dtype, page_bytes=256
    )
    bank = AdapterBank(layout, capacity_bytes=1 << 16, device="cpu", max_slots=8, poison=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    loras = []
    for i, rank in enumerate(ranks):
        gain = draw(O_FEATURES) if with_gain and i % 2 == 0 else None
        loras.append(LinearLoRA(a=draw(rank, I_FEATURES), b=draw(rank, O_FEATURES), gain=gain))
        bank.load(f"a{i}", AdapterWeights(linears={"q": loras[-1]}))
    bank.load("elsewhere", AdapterWeights(linears={"k": loras[0]}))
    return bank, loras


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("with_gain", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("ranks", [(4, 4), (1, 3, 9)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 60])
def test_linear(dtype: torch.dtype, has_bias: bool, with_gain: bool, ranks: tuple[int, ...], tokens: int) -> None:
    bank, loras = linear_bank(dtype, with_gain=with_gain, ranks=ranks)
    names = ["a1", None, "elsewhere", "a0", "a1"] + ["a2"] * (len(ranks) == 3)
    generator = torch.Generator().manual_seed(1)
    x_MI = torch.randn(len(names) * tokens, I_FEATURES, generator=generator).to(dtype)
    bias_O = torch.randn(O_FEATURES, generator=generator).to(dtype) if has_bias else None
    y_MO = torch.randn(len(names) * tokens, O_FEATURES, generator=generator).to(dtype)
    found_MO = y_MO.clone()
    with rows_of(bank, names, tokens) as rows, poison_allocations():
        tables = bank.linear_tables("q")
        PUNICA.add_lora_linear(found_MO, x_MI, rows, tables, rank_bound=9, bias_O=bias_O)
        blind_MO = y_MO.clone()
        on_device = AdapterRows.on_device(rows.slots_M)
        PUNICA.add_lora_linear(blind_MO, x_MI, on_device, tables, rank_bound=9, bias_O=bias_O)
    assert torch.equal(blind_MO, found_MO)

    expected_MO = y_MO.double()
    for m in range(len(x_MI)):
        name = names[m // tokens]
        if name is None or name == "elsewhere":
            assert torch.equal(found_MO[m], y_MO[m])
            continue
        lora = loras[int(name[1])]
        base_O = expected_MO[m].clone()
        expected_MO[m] += lora.b.double().T @ (lora.a.double() @ x_MI[m].double())
        if lora.gain is not None:
            expected_MO[m] += (lora.gain.double() - 1) * (base_O if bias_O is None else base_O - bias_O.double())
    assert_close(found_MO.double() - y_MO.double(), expected_MO - y_MO.double(), DELTA_TOL[dtype], what="delta")


def test_a_batch_whose_adapters_are_all_elsewhere() -> None:
    bank, _ = linear_bank(torch.float32, with_gain=True, ranks=(2,))
    y_MO, x_MI = torch.randn(4, O_FEATURES), torch.randn(4, I_FEATURES)
    before = y_MO.clone()
    with rows_of(bank, ["elsewhere", None], 2) as rows:
        PUNICA.add_lora_linear(y_MO, x_MI, rows, bank.linear_tables("q"), rank_bound=2)
    assert torch.equal(y_MO, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("width_in", "width_out"), [(16, 8), (5, 7), (8, 3)])
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 1, 4], [1], [0, 2, 0]], ids=str)
def test_grouped_mm(dtype: torch.dtype, width_in: int, width_out: int, counts: list[int]) -> None:
    """One row each, strides that torch's grouped GEMM takes, and strides that it does not."""
    generator = torch.Generator().manual_seed(0)
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    x_LI = torch.randn(offsets[-1], width_in, generator=generator).to(dtype)
    w_GIO = torch.randn(len(counts), width_in, width_out, generator=generator).to(dtype)
    with poison_allocations():
        found_LO = grouped_mm(x_LI, w_GIO, offsets)
    parts = [x_LI[a:b].double() @ w_GIO[g].double() for g, (a, b) in enumerate(pairwise(offsets))]
    assert_close(found_LO, torch.cat(parts), DELTA_TOL[dtype], what="product")

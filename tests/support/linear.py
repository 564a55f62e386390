"""One linear map with a poisoned adapter bank behind it, and what its rows must become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegraft.core.tables import LinearTables
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, LinearLoRA, LinearTarget, ModelTargets
from support.kernels import DEVICE

MODULE = "linear"


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearCase:
    """Rows, the slot of each (-1 = base), the bank's tables and the adapters by slot."""

    x_MI: torch.Tensor
    y_MO: torch.Tensor
    slots_M: torch.Tensor
    bias_O: torch.Tensor
    tables: LinearTables
    bank: AdapterBank
    loras: dict[int, LinearLoRA]

    def expected(self, *, with_bias: bool = False) -> torch.Tensor:
        """y with W + B A merged row by row, in float64."""
        y_MO = self.y_MO.double().clone()
        for m, slot in enumerate(self.slots_M.tolist()):
            lora = self.loras.get(slot)
            if lora is None:
                continue
            base_O = y_MO[m] - self.bias_O.double() if with_bias else y_MO[m].clone()
            a_RI, b_RO = (t.to(self.x_MI.device).double() for t in (lora.a, lora.b))
            y_MO[m] += (a_RI @ self.x_MI[m].double()) @ b_RO
            if lora.gain is not None:
                y_MO[m] += (lora.gain.to(base_O.device).double() - 1) * base_O
        return y_MO


def make_linear_case(
    ranks: Sequence[int],
    picks: Sequence[int],
    *,
    in_features: int = 37,
    out_features: int = 45,
    dtype: torch.dtype = torch.float32,
    y_dtype: torch.dtype | None = None,
    gains: Sequence[int] = (),
    device: str = DEVICE,
    page_bytes: int = 1024,
    seed: int = 0,
) -> LinearCase:
    """Row m uses the adapter number ``picks[m]`` (-1 = none); adapter i has rank ``ranks[i]``, 0 for one that does not
    touch the map, and a gain where i is in ``gains``. Slots are shuffled and leave one out."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    names = (MODULE, "other")
    linears = {name: LinearTarget(name=name, in_features=in_features, out_features=out_features) for name in names}
    layout = BankLayout(ModelTargets(model_type="tiny", linears=linears), dtype=dtype, page_bytes=page_bytes)
    rows = sum(2 * rank + 4 for rank in ranks)
    capacity = (
        rows * max(in_features, out_features) // layout.page_elems * 2 + 8 * len(ranks) + 16
    ) * layout.page_bytes
    bank = AdapterBank(layout, capacity_bytes=capacity, device=device, max_slots=len(ranks) + 2, poison=True)
    filler = LinearLoRA(a=randn(1, in_features).to(dtype), b=randn(1, out_features).to(dtype))
    bank.load("filler", AdapterWeights(linears={"other": filler}))
    slot_of, loras = [], {}
    for i, rank in enumerate(ranks):
        lora = LinearLoRA(
            a=(randn(max(rank, 1), in_features) / in_features**0.5).to(dtype),
            b=(randn(max(rank, 1), out_features) / max(rank, 1) ** 0.5).to(dtype),
            gain=(1 + 0.3 * randn(out_features)).to(dtype) if i in gains else None,
        )
        handle = bank.load(f"a{i}", AdapterWeights(linears={MODULE if rank else "other": lora}))
        slot_of.append(handle.slot)
        if rank:
            loras[handle.slot] = lora
    x_MI = randn(len(picks), in_features).to(device, dtype)
    y_MO = randn(len(picks), out_features).to(device, y_dtype or dtype)
    return LinearCase(
        x_MI=x_MI,
        y_MO=y_MO,
        slots_M=torch.tensor([-1 if pick < 0 else slot_of[pick] for pick in picks], dtype=torch.int32, device=device),
        bias_O=randn(out_features).to(device, dtype),
        tables=bank.linear_tables(MODULE),
        bank=bank,
        loras=loras,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupCase:
    """Several maps of one bank over the same rows."""

    x_MI: torch.Tensor
    ys: list[torch.Tensor]
    slots_M: torch.Tensor
    biases: list[torch.Tensor | None]
    tables: list[LinearTables]


def make_group_case(
    ranks: Sequence[Sequence[int]], picks: Sequence[int], *, widths: Sequence[int], gains: Sequence[int] = ()
) -> GroupCase:
    """Map g has ``widths[g]`` columns; adapter i has rank ``ranks[g][i]`` on it, 0 for none, and a gain on map 0 where
    i is in ``gains``. Every second map has a bias."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    linears = {
        f"map{g}": LinearTarget(name=f"map{g}", in_features=37, out_features=width) for g, width in enumerate(widths)
    }
    layout = BankLayout(ModelTargets(model_type="tiny", linears=linears), dtype=torch.float32, page_bytes=2048)
    bank = AdapterBank(layout, capacity_bytes=1 << 20, device=DEVICE, max_slots=8, poison=True)
    slots = []
    for i in range(len(ranks[0])):
        loras = {
            f"map{g}": LinearLoRA(
                a=randn(ranks[g][i], 37) / 6,
                b=randn(ranks[g][i], width),
                gain=1 + 0.3 * randn(width) if g == 0 and i in gains else None,
            )
            for g, width in enumerate(widths)
            if ranks[g][i]
        }
        slots.append(bank.load(f"a{i}", AdapterWeights(linears=loras)).slot)
    return GroupCase(
        x_MI=randn(len(picks), 37).to(DEVICE),
        ys=[randn(len(picks), width).to(DEVICE) for width in widths],
        slots_M=torch.tensor([-1 if pick < 0 else slots[pick] for pick in picks], dtype=torch.int32, device=DEVICE),
        biases=[randn(width).to(DEVICE) if g % 2 else None for g, width in enumerate(widths)],
        tables=[bank.linear_tables(name) for name in linears],
    )

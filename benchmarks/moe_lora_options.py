"""What ranks, slots and batch-invariant results cost: Qwen3-30B-A3B's layer with adapters on it.

python benchmarks/moe_lora_options.py [--questions mixed,small,slots,invariant,separate]

- mixed: 32 adapters of ranks 4, 8, 16 and 64 as they are, and with every rank padded to 64
- small: 8 adapters of one rank, 1 to 16
- slots: 8 adapters of rank 16 in a bank of 8 to 256 slots
- invariant: results that do not depend on a row's neighbours
- separate: what LoRA adds to the layer inside its GEMMs, and what beside GEMMs that are not ours

Correctness first: a time whose outputs are wrong is not reported, and the run fails. Medians of CUDA-graph replays;
a line a variant, then one JSON line.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from grid_problem import (
    DTYPE,
    SHAPES,
    Adapters,
    Batch,
    check_layer,
    lora_batch,
    make_adapters,
    make_batch,
    make_layer,
)
from stopwatch import graph_us, run_facts

from moegraft.kernels.lora_expand.host import add_lora_w2, add_lora_w13, route_lora_rows
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.tuning.heuristic import batch_invariant_tiles
from moegraft.tuning.tiles import MoETiles

SHAPE = SHAPES["qwen3-30b"]
DECODE = (8, 32, 128)


class Form(enum.Enum):
    """What is timed: a layer with LoRA inside, the same without, or LoRA alone, beside GEMMs that are not ours."""

    LAYER = enum.auto()
    BASE = enum.auto()
    SEPARATE = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Adapters of ``ranks``, of which the first ``active`` serve rows (all by default)."""

    name: str
    ranks: tuple[int, ...]
    tokens: tuple[int, ...] = DECODE
    active: int | None = None
    pad_to: int = 0
    tiles: MoETiles | None = None
    form: Form = Form.LAYER


def _mixed() -> Iterator[Variant]:
    ranks = (4, 8, 16, 64) * 8
    yield Variant(name="ranks as they are", ranks=ranks, tokens=(*DECODE, 512))
    yield Variant(name="every rank padded to 64", ranks=ranks, tokens=(*DECODE, 512), pad_to=64)


def _small() -> Iterator[Variant]:
    for rank in (1, 2, 3, 4, 7, 8, 16):
        yield Variant(name=f"rank {rank}", ranks=(rank,) * 8)


def _slots() -> Iterator[Variant]:
    for slots in (8, 64, 256):
        # Slots behind the first 8 hold rank 1: resident, and of no row.
        yield Variant(name=f"{slots} slots", ranks=(16,) * 8 + (1,) * (slots - 8), active=8, tokens=(1, *DECODE, 4096))


def _invariant() -> Iterator[Variant]:
    for name, tiles in (("default", None), ("batch-invariant", batch_invariant_tiles())):
        yield Variant(name=name, ranks=(16,) * 8, tokens=(1, *DECODE, 512, 4096), tiles=tiles)


def _separate() -> Iterator[Variant]:
    for name, form in (("no adapters", Form.BASE), ("inside", Form.LAYER), ("LoRA beside", Form.SEPARATE)):
        yield Variant(name=name, ranks=(16,) * 8, tokens=(1, *DECODE, 512, 4096), form=form)


QUESTIONS = {
    "mixed": _mixed,
    "small": _small,
    "slots": _slots,
    "invariant": _invariant,
    "separate": _separate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=lambda s: s.split(","), default=list(QUESTIONS))
    questions = parser.parse_args().questions
    weights = make_layer(SHAPE, "cuda")
    rows = [_measure(question, variant, weights) for question in questions for variant in QUESTIONS[question]()]
    print(json.dumps({**run_facts(), "rows": rows}))
    if any(None in row["lora_us"].values() for row in rows):
        sys.exit("some results are wrong and were not timed")


def _measure(question: str, variant: Variant, weights: MoEWeights) -> dict[str, Any]:
    adapters = make_adapters(SHAPE, list(variant.ranks), "cuda", pad_to=variant.pad_to)
    times = {tokens: _layer_us(variant, weights, adapters, tokens) for tokens in variant.tokens}
    pool_mib = round(adapters.tables.pool.numel() * DTYPE.itemsize / 2**20)
    shown = "  ".join(f"{tokens}: {'WRONG' if time is None else time}" for tokens, time in times.items())
    print(f"{question:10s} {variant.name:24s} pool {pool_mib:5d} MiB  us by tokens  {shown}", flush=True)
    return {"question": question, "variant": variant.name, "pool_mib": pool_mib, "lora_us": times}


def _layer_us(variant: Variant, weights: MoEWeights, adapters: Adapters, num_tokens: int) -> float | None:
    batch = make_batch(SHAPE, num_tokens, variant.active or len(variant.ranks), "cuda")
    lora = lora_batch(adapters, batch)
    args = (batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK)
    out_TD, base_TD = (fused_moe_lora(*args, lora=which, tiles=variant.tiles) for which in (lora, None))
    separate = SeparateForm(weights, lora, batch)
    if variant.form is Form.SEPARATE:
        out_TD = separate.layer()
    if not check_layer(out_TD, base_TD, weights, adapters, batch).small:
        return None
    if variant.form is Form.SEPARATE:
        return round(graph_us(separate), 1)
    used = lora if variant.form is Form.LAYER else None
    return round(graph_us(lambda: fused_moe_lora(*args, lora=used, tiles=variant.tiles)), 1)


class SeparateForm:
    """Routing and both adds, as an experts class calls them whose GEMMs are not ours; the GEMMs here are torch's."""

    def __init__(self, weights: MoEWeights, lora: LoRABatch, batch: Batch) -> None:
        K = batch.topk_ids_TK.shape[1]
        self._weights, self._batch, self._K = weights, batch, K
        self._expert_N = batch.topk_ids_TK.flatten()
        self._lora = replace(lora, token_slots_T=lora.token_slots_T.repeat_interleave(K))
        self._x_ND = batch.x_TD.repeat_interleave(K, 0)
        N = len(self._expert_N)
        self._u_NGF, self._h_NF, self._y_ND = (
            torch.zeros(N, size, dtype=DTYPE, device=self._x_ND.device) for size in (2 * SHAPE.F, SHAPE.F, SHAPE.D)
        )

    def __call__(self) -> None:
        """What is timed."""
        rows = route_lora_rows(self._expert_N, self._lora, self._weights.sizes)
        add_lora_w13(self._u_NGF, self._x_ND, rows)
        add_lora_w2(self._y_ND, self._h_NF, rows)

    def layer(self) -> torch.Tensor:
        """A whole layer around the adds, for the check."""
        rows = route_lora_rows(self._expert_N, self._lora, self._weights.sizes)
        u_NGF = self._matmul(self._x_ND, self._weights.w13)
        add_lora_w13(u_NGF, self._x_ND, rows)
        gate, up = u_NGF.chunk(2, dim=1)
        h_NF = (torch.nn.functional.silu(gate) * up).to(DTYPE)
        y_ND = self._matmul(h_NF, self._weights.w2)
        add_lora_w2(y_ND, h_NF, rows)
        return (y_ND.unflatten(0, (-1, self._K)) * self._batch.topk_weights_TK[..., None]).sum(1)

    def _matmul(self, x_NI: torch.Tensor, w_EOI: torch.Tensor) -> torch.Tensor:
        """In float32: whose rounding it would be is not the question here."""
        out_NO = torch.empty(len(x_NI), w_EOI.shape[1], device=x_NI.device)
        for expert in self._expert_N.unique().tolist():
            n = self._expert_N == expert
            out_NO[n] = x_NI[n].float() @ w_EOI[expert].float().T
        return out_NO


if __name__ == "__main__":
    main()

"""The grid's layers in quantised formats: random codes under scales that keep the variance of hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from grid_problem import DTYPE, Adapters, Batch, LayerShape

from moegraft.core.tables import ExpertsFactor, Field
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.scaled import BLOCK


def _fp8_block(shape: LayerShape, device: torch.device | str) -> ExpertsWeights:
    D, F = -(-shape.D // BLOCK), -(-shape.F // BLOCK)
    return Fp8Experts(
        **_codes(shape, device, torch.float8_e4m3fn, 448.0),
        w13_scale=_scales(shape.E, 2 * F, D, fan_in=shape.D, largest=448.0, device=device),
        w2_scale=_scales(shape.E, D, F, fan_in=shape.F, largest=448.0, device=device),
    )


def _fp8_channel(shape: LayerShape, device: torch.device | str) -> ExpertsWeights:
    return Fp8Experts(**_codes(shape, device, torch.float8_e4m3fn, 448.0), **_row_scales(shape, device, 448.0))


def _int8(shape: LayerShape, device: torch.device | str) -> ExpertsWeights:
    return Int8Experts(**_codes(shape, device, torch.int8, 127.0), **_row_scales(shape, device, 127.0))


FORMATS: dict[str, Callable[[LayerShape, torch.device | str], ExpertsWeights]] = {
    "fp8": _fp8_block,
    "fp8-channel": _fp8_channel,
    "int8": _int8,
}
"""By the name on the command line; fp8 is scaled in blocks."""

STEPS = 4
"""The largest code is this many standard deviations."""


def _codes(
    shape: LayerShape, device: torch.device | str, dtype: torch.dtype, largest: float
) -> dict[str, torch.Tensor]:
    sizes = {"w13": (shape.E, 2 * shape.F, shape.D), "w2": (shape.E, shape.D, shape.F)}
    tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes.items()}
    for tensor in tensors.values():
        for matrix in tensor:  # one at a time: the numbers take twice the room of the codes
            numbers = torch.randn(matrix.shape, dtype=DTYPE, device=device) * (largest / STEPS)
            numbers = numbers.clamp(-largest, largest)
            matrix.copy_(numbers.round() if dtype == torch.int8 else numbers)
    return tensors


def _row_scales(shape: LayerShape, device: torch.device | str, largest: float) -> dict[str, torch.Tensor]:
    return {
        "w13_scale": _scales(shape.E, 2 * shape.F, fan_in=shape.D, largest=largest, device=device),
        "w2_scale": _scales(shape.E, shape.D, fan_in=shape.F, largest=largest, device=device),
    }


def _scales(*size: int, fan_in: int, largest: float, device: torch.device | str) -> torch.Tensor:
    """Uniform in [0.5, 1.5) of what gives weights a variance of 1 / fan_in."""
    return (torch.rand(size, device=device) + 0.5) * (STEPS / largest * fan_in**-0.5)


def oracle(weights: ExpertsWeights, adapters: Adapters | None, batch: Batch, tokens_C: torch.Tensor) -> torch.Tensor:
    """Float32 outputs [C, D] of some tokens, of the dequantised weights over the rows that their GEMMs read.

    h is rounded as the layer rounds it, or its quantisation would be another one.
    """
    x_CD, ids_CK = batch.x_TD[tokens_C], batch.topk_ids_TK[tokens_C].long()
    slots_C, weights_CK = batch.token_slots_T[tokens_C].long(), batch.topk_weights_TK[tokens_C]
    out_CD = torch.zeros_like(x_CD, dtype=torch.float32)

    def delta(v: torch.Tensor, a: ExpertsFactor, b: ExpertsFactor, slots: torch.Tensor, expert: int) -> torch.Tensor:
        assert adapters is not None
        low = torch.einsum("ci,cri->cr", v.float(), adapters.factors[a][slots, expert].float())
        b_cro = adapters.factors[b][slots, expert].float()
        lane = adapters.tables.factors[slots, b, Field.LANE].long()
        columns = lane[:, None] + torch.arange(b_cro.shape[1], device=lane.device)
        return torch.einsum("cr,cro->co", low.gather(1, columns), b_cro)

    for e in ids_CK.unique().tolist():
        c, k = torch.where(ids_CK == e)
        x, slots = x_CD[c], slots_C[c]
        gate, up = (weights.quantise_input(x.float()) @ weights.w13_in_out_of(e, torch.float32)).chunk(2, dim=1)
        if adapters is not None:
            gate = gate + delta(x, ExpertsFactor.A13, ExpertsFactor.B_GATE, slots, e)
            up = up + delta(x, ExpertsFactor.A13, ExpertsFactor.B_UP, slots, e)
        h = (torch.nn.functional.silu(gate) * up).to(DTYPE).float()
        y = weights.quantise_input(h, of_w2=True) @ weights.w2_in_out_of(e, torch.float32)
        if adapters is not None:
            y = y + delta(h, ExpertsFactor.A2, ExpertsFactor.B2, slots, e)
        out_CD.index_add_(0, c, y * weights_CK[c, k, None])
    return out_CD

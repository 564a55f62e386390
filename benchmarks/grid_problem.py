"""The layers, adapters and batches of the MoE-LoRA grid, their byte and FLOP floors, and a float32 oracle.

Shape letters: T tokens · K experts per token · N = T*K rows · E experts · D hidden size · F intermediate size ·
S adapter slots · r rank · C tokens that the oracle checks
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moegraft.core.config import Activation
from moegraft.core.tables import NUM_FIELDS, ExpertsFactor, ExpertsTables, Field
from moegraft.formats.base import ExpertsWeights
from moegraft.formats.dense import DenseExperts
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts, Int4Matrix
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts, MXFP4Matrix
from moegraft.formats.scaled import Granularity
from moegraft.kernels.four_bit_product.weights import four_bit_weights
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.bank.layout import ALIGN_BYTES, DEFAULT_PAGE_BYTES, choose_page_elems

BYTES_PER_S = 4.3e12
FLOPS_PER_S = 790e12
DTYPE = torch.bfloat16
Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    name: str
    E: int
    D: int
    F: int
    K: int


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape(name="qwen3-30b", E=128, D=2048, F=768, K=8),
        LayerShape(name="mixtral", E=8, D=4096, F=14336, K=2),
        LayerShape(name="gptoss20b", E=32, D=2880, F=2880, K=4),
        LayerShape(name="dsv3-tp8", E=256, D=7168, F=256, K=8),
    )
}
TOKENS = (1, 8, 32, 128, 512, 4096)
PREFILL_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Resident slots : rank : active adapters."""

    slots: int
    rank: int
    active: int

    def __str__(self) -> str:
        return f"{self.slots}:{self.rank}:{self.active}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        slots, rank, active = map(int, text.split(":"))
        return cls(slots=slots, rank=rank, active=active)


CELLS = tuple(map(Cell.parse, ("1:16:1", "8:16:8", "8:64:8", "32:16:32")))


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Dense factors for the oracle, [S, E, rows, row length] by ``ExpertsFactor``, and the tables that kernels read."""

    factors: tuple[torch.Tensor, ...]
    tables: ExpertsTables


@dataclass(frozen=True, kw_only=True)
class Batch:
    x_TD: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    token_slots_T: torch.Tensor


FORMATS = ("bf16", "fp8", "int8", "int4", "mxfp4")


def make_layer(shape: LayerShape, device: torch.device | str) -> MoEWeights:
    """Random weights; hidden states of unit variance keep it through the layer."""
    return MoEWeights(
        w13=_randn(shape.E, 2 * shape.F, shape.D, device=device).mul_(shape.D**-0.5),
        w2=_randn(shape.E, shape.D, shape.F, device=device).mul_(shape.F**-0.5),
    )


def make_experts(shape: LayerShape, format_name: str, device: torch.device | str) -> ExpertsWeights:
    """A layer in one of ``FORMATS``: fp8 in blocks, int4 in groups of 128. 4-bit codes are drawn, not rounded."""
    E, D, F = shape.E, shape.D, shape.F
    if format_name == "int4":
        w13, w2 = (_int4(E, *size, device=device) for size in ((2 * F, D), (D, F)))
        return Int4Experts(w13=w13, w2=w2)
    if format_name == "mxfp4":
        w13, w2 = (_mxfp4(E, *size, device=device) for size in ((2 * F, D), (D, F)))
        return MXFP4Experts(w13=w13, w2=w2)
    dense = make_layer(shape, device)
    if format_name == "bf16":
        return DenseExperts(w13=dense.w13, w2=dense.w2)
    if format_name == "fp8":
        return Fp8Experts.pack(dense.w13, dense.w2, granularity=Granularity.BLOCK)
    return Int8Experts.pack(dense.w13, dense.w2)


def kernel_weights(experts: ExpertsWeights) -> MoEWeights:
    """The layer as the kernels take it."""
    if isinstance(experts, Int4Experts | MXFP4Experts):
        return four_bit_weights(experts, Activation(), DTYPE)
    from moegraft.moe.experts.triton_experts import kernel_weights as eight_bit_weights

    return eight_bit_weights(experts, Activation())


def _int4(E: int, rows: int, length: int, *, device: torch.device | str) -> Int4Matrix:
    """Codes uniform in 0..15 have a standard deviation of 4.6."""
    granules = -(-length // 128)
    spread = torch.rand(E, granules, rows, 1, device=device) + 0.5
    return Int4Matrix(
        packed=_words(E, granules, rows, device=device),
        scales=spread.mul_(length**-0.5 / 4.8).to(DTYPE).float(),
        num_inputs=length,
        group=128,
    )


def _mxfp4(E: int, rows: int, length: int, *, device: torch.device | str) -> MXFP4Matrix:
    """Uniform codes have a standard deviation of 3.0; scales are powers of two around what is needed."""
    granules, exponent = -(-length // 128), 127 + math.floor(math.log2(length**-0.5 / 3.0))
    scales = torch.randint(exponent, exponent + 2, (E, granules, rows, 4), dtype=torch.uint8, device=device)
    return MXFP4Matrix(packed=_words(E, granules, rows, device=device), scales=scales, num_inputs=length)


def _words(*size: int, device: torch.device | str) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, (*size, 32), dtype=torch.int16, device=device)


def make_adapters(shape: LayerShape, ranks: list[int], device: torch.device | str, *, pad_to: int = 0) -> Adapters:
    """One adapter a slot, on all experts and projections, in pages scattered over the pool. Deltas are as large as the
    base's outputs. ``pad_to`` stores (and computes) at least this many rank rows, the surplus zero."""
    E, D, F, S = shape.E, shape.D, shape.F, len(ranks)
    stored = [max(rank, pad_to) for rank in ranks]
    lens = {"A13": D, "B_GATE": F, "B_UP": F, "A2": F, "B2": D}
    page_elems = _page_elems(shape)
    rows = [[(2 if name == "A13" else 1) * r for name in lens] for r in stored]
    pages = [
        [-(-E * n // (page_elems // length)) for n, length in zip(row, lens.values(), strict=True)] for row in rows
    ]
    num_pages = sum(map(sum, pages))
    pool = torch.empty(num_pages, page_elems, dtype=DTYPE, device=device)
    permutation = torch.randperm(num_pages, device=device, dtype=torch.int32) if pool.device.type != "meta" else None
    page_table = torch.zeros(S, -(-max(map(sum, pages)) // 16) * 16, dtype=torch.int32, device=device)
    descriptors = torch.zeros(S, len(lens), NUM_FIELDS, dtype=torch.int32)
    factors = [
        torch.zeros(S, E, max(r[i] for r in rows), n, dtype=DTYPE, device=device) for i, n in enumerate(lens.values())
    ]
    taken = 0
    for slot, rank in enumerate(ranks):
        first = 0
        for i, row_len in enumerate(lens.values()):
            R, count = rows[slot][i], pages[slot][i]
            is_a = i in (ExpertsFactor.A13, ExpertsFactor.A2)
            descriptors[slot, i, : Field.LANE + 1] = torch.tensor([first, 0, R, R, R if i == ExpertsFactor.B_UP else 0])
            if permutation is not None:
                data = _randn(E, R, row_len, device=device).mul_((row_len if is_a else rank) ** -0.5)
                if rank < stored[slot]:
                    data.view(E, -1, stored[slot], row_len)[:, :, rank:] = 0
                factors[i][slot, :, :R] = data
                ids = permutation[taken : taken + count]
                page_table[slot, first : first + count] = ids
                k = page_elems // row_len
                padded = torch.zeros(count * k, row_len, dtype=DTYPE, device=device)
                padded[: E * R] = data.view(-1, row_len)
                pool[ids.long(), : k * row_len] = padded.view(count, -1)
            first, taken = first + count, taken + count
    tables = ExpertsTables(
        pool=pool.view(-1),
        page_table=page_table,
        factors=descriptors.to(device),
        expert_index=torch.arange(E, dtype=torch.int32).repeat(S, 1).to(device),
        page_elems=page_elems,
    )
    return Adapters(factors=tuple(factors), tables=tables)


def empty_adapters(shape: LayerShape, cell: Cell, device: torch.device | str) -> Adapters:
    """Tables of a cell in which no adapter touches anything; the factors have shapes only."""
    D, F, E, S, r = shape.D, shape.F, shape.E, cell.slots, cell.rank
    sizes = ((2 * r, D), (r, F), (r, F), (r, F), (r, D))
    tables = ExpertsTables(
        pool=torch.empty(16, dtype=DTYPE, device=device),
        page_table=torch.zeros(S, 16, dtype=torch.int32, device=device),
        factors=torch.zeros(S, len(sizes), NUM_FIELDS, dtype=torch.int32, device=device),
        expert_index=torch.zeros(S, E, dtype=torch.int32, device=device),
        page_elems=_page_elems(shape),
    )
    return Adapters(
        factors=tuple(torch.empty(S, E, *size, dtype=DTYPE, device="meta") for size in sizes), tables=tables
    )


def _page_elems(shape: LayerShape) -> int:
    return choose_page_elems(
        [shape.F, shape.D],
        target_elems=DEFAULT_PAGE_BYTES // DTYPE.itemsize,
        align_elems=ALIGN_BYTES // DTYPE.itemsize,
    )


def make_batch(shape: LayerShape, num_tokens: int, active: int, device: torch.device | str, *, seed: int = 0) -> Batch:
    """Router logits random normal; adapters drawn uniformly, in the prefill cells as contiguous equal segments."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.randn(num_tokens, shape.E, generator=generator).softmax(1).topk(shape.K)
    slots = torch.randint(active, (num_tokens,), generator=generator)
    if num_tokens >= PREFILL_TOKENS:
        slots = torch.arange(num_tokens) * active // num_tokens
    return Batch(
        x_TD=torch.randn(num_tokens, shape.D, generator=generator).to(DTYPE).to(device),
        topk_ids_TK=ids.to(torch.int32).to(device),
        topk_weights_TK=(weights / weights.sum(1, keepdim=True)).to(device),
        token_slots_T=slots.to(torch.int32).to(device),
    )


def lora_batch(adapters: Adapters, batch: Batch) -> LoRABatch:
    return LoRABatch(
        tables=adapters.tables,
        token_slots_T=batch.token_slots_T,
        rank13=adapters.factors[ExpertsFactor.A13].shape[2],
        rank2=adapters.factors[ExpertsFactor.A2].shape[2],
    )


def floor_us(shape: LayerShape, batch: Batch, rank: int, expert_bytes: float | None = None) -> float:
    """Decode: bytes of the experts hit and of the (adapter, expert) pairs hit, over the copy bandwidth. Prefill: FLOPs
    of the base over the matrix rate. ``rank`` 0: without adapters. ``expert_bytes``: of packed weights."""
    D, F, (T, K) = shape.D, shape.F, batch.topk_ids_TK.shape
    if T >= PREFILL_TOKENS:
        return 1e6 * T * K * 6 * D * F / FLOPS_PER_S
    experts = batch.topk_ids_TK.unique().numel()
    pairs = (batch.topk_ids_TK + shape.E * batch.token_slots_T[:, None]).unique().numel()
    base = experts * (3 * D * F * DTYPE.itemsize if expert_bytes is None else expert_bytes)
    return 1e6 * (base + pairs * rank * (3 * D + 3 * F) * DTYPE.itemsize) / BYTES_PER_S


def oracle(
    weights: MoEWeights | ExpertsWeights, adapters: Adapters | None, batch: Batch, tokens_C: torch.Tensor
) -> torch.Tensor:
    """Float32 outputs [C, D] of some tokens, over dequantised weights and activations as their format reads them."""
    x_CD, ids_CK = batch.x_TD[tokens_C].float(), batch.topk_ids_TK[tokens_C].long()
    slots_C, weights_CK = batch.token_slots_T[tokens_C].long(), batch.topk_weights_TK[tokens_C]
    out_CD = torch.zeros_like(x_CD)
    for e in ids_CK.unique().tolist():
        c, k = torch.where(ids_CK == e)
        x = x_CD[c]
        w13_DF, w2_FD, read = _matrices(weights, e)
        u = read(x) @ w13_DF

        def low_rank(v: torch.Tensor, factor: ExpertsFactor, slots: torch.Tensor, expert: int) -> torch.Tensor:
            return torch.einsum("ci,cri->cr", v, adapters.factors[factor][slots, expert].float())

        def expand(v: torch.Tensor, factor: ExpertsFactor, slots: torch.Tensor, expert: int) -> torch.Tensor:
            b = adapters.factors[factor][slots, expert].float()
            return torch.einsum("cr,cro->co", v[:, : b.shape[1]], b)

        if adapters is not None:
            v = low_rank(x, ExpertsFactor.A13, slots_C[c], e)
            lane = adapters.tables.factors[slots_C[c], ExpertsFactor.B_UP, Field.LANE].long()
            up = torch.stack([row.roll(-int(shift)) for row, shift in zip(v, lane.tolist(), strict=True)])
            u = u + torch.cat(
                [expand(v, ExpertsFactor.B_GATE, slots_C[c], e), expand(up, ExpertsFactor.B_UP, slots_C[c], e)], 1
            )
        gate, up = u.chunk(2, dim=1)
        h = torch.nn.functional.silu(gate) * up
        y = read(h) @ w2_FD
        if adapters is not None:
            y = y + expand(low_rank(h, ExpertsFactor.A2, slots_C[c], e), ExpertsFactor.B2, slots_C[c], e)
        out_CD.index_add_(0, c, y * weights_CK[c, k, None])
    return out_CD


def _matrices(weights: MoEWeights | ExpertsWeights, expert: int) -> tuple[torch.Tensor, torch.Tensor, Read]:
    if isinstance(weights, MoEWeights):
        return weights.w13[expert].float().T, weights.w2[expert].float().T, lambda x: x
    w13_DF, w2_FD = weights.w13_in_out_of(expert, torch.float32), weights.w2_in_out_of(expert, torch.float32)
    return w13_DF, w2_FD, weights.quantise_input


def _randn(*size: int, device: torch.device | str) -> torch.Tensor:
    return torch.randn(size, dtype=DTYPE, device=device)

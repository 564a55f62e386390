"""The layers, adapters and batches of the MoE-LoRA grid, what they must move and compute, and a float32 oracle.

Shape letters: T tokens · K experts per token · N = T*K rows · E experts · D hidden size · F intermediate size ·
S adapter slots · r rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from moegraft.core.config import Activation
from moegraft.core.tables import NUM_FIELDS, ExpertsFactor, ExpertsTables, Field
from moegraft.formats.base import DenseExperts, ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts, Int4Matrix
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts, MXFP4Matrix
from moegraft.formats.scaled import Granularity
from moegraft.kernels.records import LoRABatch, MoEWeights, Quantisation, WeightFormat
from moegraft.kernels.weights import kernel_weights as layer_weights
from moegraft.lora.bank.layout import ALIGN_BYTES, DEFAULT_PAGE_BYTES, choose_page_elems

DTYPE = torch.bfloat16
MAX_REL_ERR = 1e-2
MAX_REL_ERR_FP8 = 2e-2
"""An adapter moves h, and what of h lies near the edge of two codes goes over it in the kernel or the oracle alone:
0.009 of the delta of many tokens, up to 0.011 of one token's."""
MAX_TOKEN_ERR = 5e-2
"""A wrong tile of 128 columns in one expert of 8 is 0.14 of a token; rounding is 0.005 in bf16 and 0.02 in fp8."""
Weights = TypeVar("Weights", MoEWeights, Quantisation)
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
        if not 1 <= active <= slots or rank < 1:
            raise ValueError(f"{text}: expected slots:rank:active with 1 <= active <= slots and rank >= 1")
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


FORMATS = ("bf16", "bf16-interleaved", "fp8", "int8", "int4", "mxfp4")


def make_layer(shape: LayerShape, device: torch.device | str) -> MoEWeights:
    """Random weights; hidden states of unit variance keep it through the layer."""
    return MoEWeights(
        w13=_randn(shape.E, 2 * shape.F, shape.D, device=device).mul_(shape.D**-0.5),
        w2=_randn(shape.E, shape.D, shape.F, device=device).mul_(shape.F**-0.5),
    )


def make_experts(shape: LayerShape, format_name: str, device: torch.device | str) -> ExpertsWeights:
    """A layer in one of ``FORMATS``: fp8 in blocks, int4 in groups of 128. 4-bit codes are drawn, not rounded.

    ``bf16-interleaved``: as gpt-oss stores unquantised experts, [E, in, out], columns of gate and up in turns.
    """
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
    if format_name == "bf16-interleaved":
        w13, w2 = dense.w13.mT.contiguous(), dense.w2.mT.contiguous()
        return DenseExperts(w13=w13, w2=w2, is_transposed=True, is_interleaved=True)
    if format_name == "fp8":
        return Fp8Experts.pack(dense.w13, dense.w2, granularity=Granularity.BLOCK)
    return Int8Experts.pack(dense.w13, dense.w2)


def kernel_weights(experts: ExpertsWeights) -> MoEWeights:
    """The layer as the kernels take it."""
    return layer_weights(experts, Activation(), DTYPE)


def empty_like(weights: Weights, device: torch.device | str) -> Weights:
    """The same tensors on this device, holding nothing: what is packed takes no more memory than it stores."""
    changes: dict[str, object] = {}
    for item in fields(weights):
        value = getattr(weights, item.name)
        if isinstance(value, torch.Tensor):
            changes[item.name] = torch.empty_like(value, device=device)
        elif isinstance(value, Quantisation):
            changes[item.name] = empty_like(value, device)
    return replace(weights, **changes)


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


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a layer must at least move and compute for a batch, however it is done."""

    num_bytes: float
    flops: float

    def floor_us(self, *, bytes_per_s: float, flops_per_s: float) -> float:
        """The longer of moving and computing, at the ceilings of a card."""
        return 1e6 * max(self.num_bytes / bytes_per_s, self.flops / flops_per_s)


def count_work(shape: LayerShape, batch: Batch, rank: int, expert_bytes: float | None = None) -> Work:
    """Bytes: the experts hit, A and B of the (adapter, expert) pairs hit, x and topk in, the sum out; each once.

    ``rank`` 0: without adapters. ``expert_bytes``: of one packed expert. A negative expert id is another rank's.
    """
    D, F, ids_TK = shape.D, shape.F, batch.topk_ids_TK.long()
    is_hit_TK = ids_TK >= 0
    rows = int(is_hit_TK.sum())
    experts = ids_TK[is_hit_TK].unique().numel()
    pairs = (ids_TK + shape.E * batch.token_slots_T[:, None].long())[is_hit_TK].unique().numel()
    weights = experts * (3 * D * F * DTYPE.itemsize if expert_bytes is None else expert_bytes)
    factors = pairs * rank * 3 * (D + F) * DTYPE.itemsize
    activations = 2 * batch.x_TD.nbytes + batch.topk_ids_TK.nbytes + batch.topk_weights_TK.nbytes
    return Work(num_bytes=weights + factors + activations, flops=6.0 * rows * (D * F + rank * (D + F)))


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of the base output and of the delta, over all tokens; ``worst_token``: of the delta, the largest
    error of one token over the root mean square of a token's delta. One wrong tile hides in the norm of all tokens."""

    base: float
    delta: float
    worst_token: float
    limit: float = MAX_REL_ERR

    @property
    def small(self) -> bool:
        """False for NaN too."""
        return max(self.base, self.delta) <= self.limit and self.worst_token <= MAX_TOKEN_ERR


def check_layer(
    out_TD: torch.Tensor,
    base_TD: torch.Tensor,
    weights: MoEWeights | ExpertsWeights,
    adapters: Adapters,
    batch: Batch,
) -> Errors:
    """Outputs with and without adapters against the oracle, every token of them."""
    base_reference = oracle(weights, None, batch)
    reference = oracle(weights, adapters, batch) - base_reference
    wrong_T = (out_TD.float() - base_TD.float() - reference).norm(dim=1)
    scale = reference.norm()
    return Errors(
        base=((base_TD.float() - base_reference).norm() / base_reference.norm()).item(),
        delta=(wrong_T.norm() / scale).item(),
        worst_token=(wrong_T.max() / scale * len(wrong_T) ** 0.5).item(),
        limit=MAX_REL_ERR_FP8 if _reads_fp8(weights) else MAX_REL_ERR,
    )


def _reads_fp8(weights: MoEWeights | ExpertsWeights) -> bool:
    return isinstance(weights, Fp8Experts) or getattr(weights, "format", None) is WeightFormat.FP8


def oracle(weights: MoEWeights | ExpertsWeights, adapters: Adapters | None, batch: Batch) -> torch.Tensor:
    """Float32 outputs [T, D], over dequantised weights and activations as their format reads them.

    A negative expert id is a choice that lies on another rank, and adds nothing here.
    """
    x_TD, ids_TK = batch.x_TD.float(), batch.topk_ids_TK.long()
    out_TD = torch.zeros_like(x_TD)
    for e in ids_TK[ids_TK >= 0].unique().tolist():
        t, k = torch.where(ids_TK == e)
        x, slots = x_TD[t], batch.token_slots_T[t].long()
        w13_DF, w2_FD, read = _matrices(weights, e)
        u = read(x) @ w13_DF
        gate, up = (u[:, ::2], u[:, 1::2]) if weights.is_interleaved else u.chunk(2, dim=1)
        if adapters is not None:
            v = _shrink(adapters, ExpertsFactor.A13, e, x, slots)
            gate = gate + _expand(adapters, ExpertsFactor.B_GATE, e, v)
            up = up + _expand(adapters, ExpertsFactor.B_UP, e, v)
        h = torch.nn.functional.silu(gate) * up
        y = read(h) @ w2_FD
        if adapters is not None:
            y += _expand(adapters, ExpertsFactor.B2, e, _shrink(adapters, ExpertsFactor.A2, e, h, slots))
        out_TD.index_add_(0, t, y * batch.topk_weights_TK[t, k, None])
    return out_TD


def _shrink(
    adapters: Adapters, factor: ExpertsFactor, expert: int, x: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Low-rank rows [rows, S, r] with the lanes of every adapter, zero but for those of the row's own."""
    a = adapters.factors[factor][:, expert].float()
    v = torch.einsum("ci,sri->csr", x, a)
    return v * (slots[:, None] == torch.arange(a.shape[0], device=slots.device))[..., None]


def _expand(adapters: Adapters, factor: ExpertsFactor, expert: int, v: torch.Tensor) -> torch.Tensor:
    """B of every adapter times its lanes of v, which begin at the factor's LANE."""
    b = adapters.factors[factor][:, expert].float()
    lanes = adapters.tables.factors[:, factor, Field.LANE].long()[:, None]
    lanes = lanes + torch.arange(b.shape[1], device=v.device)
    return torch.einsum("csr,sro->co", v.gather(2, lanes.expand(v.shape[0], -1, -1)), b)


def _matrices(weights: MoEWeights | ExpertsWeights, expert: int) -> tuple[torch.Tensor, torch.Tensor, Read]:
    """w13 [D, 2F] and w2 [F, D] of one expert in float32, and what their GEMMs make of the rows that they read."""
    if isinstance(weights, MoEWeights):
        return weights.w13[expert].float().T, weights.w2[expert].float().T, lambda x: x
    w13_DF, w2_FD = weights.w13_in_out_of(expert, torch.float32), weights.w2_in_out_of(expert, torch.float32)
    if isinstance(weights, Fp8Experts):  # h is rounded to the compute dtype before it is quantised
        return w13_DF, w2_FD, lambda x: weights.quantise_input(x.to(DTYPE).float())
    return w13_DF, w2_FD, lambda x: x


def _randn(*size: int, device: torch.device | str) -> torch.Tensor:
    return torch.randn(size, dtype=DTYPE, device=device)

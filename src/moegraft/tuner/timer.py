"""Measuring tiles of a layer on this device, for ``tuner.search``: first whether they are right, then how fast."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from moegraft.core.config import MoEConfig
from moegraft.kernels.records import LoRABatch, MoEWeights
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, ModelTargets
from moegraft.testing.errors import relative_error
from moegraft.testing.poison import poison_allocations
from moegraft.tuner.search import DeviceLostError, WrongResultError
from moegraft.tuning.tiles import MoETiles, TuningShape

REFERENCE_TILES = MoETiles()
"""Small tiles without any of the paths that a candidate may choose: they fit every device."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error between two tiles' results: sums of another order, rounded to the dtype twice on the way."""
ROUNDS = 5
ROUND_US = 10_000.0

_MODULE = "experts"

TimeCall = Callable[[Callable[[], object], float], float]
"""Microseconds of one call; need not be exact above the limit that is the second argument."""
HOPELESS_RATIO = 1.2
"""A call that takes this much longer than the best so far is timed once."""


@dataclass(frozen=True, kw_only=True)
class TunedLayer:
    """A layer to tune. ``num_adapters`` of ``rank`` on all experts; none: the base alone."""

    config: MoEConfig
    is_transposed: bool = False
    is_interleaved: bool = False
    rank: int = 16
    num_adapters: int = 8

    @property
    def rank13(self) -> int:
        """Gate and up have an A each."""
        return self.rank * self.config.activation.num_halves if self.num_adapters else 0

    def shape(self, num_tokens: int) -> TuningShape:
        return TuningShape(
            num_tokens=num_tokens,
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            num_slots=self.num_adapters,
            rank13=self.rank13,
            rank2=self.rank if self.num_adapters else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of some calls. ``loras``: one a call; None: without adapters."""

    x_TD: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    loras: tuple[LoRABatch | None, ...]


class TileTimer:
    """A ``tuner.search.Measure`` over one layer with random weights, uniform routing and uniform adapters.

    A time is that of a call without adapters and one with them, one after the other: a table's tiles serve both.
    """

    def __init__(self, layer: TunedLayer, *, device: torch.device | str, time_call: TimeCall | None = None) -> None:
        self.layer = layer
        self.device = torch.device(device)
        self.weights = random_weights(layer, self.device)
        self._bank = random_adapters(layer, self.device)
        self._time_call = time_call or graph_us
        self._batch = lru_cache(maxsize=None)(self._make_batch)
        self._best_us: dict[TuningShape, float] = {}

    def __call__(self, shape: TuningShape, tiles: MoETiles) -> float:
        """Microseconds. Raises as ``tuner.search.Measure`` says."""
        try:
            batch, expected = self._batch(shape.num_tokens)
            with poison_allocations():  # rows that the tiles do not write must not hold another trial's result
                outs = run_batch(self.weights, batch, tiles)
            for out, right in zip(outs, expected, strict=True):
                error = relative_error(out, right)
                if not error <= TOLERANCE[out.dtype]:
                    raise WrongResultError(f"relative error {error:.1e}")
            limit = HOPELESS_RATIO * self._best_us.get(shape, math.inf)
            us = self._time_call(lambda: run_batch(self.weights, batch, tiles), limit)
            self._best_us[shape] = min(us, self._best_us.get(shape, us))
            return us
        except WrongResultError:
            raise
        except Exception:
            self._check_device()
            raise

    def _make_batch(self, num_tokens: int) -> tuple[Batch, tuple[torch.Tensor, ...]]:
        """A batch and its results with the reference's tiles."""
        batch = random_batch(self.layer, self._bank, num_tokens, self.device)
        return batch, run_batch(self.weights, batch, REFERENCE_TILES)

    def _check_device(self) -> None:
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise DeviceLostError(
                f"the GPU cannot go on after a trial ({first_line}); run the command again"
            ) from error


def run_batch(weights: MoEWeights, batch: Batch, tiles: MoETiles) -> tuple[torch.Tensor, ...]:
    """The results of the batch's calls."""
    from moegraft.kernels.moe_forward.host import fused_moe_lora  # needs triton

    ids_TK, weights_TK = batch.topk_ids_TK, batch.topk_weights_TK
    return tuple(
        fused_moe_lora(batch.x_TD, weights, ids_TK, weights_TK, lora=lora, tiles=tiles) for lora in batch.loras
    )


def random_batch(layer: TunedLayer, bank: AdapterBank | None, num_tokens: int, device: torch.device) -> Batch:
    """Uniform routing, uniform adapters; one call without them and, with a bank, one with them."""
    config, generator = layer.config, torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.randn(num_tokens, config.num_experts, generator=generator).softmax(1)
    weights_TK, ids_TK = scores_TE.topk(config.top_k)
    x_TD = torch.randn(num_tokens, config.hidden_size, generator=generator).to(config.dtype)
    loras: list[LoRABatch | None] = [None]
    if bank is not None:
        slots_T = torch.randint(layer.num_adapters, (num_tokens,), generator=generator, dtype=torch.int32)
        tables, shape = bank.experts_tables(_MODULE), layer.shape(num_tokens)
        slots_T = slots_T.to(device)
        loras.append(LoRABatch(tables=tables, token_slots_T=slots_T, rank13=shape.rank13, rank2=shape.rank2))
    return Batch(
        x_TD=x_TD.to(device),
        topk_ids_TK=ids_TK.to(device=device, dtype=torch.int32),
        topk_weights_TK=(weights_TK / weights_TK.sum(1, keepdim=True)).to(device),
        loras=tuple(loras),
    )


def random_weights(layer: TunedLayer, device: torch.device) -> MoEWeights:
    """Weights that keep the variance of hidden states."""
    weights = empty_weights(layer, device)
    weights.w13.normal_().mul_(layer.config.hidden_size**-0.5)
    weights.w2.normal_().mul_(layer.config.intermediate_size**-0.5)
    return weights


def empty_weights(layer: TunedLayer, device: torch.device) -> MoEWeights:
    """Weights of any content; no biases, which cost no time that tiles could change."""
    config = layer.config
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    GF = config.activation.num_halves * F
    sizes13, sizes2 = ((E, D, GF), (E, F, D)) if layer.is_transposed else ((E, GF, D), (E, D, F))
    return MoEWeights(
        w13=torch.empty(sizes13, dtype=config.dtype, device=device),
        w2=torch.empty(sizes2, dtype=config.dtype, device=device),
        activation=config.activation,
        is_transposed=layer.is_transposed,
        is_interleaved=layer.is_interleaved,
    )


def empty_bank(layer: TunedLayer, device: torch.device) -> AdapterBank | None:
    """A bank that has room for the layer's adapters. None without adapters."""
    if not layer.num_adapters:
        return None
    config, rank, gated = layer.config, layer.rank, layer.config.activation.gated
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    target = ExpertsTarget(name=_MODULE, num_experts=E, hidden_size=D, intermediate_size=F, has_gate=gated)
    layout = BankLayout(ModelTargets(model_type="tuning", experts={_MODULE: target}), dtype=config.dtype)
    rows = [E * (layer.rank13 if entry.label == "a13" else rank) for entry in layout.entries]
    pages = sum(-(-count // layout.rows_per_page(entry)) + 1 for entry, count in enumerate(rows))
    return AdapterBank(
        layout,
        capacity_bytes=layer.num_adapters * pages * layout.page_bytes,
        device=device,
        max_slots=layer.num_adapters,
    )


def random_adapters(layer: TunedLayer, device: torch.device) -> AdapterBank | None:
    """A bank with all adapters resident; one adapter's numbers serve all. None without adapters."""
    bank = empty_bank(layer, device)
    if bank is None:
        return None
    config, rank, gated = layer.config, layer.rank, layer.config.activation.gated
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size

    def factor(num_rows: int, row_len: int, fan_in: int) -> torch.Tensor:
        return torch.randn(E, num_rows, row_len, dtype=config.dtype, device=device).mul_(fan_in**-0.5).cpu()

    lora = ExpertsLoRA(
        expert_ids=tuple(range(E)),
        a13=factor(layer.rank13, D, D),
        b_gate=factor(rank, F, rank) if gated else None,
        b_up=factor(rank, F, rank),
        up_lane=rank if gated else 0,
        a2=factor(rank, F, F),
        b2=factor(rank, D, rank),
    )
    for index in range(layer.num_adapters):
        bank.load(str(index), AdapterWeights(experts={_MODULE: lora}))
    return bank


def graph_us(call: Callable[[], object], limit: float = math.inf) -> float:
    """Median microseconds of a call, from replays of a CUDA graph that holds one; above ``limit`` a rough figure."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    rough_us = _replay_us(graph, 3)
    if rough_us > limit:
        return rough_us
    replays = max(3, min(200, int(ROUND_US / max(1.0, rough_us))))
    return statistics.median(_replay_us(graph, replays) for _ in range(ROUNDS))


def _replay_us(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / times

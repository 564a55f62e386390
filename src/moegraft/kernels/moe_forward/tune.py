"""Measuring tiles of a layer on this GPU, for ``tuning.search``."""

from __future__ import annotations

import statistics
from functools import lru_cache

import torch

from moegraft.core.config import Activation
from moegraft.kernels.moe_forward.run import run_layer
from moegraft.kernels.records import MoEWeights
from moegraft.tuning.tiles import MoETiles, TuningShape

ROUNDS = 5


class LayerTimer:
    """Times calls of one layer with random weights, made once; routing is uniform. A ``tuning.search.Measure``."""

    def __init__(
        self,
        shape: TuningShape,
        *,
        dtype: torch.dtype = torch.bfloat16,
        activation: Activation | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        self.activation = activation or Activation()
        halves = self.activation.num_halves
        E, D, F = shape.num_experts, shape.hidden_size, shape.intermediate_size
        self.weights = MoEWeights(
            w13=torch.randn(E, halves * F, D, dtype=dtype, device=device).mul_(D**-0.5),
            w2=torch.randn(E, D, F, dtype=dtype, device=device).mul_(F**-0.5),
            activation=self.activation,
        )
        self._batch = lru_cache(maxsize=2)(self._make_batch)

    def __call__(self, shape: TuningShape, tiles: MoETiles) -> float:
        """Median microseconds of a call, from replays of a CUDA graph."""
        x_TD, ids_TK, weights_TK = self._batch(shape.num_tokens, shape.top_k)

        def call() -> torch.Tensor:
            return run_layer(x_TD, self.weights, ids_TK, weights_TK, None, weight_on_input=False, tiles=tiles)

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return statistics.median(_replay_us(graph, 10) for _ in range(ROUNDS))

    def _make_batch(self, num_tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w13 = self.weights.w13
        scores_TE = torch.rand(num_tokens, self.weights.num_experts, device=w13.device)
        weights_TK, ids_TK = scores_TE.topk(top_k)
        x_TD = torch.randn(num_tokens, self.weights.hidden_size, dtype=w13.dtype, device=w13.device)
        return x_TD, ids_TK.to(torch.int32), weights_TK.contiguous()


def _replay_us(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / times

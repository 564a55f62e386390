"""What mixed ranks save over padded ones, and what batch-invariant results cost: Qwen3-30B-A3B's layer, JSON lines.

python benchmarks/moe_lora_options.py
"""

from __future__ import annotations

import json

from grid_problem import CELLS, DTYPE, SHAPES, Adapters, lora_batch, make_adapters, make_batch, make_layer
from moe_lora_grid import graph_us

from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import MoEWeights
from moegraft.tuning.heuristic import batch_invariant_tiles
from moegraft.tuning.tiles import MoETiles

SHAPE = SHAPES["qwen3-30b"]
RANKS = [4, 8, 16, 64] * 8


def main() -> None:
    weights = make_layer(SHAPE, "cuda")
    for name, pad_to in (("mixed ranks 4, 8, 16, 64", 0), ("every rank padded to 64", 64)):
        adapters = make_adapters(SHAPE, RANKS, "cuda", pad_to=pad_to)
        mib = adapters.tables.pool.numel() * DTYPE.itemsize / 2**20
        times = {tokens: _layer_us(weights, adapters, tokens, len(RANKS), None) for tokens in (8, 32, 128, 512)}
        print(json.dumps({"adapters": len(RANKS), "ranks": name, "pool_mib": round(mib), "lora_us": times}), flush=True)
        del adapters
    adapters = make_adapters(SHAPE, [CELLS[1].rank] * CELLS[1].slots, "cuda")
    for name, tiles in (("default", None), ("batch-invariant", batch_invariant_tiles())):
        times = {t: _layer_us(weights, adapters, t, CELLS[1].active, tiles) for t in (1, 8, 32, 128, 512, 4096)}
        print(json.dumps({"cell": str(CELLS[1]), "results": name, "lora_us": times}), flush=True)


def _layer_us(weights: MoEWeights, adapters: Adapters, num_tokens: int, active: int, tiles: MoETiles | None) -> float:
    batch = make_batch(SHAPE, num_tokens, active, "cuda")
    lora = lora_batch(adapters, batch)
    args = (batch.x_TD, weights, batch.topk_ids_TK, batch.topk_weights_TK)
    return round(graph_us(lambda: fused_moe_lora(*args, lora=lora, tiles=tiles)), 1)


if __name__ == "__main__":
    main()

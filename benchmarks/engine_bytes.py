"""What the ranks of an engine send each other for a token, by layout, against what its routing demands: gloo, counted.

    python benchmarks/engine_bytes.py [--shapes qwen3-30b,...] [--layouts tp2,ep2,dp2,ep4,dp4,tp2ep2] [--batch 16]

Models of two layers with the D, E, K of real ones and a small F, since no byte that travels depends on it; random
bfloat16 weights; half of the requests with an adapter. All bytes that the layers of all ranks send, from the first
prompt to the last token, by the communicators' own count, over rows and layers.

Demanded, counted apart, from the experts that the model's own routers chose: where rows travel (``dp``), a row of 2 D
bytes to each other rank that holds an expert of it, and a sum of 2 D back from each; where all ranks have all rows,
the sum alone, which every rank has a part of and needs: 2 (R - 1) times 2 D, as the best all-reduce sends. Headers: K
router weights, K ids and an adapter with each row that travels, and the counts that hosts exchange. logits: of a row
that another rank than 0 samples for; plan: what rank 0 says to each other rank before a step. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from end_to_end_decode import write_adapter
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moegraft import Engine, ParallelConfig, SamplingParams
from moegraft.cli.launch import run_on_ranks
from moegraft.parallel import Communicator
from moegraft.parallel.slices import ExpertMap

SHAPES = {
    "qwen3-30b": (2048, 128, 8),
    "gptoss20b": (2880, 32, 4),
    "mixtral": (4096, 8, 2),
    "dsv3": (7168, 256, 8),
}
"""D, E, K."""
LAYOUTS = {
    "tp2": ParallelConfig(tp=2),
    "ep2": ParallelConfig(ep=2),
    "dp2": ParallelConfig(ep=2, data_parallel=True),
    "ep4": ParallelConfig(ep=4),
    "dp4": ParallelConfig(ep=4, data_parallel=True),
    "tp2ep2": ParallelConfig(tp=2, ep=2),
}
LAYERS, VOCABULARY, NEW, PROMPT = 2, 512, 8, 12
ITEM = 2  # bytes of an element
COUNTS = 32  # bytes that a host sends to each other one, a layer


@dataclass(frozen=True, kw_only=True)
class Work:
    shape: str
    layout: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of all ranks together, of a row in a layer; ``logits``: of a row; ``plan``: of a step, to each rank."""

    shape: str
    layout: str
    batch: int
    rows: int
    demanded: float
    headers: float
    sent: float
    logits: float
    plan: float


def main() -> None:
    args = parse_arguments()
    rows = []
    print("shape       layout  demanded  headers     sent   over  logits    plan")
    for shape in args.shapes:
        for layout in args.layouts:
            work = Work(shape=shape, layout=layout, batch=args.batch)
            row = run_on_ranks(count, work, size=LAYOUTS[layout].world_size, device=torch.device("cpu"))
            assert row is not None
            rows.append(row)
            print(
                f"{shape:11} {layout:7} {row.demanded:8.0f} {row.headers:8.0f} {row.sent:8.0f} "
                f"{(row.sent - row.headers) / row.demanded:6.3f} {row.logits:7.0f} {row.plan:7.0f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "engine_bytes", "torch": torch.__version__, "rows": [asdict(row) for row in rows]}))


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, default=list(SHAPES))
    parser.add_argument("--layouts", type=names, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=16, help="requests, a multiple of the ranks")
    return parser.parse_args()


def count(work: Work, rank: int) -> Row | None:
    """On every rank: an engine that serves a batch; on rank 0 what all have sent and what was demanded."""
    parallel = LAYOUTS[work.layout]
    made = keep_communicators()
    model = make_model(work.shape)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2].clone()))
    options: dict[str, Any] = {
        "kv_memory": "64MiB",
        "max_model_len": PROMPT + NEW + 1,
        "max_rows": work.batch,
        "adapter_memory": "512MiB",
        "device": "cpu",
    }
    steps = 0
    if rank > 0:
        Engine.follow(model, parallel=parallel, **options)
    else:
        with TemporaryDirectory() as scratch, Engine(model, parallel=parallel, **options) as engine:
            engine.load_adapter("a", write_adapter(model, Path(scratch) / "a", rank=4, seed=0))
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(VOCABULARY, (work.batch, PROMPT), generator=generator).tolist()
            prompts = [(tuple(one), "a" if i % 4 < 2 else None) for i, one in enumerate(ids)]
            sampling = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
            answers = list(engine.generate(prompts, sampling))
            assert all(one.outputs[0].error is None for one in answers)
            steps = engine.stats().steps
    layers = ("world", "tensor-parallel", "expert-parallel")
    sent = sum(each.traffic.total_bytes for each in made if each.name in layers)
    said = sum(each.traffic.sent_bytes.get("broadcast", 0) for each in made if each.name == "plans")
    mine = (sent, *demand(work.shape, parallel, rank, chosen))
    told: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(told, mine)
    if rank > 0:
        return None
    all_sent, demanded, headers, rows = (sum(column) for column in zip(*told, strict=True))
    if not parallel.data_parallel:
        rows //= parallel.world_size
    elsewhere = work.batch * NEW * (parallel.ep - 1) // parallel.ep if parallel.data_parallel else 0
    logits = elsewhere * VOCABULARY * ITEM
    return Row(
        **vars(work),
        rows=rows // LAYERS,
        demanded=demanded / rows,
        headers=headers / rows,
        sent=(all_sent - logits) / rows,
        logits=VOCABULARY * ITEM if elsewhere else 0,
        plan=said / (parallel.world_size - 1) / steps,
    )


def keep_communicators() -> list[Communicator]:
    """Those that this process makes from here on."""
    made: list[Communicator] = []
    make = Communicator.__init__

    def keep(self: Communicator, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)

    Communicator.__init__ = keep  # type: ignore[method-assign]
    return made


def demand(shape: str, parallel: ParallelConfig, rank: int, chosen: list[torch.Tensor]) -> tuple[int, int, int]:
    """(bytes demanded, headers, rows times layers) of this rank's rows."""
    hidden, num_experts, top_k = SHAPES[shape]
    rows = sum(len(ids_TK) for ids_TK in chosen)
    if not parallel.data_parallel:
        # The ranks bring the same rows, and each sends its share of the sum.
        return rows * 2 * (parallel.world_size - 1) * hidden * ITEM // parallel.world_size, 0, rows
    holders = ExpertMap.contiguous(num_experts, parallel.ep).experts_of_rank
    travels = 0
    for ids_TK in chosen:
        for ids in ids_TK.tolist():
            travels += sum(r != rank and not set(ids).isdisjoint(holders[r]) for r in range(parallel.ep))
    headers = travels * (8 * top_k + 4) + len(chosen) * (parallel.ep - 1) * COUNTS
    return travels * 2 * hidden * ITEM, headers, rows


def make_model(shape: str) -> Qwen3MoeForCausalLM:
    hidden, num_experts, top_k = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=128,
        dtype=torch.bfloat16,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


if __name__ == "__main__":
    main()

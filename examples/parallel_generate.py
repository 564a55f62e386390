"""One mixture-of-experts model on several processes, with an adapter a row. Needs ``moegraft[demo]``.

    torchrun --nproc-per-node 2 examples/parallel_generate.py             tensor parallel
    torchrun --nproc-per-node 2 examples/parallel_generate.py --ep 2      expert parallel
    torchrun --nproc-per-node 2 examples/parallel_generate.py --ep 2 --data-parallel
    torchrun --nproc-per-node 2 examples/parallel_generate.py --plan      transformers' own plan, attention included

The same commands run on the CPU (gloo) and on GPUs (NCCL, one GPU a process); ``--device cpu`` keeps off GPUs. The
checkpoint and the adapters are tiny, random and made on the spot: put your own paths in their place.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moegraft

NAMES = ["sql", None, "chat", "sql"]


def make_files(folder: Path) -> None:
    """A checkpoint and two adapters, as training runs would leave them."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder / "model")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    make_adapter(model, LoraConfig(r=4, target_modules=[], target_parameters=experts), folder / "sql")
    make_adapter(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]), folder / "chat")


def make_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    peft_model.save_pretrained(folder)


def generate(graft: moegraft.GraftedModel, folder: Path, rows: list[int]) -> list[list[int]]:
    for name in ("sql", "chat"):
        graft.load_adapter(folder / name, name=name)  # on all ranks, or on none
    ids = torch.tensor([[5, 17, 42, 99]], device=graft.model.device).repeat(len(rows), 1)
    tokens = graft.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapters=[NAMES[row] for row in rows],
        max_new_tokens=8,
        do_sample=False,
    )
    return tokens[:, 4:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy decoding on several processes.")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts out; the others share F")
    parser.add_argument("--data-parallel", action="store_true", help="every expert-parallel rank has rows of its own")
    parser.add_argument("--plan", action="store_true", help="load with tp_plan='auto' instead")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args = parser.parse_args()

    device = moegraft.init_parallel(args.device)  # joins the world that torchrun started
    rank, world = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if rank == 0:
        make_files(folder)
    dist.barrier()

    rows = list(range(len(NAMES)))
    if args.plan:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", tp_size=world)
        graft = moegraft.attach(model, adapter_memory="64MiB")
    else:
        layout = moegraft.ParallelConfig(tp=world // args.ep, ep=args.ep, data_parallel=args.data_parallel)
        if layout.data_parallel:
            rows = rows[layout.ep_rank_of(rank) :: layout.ep]
        # Loaded on the host, cut to this rank's slice, and only that moved to the device.
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        graft = moegraft.attach(model, adapter_memory="64MiB", parallel=layout, device=device)
    answers = generate(graft, folder, rows)

    # One process, for comparison: each of a rank's rows is what it would be alone.
    whole = moegraft.attach(AutoModelForCausalLM.from_pretrained(folder / "model").to(device), adapter_memory="64MiB")
    same = answers == generate(whole, folder, rows)
    held = {name: info.num_bytes for name, info in graft.adapters.items()}
    lines: list[str] = [""] * world
    dist.all_gather_object(lines, f"rank {rank}: rows {rows}, adapters of {held} bytes, same as one process: {same}")
    if rank == 0:
        for row, answer in zip(rows, answers, strict=True):
            print(f"{NAMES[row] or 'base':5} {answer}")
        print("\n".join(lines))
    graft.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""For authors of engines: a mixture-of-experts layer with many adapters, from plain tensors. No transformers.

    python examples/engine_layers.py

Shape letters: T tokens · E experts · K experts per token · D hidden size · F expert intermediate size · r rank
"""

from __future__ import annotations

import torch

from moegraft.layers import (
    Activation,
    ActivationKind,
    AdapterBank,
    AdapterRows,
    AdapterWeights,
    BankLayout,
    DenseExperts,
    ExpertsLoRA,
    ExpertsTarget,
    ModelTargets,
    MoEConfig,
    RankBounds,
    RouterConfig,
    Scoring,
    build_fused_moe,
    build_fused_moe_with_lora,
)

E, K, D, F = 8, 2, 64, 48
LAYER = "layers.0.experts"


def random_lora(rank: int, experts: tuple[int, ...]) -> ExpertsLoRA:
    """Rank rows, B transposed and scaled: gate and up read one A here (``up_lane=0``)."""
    h = len(experts)
    return ExpertsLoRA(
        expert_ids=experts,
        a13=torch.randn(h, rank, D) / D**0.5,
        b_gate=torch.randn(h, rank, F) / 4,
        b_up=torch.randn(h, rank, F) / 4,
        a2=torch.randn(h, rank, F) / F**0.5,
        b2=torch.randn(h, rank, D) / 4,
    )


def main() -> None:
    torch.manual_seed(0)

    # 1. The layer: sizes, weights as the checkpoint stores them, a router. The oracle chooses the experts class.
    config = MoEConfig(
        num_experts=E, top_k=K, hidden_size=D, intermediate_size=F, activation=Activation(kind=ActivationKind.SILU)
    )
    weights = DenseExperts(w13=torch.randn(E, 2 * F, D) / D**0.5, w2=torch.randn(E, D, F) / F**0.5)
    router = RouterConfig(top_k=K, scoring=Scoring.SOFTMAX, renormalize=True)
    layer, decision = build_fused_moe(config, weights, router=router)
    print(f"backend: {decision.backend}")
    for rejection in decision.rejections:
        print(f"  not {rejection.backend}: {rejection.reason}")

    # 2. The bank: one for all layers of a model. Ranks, and the experts touched, differ by adapter.
    target = ExpertsTarget(name=LAYER, num_experts=E, hidden_size=D, intermediate_size=F)
    layout = BankLayout(ModelTargets(model_type="mine", experts={LAYER: target}), dtype=torch.float32)
    bank = AdapterBank(layout, capacity_bytes=16 << 20, device="cpu")
    bank.load("sql", AdapterWeights(experts={LAYER: random_lora(rank=8, experts=tuple(range(E)))}))
    bank.load("chat", AdapterWeights(experts={LAYER: random_lora(rank=3, experts=(0, 1, 2, 4, 6))}))
    for name in bank.names():
        info = bank.info(name)
        print(f"adapter {name}: {info.num_bytes} bytes in {info.num_pages} pages")

    # 3. One step of five sequences, each with its own adapter or none. Adapters are held while the batch runs.
    names = ["sql", None, "chat", "sql", None]
    x_TD, router_logits_TE = torch.randn(len(names), D), torch.randn(len(names), E)
    with_lora = build_fused_moe_with_lora(layer, bank.experts_tables(LAYER))
    with bank.acquire(names) as batch:
        rows = AdapterRows.of(batch.row_slots, device=x_TD.device)
        out_TD = with_lora(x_TD, router_logits_TE, rows, RankBounds.of(batch.max_ranks(LAYER)))

    # 4. A row without an adapter is bit for bit what it is in a batch without adapters.
    base_TD = layer(x_TD, router_logits_TE)
    print("row  adapter  changed by")
    for t, name in enumerate(names):
        print(f"{t:3}  {name or 'base':7}  {(out_TD[t] - base_TD[t]).norm() / base_TD[t].norm():.3f}")
    bank.unload("chat")


if __name__ == "__main__":
    main()

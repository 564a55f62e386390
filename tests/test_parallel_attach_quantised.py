"""attach(parallel=...) to quantised experts: cut between the groups of columns that share a scale, sent packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.distributed import WorldPool
from support.families import build
from support.family_adapters import save_everything, save_experts
from support.formats import PACKS
from support.parallel_models import ModelCase, assert_within, make_batch
from support.thinned import thinned

import moegraft
from moegraft.integrations.transformers.host.storage import host_experts, pack_experts
from moegraft.parallel import ParallelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (None, "everything", "experts", None, "experts")
LAYOUTS = {
    "tp": ParallelConfig(tp=2),
    "ep": ParallelConfig(ep=2),
    "dp": ParallelConfig(ep=2, data_parallel=True),
    "tp4": ParallelConfig(tp=4),
    "ep4": ParallelConfig(ep=4),
}
Logits = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    folder = tmp_path_factory.mktemp("qwen3")
    adapters: dict[str, Path] = {
        "everything": save_everything("qwen3_moe", folder / "everything").path,
        "experts": save_experts("qwen3_moe", folder / "experts").path,
    }
    return ModelCase(family="qwen3_moe", adapters=adapters, names=NAMES)


def run_quantised(case: ModelCase, packing: str) -> Logits:
    """Logits of the rank's rows, without and with adapters; every rank of a world runs it, or one process alone."""
    model = build(case.family)
    for host in host_experts(model).values():
        pack = PACKS[packing].pack
        assert pack is not None
        packed = pack(host.weights())  # type: ignore[arg-type]
        host.give_up()
        pack_experts(host.module, packed, torch.float32)
    with moegraft.attach(model, adapter_memory="64MiB", parallel=case.config) as graft:
        for name, path in case.adapters.items():
            graft.load_adapter(path, name=name)
        rows = case.rows(0 if case.config is None else graft.layout.groups.ep.rank)
        batch = {key: tensor[rows] for key, tensor in make_batch(len(case.names)).items()}
        return tuple(
            graft(**batch, adapters=names).logits for names in ([None] * len(rows), [case.names[r] for r in rows])
        )


@pytest.mark.parametrize(("layout", "packing"), thinned(LAYOUTS, ("int8", "fp8 block", "int4", "mxfp4"), keep_one_in=2))
def test_ranks_together_are_one_process(
    qwen3: ModelCase, world2: WorldPool, world4: WorldPool, layout: str, packing: str
) -> None:
    """Logits and deltas as in one process; a base row as in the same ranks' run without adapters, to the bit.

    But in int8 the experts have fewer columns than a group of scales serves: all of them lie on the first rank of a
    tensor-parallel group, and the others compute zeros.
    """
    config = LAYOUTS[layout]
    case = replace(qwen3, config=config)
    alone_plain, alone_mixed = run_quantised(qwen3, packing)
    pool = world2 if config.world_size == 2 else world4
    for rank, (plain, mixed) in enumerate(pool.run(run_quantised, case, packing)):
        for i, row in enumerate(case.rows(config.ep_rank_of(rank))):
            what = f"rank {rank}, row {row}"
            assert_within(plain[i], alone_plain[row], alone_plain[row], 1e-4, what=what)
            if case.names[row] is None:
                assert torch.equal(mixed[i], plain[i]), f"{what}: other bits than without adapters"
            else:
                delta = alone_mixed[row] - alone_plain[row]
                assert_within(mixed[i] - plain[i], delta, delta, 1e-4, what=f"{what}, delta")

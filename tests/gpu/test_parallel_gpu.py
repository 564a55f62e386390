"""One model on two GPUs, over NCCL: what the ranks make of it together is what one GPU makes of it.

On a single GPU two ranks share it, in those layouts whose collectives gloo has for CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.distributed import WorldPool
from support.families import build
from support.family_adapters import save_everything, save_experts, save_part
from support.parallel_models import ModelCase, ModelResult, check_ranks, run_alone, run_rank

from moegraft.parallel import ParallelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Passing `tp_plan` directly"),
]

NAMES = (None, "everything", "experts", "part", "everything")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: gloo exchanges no CUDA tensors")
LAYOUTS = [
    pytest.param(ParallelConfig(tp=2), id="tensor parallel"),
    pytest.param(ParallelConfig(ep=2), id="expert parallel"),
    pytest.param(ParallelConfig(tp=2, fully_sharded=True), id="fully sharded", marks=needs_two),
    pytest.param(ParallelConfig(ep=2, data_parallel=True), id="data parallel, all-to-all", marks=needs_two),
    pytest.param(
        ParallelConfig(ep=2, data_parallel=True, dispatch="all_gather"),
        id="data parallel, all-gather",
        marks=needs_two,
    ),
]
# Two layers in bfloat16, summed in another order; a delta that is missing would be an error of 1.
TOL_BFLOAT16 = 0.1


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorldPool]:
    with WorldPool(2, device="cuda", timeout_seconds=120.0) as pool:
        yield pool


def _case(family: str, folder: Path) -> ModelCase:
    """A checkpoint and three adapters."""
    build(family).save_pretrained(folder / "model")
    save = {"everything": save_everything, "experts": save_experts, "part": save_part}
    adapters = {name: make(family, folder / name).path for name, make in save.items()}
    return ModelCase(family=family, adapters=adapters, names=NAMES, device="cuda")


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    return _case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def alone(case: ModelCase) -> ModelResult:
    return run_alone(case)


@pytest.mark.parametrize("config", LAYOUTS)
def test_float32(case: ModelCase, alone: ModelResult, config: ParallelConfig, gpus: WorldPool) -> None:
    """Experts in torch's own operations: what is judged here is the way that rows and sums take between GPUs."""
    mine = replace(case, config=config)
    results = gpus.run(run_rank, mine)
    check_ranks(mine, results, alone)
    assert all(result.backends == {"TorchExperts"} for result in results)


@pytest.mark.parametrize("config", LAYOUTS)
def test_kernels_in_bfloat16(case: ModelCase, config: ParallelConfig, gpus: WorldPool) -> None:
    mine = replace(case, config=config, dtype=torch.bfloat16)
    alone = run_alone(replace(mine, config=None))
    assert alone.backends == {"TritonExperts"}
    # Fully sharded ranks exchange low-rank rows between a GEMM and its delta, which kernels with LoRA inside cannot.
    backend = "TorchExperts" if config.fully_sharded else "TritonExperts"
    for rank, result in enumerate(gpus.run(run_rank, mine)):
        assert result.backends == {backend}
        for i, row in enumerate(mine.rows(config.ep_rank_of(rank))):
            if mine.names[row] is None:
                assert torch.equal(result.mixed[i], result.plain[i])
                continue
            found, expected = (r.mixed[j].float() - r.plain[j].float() for r, j in ((result, i), (alone, row)))
            # By token and in the median: a token may go to another expert where two are nearly as good. Tokens that
            # choose no expert of the adapter have no delta.
            has_delta = expected.norm(dim=-1) > 0
            assert has_delta.any()
            error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1))[has_delta].median()
            assert error < TOL_BFLOAT16, f"rank {rank}, row {row} ({mine.names[row]}): {error}"


@needs_two
def test_a_plan_of_transformers(tmp_path: Path, gpus: WorldPool) -> None:
    """Attention and heads are shared out too."""
    case = _case("qwen3_moe", tmp_path)
    mine = replace(case, checkpoint=tmp_path / "model", plan={"tp_plan": "auto", "tp_size": 2})
    check_ranks(mine, gpus.run(run_rank, mine), run_alone(case))

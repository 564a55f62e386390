"""Models that transformers has shared out by a plan of its own, in real processes: LoRA follows it, or says why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from support.families import build
from support.family_adapters import save_everything, save_experts, save_part, save_replacements, save_vocabulary
from support.parallel_acts import attach_to_plan
from support.parallel_models import ModelCase, check_ranks, run_alone, run_rank
from transformers.distributed import DistributedConfig

from moegraft.parallel import ParallelConfig

if TYPE_CHECKING:
    from support.distributed import WorldPool

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Passing `tp_plan` directly"),
]

NAMES = (None, "everything", "experts", "part", "replacements")
TP_PLAN: Mapping[str, Any] = {"tp_plan": "auto", "tp_size": 2}
HAS_EP_SIZE = "ep_size" in DistributedConfig.__dataclass_fields__  # before it a flag, and routers that hide experts


def _tp_plan_with(module: str, style: str) -> dict[str, Any]:
    return {"distributed_config": DistributedConfig(tp_size=2, tp_plan={module: style})}


def _ep_plan(**options: Any) -> dict[str, Any]:
    config = {"tp_size": 2, "ep_size": 2} if HAS_EP_SIZE else {"tp_size": 2, "enable_expert_parallel": True}
    return {"distributed_config": DistributedConfig(**config, **options)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelCase]:
    return {}


def _case(cases: dict[str, ModelCase], family: str, tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    """Checkpoint and adapters of a family, made once."""
    if family not in cases:
        folder = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(folder / "model")
        save = {"everything": save_everything, "experts": save_experts, "part": save_part}
        if family != "olmoe":
            save["replacements"] = save_replacements
        adapters = {name: make(family, folder / name).path for name, make in save.items()}
        names = [name for name in NAMES if name is None or name in adapters]
        cases[family] = ModelCase(family=family, adapters=adapters, names=names, checkpoint=folder / "model")
    return cases[family]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_tensor_parallel_plan(
    family: str, cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    """Columns of experts, column- and row-parallel attention, gathered heads, embeddings, routers, DoRA on all."""
    case = replace(_case(cases, family, tmp_path_factory), plan=TP_PLAN)
    alone, results = run_alone(case), world2.run(run_rank, case)
    check_ranks(case, results, alone)
    for result in results:
        assert result.experts_bytes * 2 == alone.experts_bytes
        assert result.adapter_bytes["everything"] < 0.9 * alone.adapter_bytes["everything"]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_tensor_parallel_plan_on_four_ranks(
    family: str, cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world4: WorldPool
) -> None:
    """Families whose heads and columns four ranks can share."""
    case = replace(_case(cases, family, tmp_path_factory), plan={"tp_plan": "auto", "tp_size": 4})
    case = replace(case, names=(None, "everything", "experts"))
    case = replace(case, adapters={name: case.adapters[name] for name in ("everything", "experts")})
    alone, results = run_alone(case), world4.run(run_rank, case)
    check_ranks(case, results, alone)
    for result in results:
        assert result.experts_bytes * 4 == alone.experts_bytes


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe"])
def test_expert_parallel_plan(
    family: str, cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    case = replace(_case(cases, family, tmp_path_factory), plan=_ep_plan())
    if not HAS_EP_SIZE:  # a router that the plan has wrapped cannot be replaced
        names = [name for name in case.names if name != "replacements"]
        case = replace(case, names=names, adapters={name: case.adapters[name] for name in names if name})
    alone, results = run_alone(case), world2.run(run_rank, case)
    check_ranks(case, results, alone)
    for result in results:
        assert result.experts_bytes * 2 == alone.experts_bytes


@pytest.mark.parametrize("config", [None, ParallelConfig(tp=2), ParallelConfig(ep=2)], ids=["left whole", "tp", "ep"])
def test_experts_that_a_plan_leaves_whole(
    config: ParallelConfig | None,
    cases: dict[str, ModelCase],
    tmp_path_factory: pytest.TempPathFactory,
    world2: WorldPool,
) -> None:
    """gpt-oss's plan shares out nothing but the head."""
    case = replace(_case(cases, "gpt_oss", tmp_path_factory), plan=TP_PLAN, config=config)
    alone, results = run_alone(case), world2.run(run_rank, case)
    check_ranks(case, results, alone)
    for result in results:
        assert (result.experts_bytes == alone.experts_bytes) == (config is None)


VOCABULARY = {
    "head": (TP_PLAN, False),
    "head, DoRA": (TP_PLAN, True),
    "embedding": (_tp_plan_with("model.embed_tokens", "embedding_rowwise"), False),
}


@pytest.mark.parametrize("what", VOCABULARY)
def test_the_vocabulary_is_shared_out(
    what: str, cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    """Each rank keeps LoRA of its part of the vocabulary where the plan cuts the base's, behind whole rows."""
    plan, use_dora = VOCABULARY[what]
    folder = tmp_path_factory.mktemp("vocabulary")
    adapters = {
        f"rank {rank}": save_vocabulary("qwen3_moe", folder / str(rank), rank=rank, use_dora=use_dora).path
        for rank in (3, 8)
    }
    case = _case(cases, "qwen3_moe", tmp_path_factory)
    case = replace(case, plan=plan, adapters=adapters, names=["rank 8", None, "rank 3", "rank 8", None])
    alone, results = run_alone(case), world2.run(run_rank, case)
    check_ranks(case, results, alone)
    for result in results:
        for name in adapters:
            assert result.adapter_bytes[name] < 0.9 * alone.adapter_bytes[name]


REFUSED = {
    "other ranks": (TP_PLAN, {"parallel": ParallelConfig(tp=4)}, "a plan for 2 ranks that bring the same rows"),
    "other cuts": (TP_PLAN, {"parallel": ParallelConfig(ep=2)}, "with tp=2 and ep=1; attach without parallel="),
    "fully sharded": (TP_PLAN, {"parallel": ParallelConfig(tp=2, fully_sharded=True)}, "with tp=2 and ep=1"),
    "other rows": (
        TP_PLAN,
        {"parallel": ParallelConfig(ep=2, data_parallel=True)},
        "a plan for 2 ranks that bring the same rows",
    ),
}
if HAS_EP_SIZE:
    REFUSED |= {
        "rows that travel": (
            _ep_plan(ep_implementation="all_to_all"),
            {},
            "ep_implementation='all_to_all', which sends rows to other ranks without their adapters",
        ),
        "expert parallel, cut otherwise": (_ep_plan(), {"parallel": ParallelConfig(tp=2)}, "with tp=1 and ep=2"),
        "experts as whole columns": (
            _tp_plan_with("model.layers.*.mlp.experts.gate_up_proj", "colwise"),
            {},
            "gate_up_proj as (Shard(dim=1),) and down_proj as",
        ),
        "sequence parallel": (
            _tp_plan_with("model.layers.*.input_layernorm", "sequence_parallel"),
            {},
            "'model.layers.0.input_layernorm' (OlmoeRMSNorm) style 'sequence_parallel'",
        ),
    }


@pytest.mark.parametrize("what", REFUSED)
def test_plans_that_lora_cannot_follow(
    what: str, cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    plan, options, message = REFUSED[what]
    case = replace(_case(cases, "olmoe", tmp_path_factory), plan=plan)
    for error in world2.run(attach_to_plan, case, options, None):
        assert error.startswith("UnsupportedModelError")
        assert message in error


def test_dora_on_a_gathered_map(
    cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    """Norms of whole rows, where the plan keeps a part of them on each rank and hides it."""
    case = replace(_case(cases, "olmoe", tmp_path_factory), plan=TP_PLAN)
    dora = save_replacements("olmoe", tmp_path_factory.mktemp("dora") / "adapter").path
    for error in world2.run(attach_to_plan, case, {}, dora):
        assert error.startswith("AdapterConfigError: use_dora: ")
        assert "needs the base weight of model.layers.0.self_attn." in error


def test_a_replacement_of_a_module_whose_output_is_shared_out(
    cases: dict[str, ModelCase], tmp_path_factory: pytest.TempPathFactory, world2: WorldPool
) -> None:
    case = _case(cases, "mixtral", tmp_path_factory)
    planned = replace(case, plan=_tp_plan_with("lm_head", "colwise"))
    for error in world2.run(attach_to_plan, planned, {}, case.adapters["replacements"]):
        assert error.startswith("AdapterMismatchError: a replacement of 'lm_head' cannot follow the parallel plan")
        assert "which gives it style 'colwise'" in error

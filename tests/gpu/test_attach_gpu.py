"""``attach`` on a CUDA model with no option set: the kernels serve it, and rows are what they are alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from peft import LoraConfig
from support.adapters import save_with_peft
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moegraft
from moegraft.integrations.transformers import GraftedModel
from moegraft.testing.errors import assert_close, assert_close_delta

pytestmark = pytest.mark.gpu

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOCABULARY = 96


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Adapter folders and the logits that PEFT computes with each for all rows, in float32 on the CPU."""
    folder, ids = tmp_path_factory.mktemp("adapters"), input_ids().cpu()
    configs = {
        "everything": LoraConfig(r=8, target_modules=ATTENTION, target_parameters=EXPERTS),
        "experts": LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS),
        "attention": LoraConfig(r=16, target_modules=ATTENTION, use_dora=True),
    }
    return {
        name: (folder / name, save_with_peft(make_model(), config, folder / name, ids))
        for name, config in configs.items()
    }


@pytest.fixture
def graft(truths: dict[str, tuple[Path, torch.Tensor]]) -> Iterator[GraftedModel]:
    with moegraft.attach(make_model().to("cuda", torch.bfloat16), adapter_memory="64MiB") as graft:
        for name, (path, _) in truths.items():
            graft.load_adapter(path, name)
        yield graft


def input_ids(rows: int = 5) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(1)).cuda()


def test_the_oracle_takes_the_kernels(graft: GraftedModel) -> None:
    assert [choice.backend for choice in graft.explain()] == ["TritonExperts"] * 3


def test_mixed_batch_agrees_with_peft(graft: GraftedModel, truths: dict[str, tuple[Path, torch.Tensor]]) -> None:
    ids, adapters = input_ids(), ["everything", None, "experts", "attention", "everything"]
    base, out = graft(input_ids=ids).logits, graft(input_ids=ids, adapters=adapters).logits
    truth_base = make_model()(input_ids=ids.cpu()).logits.float()
    expected = torch.stack([truth_base[i] if a is None else truths[a][1][i] for i, a in enumerate(adapters)])
    # Three layers in bfloat16 against float32; a delta that is missing altogether would be an error of 1.
    assert_close_delta(out.cpu(), base.cpu(), expected, truth_base, 0.1)
    assert torch.equal(out[1], base[1])


@pytest.mark.parametrize("adapter", ["everything", "experts", "attention"])
def test_mixed_row_is_the_row_among_its_like(graft: GraftedModel, adapter: str) -> None:
    ids, adapters = input_ids(), ["experts", adapter, None, "everything", "attention"]
    mixed = graft(input_ids=ids, adapters=adapters).logits
    uniform = graft(input_ids=ids, adapters=[adapter] * 5).logits
    assert_close(mixed[1], uniform[1], 5e-3)
    alone = graft(input_ids=ids[1:2], adapters=[adapter]).logits
    assert_close(mixed[1:2], alone, 5e-2)


def test_same_batch_gives_same_bits(graft: GraftedModel) -> None:
    ids, adapters = input_ids(), ["experts", "everything", None, "everything", "attention"]
    assert torch.equal(graft(input_ids=ids, adapters=adapters).logits, graft(input_ids=ids, adapters=adapters).logits)


def test_generate_and_detach(graft: GraftedModel) -> None:
    ids, adapters = input_ids(3), ["experts", None, "everything"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = graft.generate(ids, adapters=adapters, **options)
    assert out.shape == (3, 13)
    assert torch.equal(out, graft.generate(ids, adapters=adapters, **options))
    base = graft(input_ids=ids).logits
    model = graft.detach()
    assert_close(model(input_ids=ids).logits, base, 2e-2)


def test_a_captured_forward_follows_its_inputs_and_adapters(graft: GraftedModel) -> None:
    """One graph of the whole model: tokens and the rows' adapters change in place between replays."""
    # A ready mask: transformers looks at the positions on the host otherwise.
    inputs = {"input_ids": input_ids(), "attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().cuda()}
    adapters = ["everything", None, "experts", "attention", "everything"]
    with graft.batch(adapters, 5), torch.no_grad():
        for _ in range(2):
            graft.model(**inputs, use_cache=False)
        call = graft._state.current()
        assert call is not None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = graft.model(**inputs, use_cache=False).logits
    graph.replay()
    assert torch.equal(logits, graft(**inputs, use_cache=False, adapters=adapters).logits)
    inputs["input_ids"].copy_(inputs["input_ids"].flip(1))
    graph.replay()
    assert torch.equal(logits, graft(**inputs, use_cache=False, adapters=adapters).logits)
    slots_T = call.token_rows(5, 7).slots_M
    slots_T.copy_(slots_T.view(5, 7).flip(0).flatten())
    graph.replay()
    assert torch.equal(logits, graft(**inputs, use_cache=False, adapters=adapters[::-1]).logits)


def test_a_graph_with_a_rank_bound_serves_batches_of_other_adapters(
    graft: GraftedModel, truths: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    """Captured with one adapter; replayed with others, one of which was loaded over the unloaded one."""
    inputs = {"input_ids": input_ids(), "attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().cuda()}
    with graft.batch(["experts"] * 5, 5, rank_bound=16) as call, torch.no_grad():
        assert call is not None
        captured = call
        graft.model(**inputs, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = graft.model(**inputs, use_cache=False).logits
    graft.unload_adapter("experts")
    graft.load_adapter(truths["everything"][0], "again")
    for adapters in (["everything", None, "again", "attention", "again"], ["attention"] * 5, [None] * 4 + ["again"]):
        with graft.batch(adapters, 5, rank_bound=16) as call, torch.no_grad():
            assert call is not None
            captured.take_rows(call)
            graph.replay()
            assert torch.equal(logits, graft.model(**inputs, use_cache=False).logits)
        assert_close(logits, graft(**inputs, use_cache=False, adapters=adapters).logits, 5e-3)


def test_threads_on_streams_of_their_own(graft: GraftedModel) -> None:
    ids = input_ids()
    batches = [["everything", None, "experts", "attention", "everything"], ["experts"] * 5]
    expected = [graft(input_ids=ids, adapters=adapters).logits for adapters in batches]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]

    def serve(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                found[i].append(graft(input_ids=ids, adapters=batches[i]).logits)
        stream.synchronize()

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 10
        assert all(torch.equal(out, expected[i]) for out in found[i])


def test_float32_model_is_served_by_torch() -> None:
    with moegraft.attach(make_model().cuda(), adapter_memory="4MiB") as graft:
        (choice, *_) = graft.explain()
        assert choice.backend == "TorchExperts"
        assert "torch.float32" in choice.rejections[0].reason

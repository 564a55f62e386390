"""``torch.compile`` of a grafted model: one full graph serves every composition of adapters, and none is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.adapters import save_with_peft
from support.families import build
from support.mixed import KINDS, random_ids, save_kinds

import moegraft
from moegraft import GraftedModel
from moegraft.core.errors import BatchError, UnsupportedModelError
from moegraft.integrations.transformers.sites.seams import LinearSeam
from moegraft.lora.call import AdapterCall
from moegraft.lora.punica import PunicaWrapperGPU
from moegraft.testing import assert_close_delta

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = random_ids(4, seed=3)
SAVED = tuple(name for name, config in KINDS.items() if "modules_to_save" in config)
PLAIN = tuple(name for name in KINDS if name not in SAVED)
TOL = 1e-5


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of every kind, and PEFT's logits with it on every row."""
    folder = tmp_path_factory.mktemp("kinds")
    return folder, save_kinds(build("qwen3_moe"), folder, IDS)


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def check(
    graft: GraftedModel,
    logits: Callable[[], torch.Tensor],
    rows: Sequence[str | None],
    truths: dict[str, torch.Tensor],
    base: torch.Tensor,
) -> None:
    with graft.batch(rows, len(rows)), torch.no_grad():
        found = logits()
    for i, name in enumerate(rows):
        if name is None:
            assert torch.equal(found[i], base[i]), f"row {i}: a base row has other bits"
        else:
            assert_close_delta(found[i], base[i], truths[name][i], base[i], TOL)


@pytest.mark.parametrize("backend", ["counted", "aot_eager"])
def test_one_graph_serves_all(kinds: tuple[Path, dict[str, torch.Tensor]], backend: str) -> None:
    """Traced while all rows are base; then every kind of LoRA, loads, unloads, evictions, other compositions."""
    folder, truths = kinds
    graphs = Graphs()
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", max_adapters=4, compiled=True) as graft:
        model = graft.model

        @torch.compile(fullgraph=True, backend=graphs if backend == "counted" else backend)
        def logits() -> torch.Tensor:
            return model(input_ids=IDS, use_cache=False).logits

        with torch.no_grad():
            base = logits()
        check(graft, logits, [None] * 4, truths, base)
        for name in PLAIN:
            graft.load_adapter(folder / name, name=name)
            check(graft, logits, [name, None, name, name], truths, base)
        for rows in (["router", "lm_head", None, "experts"], ["embeddings", "dora", "attention", "embeddings"]):
            check(graft, logits, rows, truths, base)
        for name in PLAIN[1:]:
            graft.unload_adapter(name)
        check(graft, logits, [PLAIN[0], None, None, PLAIN[0]], truths, base)
        with torch.no_grad():
            assert torch.equal(logits(), base)
    if backend == "counted":
        assert graphs.count == 1


@pytest.mark.parametrize("name", ["everything", "save embeddings"])
def test_replaced_parameters_are_applied(kinds: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, truths = kinds
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", compiled=True) as graft:
        run = torch.compile(graft.model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            base = run(input_ids=IDS, use_cache=False).logits
        graft.load_adapter(folder / name, name=name)
        check(graft, lambda: run(input_ids=IDS, use_cache=False).logits, [name, None, name, None], truths, base)


@pytest.mark.parametrize("what", ["model", "forward"])
def test_an_adapter_that_comes_after_compilation_is_not_lost(
    kinds: tuple[Path, dict[str, torch.Tensor]], what: str
) -> None:
    """Without ``compiled=``: hooks come with the adapter, and the graph is traced again."""
    folder, truths = kinds
    graphs = Graphs()
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB") as graft:
        model = graft.model
        run = torch.compile(model if what == "model" else model.forward, fullgraph=True, backend=graphs)

        def logits() -> torch.Tensor:
            return run(input_ids=IDS, use_cache=False).logits

        with torch.no_grad():
            base = logits()
        before = graphs.count
        for name in ("experts", "everything"):
            graft.load_adapter(folder / name, name=name)
            check(graft, logits, [name, None, name, None], truths, base)
        assert graphs.count > before, "hooks came, and the graph does not know"
        model = graft.detach()
        with torch.no_grad():
            assert torch.allclose(run(input_ids=IDS, use_cache=False).logits, base, atol=1e-5)


def test_the_models_own_compile(kinds: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """``model.compile()`` and the calls that GraftedModel offers; packed rows and the head's last tokens too."""
    folder, _ = kinds
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", compiled=True) as graft:
        graft.load_adapter(folder / "everything", name="a")
        graft.load_adapter(folder / "lm_head", name="b")
        rows = ["a", "b", None, "a"]
        eager = graft(input_ids=IDS, adapters=rows).logits
        last = graft(input_ids=IDS, adapters=rows, logits_to_keep=2).logits
        tokens = graft.generate(input_ids=IDS, adapters=rows, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        graft.model.compile(backend="aot_eager")
        # Eager code has one product for A of q, k and v together, a graph that follows any batch has three.
        assert torch.allclose(graft(input_ids=IDS, adapters=rows).logits, eager, atol=1e-5)
        assert torch.allclose(graft(input_ids=IDS, adapters=rows, logits_to_keep=2).logits, last, atol=1e-5)
        again = graft.generate(input_ids=IDS, adapters=rows, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(again, tokens)


def test_inductor(tmp_path: Path) -> None:
    """Generated code, on one layer; the truth is the eager model, which other tests hold to PEFT."""
    model = build("qwen3_moe", num_hidden_layers=1)
    save_with_peft(model, LoraConfig(**KINDS["everything"]), tmp_path / "a", IDS)
    with moegraft.attach(model, adapter_memory="4MiB", compiled=True) as graft:
        graft.load_adapter(tmp_path / "a", name="a")
        rows = ["a", None, "a", "a"]
        expected, base = graft(input_ids=IDS, adapters=rows).logits, graft(input_ids=IDS).logits
        run = torch.compile(graft.model, fullgraph=True)
        with torch.no_grad():
            plain = run(input_ids=IDS, use_cache=False).logits
        with graft.batch(rows, 4), torch.no_grad():
            found = run(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found[1], plain[1])
        assert_close_delta(found, plain, expected, base, TOL)


def test_gradients_and_batches_do_not_meet(kinds: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """A graph that computes gradients has transformers' own experts: right without a batch, refused inside one."""
    folder, _ = kinds
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", compiled=True) as graft:
        graft.load_adapter(folder / "experts", name="a")
        model = graft.model
        expected = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        run = torch.compile(model, fullgraph=False, backend="aot_eager")
        loss = run(input_ids=IDS, labels=IDS, use_cache=False).loss
        assert torch.allclose(loss, expected)
        loss.backward()
        assert model.model.layers[0].mlp.experts.down_proj.grad is not None
        with pytest.raises(BatchError, match="gradients"), graft.batch(["a"] * 4, 4):
            run(input_ids=IDS, labels=IDS, use_cache=False)


def test_a_graph_of_a_detached_graft_says_so() -> None:
    graphs = Graphs()
    graft = moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", compiled=True)
    run = torch.compile(graft.model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        first = run(input_ids=IDS, use_cache=False).logits
        model = graft.detach()
        assert torch.allclose(run(input_ids=IDS, use_cache=False).logits, first, atol=1e-5)
    again = moegraft.attach(model, adapter_memory="4MiB", compiled=True)
    with torch.no_grad():
        assert torch.equal(run(input_ids=IDS, use_cache=False).logits, first)
    again.detach()


def test_a_number_without_an_owner_is_refused() -> None:
    import moegraft.integrations.transformers  # noqa: F401  # defines the ops

    with pytest.raises(UnsupportedModelError, match="compile the model again"):
        torch.ops.moegraft.graft_end(torch.zeros(1, dtype=torch.int32), 10**9)


def test_maps_that_read_the_same_input_share_two_launches(
    kinds: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose calls are static: here the kernels run in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton")
    folder, _ = kinds
    monkeypatch.setattr(AdapterCall, "is_static", property(lambda call: call.slots_M is not None))
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        ops.extend(str(node.target) for node in graph.graph.nodes if "add_lora" in str(node.target))
        return graph.forward

    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB", compiled=True) as graft:
        graft.load_adapter(folder / "attention", name="a")
        for seam in graft._fittings._seams.values():
            if isinstance(seam, LinearSeam):
                seam.delta.punica = PunicaWrapperGPU()
        attention = graft.model.model.layers[0].self_attn
        x = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))

        def maps() -> list[torch.Tensor]:
            return [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]

        traced = torch.compile(maps, fullgraph=True, backend=backend)
        slot = graft.bank.get("a").slot
        with torch.no_grad():
            base = maps()
            with graft.batch(["a"], lengths=[4]):
                expected = maps()
            for rows in ([0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
                slots = torch.tensor([slot if row else -1 for row in rows], dtype=torch.int32)
                with graft.batch(["a"], slots=slots, rank_bound=16, all_threads=True):
                    found = traced()
                for y, own, plain in zip(found, expected, base, strict=True):
                    for i, row in enumerate(rows):
                        assert torch.allclose(y[i], own[i] if row else plain[i], atol=1e-5)
                        assert row or torch.equal(y[i], plain[i])
        assert set(ops) == {"moegraft.add_lora_linears"}
        assert all((own - plain).abs().max() > 0.01 for own, plain in zip(expected, base, strict=True))


def test_a_map_that_is_not_called_behind_the_first_goes_alone(kinds: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Nothing is lost or added twice where a parent calls its maps on other inputs, or not at all."""
    folder, _ = kinds
    with moegraft.attach(build("qwen3_moe"), adapter_memory="4MiB") as graft:
        graft.load_adapter(folder / "attention", name="a")
        attention = graft.model.model.layers[0].self_attn
        assert "forward" in vars(attention.k_proj)
        x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), graft.batch(["a", None], lengths=[1, 1]):
            together = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
            alone = [attention.v_proj(x), attention.k_proj(x + 0), attention.q_proj(x)]
            for y, own in zip(alone, reversed(together), strict=True):
                assert torch.allclose(y, own, atol=1e-6)
            x_changed = x.clone()
            attention.q_proj(x_changed)
            x_changed += 1
            assert torch.allclose(attention.k_proj(x_changed), attention.k_proj(x + 1), atol=1e-6)
            for _ in range(12):
                assert torch.allclose(attention.q_proj(x), together[0], atol=1e-6)
            assert torch.allclose(attention.k_proj(x), together[1], atol=1e-6)
            with torch.inference_mode():
                assert torch.allclose(graft.model(IDS[:2, :1]).logits, graft.model(IDS[:2, :1]).logits)
        graft.unload_adapter("a")
        assert "forward" not in vars(attention.k_proj)

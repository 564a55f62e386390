"""Runs a StepPlan through the attached transformers model, and gives the logits of the rows that sample."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.config import DeviceTarget
from moegraft.core.errors import UnsupportedModelError
from moegraft.integrations.transformers import GraftedModel
from moegraft.serving.attention import IMPLEMENTATION
from moegraft.serving.batch import Packing, StepBatch, pack
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.kv_pool import KVPool, LayerShape, layer_shapes
from moegraft.serving.scheduler import BASE, Chunk, SequenceState, StepPlan

RECURRENT = frozenset(
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax nemotron_h "
    "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba "
    "zamba2".split()
)
"""Model types with layers that carry a state from token to token: they need more than pages."""

_PAGED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class Runner:
    """Owns the model's attention while it lives: ``close`` gives the model its own back.

    names: lane -> the bank's name of the adapter. row_by_row and batch_sizes: see ``pack`` and EngineConfig.
    """

    def __init__(
        self,
        graft: GraftedModel,
        *,
        names: Callable[[int], str],
        batch_sizes: Sequence[int] = (),
        max_rows: int = 128,
        row_by_row: bool = False,
    ) -> None:
        self.graft = graft
        self.model: PreTrainedModel = graft.model
        self.device: torch.device = graft.bank.pool.data.device
        self.pool: KVPool | None = None
        self._names = names
        self._sizes = sorted(batch_sizes)
        self._max_wanted = max_rows
        self._row_by_row = row_by_row
        self._packing: Packing | None = None
        self._graphs: DecodeGraphs | None = None
        self._previous: str = self.model.config._attn_implementation
        self._stack = ExitStack()  # the adapters of the rows that the head is given, until the model returns
        self._step: StepBatch | None = None
        check_can_be_paged(self.model)
        self._probe = _Probe(self.model, self.device)
        self.model.set_attn_implementation(IMPLEMENTATION)
        head: nn.Module = self.model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._keep_wanted_rows)
        try:
            self.shapes: dict[int, LayerShape] = layer_shapes(self.model, self.device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._hook.remove()
        self.model.set_attn_implementation(self._previous)
        self.pool = self._packing = self._graphs = None

    def open_pool(self, num_pages: int, page_size: int) -> None:
        """Allocates the pages, and checks with a few tokens that the model is right over them.

        Raises UnsupportedModelError.
        """
        self.pool = KVPool(self.shapes, num_pages=num_pages, page_size=page_size, device=self.device)
        has_kernel = self.device.type == "cuda" and DeviceTarget.of(self.device).has_triton
        self._packing = Packing(
            pool=self.pool,
            row_by_row=self._row_by_row,
            has_kernel=has_kernel,
            is_grouped=not has_kernel and not self._row_by_row and not self._sizes,
        )
        self._probe.check(self)

    def open_graphs(self, longest: int) -> None:
        """From now on decode steps, of sequences of up to ``longest`` tokens, run as CUDA graphs."""
        assert self.pool is not None
        # Without sizes of the caller's: powers of two up to 8, then in steps that waste at most an eighth.
        sizes = self._sizes or [size for size in (1, 2, 4) if size < self._max_wanted] + [
            size for size in range(8, self._max_wanted + 8, 8) if size <= 64 or size % 16 == 0
        ]
        self._graphs = DecodeGraphs(
            self._forward,
            self._bounded,
            self.graft.bank,
            self.pool,
            sizes=sizes,
            width=-(-longest // self.pool.page_size),
        )

    @property
    def beat_seconds(self) -> float | None:
        """How long the engine may be idle before ``beat`` is called; None for ever."""
        return None

    def beat(self) -> None:
        """See ``beat_seconds``."""

    @property
    def graph_captures(self) -> int:
        return 0 if self._graphs is None else self._graphs.captures

    @torch.no_grad()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits [W, vocabulary] float32: the chunks that sample, in the plan's order, come first."""
        assert self._packing is not None
        if self._graphs is not None and all(chunk.samples and chunk.count == 1 for chunk in plan.chunks):
            found = self._graphs.run(plan)
            if found is not None:
                return found.float()
        step = pack(plan, self._packing, padded_to=self._padded(plan))
        with self._adapters(step.lanes, step.lengths), self._stack:
            return self._forward(step).float()

    def _forward(self, step: StepBatch) -> torch.Tensor:
        self._step = step
        try:
            logits: torch.Tensor = self.model(
                input_ids=step.ids_T[:, None],
                position_ids=step.positions_T[:, None],
                use_cache=False,
                paged=step,
            ).logits
        finally:
            self._step = None
        return logits[:, 0]

    def _padded(self, plan: StepPlan) -> tuple[int, int]:
        """Rows of the step and of its head, of which there is at least one: not every model takes none."""
        wanted = max(1, sum(chunk.samples for chunk in plan.chunks))
        return self._next_size(plan.num_tokens), max(wanted, min(self._next_size(wanted), self._max_wanted))

    def _next_size(self, rows: int) -> int:
        at = bisect_left(self._sizes, rows)
        return self._sizes[at] if at < len(self._sizes) else rows

    def _adapters(self, lanes: tuple[int, ...], lengths: tuple[int, ...]) -> AbstractContextManager[Any]:
        """The one place that says to the layers which adapter each row uses: lane i the next ``lengths[i]`` rows."""
        return self.graft.batch([None if lane == BASE else self._names(lane) for lane in lanes], lengths=lengths)

    def _bounded(self, lanes: Sequence[int], *, rank_bound: int | None) -> AbstractContextManager[Any]:
        """One lane a row, for what is captured: it must serve other adapters too."""
        names = [None if lane == BASE else self._names(lane) for lane in lanes]
        return self.graft.batch(names, len(names), rank_bound=rank_bound)

    def _keep_wanted_rows(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the head: only the rows that sample go on, each with its own adapter."""
        step, self._step = self._step, None  # once a step: a copy of the head that an adapter replaces has the hook too
        if step is None or step.rows_W is None:
            return None
        self._stack.enter_context(self._adapters(step.lanes_W, (1,) * len(step.lanes_W)))
        return args[0][step.rows_W], *args[1:]


def check_can_be_paged(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for families that keep more of a token than keys and values."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    odd = sorted(str(layer) for layer in layers - _PAGED_LAYERS)
    if config.model_type in RECURRENT or odd:
        what = f"layers of the kinds {', '.join(odd)}" if odd else "layers with recurrent state"
        raise UnsupportedModelError(
            f"{type(model).__name__} ({config.model_type}) has {what}, which the engine does not serve yet: "
            "it keeps pages of keys and values only; moegraft.attach(model).generate(...) serves this model"
        )
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{type(model).__name__} attends in chunks, which the engine does not serve yet")


def longest_context(model: PreTrainedModel) -> int:
    """Tokens of a sequence, at most. Where positions scale with the longest sequence of a batch, the length up to which
    they do not: other requests must not change a sequence."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    variants = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for variant in variants:
        if variant.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            longest = min(longest, int(variant.get("original_max_position_embeddings") or longest))
    return longest


class _Probe:
    """A few tokens, through the model's own attention and then over pages: the two must agree."""

    TOKENS = 6

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.ids: list[int] = torch.randint(vocabulary, (self.TOKENS,), generator=generator).tolist()
        ids = torch.tensor([self.ids], device=device)
        self.expected_V: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()

    def check(self, runner: Runner) -> None:
        """Raises UnsupportedModelError where what crosses from token to token does not go through the pages."""
        assert runner.pool is not None
        sequence = SequenceState(tokens=self.ids, lane=BASE, pages=_probe_pages(runner.pool))
        half = self.TOKENS // 2
        runner.run(StepPlan((Chunk(sequence, 0, half, samples=False),)))
        found_V = runner.run(StepPlan((Chunk(sequence, half, self.TOKENS - half, samples=True),)))[0]
        error = (found_V - self.expected_V).norm() / self.expected_V.norm()
        # Half precision may send a token to other experts; a lost state leaves nothing of the logits.
        bound = 1e-3 if runner.model.dtype == torch.float32 else 0.3
        if not error <= bound:
            raise UnsupportedModelError(
                f"{type(runner.model).__name__} gives other logits over pages than by itself (relative error "
                f"{error:.2g}, expected at most {bound}): it keeps more of a token than keys and values"
            )


def _probe_pages(pool: KVPool) -> list[int]:
    return list(range(1, 1 + -(-_Probe.TOKENS // pool.page_size)))

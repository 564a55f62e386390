"""Runs a StepPlan through the attached transformers model, and gives the logits of the rows that sample."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moegraft.core.config import DeviceTarget
from moegraft.core.errors import MoegraftError, UnsupportedModelError
from moegraft.integrations.transformers import GraftedModel
from moegraft.serving.attention import IMPLEMENTATION
from moegraft.serving.attention.latents import LatentExpansion, give_back, keep_latents
from moegraft.serving.batch import Packing, StepBatch, pack
from moegraft.serving.chunk_graphs import ChunkGraphs
from moegraft.serving.fused import FusedParts
from moegraft.serving.graphs import DecodeGraphs
from moegraft.serving.kv_pool import KVPool, LayerShape, layer_shapes
from moegraft.serving.scheduler import BASE, Chunk, SequenceState, StepPlan
from moegraft.serving.states import StateSlots, find_states

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"})
_OTHER_LAYERS = frozenset({"moe", "mlp"})
_WINDOW_MASK = "create_sliding_window_causal_mask"
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class Runner:
    """Owns the model's attention while it lives: ``close`` gives the model its own back.

    names: lane -> the bank's name of the adapter. row_by_row, batch_sizes, latent_cache: see ``pack``, EngineConfig.
    """

    graphs_type: type[DecodeGraphs] = DecodeGraphs

    def __init__(
        self,
        graft: GraftedModel,
        *,
        names: Callable[[int], str],
        batch_sizes: Sequence[int] = (),
        max_rows: int = 128,
        row_by_row: bool = False,
        latent_cache: bool | None = None,
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
        self._chunk_graphs: ChunkGraphs | None = None
        self._previous = _attention_of(self.model)
        self._stack = ExitStack()  # the adapters of the rows that the head is given, until the model returns
        self._step: StepBatch | None = None
        check_can_be_paged(self.model)
        self._hook = _head(self.model).register_forward_pre_hook(self._keep_wanted_rows)
        self.states: StateSlots | None = None
        self._fused: FusedParts | None = None
        self._latents: list[LatentExpansion] = []
        try:
            with _running_text(self.model):
                self._probe = _Probe(self.model, self.device)
                self.model.set_attn_implementation(IMPLEMENTATION)
                if self.device.type == "cpu" if latent_cache is None else latent_cache:
                    self._latents = keep_latents(self.model, graft)
                self.shapes: dict[int, LayerShape] = layer_shapes(self.model, self.device)
                run = partial(layer_shapes, self.model, self.device)
                self.states = find_states(self.model, run, self.shapes, graft.current_call)
            if self.states is not None and row_by_row:
                raise UnsupportedModelError(
                    f"batch_invariant: {type(self.model).__name__} has recurrent layers, whose bits follow the chunks "
                    "of a prompt"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._hook.remove()
        if self.states is not None:
            self.states.close()
        if self._fused is not None:
            self._fused.remove()
        give_back(self._latents)
        for config, attention in self._previous:
            config._attn_implementation = attention
        self.pool = self._packing = self._graphs = self._chunk_graphs = None

    def open_pool(self, num_pages: int, page_size: int, num_slots: int = 1) -> None:
        """Allocates the pages and slots, and checks with a few tokens that the model is right over them.

        Raises UnsupportedModelError.
        """
        has_kernel = _has_kernels(self.device)
        self.pool = KVPool(
            self.shapes, num_pages=num_pages, page_size=page_size, device=self.device, has_kernel=has_kernel
        )
        if has_kernel:
            is_alone = self.graphs_type is DecodeGraphs
            self._fused = FusedParts(self.graft, self.device, takes_linears=is_alone and not self._row_by_row)
        self._packing = Packing(
            pool=self.pool,
            row_by_row=self._row_by_row,
            has_kernel=has_kernel,
            is_grouped=not has_kernel and not self._row_by_row and not self._sizes,
            has_states=self.states is not None,
        )
        if self.states is not None:
            self.states.open(num_slots, self.device)
        with _running_text(self.model):
            self._probe.check(self)

    def open_graphs(self, longest: int, chunk_tokens: int) -> None:
        """From now on steps of up to ``chunk_tokens`` tokens, of sequences of up to ``longest``, run as CUDA graphs."""
        assert self.pool is not None
        # Without sizes of the caller's: powers of two up to 8, then in steps that waste at most an eighth.
        sizes = self._sizes or [size for size in (1, 2, 4) if size < self._max_wanted] + [
            size for size in range(8, self._max_wanted + 8, 8) if size <= 64 or size % 16 == 0
        ]
        self._graphs = self.graphs_type(
            self._forward,
            self._bounded,
            self.graft.bank,
            self.pool,
            sizes=sizes,
            width=-(-longest // self.pool.page_size),
        )
        # Ranks that captured and ran eagerly at once would wait for each other for ever; theirs decide together.
        if self.pool.prefills_all and not self._sizes and self.graphs_type is DecodeGraphs:
            self._chunk_graphs = ChunkGraphs(self._graphs, self.pool, rows=self._max_wanted, tokens=chunk_tokens)

    @property
    def beat_seconds(self) -> float | None:
        """How long the engine may be idle before ``beat`` is called; None for ever."""
        return None

    def beat(self) -> None:
        """See ``beat_seconds``."""

    @property
    def graph_captures(self) -> int:
        return sum(graphs.captures for graphs in (self._graphs, self._chunk_graphs) if graphs is not None)

    @torch.no_grad()
    def run(self, plan: StepPlan, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [W, vocabulary], which the next step overwrites: the chunks that sample, in the plan's order, come
        first. ids: on the device, the token of each chunk, which the host does not know yet."""
        assert self._packing is not None
        graphs: DecodeGraphs | ChunkGraphs | None = self._chunk_graphs
        if all(chunk.samples and chunk.count == 1 for chunk in plan.chunks):
            graphs = self._graphs
        found = None if graphs is None else graphs.run(plan, ids)
        if found is not None:
            return found
        step = pack(plan, self._packing, padded_to=self._padded(plan))
        if ids is not None:
            step.ids_T[: ids.shape[0]] = ids
        if self.states is not None:
            self.states.clear([chunk.sequence.slot for chunk in plan.chunks if chunk.start == 0])
        with self._adapters(step.lanes, step.lengths):
            return self._forward(step)

    def _forward(self, step: StepBatch) -> torch.Tensor:
        self._step = step
        recurrent = nullcontext() if self.states is None else self.states.step(step.states)
        try:
            with recurrent, self._stack:
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

    def _bounded(self, lanes: Sequence[int], *, rank_bound: int | None, **stated: Any) -> AbstractContextManager[Any]:
        """One lane a row, for what is captured: it must serve other adapters too. stated: see ``graft.batch``."""
        names = [None if lane == BASE else self._names(lane) for lane in lanes]
        return self.graft.batch(names, len(names), rank_bound=rank_bound, **stated)

    def _keep_wanted_rows(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the head: only the rows that sample go on, each with its own adapter."""
        step, self._step = self._step, None  # once a step: a copy of the head that an adapter replaces has the hook too
        if step is None or step.rows_W is None:
            return None
        bind = step.bind_wanted or partial(self._adapters, step.lanes_W, (1,) * len(step.lanes_W))
        self._stack.enter_context(bind())
        return args[0][step.rows_W], *args[1:]


def _attention_of(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The attention that every config of the model and its parts names; each behind the config that it lies in, which
    sets those inside too."""
    found: dict[int, tuple[PreTrainedConfig, str | None]] = {}
    left = [part.config for part in reversed(list(model.modules())) if isinstance(part, PreTrainedModel)]
    while left:
        config = left.pop()
        if id(config) not in found:
            found[id(config)] = (config, config._attn_implementation)
            inner = [getattr(config, name, None) for name in config.sub_configs]
            left += [each for each in inner if isinstance(each, PreTrainedConfig)]
    return list(found.values())


def _head(model: PreTrainedModel) -> nn.Module:
    """The model's, or the one that a model inside it has. Raises UnsupportedModelError."""
    parts = [part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)]
    heads = list(
        {id(head): head for head in (parts[:1] if parts[0] is not None else parts) if head is not None}.values()
    )
    if len(heads) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} does not say which of its modules is the head")
    head: nn.Module = heads[0]
    return head


@contextmanager
def _running_text(model: PreTrainedModel) -> Iterator[None]:
    """Around the model's first steps: what its own code raises where it cannot run on text alone, or with another
    attention, becomes UnsupportedModelError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, MoegraftError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be served: a step of text alone, over pages, raises "
            f"{type(error).__name__}: {error}"
        ) from error


def check_can_be_paged(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for layers that keep something else of a token than keys and values, or a state."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    odd = sorted(str(layer) for layer in layers - _ATTENTION_LAYERS - _RECURRENT_LAYERS - _OTHER_LAYERS)
    if odd:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({config.model_type}) has layers of the kinds {', '.join(odd)}, which the engine "
            "does not serve yet; moegraft.attach(model).generate(...) serves this model"
        )
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{type(model).__name__} attends in chunks, which the engine does not serve yet")


def _has_kernels(device: torch.device) -> bool:
    """Whether attention, norms and rotary embeddings run in Triton's kernels."""
    return device.type == "cuda" and DeviceTarget.of(device).has_triton


def longest_context(model: PreTrainedModel, shapes: Mapping[int, LayerShape]) -> int:
    """Tokens of a sequence, at most. Where positions scale with the longest sequence of a batch, the length up to which
    they do not: other requests must not change a sequence. Where a model's mask and its attention disagree about a
    sliding window (one of them knows none), the window, within which both say the same."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    variants = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for variant in variants:
        if variant.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            longest = min(longest, int(variant.get("original_max_position_embeddings") or longest))
    window = getattr(config, "sliding_window", None)
    if window:
        files = {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}
        masks_it = any(_WINDOW_MASK in vars(sys.modules[file]) for file in files)
        attends_it = any(shape.window is not None for shape in shapes.values())
        if masks_it != attends_it:
            longest = min(longest, int(window))
    return longest


class _Probe:
    """A few tokens, through the model's own attention and then over pages: the two must agree."""

    CHUNKS = (3, 2, 1)

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.ids: list[int] = torch.randint(vocabulary, (sum(self.CHUNKS),), generator=generator).tolist()
        ids = torch.tensor([self.ids], device=device)
        self.expected_V: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()

    def check(self, runner: Runner) -> None:
        """Raises UnsupportedModelError where what crosses from token to token goes through no pages and no slot."""
        assert runner.pool is not None
        pages = list(range(1, 1 + -(-len(self.ids) // runner.pool.page_size)))
        sequence = SequenceState(tokens=self.ids, lane=BASE, pages=pages, slot=1)
        start = 0
        for count in self.CHUNKS:
            is_last = start + count == len(self.ids)
            found_WV = runner.run(StepPlan((Chunk(sequence, start, count, samples=is_last),)))
            start += count
        error = (found_WV[0] - self.expected_V).norm() / self.expected_V.norm()
        # Half precision may send a token to other experts; a lost state leaves nothing of the logits.
        bound = 1e-3 if runner.model.dtype == torch.float32 else 0.3
        if not error <= bound:
            raise UnsupportedModelError(
                f"{type(runner.model).__name__} gives other logits over pages than by itself (relative error "
                f"{error:.2g}, expected at most {bound}): it keeps more of a token than keys, values and states"
            )

"""``attach``: many PEFT adapters on one transformers Mixture-of-Experts model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from moegraft.build import linear_punica_for
from moegraft.core.errors import BatchError, UnsupportedModelError
from moegraft.core.memory import parse_bytes
from moegraft.integrations.transformers.call import CallState, ForwardHooks, head_modules, token_modules
from moegraft.integrations.transformers.experts import (
    IMPLEMENTATION,
    ExpertsSite,
    SiteOptions,
    build_site,
    decide_backends,
    experts_configs,
    install_sites,
    is_spent,
    moe_config,
    remove_sites,
)
from moegraft.integrations.transformers.explain import Explanation, LayerChoice
from moegraft.integrations.transformers.generation import batch_rows, sequences_per_row
from moegraft.integrations.transformers.parallel import INPUTS, RankAdapters
from moegraft.integrations.transformers.parallel_layout import (
    ModelFacts,
    RankOptions,
    agree_on_layout,
    planned,
    together,
    with_whole_parameters,
)
from moegraft.integrations.transformers.saved import SavedSeam
from moegraft.integrations.transformers.seams import EmbeddingSeam, LinearSeam, RouterSeam, Seam
from moegraft.integrations.transformers.storage import HostExperts, check_uniform, packed_experts
from moegraft.integrations.transformers.targets import discover_targets, experts_per_token
from moegraft.lora.bank import AdapterBank, AdapterBatch, AdapterInfo, BankLayout
from moegraft.lora.call import AdapterCall, CallMemory
from moegraft.lora.peft import LoadReport
from moegraft.lora.targets import AdapterWeights, ModelTargets
from moegraft.parallel import ParallelConfig
from moegraft.parallel.expert_map import ExpertMap

_MARK = "_moegraft_graft"


def attach(  # noqa: PLR0913  # the one call of users: every option by its name
    model: PreTrainedModel,
    *,
    adapter_memory: int | str = "2GiB",
    max_adapters: int = 64,
    backend: str | None = None,
    lora_experts: bool = True,
    batch_invariant: bool = False,
    parallel: ParallelConfig | None = None,
    expert_maps: Mapping[str, ExpertMap] | None = None,
    device: torch.device | str | None = None,
) -> GraftedModel:
    """Graft adapters onto ``model``; the model is changed in place and ``detach`` gives it back.

    adapter_memory: bytes, or a string such as ``"512MiB"``, for adapters resident on the model's device; more may be
    loaded, the least recently used wait in host memory. max_adapters: how many may be resident at once.
    backend: an experts class by name instead of the oracle's choice. lora_experts: False says that no adapter will
    touch experts: backends that take no LoRA are then considered too, and an adapter with LoRA on experts is refused.
    batch_invariant: only backends whose experts layers give a row the same bits in any batch (docs/numerics.md has the
    price); attention and what else the model computes itself is as batch-invariant as the host's own GEMMs.

    parallel: several processes, each of which has loaded the whole model, keep a slice of the experts each and free the
    rest; ``detach`` cannot give that back (docs/parallel.md). All ranks attach together, and from then on load, unload
    and run together. expert_maps: which rank holds which experts, by module; contiguous by default. device: where the
    slices, and then the rest of the model, are moved: a model too large for one device is loaded on the host. Where
    nothing is cut, the whole model is moved there first. A model that transformers has loaded with a parallel plan
    (``tp_plan="auto"``) needs none of them.

    Raises UnsupportedModelError, NoBackendError or ParallelError, and leaves the model as it was.
    """
    ranks = RankOptions(config=parallel, expert_maps=expert_maps, device=device)
    return GraftedModel(
        model,
        adapter_memory=adapter_memory,
        max_adapters=max_adapters,
        backend=backend,
        lora_experts=lora_experts,
        batch_invariant=batch_invariant,
        ranks=ranks,
    )


class GraftedModel:
    """A transformers model in which every row of a batch may use its own adapter. Inference only; see ``attach``.

    Any number of threads may call one GraftedModel at once with different ``adapters``; on several ranks one thread at
    a time, since all ranks must make the same calls in the same order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        adapter_memory: int | str,
        max_adapters: int,
        backend: str | None,
        lora_experts: bool,
        batch_invariant: bool,
        ranks: RankOptions,
    ) -> None:
        self.model = model
        self._state = CallState()
        self._lock = threading.RLock()
        alike = {"lora_experts": lora_experts, "batch_invariant": batch_invariant}
        facts, self.layout = agree_on_layout(model, ranks, lambda: _examine(model, ranks), alike)
        device, dtype = facts.device, facts.dtype
        self._targets = facts.targets if facts.plan is None else with_whole_parameters(facts.targets)
        self._local_targets = self.layout.local_targets(self._targets)
        self.bank = together(
            self.layout.groups,
            lambda: AdapterBank(
                BankLayout(self._local_targets, dtype=dtype),
                capacity_bytes=parse_bytes(adapter_memory),
                device=device,
                max_slots=max_adapters,
            ),
        )
        options = SiteOptions(
            bank=self.bank,
            state=self._state,
            layout=self.layout,
            device=device,
            configs={
                name: moe_config(model.get_submodule(name), facts.top_k, dtype, batch_invariant=batch_invariant)
                for name in self._targets.experts
            },
            backend=backend,
            lora_experts=lora_experts,
        )
        self._sites = self._build_sites(options, is_moved=ranks.device is not None)
        self._ranks = RankAdapters(self.bank, self._targets, self.layout, lora_experts=lora_experts)
        self._seams: dict[tuple[str, type[Seam]], Seam] = {}
        self._memory = CallMemory()
        self._heads = head_modules(model, self._targets)
        self._previous = install_sites(model, self._sites)
        self._experts_configs = experts_configs(model, self._sites)
        if ranks.device is not None and self.layout.expert_maps:
            model.to(device)  # what is left of it
        self._hooks = ForwardHooks(self._state, model, token_modules(model, self._targets))
        self._attached = True
        setattr(model, _MARK, self)

    def _build_sites(self, options: SiteOptions, *, is_moved: bool) -> dict[str, ExpertsSite]:
        """``is_moved``: the model is to lie on ``options.device``.

        Layers that are kept whole must lie there before they are built: packed weights that move are new tensors, and
        the device decides on the backend.
        """
        model, experts, groups = self.model, self._targets.experts, self.layout.groups
        if is_moved and not self.layout.expert_maps:
            together(groups, lambda: decide_backends(model, experts, options))
            model.to(options.device)
        return together(
            groups,
            lambda: {name: build_site(model.get_submodule(name), target, options) for name, target in experts.items()},
            told=lambda sites: {"the backends of their layers": [site.decision.backend for site in sites.values()]},
        )

    # Adapters

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """What is loaded: name -> ranks by module, modules touched, bytes, loaded from, resident or not. Read-only."""
        return MappingProxyType({name: self.bank.info(name) for name in self.bank.names()})

    def load_adapter(
        self, path: str | os.PathLike[str], name: str | None = None, *, resident: bool = True
    ) -> LoadReport:
        """Read a PEFT adapter folder and make it usable as ``name`` (default: the folder's name).

        resident: whether it takes its place on the device now, and may evict others, or when a batch first names it.

        Raises AdapterError of the kind that fits; nothing has changed then, on no rank.
        """
        self._check_attached()
        name = name if name is not None else os.path.basename(os.path.normpath(path))

        def enter(weights: AdapterWeights) -> None:
            with self._lock:
                # Seams first: another thread may name the adapter as soon as the bank knows it.
                self._fit_seams(weights)
                try:
                    self.bank.load(name, weights, source=os.fspath(path), resident=resident)
                finally:
                    self._fit_seams()

        try:
            return self._ranks.load(path, name, enter)
        finally:
            # What this rank had entered is taken back where another rank failed.
            with self._lock:
                self._fit_seams()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UnknownAdapterError, or AdapterInUseError while a batch uses it."""
        # The banks' lock is taken before this one, as when an adapter is loaded: two threads may do one of each.
        self._ranks.unload(name)
        with self._lock:
            self._fit_seams()

    def pin_adapter(self, name: str) -> None:
        """Make an adapter resident and keep it from being evicted."""
        self._ranks.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Undo ``pin_adapter``."""
        self.bank.unpin(name)

    # Running

    def __call__(self, *args: Any, adapters: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """transformers' forward pass, and its own output object; ``adapters`` has one name (or None) a row."""
        with (
            self._ranks.call(args, kwargs, adapters),
            self._batch(adapters, batch_rows(args, kwargs, ("input_ids", "inputs_embeds")), growth=(1,)),
            torch.no_grad(),
        ):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapters: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate``; a row keeps its adapter through padding, beams and several returned sequences."""
        growth = (1, sequences_per_row(args, kwargs, self.model.generation_config))
        with (
            self._ranks.generation(args, kwargs, adapters, self.model.generation_config) as options,
            self._batch(adapters, batch_rows(args, kwargs, INPUTS), growth=growth),
            torch.no_grad(),
        ):
            return self.model.generate(*args, **options)

    @contextmanager
    def batch(
        self,
        adapters: Sequence[str | None] | None,
        rows: int | None = None,
        *,
        lengths: Sequence[int] | None = None,
        slots: torch.Tensor | None = None,
        rank_bound: int | None = None,
        all_threads: bool = False,
    ) -> Iterator[AdapterCall | None]:
        """Inside the block the model runs with these adapters, whoever calls it.

        For engines that call the model themselves. ``adapters`` has one entry a row of the model's input, or the input
        has as many rows for each entry, next to each other (beams). Packed rows: entry i serves the next ``lengths[i]``
        tokens. ``slots``: a tensor of the caller's, int32 [tokens] on the device, -1 = base, that says it instead,
        whenever a layer runs; it may change between calls and holds slots of ``adapters`` only. ``all_threads``: also
        in threads that the block did not start, one such block at a time; otherwise only in this thread or task.

        A call belongs to its block: blocks of one thread nest. Raises BatchError or UnknownAdapterError; BatchError
        also where a module meets rows of which the batch does not say which adapter each uses.

        ``rank_bound``: what runs inside, a CUDA graph say, serves later batches too, of any adapters of up to this
        rank: LoRA is launched wherever an adapter that is loaded now has a place for it, and reads the slots of its
        rows from ``call.token_rows(B, S).slots_M`` or ``slots``. Each later batch has a block of its own with a
        ``rank_bound``; ``captured.take_rows(call)`` checks it and copies its slots over. BatchError where an adapter of
        the batch has a larger rank, where a loaded one replaces parameters (``modules_to_save``), and where rows travel
        between ranks.
        """
        with self._batch(
            adapters, rows, lengths=lengths, slots_M=slots, rank_bound=rank_bound, all_threads=all_threads
        ) as call:
            yield call

    @contextmanager
    def _batch(
        self,
        adapters: Sequence[str | None] | None,
        rows: int | None,
        *,
        all_threads: bool = False,
        rank_bound: int | None = None,
        **stated: Any,
    ) -> Iterator[AdapterCall | None]:
        self._check_attached()
        with self._ranks.refusing(names_given=adapters is not None):
            names = _check_rows(adapters, rows, self.bank.names())
            if rank_bound is not None:
                self._check_bounded(rank_bound)
        if names is None and self.layout.rows_travel and self._state.current() is None:
            names = (None,) * (1 if rows is None else rows)  # other ranks may have adapters
        call = None
        with ExitStack() as stack:
            if names is not None:
                held, group = stack.enter_context(self._ranks.acquire(names))
                if rank_bound is not None:
                    _check_ranks(held, rank_bound, self._targets)
                call = AdapterCall(
                    held,
                    self.bank.pool.data.device,
                    rank_bound=rank_bound,
                    group=group,
                    memory=self._memory,
                    heads=self._heads,
                    modules={name for name, _ in self._seams} | self._sites.keys(),
                    **stated,
                )
                self._memory = call.memory
                # Also where no row has an adapter: a batch around this one must not show through.
                stack.enter_context(self._state.bound(call) if all_threads else self._state.running(call))
            yield call

    # Looking inside and leaving

    def explain(self) -> Explanation:
        """For each experts layer the chosen backend and why every other was refused."""
        choices = []
        for name, site in self._sites.items():
            is_ours = site.is_cut or packed_experts(self.model.get_submodule(name)) is not None
            choices.append(LayerChoice.of(name, site.decision, is_ours=is_ours))
        return Explanation(choices=tuple(choices))

    def detach(self) -> PreTrainedModel:
        """Take everything out again: the original model, bit for bit. Raises AdapterInUseError during a batch.

        Experts that ``attach(parallel=...)`` has cut to this rank's slice are given up, not put together again: a
        forward pass of the model then raises UnsupportedModelError. Nothing is sent to other ranks, which may be gone.
        """
        with self._lock:
            if not self._attached:
                return self.model
            self.bank.close()
            self._fit_seams()
            self._memory = CallMemory()
            self._hooks.remove()
            remove_sites(self.model, self._sites, self._previous)
            delattr(self.model, _MARK)
            self._sites = {name: site for name, site in self._sites.items() if not site.is_cut}
            self.layout.groups.close()
            self._attached = False
            return self.model

    def __enter__(self) -> GraftedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # Inside

    def _check_attached(self) -> None:
        if not self._attached:
            raise UnsupportedModelError("this GraftedModel was detached; call moegraft.attach(model) again")
        for config in self._experts_configs:
            if config._experts_implementation != IMPLEMENTATION:
                raise UnsupportedModelError(
                    f"the experts implementation of the grafted model was set to {config._experts_implementation!r}, "
                    f"under which adapters would be lost; call model.set_experts_implementation({IMPLEMENTATION!r})"
                )

    def _check_bounded(self, rank_bound: int) -> None:
        if rank_bound < 1:
            raise BatchError(f"rank_bound={rank_bound}, expected at least 1")
        if self.layout.rows_travel:
            raise BatchError("rank_bound= is not served where rows travel between ranks: every step asks the others")
        for name in self.bank.names():
            for module, param in sorted(self.bank.get(name).saved):
                raise BatchError(
                    f"adapter {name!r} replaces {module}.{param} (modules_to_save), which a batch with rank_bound= "
                    "cannot follow; unload it first"
                )

    def _fit_seams(self, coming: AdapterWeights | None = None) -> None:
        """Exactly the seams are installed that the loaded adapters need, and one that is about to be loaded."""
        wanted = self._wanted_seams(coming)
        for key in [key for key in self._seams if key not in wanted]:
            self._seams.pop(key).remove()
        for key in [key for key in wanted if key not in self._seams]:
            seam = self._make_seam(*key)
            seam.install()
            self._seams[key] = seam

    def _wanted_seams(self, coming: AdapterWeights | None) -> list[tuple[str, type[Seam]]]:
        handles = [self.bank.get(name) for name in self.bank.names()]
        modules = [module for handle in handles for module in handle.ranks]
        saved = [module for handle in handles for module, _ in sorted(handle.saved)]
        if coming is not None:
            modules += [*coming.linears, *coming.embeddings]
            saved += coming.saved
        wanted: dict[tuple[str, type[Seam]], None] = {}
        for module in modules:
            if module in self._targets.linears:
                wanted[module, RouterSeam if self._targets.linears[module].router else LinearSeam] = None
            elif module in self._targets.embeddings:
                wanted[module, EmbeddingSeam] = None
        return [*wanted, *((module, SavedSeam) for module in dict.fromkeys(saved))]

    def _make_seam(self, name: str, kind: type[Seam]) -> Seam:
        module = self.model.get_submodule(name)
        mine, ranks = self.layout.mine.linears.get(name), self.layout.groups.world
        if kind is LinearSeam:
            gathers = self.layout.sees_whole_rows(name)
            target = (self._targets if gathers else self._local_targets).linears[name]
            punica = linear_punica_for(self.bank.pool.data.device, mine, ranks, gathers=gathers)
            return LinearSeam(target, module, self.bank, self._state, punica)
        if kind is EmbeddingSeam:
            return EmbeddingSeam(name, module, self.bank, self._state, mine, ranks)
        if kind is RouterSeam:
            return RouterSeam(self._local_targets.linears[name], module, self.bank, self._state)
        if kind is SavedSeam:
            return SavedSeam(name, module, self.bank, self._state, is_planned=self.layout.plan is not None)
        return kind(name, module, self.bank, self._state)


def _examine(model: PreTrainedModel, ranks: RankOptions) -> ModelFacts:
    """What attach has to know of a model. Raises UnsupportedModelError."""
    if is_spent(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its experts were cut to a rank's slice and given up by detach(); load it again"
        )
    if hasattr(model, _MARK):
        raise UnsupportedModelError(
            f"{type(model).__name__} is grafted already; call detach() on its GraftedModel first"
        )
    targets = discover_targets(model)
    device, dtype = check_uniform(model, [HostExperts.of(model.get_submodule(name)) for name in targets.experts])
    return ModelFacts(
        targets=targets,
        device=device if ranks.device is None else torch.device(ranks.device),
        dtype=dtype,
        top_k=experts_per_token(model),
        plan=planned(model, targets, ranks.config),
    )


def _check_rows(
    adapters: Sequence[str | None] | None, rows: int | None, loaded: Sequence[str]
) -> tuple[str | None, ...] | None:
    """The names of the batch, checked against its rows; None where no row has an adapter to be looked up."""
    if adapters is None:
        return None
    known = ", ".join(loaded) or "none"
    if isinstance(adapters, str):
        raise BatchError(f"adapters={adapters!r} is a string, expected one entry a row; loaded: {known}")
    if isinstance(adapters, Set | Mapping) or not isinstance(adapters, Iterable):
        raise BatchError(f"adapters= is a {type(adapters).__name__}, expected a list: one entry a row, in their order")
    names = tuple(adapters)
    odd = next((name for name in names if name is not None and not isinstance(name, str)), None)
    if odd is not None:
        raise BatchError(f"adapters= has an entry {odd!r}, expected names and None; loaded: {known}")
    if rows is not None and len(names) != rows:
        raise BatchError(f"adapters= has {len(names)} entries for a batch of {rows} rows; loaded: {known}")
    return names


def _check_ranks(held: AdapterBatch, rank_bound: int, targets: ModelTargets) -> None:
    for handle in held.handles:
        for module, ranks in handle.ranks.items():
            # The A of experts stacks gate and up; behind A and B of other modules stands a gain of one row.
            rank = max(ranks[1:] if module in targets.experts else ranks[:2])
            if rank > rank_bound:
                raise BatchError(f"adapter {handle.name!r} has rank {rank} on {module!r}, rank_bound is {rank_bound}")

"""``attach``: many PEFT adapters on one transformers Mixture-of-Experts model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, SupportsIndex, cast

import torch
from transformers import PreTrainedModel

from moegraft.core.errors import AdapterFileError, AdapterMismatchError, BatchError, UnsupportedModelError
from moegraft.core.memory import parse_bytes
from moegraft.integrations.transformers.explain import Explanation, LayerChoice
from moegraft.integrations.transformers.generation import RowGuard, sequences_per_row
from moegraft.integrations.transformers.host.storage import check_uniform, host_experts, packed_experts
from moegraft.integrations.transformers.host.targets import discover_targets, experts_per_token
from moegraft.integrations.transformers.parallel.calls import INPUTS, RankCalls
from moegraft.integrations.transformers.parallel.layout import (
    ModelFacts,
    RankOptions,
    agree_on_layout,
    planned,
    with_whole_parameters,
)
from moegraft.integrations.transformers.sites.call import CallState, batch_rows, head_modules
from moegraft.integrations.transformers.sites.experts import (
    ExpertsSite,
    SiteOptions,
    build_site,
    decide_backends,
    is_grafted,
    is_spent,
)
from moegraft.integrations.transformers.sites.fittings import Fittings
from moegraft.lora.bank import AdapterBank, AdapterBatch, AdapterInfo, BankLayout
from moegraft.lora.bank.combination import Combination, combine, parse_combination
from moegraft.lora.call import AdapterCall, CallMemory
from moegraft.lora.collective_bank import CollectiveBank, Combinations, GroupBatch
from moegraft.lora.peft import LoadReport
from moegraft.lora.peft.loader import PeftAdapter
from moegraft.lora.targets import AdapterWeights
from moegraft.oracle import why_no_dora
from moegraft.parallel import Agreement, ParallelConfig, Step
from moegraft.parallel.slices import ExpertMap

_MARK = "_moegraft_graft"
# What one row names: an adapter's name, None for the base, or several that add up: names, or (name, weight).
RowAdapters = str | Sequence[str | tuple[str, float]] | None


def attach(  # noqa: PLR0913  # the one call of users: every option by its name
    model: PreTrainedModel,
    *,
    adapter_memory: int | str = "2GiB",
    max_adapters: int = 64,
    backend: str | None = None,
    lora_experts: bool = True,
    batch_invariant: bool = False,
    compiled: bool = False,
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
    compiled: the model will be compiled (``torch.compile(model, fullgraph=True)``): the places where adapters take
    part are put in once, for all modules, so that one graph serves every adapter that comes and goes. A model that is
    compiled without it is right too, and compiled anew whenever an adapter touches modules that none touched before.

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
        compiled=compiled,
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
        compiled: bool,
        ranks: RankOptions,
    ) -> None:
        self.model = model
        self._process = os.getpid()
        self._attached = False
        alike = {"lora_experts": lora_experts, "batch_invariant": batch_invariant}
        facts, self.layout = agree_on_layout(model, ranks, lambda: _examine(model, ranks), alike)
        agreement = Agreement(self.layout.groups.control)
        fittings = None
        try:
            self._state = CallState(facts.device)
            self._targets = facts.targets if facts.plan is None else with_whole_parameters(facts.targets)
            self._local_targets = self.layout.local_targets(self._targets)
            with agreement.step():
                self.bank = AdapterBank(
                    BankLayout(self._local_targets, dtype=facts.dtype),
                    capacity_bytes=parse_bytes(adapter_memory),
                    device=facts.device,
                    max_slots=max_adapters,
                )
            options = SiteOptions(
                bank=self.bank,
                state=self._state,
                layout=self.layout,
                device=facts.device,
                experts=facts.experts,
                configs={
                    name: host.config(facts.top_k, facts.dtype, batch_invariant=batch_invariant)
                    for name, host in facts.experts.items()
                },
                backend=backend,
                lora_experts=lora_experts,
            )
            sites = self._build_sites(options, agreement, is_moved=ranks.device is not None)
            self._fittings = fittings = Fittings(
                model, self.bank, self._state, self.layout, self._targets, self._local_targets, compiled=compiled
            )
            self._adapters = CollectiveBank(self.bank, self.layout.groups, fit=fittings.fit)
            vocab_size = getattr(model.get_input_embeddings(), "num_embeddings", None)
            self._combinations = Combinations(self._adapters, most=max_adapters)
            self._ranks = RankCalls(self._adapters, self.layout, vocab_size=vocab_size)
            self._lora_experts = lora_experts
            self._memory = CallMemory()
            self._heads = head_modules(model, self._targets)
            fittings.install(sites)
            if ranks.device is not None and self.layout.expert_maps:
                model.to(facts.device)  # what is left of it
            fittings.watch()
            setattr(model, _MARK, self)
            self._attached = True
        except BaseException:
            if fittings is not None:
                fittings.remove()
            vars(model).pop(_MARK, None)
            self.layout.groups.close()
            raise

    def _build_sites(self, options: SiteOptions, agreement: Agreement, *, is_moved: bool) -> dict[str, ExpertsSite]:
        """``is_moved``: the model is to lie on ``options.device``.

        Layers that are kept whole must lie there before they are built: packed weights that move are new tensors, and
        the device decides on the backend.
        """
        if is_moved and not self.layout.expert_maps:
            with agreement.step():
                decide_backends(options)
            self.model.to(options.device)
        with agreement.step() as step:
            sites = {name: build_site(name, options) for name in options.experts}
            step.same("the backends of their layers", lambda: [site.decision.backend for site in sites.values()])
        return sites

    @staticmethod
    def of(model: PreTrainedModel) -> GraftedModel | None:
        """The graft that ``attach`` has put on a model, for those who have lost it; None where there is none."""
        graft = vars(model).get(_MARK)
        return graft if isinstance(graft, GraftedModel) else None

    # Adapters

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """What is loaded at one moment: name -> ranks by module, modules touched, bytes, loaded from, resident or not.

        Read-only.
        """
        return MappingProxyType(self.bank.infos())

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        resident: bool = True,
        skip_unserved: bool = False,
    ) -> LoadReport:
        """Read a PEFT adapter folder and make it usable as ``name`` (default: the folder's name).

        resident: whether it takes its place on the device now, and may evict others, or when a batch first names it.
        skip_unserved: leaves out what the adapter has on modules that the model has and that are not served (a vision
        tower, say), and lists them in the report's ``left_out``: its outputs are then those of the rest alone.

        Raises AdapterError of the kind that fits; nothing has changed then, on no rank.
        """
        self._check_attached()
        name = name if name is not None else os.path.basename(os.path.normpath(path))
        read = partial(self._read, path, name, skip_unserved)
        return self._adapters.load(name, read, source=os.fspath(path), resident=resident)

    def _read(
        self, path: str | os.PathLike[str], name: str, skip_unserved: bool, step: Step
    ) -> tuple[AdapterWeights, LoadReport]:
        """This rank's slice of an adapter."""
        with PeftAdapter(path, self._targets, name=name, skip_unserved=skip_unserved) as adapter:
            step.same(f"the files of adapter {name!r}", adapter.digest, error=AdapterFileError)
            step.same("skip_unserved=", lambda: skip_unserved)
            weights, report = adapter.build(
                dtype=self.bank.layout.dtype, rank_slice=self.layout.mine, max_bytes=self.bank.pool.capacity_bytes
            )
        if self.layout.plan is not None:
            self.layout.plan.check_adapter(weights)
        if weights.experts and not self._lora_experts:
            raise AdapterMismatchError(
                f"adapter {name!r} has LoRA on experts ({min(weights.experts)}), of which "
                "attach(lora_experts=False) said that there would be none; attach without it"
            )
        for module, experts in weights.experts.items():
            reason = why_no_dora(self._fittings.sites[module].decision.experts_cls) if experts.has_gains else None
            if reason is not None:
                raise AdapterMismatchError(f"adapter {name!r} has DoRA on experts ({module}), but {reason}")
        return weights, report

    def combine_adapters(self, parts: Sequence[tuple[str, float]], name: str) -> None:
        """For engines: what ``parts`` (name, weight) add together as an adapter ``name`` of its own, which stays until
        it is unloaded and which ``adapters`` does not list. A batch may name several adapters without it.

        Raises AdapterError of the kind that fits, or BatchError where one of them does more than add a delta.
        """
        self._check_attached()
        self._adapters.load(name, lambda _: (combine(self.bank, parts), None), resident=False)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UnknownAdapterError, or AdapterInUseError while a batch uses it."""
        self._check_attached()
        self._adapters.unload(name)
        self._combinations.prune()

    def pin_adapter(self, name: str) -> None:
        """Make an adapter resident and keep it from being evicted."""
        self._check_attached()
        self._adapters.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Undo ``pin_adapter``."""
        self._check_attached()
        self.bank.unpin(name)

    # Running

    def __call__(self, *args: Any, adapters: Sequence[RowAdapters] | None = None, **kwargs: Any) -> Any:
        """transformers' forward pass, and its own output object; ``adapters`` has one name (or None) a row.

        Or several that add up: ``[["style", "domain"], None]``, with weights ``[[("style", 0.5), ("domain", 1.0)]]``.
        """
        with (
            self._ranks.call(args, kwargs, adapters),
            self._batch(adapters, batch_rows(args, kwargs, ("input_ids", "inputs_embeds")), growth=(1,)),
            torch.no_grad(),
        ):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapters: Sequence[RowAdapters] | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate``; a row keeps its adapter through padding, beams and several returned sequences.

        Where an adapter makes logits that are not finite, its row ends, the others run to their end, and BatchError
        names the row and has the ``output``.
        """
        defaults = self.model.generation_config
        growth = (1, sequences_per_row(args, kwargs, defaults))
        with (
            self._ranks.generation(args, kwargs, adapters, defaults) as options,
            self._batch(adapters, batch_rows(args, kwargs, INPUTS), growth=growth) as call,
            torch.no_grad(),
        ):
            if call is None or not call.batch.names:
                return self.model.generate(*args, **options)
            guard = RowGuard.of(call.batch.names, args, options, defaults)
            output = self.model.generate(*args, **guard.added_to(options))
            guard.check(output)
            return output

    @contextmanager
    def batch(
        self,
        adapters: Sequence[RowAdapters] | None,
        rows: int | None = None,
        *,
        lengths: Sequence[int] | None = None,
        slots: torch.Tensor | None = None,
        run_length: int = 1,
        rank_bound: int | None = None,
        all_threads: bool = False,
        agreed: Sequence[str | None] | None = None,
    ) -> Iterator[AdapterCall | None]:
        """Inside the block the model runs with these adapters, whoever calls it.

        For engines that call the model themselves. ``adapters`` has one entry a row of the model's input, or the input
        has as many rows for each entry, next to each other (beams). Packed rows: entry i serves the next ``lengths[i]``
        tokens. ``slots``: a tensor of the caller's, int32 [tokens] on the device, -1 = base, that says it instead,
        whenever a layer runs; it may change between calls and holds slots of ``adapters`` only; ``run_length``: how
        many neighbours have the same slot, about, which chooses tiles and no results. ``all_threads``: also in threads
        that the block did not start, one such block at a time; otherwise only in this thread or task.

        A call belongs to its block: blocks of one thread nest. Raises BatchError or UnknownAdapterError; BatchError
        also where a module meets rows of which the batch does not say which adapter each uses.

        ``rank_bound``: what runs inside, a CUDA graph say, serves later batches too, of any adapters of up to this
        rank: LoRA is launched wherever an adapter that is loaded now has a place for it, and reads the slots of its
        rows from ``call.token_rows(B, S).slots_M`` or ``slots``. Each later batch has a block of its own with a
        ``rank_bound``; ``captured.take_rows(call)`` checks it and copies its slots over. BatchError where an adapter of
        the batch has a larger rank, where a loaded one replaces parameters (``modules_to_save``), and where rows travel
        between ranks.

        ``agreed``: on several ranks, the adapters of all ranks' rows, where the caller has seen to it that the ranks
        run the same batch and have these adapters resident: nothing is sent to find that out. With ``rank_bound`` it
        has also seen to it that no adapter of the batch, nor any that was loaded at a capture, replaces parameters.
        """
        with self._batch(
            adapters,
            rows,
            lengths=lengths,
            slots_M=slots,
            run_length=run_length,
            rank_bound=rank_bound,
            all_threads=all_threads,
            agreed=agreed,
        ) as call:
            yield call

    def current_call(self) -> AdapterCall | None:
        """The batch that layers which run now belong to, for engines that call a module of the model themselves."""
        return self._state.current()

    @contextmanager
    def _batch(
        self,
        adapters: Sequence[RowAdapters] | None,
        rows: int | None,
        *,
        all_threads: bool = False,
        rank_bound: int | None = None,
        agreed: Sequence[str | None] | None = None,
        **stated: Any,
    ) -> Iterator[AdapterCall | None]:
        self._check_attached()
        with nullcontext() if agreed is not None else self._ranks.refusing(names_given=adapters is not None):
            names = _check_rows(adapters, rows, self.bank.names())
            if rank_bound is not None and agreed is None:
                self._check_bounded(rank_bound)
        if names is None and self.layout.rows_travel and self._state.current() is None:
            names = (None,) * (1 if rows is None else rows)  # other ranks may have adapters
        call = None
        with ExitStack() as stack:
            if names is not None:
                held, group = self._acquire(names, agreed, stack)
                if rank_bound is not None:
                    _check_ranks(held, rank_bound)
                call = AdapterCall(
                    held,
                    self.bank.pool.data.device,
                    rank_bound=rank_bound,
                    group=group,
                    memory=self._memory,
                    heads=self._heads,
                    modules=() if rank_bound is None else self._fittings.modules(),
                    **stated,
                )
                self._memory = call.memory
                # Also where no row has an adapter: a batch around this one must not show through.
                stack.enter_context(self._state.bound(call) if all_threads else self._state.running(call))
            yield call

    def _acquire(
        self,
        rows: Sequence[str | Combination | None],
        agreed: Sequence[str | None] | None,
        stack: ExitStack,
    ) -> tuple[AdapterBatch, GroupBatch | None]:
        """The adapters of the rows, those that they name together as one each, until ``stack`` is left."""
        if all(row is None or isinstance(row, str) for row in rows):
            return stack.enter_context(self._ranks.acquire(cast("Sequence[str | None]", rows), agreed))
        with self._combinations.lock:  # none is forgotten before the batch has it
            with self._ranks.refusing(names_given=True):
                if self.layout.rows_travel:
                    raise BatchError(
                        "adapters=: several adapters on a row are not served where rows travel between ranks"
                    )
                for row in dict.fromkeys(row for row in rows if isinstance(row, tuple)):
                    for name, _ in row:
                        self.bank.get(name)
            names = [self._combinations.name_of(row) if isinstance(row, tuple) else row for row in rows]
            return stack.enter_context(self._ranks.acquire(names))

    # Looking inside and leaving

    def explain(self) -> Explanation:
        """For each experts layer the chosen backend and why every other was refused."""
        choices = []
        for name, site in self._fittings.sites.items():
            is_ours = site.is_cut or packed_experts(self.model.get_submodule(name)) is not None
            choices.append(LayerChoice.of(name, site.decision, is_ours=is_ours))
        return Explanation(choices=tuple(choices))

    def detach(self, *, force: bool = False) -> PreTrainedModel:
        """Take everything out again: the original model, bit for bit. Raises AdapterInUseError during a batch.

        ``force``: also during a batch, whose forward pass then ends with an error or as the base model's; for batches
        that nobody can end any more. Experts that ``attach(parallel=...)`` has cut to this rank's slice are given up,
        not put together again: a forward pass of the model then raises UnsupportedModelError. Nothing is sent to other
        ranks, which may be gone.
        """
        self._check_process()
        if self._attached:
            self.bank.close(force=force)
            try:
                self._take_out()
            except BaseException:
                self._take_out()  # an interrupt: adapters are gone, so the rest goes too
                raise
        return self.model

    def _take_out(self) -> None:
        self._fittings.remove()
        self._memory = CallMemory()
        vars(self.model).pop(_MARK, None)
        self.layout.groups.close()
        self._attached = False

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UnsupportedModelError(
            "a GraftedModel can be neither copied nor pickled: call detach(), copy the model, and attach the copy"
        )

    def __enter__(self) -> GraftedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # Inside

    def _check_attached(self) -> None:
        self._check_process()
        if not self._attached:
            raise UnsupportedModelError("this GraftedModel was detached; call moegraft.attach(model) again")
        self._fittings.check()

    def _check_process(self) -> None:
        """Before any lock is taken: a thread that held it when the process was forked is not there to release it."""
        if os.getpid() != self._process:
            raise UnsupportedModelError(
                f"this GraftedModel belongs to process {self._process} and not to process {os.getpid()}, which was "
                "forked from it: load the model and call moegraft.attach in the process that runs it"
            )

    def _check_bounded(self, rank_bound: int) -> None:
        if rank_bound < 1:
            raise BatchError(f"rank_bound={rank_bound}, expected at least 1")
        if self.layout.rows_travel:
            raise BatchError("rank_bound= is not served where rows travel between ranks: every step asks the others")
        for handle in self.bank.handles():
            for module, param in sorted(handle.saved):
                raise BatchError(
                    f"adapter {handle.name!r} replaces {module}.{param} (modules_to_save), which a batch with "
                    "rank_bound= cannot follow; unload it first"
                )


def _examine(model: PreTrainedModel, ranks: RankOptions) -> ModelFacts:
    """What attach has to know of a model. Raises UnsupportedModelError."""
    if is_spent(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its experts were cut to a rank's slice and given up by detach(); load it again"
        )
    for name, module in model.named_modules():
        if _MARK in vars(module) or is_grafted(module):
            where = f": {name!r}" if name else ""
            raise UnsupportedModelError(
                f"{type(model).__name__} is grafted already{where}; call detach() on its GraftedModel first "
                "(GraftedModel.of(model) finds it)"
            )
    if ranks.device is not None and torch.device(ranks.device).type == "meta":
        raise UnsupportedModelError("device='meta' would throw the weights away; expected a device that has memory")
    hosts = host_experts(model)
    targets = discover_targets(model, hosts)
    experts = {name: hosts[name] for name in targets.experts}
    device, dtype = check_uniform(model, experts.values())
    return ModelFacts(
        targets=targets,
        experts=experts,
        device=device if ranks.device is None else torch.device(ranks.device),
        dtype=dtype,
        top_k=experts_per_token(model),
        plan=planned(model, targets, ranks.config),
    )


def _check_rows(
    adapters: Sequence[RowAdapters] | None, rows: int | None, loaded: Sequence[str]
) -> tuple[str | Combination | None, ...] | None:
    """The names of the batch, checked against its rows; None where no row has an adapter to be looked up."""
    if adapters is None:
        return None
    known = ", ".join(loaded) or "none"
    if isinstance(adapters, str):
        raise BatchError(f"adapters={adapters!r} is a string, expected one entry a row; loaded: {known}")
    if isinstance(adapters, Set | Mapping) or not isinstance(adapters, Iterable):
        raise BatchError(f"adapters= is a {type(adapters).__name__}, expected a list: one entry a row, in their order")
    names: list[str | Combination | None] = []
    for entry in adapters:
        if entry is not None and not isinstance(entry, str | list | tuple):
            raise BatchError(f"adapters= has an entry {entry!r}, expected names and None; loaded: {known}")
        names.append(parse_combination(entry, known) if isinstance(entry, list | tuple) else entry)
    if rows is not None and len(names) != rows:
        raise BatchError(f"adapters= has {len(names)} entries for a batch of {rows} rows; loaded: {known}")
    return tuple(names)


def _check_ranks(held: AdapterBatch, rank_bound: int) -> None:
    for handle in held.handles:
        if handle.largest_rank > rank_bound:
            module = next(module for module in handle.ranks if handle.rank_on(module) > rank_bound)
            raise BatchError(
                f"adapter {handle.name!r} has rank {handle.rank_on(module)} on {module!r}, rank_bound is {rank_bound}"
            )

"""``Engine``: a model with its adapters, behind a queue of requests."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moegraft.core.errors import ParallelError
from moegraft.parallel import ParallelConfig
from moegraft.parallel.processes import Followers
from moegraft.serving.adapters import AdapterStore, Source
from moegraft.serving.config import EngineConfig
from moegraft.serving.grammar import GrammarCompiler, Matcher
from moegraft.serving.loading import end_ids, load_tokenizer, media_ids
from moegraft.serving.loop import EngineLoop, Live, LiveRequest
from moegraft.serving.opening import Opened, Setup, follow, follow_rank, open_model
from moegraft.serving.pages import PagePool
from moegraft.serving.ranks import Leader, RankRunner
from moegraft.serving.requests import (
    AdapterChoice,
    Completion,
    EngineBusyError,
    EngineClosedError,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    SequenceOutput,
    TokenEvent,
    Usage,
)
from moegraft.serving.runner import Runner
from moegraft.serving.sampler import SamplingRow, sequence_seed
from moegraft.serving.scheduler import BASE, Residents, Scheduler, SequenceState, State
from moegraft.serving.spread import SharedResidents, SpreadScheduler
from moegraft.serving.status import OTHERS, AdapterStatus, EngineStats
from moegraft.serving.stream import TokenStream
from moegraft.serving.text import TextCodec, TextGrowth

Prompt = str | Sequence[int]


class Engine:
    """Serves one model and any number of adapters; every method may be called from any thread.

    One thread of the engine's own runs the model, another reads adapters. ``close`` (or leaving the ``with`` block)
    ends both.
    """

    text: TextCodec
    """Tokenizer, chat templates: ``encode``, ``render_chat(messages, adapter=..., tools=...)``, ``decode``."""
    config: EngineConfig
    model_name: str
    """The base model's name: its folder's, or the class of a model that was passed in."""
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        adapters_from: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "auto",
        device: str | None = None,
        parallel: ParallelConfig | None = None,
        plan: bool = False,
        **options: Any,
    ) -> None:
        """model: a checkpoint folder, or a model that is in memory (then ``tokenizer`` is needed for text).

        adapters: name -> folder, loaded before this returns. adapters_from: a folder of adapter folders, each of which
        is loaded when a request first names it. options: fields of EngineConfig, such as ``kv_memory="20GiB"``.

        parallel: how the ranks of several processes share the model, of which this one is rank 0. It starts the others
        from the checkpoint's folder; under torchrun they call ``Engine.follow``. plan: transformers' own plan cuts the
        model, attention and vocabulary too, for ``parallel.tp`` ranks.

        Raises UnsupportedModelError for a model that cannot be paged, AdapterError, CheckpointError, ParallelError or
        ValueError.
        """
        self.config = EngineConfig(**options)
        self._setup = Setup(
            model=model,
            config=self.config,
            parallel=parallel or ParallelConfig(),
            plan=plan,
            dtype=dtype,
            device=device,
        )
        if isinstance(model, PreTrainedModel):
            self.model_name = type(model).__name__
        else:
            self.model_name = Path(model).resolve().name
            tokenizer = tokenizer or load_tokenizer(model)
        self.text = TextCodec(tokenizer)
        self._followers: Followers | None = None
        self._failing = threading.Lock()
        self.failure: str | None = None
        self.on_failure: Callable[[str], object] = lambda message: None
        self._is_accepting = True
        self._ids = itertools.count()
        self._resources = ExitStack()
        try:
            self._open(Path(adapters_from) if adapters_from is not None else None)
            for name, path in (adapters or {}).items():
                self.load_adapter(name, path)
        except BaseException as error:
            self.close()
            if isinstance(error, ParallelError) and self.failure is not None:
                raise ParallelError(self.failure) from error  # what the others follow from
            raise

    def _open(self, folder: Path | None) -> None:
        """The attached model, its pages and threads; what is opened here is closed by ``close``, the last first."""
        setup = self._setup
        if folder is not None and not folder.is_dir():
            raise ValueError(f"adapters_from: {folder} is not a folder")
        if setup.size > 1 and not dist.is_initialized() and not isinstance(setup.model, PreTrainedModel):
            self._followers = Followers(follow_rank, setup, size=setup.size, device=setup.target, on_end=self._fail)
            self._resources.callback(self._followers.close)
        opened = open_model(setup, self._key, self._resources.callback)
        self._graft, runner = opened.graft, opened.runner
        self.max_model_len = opened.max_model_len
        self._end_ids = frozenset(end_ids(self._graft.model))
        self._media_ids = media_ids(self._graft.model)
        self._vocab_size: int = self._graft.model.get_input_embeddings().weight.shape[0]
        leader = None
        if opened.channel is not None:
            assert isinstance(runner, RankRunner)
            leader = Leader(runner, opened.channel)
        self._store = AdapterStore(self._graft, self.text, folder=folder, leader=leader)
        self._resources.callback(self._store.close)
        scheduler = self._make_scheduler(opened)
        self._loop = EngineLoop(
            runner, scheduler, self._store, runs_ahead=self._runs_ahead(runner), on_failure=self._lose
        )
        if leader is not None:
            leader.lead(self._loop.call)
            self._resources.callback(leader.close)
        self._grammars = None
        if self.text.has_tokenizer:
            self._grammars = GrammarCompiler(self.text.tokenizer, self._vocab_size, tuple(self._end_ids))
        self._store.listen(self._loop.adapter_loaded, self._loop.adapter_gone)
        self._loop.start()
        self._resources.callback(self._loop.close)

    def _make_scheduler(self, opened: Opened) -> Scheduler | SpreadScheduler:
        """One; of ranks that bring rows of their own, one each."""
        config, parallel = self.config, self._setup.parallel

        def make(residents: Residents) -> Scheduler:
            # Pages alone do not bring a prefix back where layers carry a state.
            has_prefixes = config.prefix_cache and opened.runner.states is None
            pages = PagePool(opened.num_pages, config.page_size, prefix_cache=has_prefixes)
            return Scheduler(pages, residents, max_rows=opened.max_rows, chunk_tokens=config.chunk_tokens)

        if not parallel.data_parallel:
            return make(self._store)
        shared = SharedResidents(self._store)
        return SpreadScheduler([make(shared) for _ in range(parallel.ep)])

    def _runs_ahead(self, runner: Runner) -> bool:
        return runner.device.type == "cuda" if self.config.overlap is None else self.config.overlap

    def _key(self, lane: int) -> str:
        return self._store.key(lane)

    @classmethod
    def follow(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        parallel: ParallelConfig,
        plan: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        """What ranks from 1 on call where torchrun, or another launcher, has started them all: takes part in the engine
        of rank 0, which was given the same arguments, until that is closed.

        Raises ParallelError where a rank is lost, and whatever this rank could not do alone.
        """
        config = EngineConfig(**options)
        follow(Setup(model=model, config=config, parallel=parallel, plan=plan, dtype=dtype, device=device))

    def _lose(self, message: str) -> None:
        """The engine's thread has lost a rank; who watches the ranks may know why."""
        self._fail(message if self._followers is None else self._followers.why(message))

    def _fail(self, message: str) -> None:
        """A rank is lost: all requests end, and no more are taken."""
        with self._failing:
            if self.failure is not None:
                return
            self.failure, self._is_accepting = message, False
        if hasattr(self, "_graft"):
            self._graft.layout.groups.world.give_up(message)
        if hasattr(self, "_loop"):
            self._loop.abandon(message)
        self.on_failure(message)

    # Requests

    def generate(
        self,
        prompts: Sequence[tuple[Prompt, AdapterChoice] | Prompt],
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[Completion]:
        """Runs prompts, each text or token ids and with its adapter's name, and gives them back in their order. Several
        adapters of one prompt add up: ``("a prompt", ["style", ("domain", 0.5)])``.

        Raises RequestError or UnknownAdapterError before anything has run.
        """
        sampling = sampling_params or SamplingParams()
        requests = []
        for prompt in prompts:
            text, adapter = prompt if isinstance(prompt, tuple) and _is_pair(prompt) else (prompt, None)
            ids = self.text.encode(text) if isinstance(text, str) else tuple(text)
            request = Request(
                request_id=f"generate-{next(self._ids)}", prompt_ids=ids, adapter=adapter, sampling=sampling
            )
            self._check(request)
            requests.append(request)
        return self._generate(requests)

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        streams: deque[tuple[Request, TokenStream]] = deque()
        left = deque(requests)
        try:
            while left or streams:
                while left and len(streams) < self.config.max_waiting:
                    try:
                        streams.append((left[0], self.submit(left[0])))
                    except EngineBusyError:
                        if not streams:
                            raise
                        break
                    left.popleft()
                yield collect(streams[0][0], streams[0][1])
                streams.popleft()
        finally:
            for request, _ in streams:
                self.cancel(request.request_id)

    def submit(self, request: Request) -> TokenStream:
        """Queues a request. Its adapter may still be on disk under ``adapters_from``: it is then loaded first.

        Raises, having queued nothing: RequestError, UnknownAdapterError, EngineBusyError, EngineClosedError; BatchError
        for adapters that do not add up. A load that fails later ends the request's stream with ``FinishReason.ERROR``.
        """
        self._check(request)
        params = request.sampling
        matcher: Matcher | None = None
        if params.grammar is not None:
            if self._grammars is None:
                raise RequestError("grammar", params.grammar.kind, "none: the engine has no tokenizer")
            matcher = self._grammars.compile(params.grammar)
        loop = self._loop
        with loop.lock:
            if not self._is_accepting:
                why = "" if self.failure is None else f": {self.failure}"
                raise EngineClosedError(f"the engine takes no more requests{why}")
            if request.request_id in loop.live:
                raise RequestError("request_id", request.request_id, "an id that is not in flight")
            if len(loop.live) >= self.config.max_waiting + self.config.max_rows:
                raise EngineBusyError(f"{len(loop.live)} requests are in flight; try again later")
            version = None if request.wanted is None else self._store.use(request.wanted)
            stream = TokenStream(request.request_id, params.n)
            live = LiveRequest(request, stream, version, time.perf_counter())
            self._add_sequences(live, matcher)
            loop.live[request.request_id] = live
        loop.submit(live)
        return stream

    def _add_sequences(self, live: LiveRequest, matcher: Matcher | None) -> None:
        request, params = live.request, live.request.sampling
        end = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        max_new = self.max_model_len - len(request.prompt_ids)
        for index in range(params.n):
            state = SequenceState(
                tokens=list(request.prompt_ids), lane=BASE if live.version is None else live.version.uid
            )
            row = SamplingRow(
                params=params,
                seed=sequence_seed(seed, index),
                prompt=frozenset(request.prompt_ids) if params.repetition_penalty != 1.0 else frozenset(),
                end_ids=end,
                matcher=None if matcher is None else matcher.copy(),
            )
            growth = None
            if self.text.has_tokenizer:
                growth = TextGrowth(
                    self.text,
                    stop=params.stop,
                    include_stop=params.include_stop,
                    skip_special_tokens=params.skip_special_tokens,
                )
            total = len(request.prompt_ids) + min(params.max_tokens or max_new, max_new)
            state.owner = sequence = Live(live, index, state, row, growth, total)
            live.sequences.append(sequence)
        live.open = params.n

    def _check(self, request: Request) -> None:
        """Raises RequestError or UnknownAdapterError."""
        ids, params = request.prompt_ids, request.sampling
        if not ids:
            raise RequestError("prompt", "no tokens", "at least one token")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise RequestError("prompt", f"{len(ids)} tokens", f"at most {self.max_model_len - 1}")
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                "max_tokens",
                params.max_tokens,
                f"at most {room}: the prompt has {len(ids)} tokens, the context {self.max_model_len}",
            )
        named = (("prompt", ids), ("stop_token_ids", params.stop_token_ids), ("logit_bias", tuple(params.logit_bias)))
        for name, tokens in named:
            wrong = next((t for t in tokens if type(t) is not int or not 0 <= t < self._vocab_size), None)
            if wrong is not None:
                raise RequestError(name, wrong, f"token ids from 0 to {self._vocab_size - 1}")
        media = next((token for token in ids if token in self._media_ids), None)
        if media is not None:
            raise RequestError(
                "prompt",
                media,
                f"text: the token is the config's {self._media_ids[media]}, and no images, videos or sound are served",
            )
        if params.stop and not self.text.has_tokenizer:
            raise RequestError("stop", params.stop, "no strings: the engine has no tokenizer")
        if request.wanted is not None:
            self._store.check(request.wanted)

    def cancel(self, request_id: str) -> bool:
        """Ends a request with CANCELLED, and gives its pages back; False where it is not in flight."""
        loop = self._loop
        with loop.lock:
            found = request_id in loop.live
        if found:
            loop.cancel(request_id)
        return found

    # Adapters

    @property
    def adapters(self) -> Mapping[str, AdapterStatus]:
        """What is loaded or being loaded, by name."""
        counts = self._counts()
        return MappingProxyType(self._store.status(lambda name: counts.get(name, (0, 0))))

    @property
    def available_adapters(self) -> tuple[str, ...]:
        """Names under ``adapters_from`` that a request may use though they are not loaded yet."""
        return self._store.available()

    def load_adapter(
        self, name: str, source: Source, *, replace: bool = False, skip_unserved: bool = False
    ) -> AdapterStatus:
        """Waits until an adapter is loaded and checked; other requests go on meanwhile.

        source: a folder, an fsspec URL, or the two files of one from memory: ``{"adapter_config.json": ...,
        "adapter_model.safetensors": ...}``. replace: a name that is taken gets a new version; requests that run finish
        on the old one. skip_unserved: leaves out what the adapter has on modules that are not served (a vision tower),
        which its status lists. Raises AdapterError of the kind that fits; nothing has changed then.
        """
        if self.failure is not None:
            raise EngineClosedError(f"the engine takes no more adapters: {self.failure}")
        self._store.load(name, source, replace=replace, skip_unserved=skip_unserved)
        return self.adapters[name]

    def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Forgets an adapter at once where no request uses it, otherwise after the last one: it takes no new ones.

        Raises UnknownAdapterError; AdapterInUseError, whose message has the count, where requests still use it (it
        drains and is gone when they end). force: cancels them instead, and waits until they have ended.
        """
        if not force:
            self._store.unload(name)
            return
        using = self._store.retire(name)
        loop = self._loop
        with loop.lock:
            ids = [key for key, live in loop.live.items() if live.version is not None and live.version.stands_on(using)]
        for request_id in ids:
            loop.cancel(request_id)
        loop.call(lambda: None)
        self._store.settle()

    def pin_adapter(self, name: str) -> None:
        """Keeps an adapter on the device. Raises UnknownAdapterError or AdapterMemoryError."""
        self._store.pin(name, pinned=True)

    def unpin_adapter(self, name: str) -> None:
        """Undoes ``pin_adapter``. Raises UnknownAdapterError."""
        self._store.pin(name, pinned=False)

    # State

    def _counts(self) -> dict[str, tuple[int, int]]:
        """(running, waiting) sequences by adapter, the base under the empty name."""
        with self._loop.lock:
            requests = list(self._loop.live.values())
        counts: dict[str, tuple[int, int]] = {}
        for request in requests:
            running = sum(live.state.state is State.RUNNING for live in request.sequences)
            waiting = sum(live.state.state is State.WAITING for live in request.sequences)
            name = request.request.label
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + running, before[1] + waiting)
        return counts

    def stats(self) -> EngineStats:
        """Counts and times, for metrics."""
        loop, counts = self._loop, self._counts()
        scheduler = loop.scheduler
        running, waiting = (sum(numbers) for numbers in zip(*counts.values(), strict=True)) if counts else (0, 0)
        counters = dict(loop.counters)
        unnamed = [here for name, here in counts.items() if name not in counters]
        counts[OTHERS] = (sum(running for running, _ in unnamed), sum(waiting for _, waiting in unnamed))
        adapters = {name: each.snapshot(*counts.get(name, (0, 0))) for name, each in counters.items()}
        return EngineStats(
            running=running,
            waiting=waiting,
            pages_total=scheduler.pages.capacity,
            pages_used=scheduler.pages.num_held,
            pages_cached=scheduler.pages.num_cached,
            steps=loop.steps,
            failed_steps=loop.failed_steps,
            preemptions=scheduler.preemptions,
            step_seconds=loop.step_seconds,
            graph_captures=loop.runner.graph_captures,
            adapters=adapters,
            load_seconds=self._store.load_times.snapshot(),
            evictions=self._graft.bank.evictions,
        )

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_accepting

    def check_integrity(self) -> None:
        """Raises MoegraftError where pages, sequences and adapters do not agree."""
        self._loop.call(self._loop.scheduler.check_integrity)
        self._graft.bank.check_integrity()

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those in flight; False where ``timeout`` seconds did not do."""
        loop = self._loop
        with loop.lock:
            self._is_accepting = False
            return loop.all_done.wait_for(lambda: not loop.live, timeout)

    def close(self) -> None:
        """Cancels what is in flight, ends the threads and gives the model its own attention back."""
        self._is_accepting = False
        self._resources.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def collect(request: Request, events: TokenStream) -> Completion:
    """All events of a request as one record."""
    by_index: dict[int, list[TokenEvent]] = {index: [] for index in range(request.sampling.n)}
    for event in events:
        by_index[event.index].append(event)
    outputs = []
    usages = []
    for index, mine in by_index.items():
        last = mine[-1]
        usages.append(last.usage or Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0))
        outputs.append(
            SequenceOutput(
                index=index,
                text="".join(event.text for event in mine),
                token_ids=tuple(token for event in mine for token in event.token_ids),
                logprobs=tuple(entry for event in mine for entry in event.logprobs),
                finish_reason=last.finish_reason or FinishReason.ERROR,
                stop_reason=last.stop_reason,
                error=last.error,
            )
        )
    usage = Usage(
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=usages[0].cached_tokens,
        completion_tokens=sum(each.completion_tokens for each in usages),
    )
    return Completion(
        request_id=request.request_id,
        adapter=request.adapter,
        prompt_ids=request.prompt_ids,
        outputs=tuple(outputs),
        usage=usage,
    )


def _is_pair(prompt: tuple[Any, ...]) -> bool:
    """Whether a tuple is (prompt, adapter) rather than token ids."""
    return len(prompt) == 2 and (prompt[1] is None or isinstance(prompt[1], str | list | tuple))

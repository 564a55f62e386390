"""``Engine``: a model with its adapters, behind a queue of requests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moegraft.serving.config import EngineConfig
from moegraft.serving.requests import Completion, Request, SamplingParams
from moegraft.serving.status import AdapterStatus, EngineStats
from moegraft.serving.stream import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moegraft.serving.text import TextCodec

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
        **options: Any,
    ) -> None:
        """model: a checkpoint folder, or a model that is in memory (then ``tokenizer`` is needed for text).

        adapters: name -> folder, loaded before this returns. adapters_from: a folder of adapter folders, each of which
        is loaded when a request first names it. options: fields of EngineConfig, such as ``kv_memory="20GiB"``.

        Raises UnsupportedModelError for a model that cannot be paged, AdapterError, CheckpointError or ValueError.
        """
        raise NotImplementedError

    # Requests

    def generate(
        self,
        prompts: Sequence[tuple[Prompt, str | None] | Prompt],
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[Completion]:
        """Runs prompts, each text or token ids and with its adapter's name, and gives them back in their order.

        Raises RequestError or UnknownAdapterError before anything has run.
        """
        raise NotImplementedError

    def submit(self, request: Request) -> TokenStream:
        """Queues a request. Its adapter may still be on disk under ``adapters_from``: it is then loaded first.

        Raises, having queued nothing: RequestError, UnknownAdapterError, EngineBusyError, EngineClosedError. A load
        that fails later ends the request's stream with ``FinishReason.ERROR``.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        """Ends a request with CANCELLED, and gives its pages back; False where it is not in flight."""
        raise NotImplementedError

    # Adapters

    @property
    def adapters(self) -> Mapping[str, AdapterStatus]:
        """What is loaded or being loaded, by name."""
        raise NotImplementedError

    @property
    def available_adapters(self) -> tuple[str, ...]:
        """Names under ``adapters_from`` that a request may use though they are not loaded yet."""
        raise NotImplementedError

    def load_adapter(
        self, name: str, source: str | os.PathLike[str] | Mapping[str, bytes], *, replace: bool = False
    ) -> AdapterStatus:
        """Waits until an adapter is loaded and checked; other requests go on meanwhile.

        source: a folder, an fsspec URL, or the two files of one from memory: ``{"adapter_config.json": ...,
        "adapter_model.safetensors": ...}``. replace: a name that is taken gets a new version; requests that run finish
        on the old one. Raises AdapterError of the kind that fits; nothing has changed then.
        """
        raise NotImplementedError

    def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Forgets an adapter at once where no request uses it, otherwise after the last one: it takes no new ones.

        Raises UnknownAdapterError; AdapterInUseError, whose message has the count, where requests still use it (it
        drains and is gone when they end). force: cancels them instead.
        """
        raise NotImplementedError

    def pin_adapter(self, name: str) -> None:
        """Keeps an adapter on the device. Raises UnknownAdapterError or AdapterMemoryError."""
        raise NotImplementedError

    def unpin_adapter(self, name: str) -> None:
        """Undoes ``pin_adapter``. Raises UnknownAdapterError."""
        raise NotImplementedError

    # State

    def stats(self) -> EngineStats:
        """Counts and times, for metrics."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raises MoegraftError where pages, sequences and adapters do not agree."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those in flight; False where ``timeout`` seconds did not do."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancels what is in flight, ends the threads and gives the model its own attention back."""
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

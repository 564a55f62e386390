"""Text and tokens: prompts, chat templates, text that grows token by token, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegraft.core.errors import FileError, MoegraftError
from moegraft.files import Folder
from moegraft.serving.requests import AdapterChoice, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_BYTES = 1 << 20


class TextCodec:
    """A tokenizer, and the chat templates of the model and of adapters that bring their own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, str] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises MoegraftError for an engine without one, which takes and gives token ids only."""
        if self._tokenizer is None:
            raise MoegraftError("this engine has no tokenizer: pass tokenizer=, or prompts as token ids")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens that the model puts in front."""
        return tuple(self.tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: AdapterChoice = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, under the adapter's chat template where it has one, else the model's; of several
        adapters the first that has one decides.

        options: further variables of the template. Raises RequestError where the template refuses the messages.
        """
        names = [adapter] if isinstance(adapter, str) else [e if isinstance(e, str) else e[0] for e in adapter or ()]
        template = next((self._templates[name] for name in names if name in self._templates), None)
        if template is None and self.tokenizer.chat_template is None:
            raise RequestError("messages", "a conversation", "a prompt: the model's tokenizer has no chat template")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(options or {}),
            )
        except Exception as error:  # templates raise what they like
            raise RequestError("messages", type(error).__name__, f"what the chat template takes: {error}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def set_template(self, adapter: str, template: str | None) -> None:
        """The chat template of an adapter; None for the model's."""
        if template is None:
            self._templates.pop(adapter, None)
        else:
            self._templates[adapter] = template


def adapter_template(folder: Path) -> str | None:
    """The chat template that lies beside an adapter: ``chat_template.jinja``, or a field of its tokenizer's config.

    Raises FileError, also for a link that leaves the folder.
    """
    with Folder(folder) as files:
        if files.has("chat_template.jinja"):
            try:
                return files.read("chat_template.jinja", max_bytes=MAX_TEMPLATE_BYTES).decode()
            except UnicodeDecodeError as error:
                raise FileError(f"{folder}: chat_template.jinja is not UTF-8 ({error})") from None
        if files.has("tokenizer_config.json"):
            with suppress(FileError):  # not needed but for this field
                found = files.read_object("tokenizer_config.json", max_bytes=MAX_TEMPLATE_BYTES).get("chat_template")
                return found if isinstance(found, str) else None
    return None


class TextGrowth:
    """The text of one sequence, token by token: what may be shown now, and whether a stop string has come.

    Characters of several tokens, and text that may yet become a stop string, are held back.
    """

    def __init__(
        self,
        codec: TextCodec,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._codec = codec
        self._stop = stop
        self._include_stop = include_stop
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # of the ids that are decoded together with new ones
        self._read = 0  # ids before this are in the text
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string that has come or None)."""
        self._ids.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return "", None
        self._held += now[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        return self._let_go()

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        before = self._decode(self._start, self._read)
        rest = self._held + self._decode(self._start, len(self._ids))[len(before) :]
        self._held, self._start, self._read = "", self._read, len(self._ids)
        return rest

    def _decode(self, start: int, stop: int) -> str:
        return self._codec.decode(self._ids[start:stop], skip_special_tokens=self._skip)

    def _let_go(self) -> tuple[str, str | None]:
        found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            at, text = min(found)
            shown = self._held[: at + len(text) if self._include_stop else at]
            self._held, self._start, self._read = "", len(self._ids), len(self._ids)
            return shown, text
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, None


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0

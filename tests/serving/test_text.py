"""Text that grows token by token: nothing is shown too early, and all of it adds up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moegraft.cli.train import _make_tokenizer
from moegraft.core.errors import MoegraftError
from moegraft.serving.requests import RequestError
from moegraft.serving.text import TextCodec, TextGrowth


class ByteCodec(TextCodec):
    """A token is a byte of UTF-8: characters come in up to four tokens."""

    def __init__(self) -> None:
        super().__init__(None)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")


@given(text=st.text(alphabet="ab→é🙂 ", max_size=20))
def test_pieces_add_up_and_hold_no_half_character(text: str) -> None:
    growth = TextGrowth(ByteCodec())
    pieces = [growth.add(byte)[0] for byte in text.encode()]
    assert "".join(pieces) + growth.finish() == text
    assert "\ufffd" not in "".join(pieces)


@given(
    text=st.text(alphabet="abc→", max_size=24),
    stop=st.lists(st.text(alphabet="abc→", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings(text: str, stop: list[str], include: bool) -> None:
    """Against the naive rule: after each whole character, the earliest place at which a stop string begins."""
    expected, found_stop = text, None
    for end in range(len(text) + 1):
        places = [(text[:end].find(each), each) for each in stop if each in text[:end]]
        if places:
            at, found_stop = min(places)
            expected = text[: at + len(found_stop) if include else at]
            break
    growth = TextGrowth(ByteCodec(), stop=tuple(stop), include_stop=include)
    shown, reason = "", None
    for byte in text.encode():
        piece, reason = growth.add(byte)
        shown += piece
        assert expected.startswith(shown), "shown before it was known not to be a stop string"
        if reason is not None:
            break
    else:
        shown += growth.finish()
    assert (shown, reason) == (expected, found_stop)


def test_without_a_tokenizer() -> None:
    with pytest.raises(MoegraftError, match="no tokenizer"):
        TextCodec(None).encode("text")


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(_make_tokenizer())


class TestChat:
    def test_an_adapters_own_template(self, codec: TextCodec) -> None:
        messages = [{"role": "user", "content": "what"}]
        plain = codec.render_chat(messages, adapter="a")
        codec.set_template("a", "{{ messages[0]['role'] }}: {{ messages[0]['content'] }}")
        assert codec.decode(codec.render_chat(messages, adapter="a")) == "user: what"
        assert codec.render_chat(messages, adapter="b") == codec.render_chat(messages) == plain
        codec.set_template("a", None)
        assert codec.render_chat(messages, adapter="a") == plain

    @pytest.mark.parametrize("template", ["{{ messages[7]['content'] }}", "{{ raise_exception('no') }}", "{% bad"])
    def test_a_template_that_fails(self, codec: TextCodec, template: str) -> None:
        codec.set_template("broken", template)
        with pytest.raises(RequestError, match="messages"):
            codec.render_chat([{"role": "user", "content": "x"}], adapter="broken")

    def test_a_template_cannot_reach_python(self, codec: TextCodec) -> None:
        codec.set_template("evil", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
        with pytest.raises(RequestError, match="messages"):
            codec.render_chat([{"role": "user", "content": "x"}], adapter="evil")

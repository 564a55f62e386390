"""Pages against a naive model: what every sequence holds, and what each page was computed from, kept in plain lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moegraft.core.errors import MoegraftError
from moegraft.serving.pages import SCRATCH_PAGE, PagePool

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, grow, publish and go. A page's *content* is (namespace, all tokens up to its end): what keys and
    values depend on. The naive rule: a page may be matched only for exactly that content."""

    @initialize(num_pages=st.integers(2, 9))
    def open(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, SIZE)
        self.content: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.sequences: list[tuple[int, list[int], list[int]]] = []

    @rule(tokens=TOKENS, namespace=st.integers(0, 2))
    def come(self, tokens: list[int], namespace: int) -> None:
        known = self.pool.match(tokens, namespace)
        assert len(known) * SIZE < len(tokens)
        for at, page in enumerate(known):
            assert self.content[page] == (namespace, tuple(tokens[: (at + 1) * SIZE]))
        free = self.pool.available
        new = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(known))
        if new is None:
            assert self.pool.pages_for(len(tokens)) - len(known) > free
            self.pool.release(known)
            return
        held = [page for _, _, pages in self.sequences for page in pages]
        assert SCRATCH_PAGE not in new
        assert not set(new) & {*held, *known}
        pages = known + new
        for at in range(len(known), len(pages)):  # computed, and full pages published in their order
            end = (at + 1) * SIZE
            self.content[pages[at]] = (namespace, tuple(tokens[:end]))
            if end <= len(tokens):
                pages[at] = self.pool.publish(pages, at, tokens[end - SIZE : end], namespace)
                assert self.content[pages[at]] == (namespace, tuple(tokens[:end]))
        self.sequences.append((namespace, tokens, pages))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(at)[2])

    @rule(namespace=st.integers(0, 2))
    def forget(self, namespace: int) -> None:
        """An unloaded version: none of its sequences is left, and none of its pages is found again."""
        for entry in [entry for entry in self.sequences if entry[0] == namespace]:
            self.sequences.remove(entry)
            self.pool.release(entry[2])
        self.pool.forget(namespace)
        assert self.pool.match([0, 0, 0], namespace) == []
        assert self.pool.match([0, 1, 0], namespace) == []

    @invariant()
    def agrees(self) -> None:
        held = [pages for _, _, pages in self.sequences]
        self.pool.check_integrity(held)
        assert self.pool.available == self.pool.capacity - len({page for pages in held for page in pages})


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=25)


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(4, SIZE)
    assert pool.allocate(4) is None
    pages = pool.allocate(3)
    assert pages is not None
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.release(pages)
    assert pool.available == 3


def test_idle_pages_go_from_the_end_of_a_prefix() -> None:
    """A page whose successor is still known must stay: the successor could not be found without it."""
    pool = PagePool(4, SIZE)
    pages = pool.allocate(3)
    assert pages is not None
    tokens = [1, 2, 3, 4, 5, 6]
    for at in range(3):
        pool.publish(pages, at, tokens[at * SIZE : (at + 1) * SIZE], 0)
    pool.release(pages)
    assert pool.allocate(1) == [pages[2]]
    assert pool.match([*tokens, 7], 0) == pages[:2]


def test_two_that_compute_the_same_share_one_page_afterwards() -> None:
    pool = PagePool(5, SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    assert pool.publish(first, 0, [1, 2], 0) == first[0]
    assert pool.publish(second, 0, [1, 2], 0) == first[0]
    pool.check_integrity([first, first])
    assert pool.publish(pool.match([1, 2, 3], 0), 0, [1, 2], 0) == first[0]
    assert pool.match([1, 2, 3], 1) == []


def test_integrity_finds_what_is_wrong() -> None:
    pool = PagePool(5, SIZE)
    pages = pool.allocate(2)
    assert pages is not None
    with pytest.raises(MoegraftError, match="holders counted"):
        pool.check_integrity([pages[:1]])
    pool._free.pop()
    with pytest.raises(MoegraftError, match="lost, or in two places"):
        pool.check_integrity([pages])


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    """Its logits have to be computed: a prompt that ends with a full page finds the pages before it only."""
    pool = PagePool(5, SIZE)
    pages = pool.allocate(2)
    assert pages is not None
    for at, tokens in enumerate(([1, 2], [3, 4])):
        pool.publish(pages, at, tokens, 0)
    assert pool.match([1, 2, 3, 4], 0) == pages[:1]
    assert pool.match([1, 2, 3, 4, 5], 0) == pages
    assert pool.match([1, 2], 0) == []

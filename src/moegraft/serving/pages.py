"""Pages of keys and values: who holds which, and which can be found again by what they were computed from.

The prefix index is a tree: a page that is full is known by its tokens, by the page before it, and at the root by the
version of the adapter, whose keys and values differ from those of every other version. Keys are compared, not hashed.

Example, pages of 2 tokens, namespace 7: a sequence 3 1 4 1 5 that holds pages 2, 9, 4 has published 2 and 9:

    (root 7, (3, 1)) -> page 2, node 10        (node 10, (4, 1)) -> page 9, node 11        page 4 is not full
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moegraft.core.errors import MoegraftError

SCRATCH_PAGE = 0
"""Where padded rows write; nobody reads it."""

Key = tuple[int, tuple[int, ...]]
"""(node of the page before, or the negated namespace, less one, for the first page; tokens)."""


@dataclass(frozen=True)
class _Node:
    uid: int
    key: Key
    namespace: int


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens, page 0 being scratch. Not thread-safe: the engine's thread owns it.

    A page is free, held by one sequence or several, or *idle*: held by nobody, and still in the prefix index. Idle
    pages are given away last, the least recently used first; a page goes before the page that it continues.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"found {num_pages} pages, expected at least 2: one is scratch")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._holders: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes: dict[int, _Node] = {}  # by page
        self._index: dict[Key, int] = {}
        self._last_uid = 0

    @property
    def capacity(self) -> int:
        """Pages that sequences can hold in all."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give now."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages in the prefix index."""
        return len(self._nodes)

    @property
    def num_held(self) -> int:
        return len(self._holders)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages held once each, or None and no change where there are not so many."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one hold on each page of a sequence, in the sequence's order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self._nodes:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: Sequence[int], namespace: int) -> list[int]:
        """The longest run of known pages that ``tokens`` begin with, held for the caller.

        The last token is never part of it: its logits have to be computed.
        """
        pages: list[int] = []
        if not self.prefix_cache:
            return pages
        parent = _root(namespace)
        for start in range(0, (len(tokens) - 1) // self.page_size * self.page_size, self.page_size):
            page = self._index.get((parent, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            pages.append(page)
            parent = self._nodes[page].uid
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages

    def publish(self, pages: Sequence[int], at: int, tokens: Sequence[int], namespace: int) -> int:
        """Enters page ``pages[at]``, computed and full, whose tokens are ``tokens``; the pages before it are entered.

        Gives the page to use from now on: where another sequence has entered the same first, its page, held for the
        caller in place of the own one, which is given back.
        """
        page = pages[at]
        if not self.prefix_cache:
            return page
        parent = self._nodes[pages[at - 1]].uid if at else _root(namespace)
        key = (parent, tuple(tokens))
        known = self._index.get(key)
        if known is not None and known != page:
            self._holders[known] += 1
            self._idle.pop(known, None)
            self.release([page])
            return known
        if known is None:
            self._last_uid += 1
            self._nodes[page] = _Node(self._last_uid, key, namespace)
            self._index[key] = page
        return page

    def forget(self, namespace: int) -> None:
        """Takes every page of a namespace out of the index; no sequence of it may be left."""
        for page in [page for page, node in self._nodes.items() if node.namespace == namespace]:
            self._drop(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._drop(page)
        return page

    def _drop(self, page: int) -> None:
        del self._index[self._nodes.pop(page).key]

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Raises MoegraftError unless ``held``, the pages of all sequences, and the records here agree."""
        expected = Counter(page for pages in held for page in pages)
        if expected != self._holders:
            wrong = {page for page in expected | self._holders if expected[page] != self._holders[page]}
            raise MoegraftError(f"pages {sorted(wrong)[:8]}: holders counted {self._holders}, found {expected}")
        places = Counter([SCRATCH_PAGE, *self._free, *self._idle, *self._holders])
        if places != Counter(range(self.num_pages)):
            wrong = {page for page in range(self.num_pages) if places[page] != 1}
            raise MoegraftError(f"pages {sorted(wrong)[:8]} are lost, or in two places at once")
        uids = {node.uid for node in self._nodes.values()}
        for page, node in self._nodes.items():
            parent, _ = node.key
            if self._index.get(node.key) != page or page in self._free:
                raise MoegraftError(f"page {page} and the prefix index do not agree")
            if parent not in uids and parent != _root(node.namespace):
                raise MoegraftError(f"page {page} continues a page that is in the index no more")
        if len(self._index) != len(self._nodes) or not self._idle.keys() <= self._nodes.keys():
            raise MoegraftError("the prefix index has entries without pages")


def _root(namespace: int) -> int:
    return -1 - namespace

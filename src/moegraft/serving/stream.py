"""Events of one request, from the engine's thread to whoever reads them, blocking or in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from moegraft.serving.requests import TokenEvent


class TokenStream:
    """Iterable of TokenEvents until every sequence of the request has ended: ``for`` in a thread, or ``async for``.

    One reader. Events wait in memory: at most one a token that the request may generate, so that a slow reader never
    holds the engine up.
    """

    def __init__(self, request_id: str, num_sequences: int) -> None:
        self.request_id = request_id
        self._left = num_sequences
        self._events: deque[TokenEvent] = deque()
        self._ready = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        """For the engine. An event with a finish reason is the last of its sequence."""
        with self._ready:
            self._events.append(event)
            self._ready.notify()
            loop, waiter, self._waiter = self._loop, self._waiter, None
        if waiter is not None and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_wake, waiter)

    def get(self, timeout: float | None = None) -> TokenEvent | None:
        """The next event, None after the last one. Raises TimeoutError after ``timeout`` seconds."""
        with self._ready:
            if self._left == 0 and not self._events:
                return None
            if not self._ready.wait_for(lambda: bool(self._events), timeout):
                raise TimeoutError(f"request {self.request_id!r}: no event in {timeout} seconds")
            return self._take()

    def _take(self) -> TokenEvent:
        event = self._events.popleft()
        self._left -= event.finish_reason is not None
        return event

    def __iter__(self) -> Iterator[TokenEvent]:
        while (event := self.get()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            with self._ready:
                if self._events:
                    event, waiter = self._take(), None
                elif self._left == 0:
                    return
                else:
                    self._loop = asyncio.get_running_loop()
                    event, waiter = None, self._loop.create_future()
                    self._waiter = waiter
            if event is not None:
                yield event
            elif waiter is not None:
                await waiter


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

"""The adapters of one batch, held in the pool until the batch is released."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from moegraft.lora.bank.handle import AdapterHandle


class AdapterBatch:
    """Made by ``AdapterBank.acquire``; a context manager. Several may be alive at once.

    ``names`` and ``row_slots``: adapter name (None = base) and slot (-1 = base) of each row of the batch ·
    ``handles``: the distinct adapters in order of their first row. None of them is evicted or unloaded, and no slot
    changes, before ``release``.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        handles: Sequence[AdapterHandle],
        release: Callable[[AdapterBatch], None],
    ) -> None:
        slots = {handle.name: handle.slot for handle in handles}
        self.names = tuple(names)
        self.row_slots = tuple(-1 if name is None else slots[name] for name in names)
        self.handles = tuple(handles)
        self.released = False
        self._release = release
        self._max_ranks: dict[str, tuple[int, ...]] = {}

    @property
    def has_adapters(self) -> bool:
        return bool(self.handles)

    def max_ranks(self, module: str) -> tuple[int, ...]:
        """Largest rank of each factor of a module (ExpertsFactor or LinearFactor order) over the adapters here.

        Empty where none of them touches the module.
        """
        ranks = self._max_ranks.get(module)
        if ranks is None:
            held = [handle.ranks[module] for handle in self.handles if module in handle.ranks]
            ranks = tuple(max(column) for column in zip(*held, strict=True))
            self._max_ranks[module] = ranks
        return ranks

    def release(self) -> None:
        """Lets the bank evict and unload these adapters again. Releasing twice does nothing."""
        self._release(self)

    def __enter__(self) -> AdapterBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

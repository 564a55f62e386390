"""Which adapters leave the pool so that others fit. Decides; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from moegraft.core.errors import AdapterMemoryError
from moegraft.lora.bank.handle import AdapterHandle
from moegraft.lora.bank.pool import PagePool


def check_fits_at_all(name: str, num_pages: int, pool: PagePool) -> None:
    """Raises AdapterMemoryError for an adapter that is larger than the whole pool."""
    if num_pages > pool.num_pages:
        raise AdapterMemoryError(
            f"adapter {name!r} needs {num_pages * pool.page_bytes} bytes ({num_pages} pages), "
            f"the adapter memory has {pool.capacity_bytes} bytes ({pool.num_pages} pages)"
        )


def choose_victims(
    resident: Sequence[AdapterHandle], wanted: Sequence[AdapterHandle], *, pool: PagePool, max_slots: int
) -> list[AdapterHandle]:
    """Least recently used adapters to evict, so that all ``wanted`` ones are resident afterwards.

    Only adapters that are neither wanted, pinned nor in use, and none whose leaving does not help. Raises
    AdapterMemoryError where even all of them are not enough.
    """
    missing = [handle for handle in wanted if not handle.resident]
    pages_short = sum(handle.space.num_pages for handle in missing) - pool.num_free
    slots_short = len(missing) - (max_slots - len(resident))
    kept = set(wanted)
    candidates = sorted((h for h in resident if h.evictable and h not in kept), key=lambda h: h.last_use)
    victims: list[AdapterHandle] = []
    for handle in candidates:
        if pages_short <= 0 and slots_short <= 0:
            break
        victims.append(handle)
        pages_short -= handle.space.num_pages
        slots_short -= 1
    if pages_short > 0 or slots_short > 0:
        raise AdapterMemoryError(_shortage(resident, missing, kept, pool, max_slots))
    for handle in reversed(victims.copy()):
        if pages_short + handle.space.num_pages <= 0 and slots_short + 1 <= 0:
            victims.remove(handle)
            pages_short += handle.space.num_pages
            slots_short += 1
    return victims


def _shortage(
    resident: Sequence[AdapterHandle],
    missing: Sequence[AdapterHandle],
    kept: set[AdapterHandle],
    pool: PagePool,
    max_slots: int,
) -> str:
    held = []
    for handle in resident:
        why = [w for w, is_so in (("pinned", handle.pinned), ("in use", handle.in_use)) if is_so]
        why += ["wanted by this batch"] if handle in kept else []
        if why:
            held.append(f"{handle.name!r} {handle.space.num_pages * pool.page_bytes} bytes ({', '.join(why)})")
    names = ", ".join(repr(handle.name) for handle in missing)
    needed = sum(handle.space.num_pages for handle in missing)
    return (
        f"adapters {names} need {needed * pool.page_bytes} bytes ({needed} pages) and {len(missing)} slots; "
        f"free: {pool.num_free * pool.page_bytes} of {pool.capacity_bytes} bytes "
        f"({pool.num_free} of {pool.num_pages} pages) and {max_slots - len(resident)} of {max_slots} slots; "
        f"cannot leave: {'; '.join(held) or 'none'}"
    )

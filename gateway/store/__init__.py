"""The storage seam: what sessions need kept, and where.

`base` says what a store is, `facts` is the fold that all share, `memory` and `sqlite` are stores. The last is imported
only when it is asked for.
"""

from __future__ import annotations

from gateway.config import Limits
from gateway.config import Store as StoreSettings
from gateway.errors import ConfigError
from gateway.store.base import Appended, Purged, Retention, SessionRecord, Store, Stored, StoredInput, StoredSession
from gateway.store.memory import MemoryStore

__all__ = [
    "Appended",
    "MemoryStore",
    "Purged",
    "Retention",
    "SessionRecord",
    "Store",
    "Stored",
    "StoredInput",
    "StoredSession",
    "open_store",
]


def open_store(settings: StoreSettings, limits: Limits) -> Store:
    """The store that ``settings.url`` names, to be entered with ``async with``.

    Args:
        limits: ``replay_max_events`` and ``replay_max_bytes`` bound a session; ``resume_window_ms`` is how long an idle
            one is kept at least, and in memory at most.

    Raises:
        ConfigError: the URL names no store.
    """
    url = settings.url
    retention = Retention(
        resume_window_ms=limits.resume_window_ms,
        max_age_ms=limits.resume_window_ms if url == "memory" else settings.keep_ms,
        max_sessions=settings.max_sessions,
        max_total_bytes=settings.max_total_bytes,
    )
    max_events, max_bytes = limits.replay_max_events, limits.replay_max_bytes
    if url == "memory":
        return MemoryStore(max_events=max_events, max_bytes=max_bytes, retention=retention)
    scheme, _, path = url.partition(":")
    if scheme != "sqlite" or not path:
        raise ConfigError("store.url", f"expected 'memory' or 'sqlite:PATH', got {url!r}")
    if path.startswith((":memory:", "file:")):
        raise ConfigError("store.url", f"expected the path of a file after 'sqlite:' (or 'memory'), got {url!r}")
    from gateway.store.sqlite import SqliteStore

    return SqliteStore(
        path,
        durability=settings.durability,
        max_events=max_events,
        max_bytes=max_bytes,
        retention=retention,
    )

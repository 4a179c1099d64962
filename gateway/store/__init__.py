"""The storage seam: what sessions need kept, and where.

`base` says what a store is, `facts` is the fold that all share, `memory` and `sqlite` are stores. The last is imported
only when it is asked for.
"""

from __future__ import annotations

from gateway.config import Limits
from gateway.errors import ConfigError
from gateway.store.base import Purged, Retention, SessionRecord, Store, Stored, StoredInput, StoredSession
from gateway.store.memory import MemoryStore

__all__ = [
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


def open_store(url: str, limits: Limits, *, durability: str = "full") -> Store:
    """The store that `url` names, to be entered with ``async with``.

    Args:
        url: ``memory``, or ``sqlite:PATH``.
        limits: ``replay_max_events`` and ``replay_max_bytes`` bound a session, ``resume_window_ms`` says how long an
            idle one is kept.
        durability: for ``sqlite``: ``full`` or ``normal``.

    Raises:
        ConfigError: the URL names no store, or there is no such durability.
    """
    retention = Retention(resume_window_ms=limits.resume_window_ms, max_age_ms=limits.resume_window_ms)
    max_events, max_bytes = limits.replay_max_events, limits.replay_max_bytes
    if durability not in ("full", "normal"):
        raise ConfigError("store.durability", f"expected 'full' or 'normal', got {durability!r}")
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
        durability="full" if durability == "full" else "normal",
        max_events=max_events,
        max_bytes=max_bytes,
        retention=retention,
    )

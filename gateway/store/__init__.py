"""The storage seam: what sessions need kept, and where.

`base` says what a store is, `facts` is the fold that all share, `memory` and `sqlite` are stores.
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


def open_store(url: str, limits: Limits) -> Store:
    """The store that `url` names, to be entered with ``async with``.

    Args:
        url: ``memory``.
        limits: ``replay_max_events`` and ``replay_max_bytes`` bound a session, ``resume_window_ms`` says how long.

    Raises:
        ConfigError: the URL names no store.
    """
    retention = Retention(resume_window_ms=limits.resume_window_ms, max_age_ms=limits.resume_window_ms)
    if url == "memory":
        return MemoryStore(max_events=limits.replay_max_events, max_bytes=limits.replay_max_bytes, retention=retention)
    raise ConfigError("store.url", f"expected 'memory' or 'sqlite:PATH', got {url!r}")

"""What of a session is in the store alone: read for readers that are far behind, for snapshots and for agents."""

from __future__ import annotations

import structlog

from gateway.config import Limits
from gateway.errors import StoreUnavailable
from gateway.protocol.log import Log
from gateway.protocol.messages import Event
from gateway.store import Store

_log = structlog.get_logger(__name__)


class Older:
    """Reads the events of a log's window that are not in memory.

    Everything here waits for the store and raises `StoreError`; cancelling is safe.
    """

    def __init__(self, session_id: str, log: Log, store: Store, limits: Limits) -> None:
        self._session_id = session_id
        self._log = log
        self._store = store
        self._limits = limits

    async def read(self, after: int, upto: int) -> list[Event]:
        """The events above `after` up to `upto`, which is at most ``log.tail``."""
        return await self._store.read(self._session_id, after, upto)

    async def newest(self, max_events: int, max_bytes: int) -> list[Event]:
        """The newest ones, within what those bounds leave beside the events in memory.

        They are right before those when this returns; use them without an await in between.
        """
        log = self._log
        loaded: tuple[int, int] | None = None
        events: list[Event] = []
        while (wanted := log.older_than_tail(max_events - len(log), max_bytes - log.held_bytes)) != loaded:
            if wanted is None:
                return []
            # What leaves memory while this waits is loaded in the next round. Seldom more than one is needed: a tail
            # moves in steps of a quarter of what may be held.
            events = await self.read(*wanted)
            loaded = wanted
        return events

    async def for_snapshot(self) -> list[Event]:
        """`newest`, as far as a snapshot's transcript may need it: about every second event belongs into one."""
        return await self.newest(2 * self._limits.snapshot_max_events, self._limits.max_frame_bytes)

    @property
    def wanted_for_transcript(self) -> bool:
        """Whether `for_transcript` would have to read anything."""
        room = self._limits.tail_max_bytes // 2 - self._log.held_bytes
        return self._log.older_than_tail(1 << 62, room) is not None

    async def for_transcript(self) -> list[Event]:
        """`newest`, so that a turn finds half of ``tail_max_bytes`` even when many sessions share the memory.

        While there is room a session holds more than that by itself. Empty if the store cannot be read just now: the
        turn starts nevertheless.
        """
        try:
            return await self.newest(1 << 62, self._limits.tail_max_bytes // 2)
        except StoreUnavailable as exc:
            _log.warning("transcript_cut", session_id=self._session_id, error=str(exc))
            return []

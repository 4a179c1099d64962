"""What has arrived and was not yet taken by the user: bounded in count and bytes."""

from __future__ import annotations

from collections import deque

from gateway.protocol.messages import Event, Snapshot


class Buffer:
    """Events and snapshots in the order of the log, between the socket and the user's ``async for``.

    Invariant: at most `max_items` and `max_bytes`, plus what one message of the gateway brought, plus one snapshot.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items: deque[tuple[Event | Snapshot, int]] = deque()
        self.size = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def full(self) -> bool:
        """Nothing more should be read until the user has taken something."""
        return len(self._items) >= self._max_items or self.size >= self._max_bytes

    @property
    def roomy(self) -> bool:
        """At most half full: worth a new connection."""
        return len(self._items) <= self._max_items // 2 and self.size <= self._max_bytes // 2

    def put(self, item: Event | Snapshot, size: int) -> None:
        """Append. A snapshot replaces one that is still the newest item: it says all that one said, and more."""
        if isinstance(item, Snapshot) and self._items and isinstance(self._items[-1][0], Snapshot):
            self.size -= self._items.pop()[1]
        self._items.append((item, size))
        self.size += size

    def take(self) -> Event | Snapshot | None:
        """The oldest item, or None."""
        if not self._items:
            return None
        item, size = self._items.popleft()
        self.size -= size
        return item

"""The client's side of resuming: its cursor, and how long it waits before it comes back."""

from __future__ import annotations

from typing import Literal

from gateway.protocol.messages import Event, HelloOk, Snapshot

Verdict = Literal["new", "duplicate", "gap"]


class CursorTracker:
    """Where a client stands in a session's log, and the rule for what arrives (PROTOCOL section 4).

    Invariant: `cursor` never decreases within an epoch; every number up to it has been accounted for.
    """

    def __init__(self, cursor: int = 0, epoch: str | None = None) -> None:
        self.cursor = cursor
        self.epoch = epoch

    def offer(self, event: Event) -> Verdict:
        """Judge an event. ``new``: apply it, the cursor has moved. ``duplicate``: ignore it.

        ``gap``: something is missing before it; ignore it and everything until a snapshot, and send `resync`.
        """
        if event.seq <= self.cursor:
            return "duplicate"
        if event.first > self.cursor + 1:
            return "gap"
        self.cursor = event.seq
        return "new"

    def welcome(self, hello: HelloOk) -> None:
        """Adopt where the gateway continues the stream.

        When a snapshot is to follow, the old position stays until it is here: a client whose connection breaks in
        between must not claim to have what it never got.
        """
        if hello.resync_required:
            return
        self.cursor = hello.cursor
        self.epoch = hello.epoch

    def reset(self, snapshot: Snapshot) -> None:
        """Adopt a snapshot's position."""
        self.cursor = snapshot.cursor
        self.epoch = snapshot.epoch


class Backoff:
    """Delays between reconnects: full jitter, ``random() * min(cap, base * 2**attempt)`` (PROTOCOL section 9).

    Args:
        base, cap: seconds.
    """

    def __init__(self, base: float = 0.5, cap: float = 30.0) -> None:
        self._base = base
        self._cap = cap
        self.attempt = 0

    def delay(self, chance: float, hint: float = 0.0) -> float:
        """Seconds to wait now; counts an attempt.

        Args:
            chance: a random number in 0..1.
            hint: the server's word in seconds; the delay is never under it.
        """
        # 2**attempt overflows a float near 1024 attempts; the cap is reached long before 64.
        ceiling = min(self._cap, self._base * 2.0 ** min(self.attempt, 64))
        self.attempt += 1
        return max(hint, chance * ceiling)

    def reset(self) -> None:
        """Call after a connection that stayed joined for a while."""
        self.attempt = 0

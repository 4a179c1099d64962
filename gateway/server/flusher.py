"""The one task that writes to every connection.

Theory of operation
-------------------
A connection that has something new is *dirty*. The flusher visits the dirty ones, and each writes what it has with one
non-blocking system call; what the kernel refuses is that connection's own business from then on. Compared with a task
per connection this saves a task switch per event and connection, and lets many events share one write.

The adaptive gap: while many sessions stream, waiting a little between passes lets events pile up, so each write carries
more. The gap is three times what the last pass took, at most 5 ms; below 0.5 ms there is none. The first event after
silence goes out at once. A pass that served one log to many connections gains nothing from waiting, so there is no gap
after it: it goes by the number of logs that were read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import trio

from gateway.protocol.log import Chunk
from gateway.transport.frames import text_frames

GAP_FACTOR = 3.0
GAP_MOST = 0.005
GAP_LEAST = 0.0005
"""Seconds. Three quarters of the time for everything else; 5 ms is below what a reader of text can see."""


class Flushable(Protocol):
    dirty: bool

    def flush(self) -> None:
        """Write what there is, without waiting."""

    def crashed(self, exc: Exception) -> None:
        """`flush` failed: end the connection."""


class Flusher:
    """Visits dirty connections. `timer` gives seconds; a simulation passes its own."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._dirty: list[Flushable] = []
        self._work = trio.lowlevel.ParkingLot()
        self._framed: tuple[Chunk, bytes] | None = None
        self._fresh = 0

    def mark(self, connection: Flushable) -> None:
        """Have a connection visited in the next pass. Never waits."""
        if not connection.dirty:
            connection.dirty = True
            if not self._dirty:
                self._work.unpark()
            self._dirty.append(connection)

    def frames(self, chunk: Chunk) -> bytes:
        """A chunk as WebSocket frames; the many readers of one log share the bytes."""
        framed = self._framed
        if framed is not None and framed[0] is chunk:
            return framed[1]
        self._fresh += 1
        data = text_frames(chunk.payloads)
        self._framed = (chunk, data)
        return data

    async def run(self) -> None:
        """Flush until cancelled. Owned by the gateway's nursery."""
        timer = self._timer
        while True:
            if not self._dirty:
                await self._work.park()
            batch, self._dirty = self._dirty, []
            self._fresh = 0
            started = timer()
            for connection in batch:
                connection.dirty = False
                try:
                    connection.flush()
                except Exception as exc:
                    # One connection's fault is not the others': they are served, it is closed.
                    connection.crashed(exc)
            self._framed = None
            gap = min(GAP_MOST, GAP_FACTOR * (timer() - started))
            if self._fresh > 1 and gap >= GAP_LEAST:
                await trio.sleep(gap)
            else:
                await trio.lowlevel.checkpoint()

"""The one task that publishes what agents stream and writes to every connection.

Theory of operation
-------------------
A connection that has something new is *dirty*. The flusher visits the dirty ones, and each writes what it has with one
non-blocking system call; what the kernel refuses is that connection's own business from then on. Compared with a task
per connection this saves a task switch per event and connection, and lets many events share one write. Publishers are
visited the same way, first, so what they show goes out in the same pass.

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
        """Do what there is to do, without waiting."""

    def crashed(self, exc: Exception) -> None:
        """`flush` failed: end what it belongs to."""


class Flusher:
    """Visits dirty publishers and connections. `timer` gives seconds; a simulation passes its own."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._publishers: list[Flushable] = []
        self._dirty: list[Flushable] = []
        self._work = trio.lowlevel.ParkingLot()
        self._framed: tuple[Chunk, bytes] | None = None
        self._fresh = 0

    def mark(self, connection: Flushable) -> None:
        """Have a connection visited in the next pass. Never waits."""
        if not connection.dirty:
            connection.dirty = True
            if not self._dirty and not self._publishers:
                self._work.unpark()
            self._dirty.append(connection)

    def mark_publisher(self, publisher: Flushable) -> None:
        """Have a publisher visited in the next pass. It calls this once per visit. Never waits."""
        if not self._dirty and not self._publishers:
            self._work.unpark()
        self._publishers.append(publisher)

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
            if not self._dirty and not self._publishers:
                await self._work.park()
            self._fresh = 0
            started = timer()
            publishers, self._publishers = self._publishers, []
            self._visit(publishers)
            connections, self._dirty = self._dirty, []
            for connection in connections:
                connection.dirty = False
            self._visit(connections)
            self._framed = None
            gap = min(GAP_MOST, GAP_FACTOR * (timer() - started))
            if self._fresh > 1 and gap >= GAP_LEAST:
                await trio.sleep(gap)
            else:
                await trio.lowlevel.checkpoint()

    def _visit(self, batch: list[Flushable]) -> None:
        for one in batch:
            try:
                one.flush()
            except Exception as exc:
                # One connection's or session's fault is not the others': they are served, it is ended.
                one.crashed(exc)

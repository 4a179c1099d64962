"""The one task that publishes what agents stream and writes to every connection.

Theory of operation
-------------------
A connection that has something new is *dirty*. The flusher visits the dirty ones, and each writes what it has with one
non-blocking system call; what the kernel refuses is that connection's own business from then on. Compared with a task
per connection this saves a task switch per event and connection, and lets many events share one write. Publishers are
visited the same way, first, so what they show goes out in the same pass.

The adaptive gap: while many sessions stream, waiting a little between passes lets events pile up, so each write carries
more. The gap is three times what the last pass took, at most 16 ms; below 0.5 ms there is none. A pass that served one
log to many connections gains nothing from waiting, so there is no gap after it: it goes by the number of logs that were
read. What is *urgent* does not wait for the gap's end: replies, the engine's own events but for the end of a long
answer, and the first delta after a silence are visited in the next scheduler pass, alone. An input is published by
whoever brings it, in the same step (`publish`); only the writing to connections is left to the next pass, where a reply
shares the system call with what follows it. What was stored and somebody waits for, and what a turn says first, is
written in the same step too (`deliver`): while a hundred agents stream each scheduler pass takes a millisecond. As long
as others have work, a pass of the flusher stops after a session or two for them and for what is urgent: who asks now
does not wait until a hundred answers have been written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Protocol

import trio

from gateway.protocol.log import Chunk
from gateway.transport.frames import text_frames

GAP_FACTOR = 3.0
GAP_MOST = 0.016
GAP_LEAST = 0.0005
"""Seconds. Three quarters of the time for everything else; in 16 ms a screen shows its next frame."""

SLICE = 0.0001
"""Seconds of a pass between two scheduler passes while others have work too: a session or two. Whoever asks waits for
some five scheduler passes until the first word of the answer, and for a slice in each; who reads a long answer gets the
next part of it later, because a pass takes longer."""

SLICE_ALONE = 0.0003
"""The same while nobody else has anything to do: fewer of the scheduler's passes, which cost 15 µs each."""

SILENCE = 0.1
"""Seconds without a visit after which a publisher's next delta is a beginning, which somebody waits for."""

SOON, NOW, HERE = 1, 2, 3


class Flushable(Protocol):
    dirty: int
    """0, or when it was asked to be visited: `SOON` (after the gap), `NOW` (in the next scheduler pass) or `HERE` (in
    this step)."""
    visited_at: float
    """When it was last visited, in seconds of the flusher's timer."""

    def flush(self) -> None:
        """Do what there is to do, without waiting."""

    def crashed(self, exc: Exception) -> None:
        """`flush` failed: end what it belongs to."""


class _Round:
    """Who is to be visited: publishers first, so that what they show goes out in the same round."""

    def __init__(self) -> None:
        self.publishers: list[Flushable] = []
        self.connections: list[Flushable] = []

    def __bool__(self) -> bool:
        return bool(self.publishers or self.connections)


class Flusher:
    """Visits dirty publishers and connections. `timer` gives seconds; a simulation passes its own."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._soon = _Round()
        self._now = _Round()
        self._here: list[Flushable] = []
        self._when = SOON
        """When what is shown in this step is written."""
        self._context = copy_context()
        self._idle = False
        self._parked = False
        """Whether the task may be waiting: to look costs a tenth of what waking nobody does."""
        self._work = trio.lowlevel.ParkingLot()
        self._framed: tuple[Chunk, bytes] | None = None
        self._fresh = 0

    def mark(self, connection: Flushable, *, urgent: bool = False) -> None:
        """Have a connection visited. Never waits."""
        when = NOW if urgent and self._when is SOON else self._when
        if connection.dirty < when:
            connection.dirty = when
            if when is HERE:
                self._here.append(connection)
                return
            (self._now if when is NOW else self._soon).connections.append(connection)
            if self._parked and (when is NOW or self._idle):
                self._wake()

    def mark_publisher(self, publisher: Flushable, *, urgent: bool = False, patient: bool = False) -> None:
        """Have a publisher visited: soon, unless it is `patient`, if it was silent for a while. Never waits."""
        silent = not patient and self._timer() - publisher.visited_at > SILENCE
        when = NOW if urgent or silent else SOON
        if publisher.dirty < when:
            publisher.dirty = when
            (self._now if when is NOW else self._soon).publishers.append(publisher)
            if self._parked and (when is NOW or self._idle):
                self._wake()

    def publish(self, publisher: Flushable) -> None:
        """Visit a publisher in this step. What it shows is urgent: the next scheduler pass writes it."""
        before, self._when = self._when, NOW
        try:
            self._visit(publisher, self._timer())
        finally:
            self._when = before

    def deliver(self, publisher: Flushable) -> None:
        """Visit a publisher, and then whoever it has shown something, in this step."""
        # It may be an agent that calls: the tasks that a visit starts are not to see its context variables.
        self._context.run(self._deliver, publisher, self._timer())

    def _deliver(self, publisher: Flushable, now: float) -> None:
        before, self._when = self._when, HERE
        try:
            self._visit(publisher, now)
        finally:
            self._when = before
        shown, self._here = self._here, []
        for connection in shown:
            self._visit(connection, now)
        self._framed = None

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
        while True:
            if not self._now and not self._soon:
                self._idle = True
                await self._park()
                self._idle = False
            gap = min(GAP_MOST, GAP_FACTOR * await self._pass())
            if self._fresh > 1 and gap >= GAP_LEAST:
                with trio.move_on_after(gap):
                    while True:
                        if not self._now:
                            await self._park()
                        else:
                            await trio.lowlevel.checkpoint()
                        self._serve_urgent()
            else:
                await trio.lowlevel.checkpoint()

    async def _park(self) -> None:
        self._parked = True
        await self._work.park()

    def _wake(self) -> None:
        self._parked = False
        self._work.unpark()

    async def _pass(self) -> float:
        """Visit whoever waits; returns how many seconds that took, without those of others in between."""
        timer = self._timer
        self._fresh = 0
        soon, self._soon = self._soon, _Round()
        taken, most = 0.0, SLICE
        started = now = timer()
        for visit, batch in ((self._deliver, soon.publishers), (self._visit, soon.connections)):
            for one in batch:
                if not one.dirty:
                    continue  # visited since
                visit(one, now)
                now = timer()
                if now - started >= most:
                    self._serve_urgent()
                    paused = timer()
                    taken += paused - started
                    await trio.lowlevel.checkpoint()
                    started = now = timer()
                    most = SLICE if started - paused > SLICE / 2 else SLICE_ALONE
        self._serve_urgent()
        return taken + timer() - started

    def _serve_urgent(self) -> None:
        round_, self._now = self._now, _Round()
        now = self._timer()
        for publisher in round_.publishers:
            if publisher.dirty:  # else it was visited since
                self._deliver(publisher, now)
        for connection in round_.connections:
            if connection.dirty:
                self._visit(connection, now)
        self._framed = None

    def _visit(self, one: Flushable, now: float) -> None:
        one.dirty = 0
        one.visited_at = now
        try:
            one.flush()
        except Exception as exc:
            # One connection's or session's fault is not the others': they are served, it is ended.
            one.crashed(exc)

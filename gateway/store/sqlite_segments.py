"""How a store file keeps events: in segments, a few of one session's to a row.

A row for each event, clustered by session, had the tree put in order after every second batch: each session writes at a
place of its own, between two pages that are full, so one batch changed three or four. A segment has room for what comes
next: to write that changes its page in place, and only every few batches a new one is added, at the end of the table,
next to the new ones of others. That is a seventh to a half of the pages. A session's segments never overlap in their
numbers.

Inside, an event is a line, JSON as the codec writes it (which has no line break and no tab). Behind an input that was
not simply to be queued stand a tab and its `on_busy`. Empty lines are room.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import orjson
from attrs import define

from gateway.errors import StoreUnusable
from gateway.protocol.keys import Key, digest_of

SEGMENT = 960
"""Bytes of a segment, if it has no event that is longer: four of them fit a page. A short turn writes half of that.
With twice as much short turns write up to a quarter more pages, answers of a kilobyte a fifth fewer."""

SCHEMA = (
    # first: the lowest number. events, bytes: how many it has, and their sizes, line breaks not counted.
    """CREATE TABLE segments (
        id INTEGER PRIMARY KEY, session INTEGER NOT NULL, first INTEGER NOT NULL, events INTEGER NOT NULL,
        bytes INTEGER NOT NULL, lines BLOB NOT NULL)""",
    "CREATE INDEX segments_of_session ON segments (session, first)",
)


@define(eq=False)
class Segment:
    """One of a session, as it is built."""

    id: int
    session: int
    first: int
    events: int = 0
    size: int = 0
    lines: bytes = b""

    def add(self, payload: bytes, on_busy: str = "queue") -> None:
        """Add an event."""
        self.events += 1
        self.size += len(payload)
        self.lines += payload + (b"\n" if on_busy == "queue" else b"\t%b\n" % on_busy.encode())

    def padded(self) -> bytes:
        """Its lines and its room."""
        return self.lines.ljust(SEGMENT, b"\n")


class Line(NamedTuple):
    """An event as it is stored."""

    seq: int
    type: bytes
    payload: bytes
    on_busy: str = "queue"


_HEAD = re.compile(rb'\{"type":"(\w+)","seq":(\d+),')


def parse(lines: bytes) -> Iterator[Line]:
    """The events of segments.

    Raises:
        StoreUnusable: there is a line that is none.
    """
    for line in lines.split(b"\n"):
        if line:
            head = _HEAD.match(line)
            if head is None:
                raise StoreUnusable("a stored event cannot be read; restore a backup")
            payload, _, on_busy = line.partition(b"\t")
            yield Line(int(head[2]), head[1], payload, on_busy.decode() or "queue")


def fetch(connection: sqlite3.Connection, session: int, after: int, upto: int) -> list[Line]:
    """A session's events with ``after < seq <= upto``, in order; also such as were kept when those around them went."""
    (lines,) = connection.execute(
        """SELECT CAST(group_concat(lines, '') AS BLOB) FROM segments
        WHERE session = ?1 AND first <= ?3 AND first >= coalesce(
            (SELECT max(first) FROM segments WHERE session = ?1 AND first <= ?2), ?2)""",
        (session, after, upto),
    ).fetchone()
    return sorted(line for line in parse(lines or b"") if after < line.seq <= upto)


def key_of(line: Line) -> tuple[str, Key]:
    """The idempotency key that an input is."""
    event = orjson.loads(line.payload)
    return event["request_id"], Key(line.seq, digest_of(event["content"], event["metadata"]), event["at"])


def open_asks(events: Iterable[Line]) -> dict[str, int]:
    """Of the events of a turn: the questions that nobody has answered (id → number), in order. They are kept for as
    long as they are open."""
    asks: dict[str, int] = {}
    for line in events:
        if line.type == b"ask":
            asks[orjson.loads(line.payload)["ask_id"]] = line.seq
        elif line.type == b"answered":
            asks.pop(orjson.loads(line.payload)["ask_id"], None)
    return asks

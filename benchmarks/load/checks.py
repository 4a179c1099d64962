"""What may be counted: a sequence that is complete, in order, and says what it must. Everything else ends the run.

Plain objects without I/O. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.texts import LENGTH, piece, pieces


class ContentError(Exception):
    """The server sent something else than it should have. What was measured does not count."""


class Numbered:
    """One answer of a peer: deltas that carry their number, each sent as it is.

    Args:
        tag: the answer's name. count: how many deltas it has, None for no end.
    """

    def __init__(self, tag: str, count: int | None = None) -> None:
        self.tag = tag
        self.count = count
        self.received = 0

    def delta(self, tag: object, number: object, text: object) -> None:
        """Take the next delta."""
        if tag != self.tag:
            raise ContentError(f"a delta of {tag!r} where one of {self.tag!r} was expected")
        if number != self.received:
            raise ContentError(f"{self.tag}: delta {number!r} where {self.received} was expected")
        if text != piece(self.tag, self.received):
            raise ContentError(f"{self.tag}: delta {number} says {text!r}")
        self.received += 1

    def end(self) -> None:
        """The server says that this was all."""
        if self.count is not None and self.received != self.count:
            raise ContentError(f"{self.tag}: ended after {self.received} of {self.count} deltas")


class Covered:
    """A session's events, as a client of the gateway has to take them (PROTOCOL section 4).

    Numbers are covered without a hole; no number comes twice; the text of every delta is the next piece of the answer,
    merged with what follows or not; every output says what was streamed since the one before.

    Args:
        cursor: the number of the last event that the client has.

    Attributes:
        received: pieces of the present answer that arrived, in deltas or in an output in their place.
        streamed: pieces of all answers that arrived in deltas.
    """

    def __init__(self, cursor: int = 0) -> None:
        self.cursor = cursor
        self.streamed = 0
        self._expect("", None)

    def _expect(self, tag: str, count: int | None) -> None:
        self.tag = tag
        self.count = count
        self.received = self._sealed = 0

    def ask(self, tag: str, count: int | None = None) -> None:
        """The next turn will answer with `count` pieces of `tag`; 0 if its text is not made of pieces."""
        self._expect(tag, count)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        seq, first = event["seq"], event["first"]
        if seq <= self.cursor:
            raise ContentError(f"event {seq} came again: the cursor was at {self.cursor}")
        if first > self.cursor + 1:
            raise ContentError(f"a gap: {self.cursor} was followed by {first}..{seq}")
        self.cursor = seq
        kind = event["type"]
        if kind == "delta":
            self._text(event["text"], self.received, "delta")
            count = len(event["text"]) // LENGTH
            self.received += count
            self.streamed += count
        elif kind == "output" and self.count != 0:
            self._text(event["content"], self._sealed, "output")
            self._sealed += len(event["content"]) // LENGTH
            if self._sealed < self.received:
                raise ContentError(f"{self.tag}: {self.received} pieces were streamed, the output has {self._sealed}")
            self.received = self._sealed
        elif kind == "turn_ended":
            if event["outcome"] != "completed":
                raise ContentError(f"{self.tag}: the turn ended as {event['outcome']}: {event.get('error')}")
            if self.count and not self.received == self._sealed == self.count:
                raise ContentError(f"{self.tag}: ended with {self.received} of {self.count} pieces")

    def _text(self, text: str, start: int, what: str) -> None:
        if text != pieces(self.tag, start, len(text) // LENGTH) or not text:
            raise ContentError(f"{self.tag}: a wrong {what} after {start} pieces: {text[:200]!r}")

"""Server-sent events from bytes, sans-I/O.

A parser of our own, because text-based line readers (httpx2's `aiter_lines` among them) also end lines at U+2028 and
its kin, which may stand unescaped in JSON, and because a line from a foreign server needs a bound.
"""

from __future__ import annotations

from attrs import define, field, frozen

MAX_EVENT_BYTES = 1024 * 1024
"""One event: a thousand times a usual chunk, so that a whole answer in one event still passes."""


class EventTooLarge(Exception):
    """An event exceeds `MAX_EVENT_BYTES`; the rest of the stream cannot be read."""


@frozen
class ServerSentEvent:
    """`name` is the event's type, empty if it has none; `data` its data lines, joined by newlines."""

    name: str
    data: str


@define
class EventParser:
    """Bytes in, events out.

    Besides the standard's fields it takes ``error: …`` for an event of that name, which llama.cpp's server sends.
    """

    _rest: bytearray = field(factory=bytearray, init=False)
    _size: int = field(default=0, init=False)
    _name: str = field(default="", init=False)
    _data: list[str] = field(factory=list, init=False)

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; return the events they complete.

        Raises:
            EventTooLarge: a line or an event is longer than `MAX_EVENT_BYTES`.
        """
        self._rest += chunk
        if not self._rest.endswith((b"\n", b"\r")) and b"\n" not in chunk and b"\r" not in chunk:
            self._check(len(self._rest))
            return []
        lines = bytes(self._rest).splitlines(keepends=True)
        # A line is complete at its end mark, and a "\r" may be the first half of one.
        self._rest = bytearray(b"" if lines[-1].endswith(b"\n") else lines.pop())
        self._check(len(self._rest))
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if not line:
            event = ServerSentEvent(self._name, "\n".join(self._data)) if self._data else None
            self._name, self._data, self._size = "", [], 0
            return event
        self._size += len(line)
        self._check(0)
        name, _, value = line.decode("utf-8", "replace").removeprefix("\ufeff").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "error":
            self._name = "error"
            self._data.append(value)
        return None  # comments (an empty name), `id`, `retry` and unknown fields mean nothing here

    def _check(self, more: int) -> None:
        if self._size + more > MAX_EVENT_BYTES:
            raise EventTooLarge

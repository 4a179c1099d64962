"""The covering log: a session's history, which is also the buffer of every connection that reads it.

Theory of operation
-------------------
Numbers are given once, in order, and every number stays accounted for: an entry stands for the range ``first..seq``.
What is *superseded* is removed, and the entry after it then covers its numbers. That one rule gives all of these:

- a long answer does not push older messages out: its deltas go when its output comes;
- a slow reader gets merged deltas and skips what no longer matters, and still sees no gap;
- after a crash the numbers of lost deltas are covered by the next entry.

So `first` is never stored. It is ``previous retained entry's seq + 1``, computed when an entry is served.

A reader is a *cursor*: the ``seq`` of the last event it has. `Log.read` returns what follows it, within a byte budget.
`Log.floor` is the oldest cursor that can be continued without a gap; a reader below it needs a snapshot.

Invariants:
    entries are in strictly increasing ``seq``; ``floor < entries[0].seq``; ``head >= entries[-1].seq``
    all volatile entries belong to turns that have not ended
    non-volatile entries are within ``max_events`` and ``max_bytes`` (but the newest one always stays)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter

from attrs import define, frozen

from gateway.errors import GatewayError
from gateway.protocol import codec
from gateway.protocol.messages import Delta, Event, Output, Progress, TurnEnded

MERGE_FROM = 8
"""Adjacent deltas are merged when at least so many wait for a reader. Below it, sending the frames that are already
encoded for everyone costs less than encoding one for this reader alone (0.4 µs a frame against 3 µs a merge)."""

MERGED_BYTES = 64 * 1024
"""A merged delta's text is cut here, so that a frame stays far below ``max_frame_bytes`` (PROTOCOL section 4)."""

_by_seq = attrgetter("seq")


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class CursorExpired(GatewayError):
    """The cursor is below `Log.floor`: no gapless continuation exists; take a snapshot."""


@define(eq=False)
class Entry:
    """One retained event. `payload` is its JSON with `first` as given in `first`; a delta's is made when first served.

    `size` is in bytes: of the text of a delta, which is what it adds to a merged one, and of the JSON of anything else.
    `parts` of a delta that stands for several: their texts, the last of them numbered `seq`.
    """

    event: Event
    seq: int
    size: int
    first: int = 0
    payload: bytes | None = None
    parts: list[str] | None = None

    def text_after(self, cursor: int) -> str:
        """Of a delta: its text without the parts up to `cursor`."""
        parts = self.parts
        if parts is None or cursor <= self.seq - len(parts):
            return self.event.text  # type: ignore[attr-defined,no-any-return]
        return "".join(parts[cursor - self.seq :])

    def encode(self, first: int) -> bytes:
        """The event as served with `first`. All readers share the bytes."""
        if self.payload is None or self.first != first:
            self.payload = codec.encode_event(self.event, first)
            self.first = first
        return self.payload


@frozen
class Chunk:
    """What follows a cursor: encoded events, the cursor after them, and their size in bytes."""

    payloads: list[bytes]
    cursor: int
    size: int


class Log:
    """A session's log in memory.

    Args:
        max_events: bound on retained non-volatile events (``replay_max_events``).
        max_bytes: bound on their encoded bytes (``replay_max_bytes``).
        base: every number up to this one is history that is not here; a new log continues with ``base + 1``.
    """

    def __init__(self, *, max_events: int, max_bytes: int, base: int = 0) -> None:
        self._entries: list[Entry] = []
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events = 0  # retained, non-volatile
        self._bytes = 0  # theirs
        self._open: dict[str, dict[tuple[str, str], int]] = {}
        """Turn → (kind, channel or key) → ``seq`` of its oldest volatile entry that nothing has superseded."""
        self._memo: tuple[int, int, int, Chunk] | None = None
        self.version = 0
        self.floor = base
        self.head = base

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Event]:
        return (entry.event for entry in self._entries)

    def newest_first(self) -> Iterator[tuple[Entry, int]]:
        """Entries from the newest to the oldest, each with its ``first``."""
        entries = self._entries
        for i in range(len(entries) - 1, -1, -1):
            yield entries[i], (entries[i - 1].seq if i else self.floor) + 1

    @property
    def retained_events(self) -> int:
        """Non-volatile events held."""
        return self._events

    @property
    def retained_bytes(self) -> int:
        """Encoded bytes of the non-volatile events held."""
        return self._bytes

    def append(self, event: Event, payload: bytes | None = None, parts: list[str] | None = None) -> None:
        """Add a numbered event; removes what it supersedes and what no longer fits.

        Args:
            event: its ``seq`` must be above `head`. A jump is a hole that this event covers (lost in a crash).
            payload: the event encoded with ``first == seq``, when the caller has it already.
            parts: of a delta that stands for several numbers, ending with its ``seq``: the text of each.
        """
        if event.seq - (len(parts) - 1 if parts else 0) <= self.head:
            raise AssertionError(f"number {event.seq} was given before: the head is {self.head}")
        # Measured and encoded before anything changes: an event that has no JSON form must leave the log as it was.
        if type(event) is Delta:
            entry = Entry(event, event.seq, _text_bytes(event.text))
            if parts is not None and len(parts) > 1:
                entry.parts = parts
            self._append_volatile(entry, event, ("channel", event.channel))
        else:
            if payload is None:
                payload = codec.encode_event(event, event.seq)
            entry = Entry(event, event.seq, len(payload), event.seq, payload)
            if type(event) is Progress:
                self._supersede(event.turn_id, ("progress", event.key))
                self._append_volatile(entry, event, ("progress", event.key))
            else:
                self._append_kept(entry)
        self.head = event.seq
        self.version += 1

    def _append_volatile(self, entry: Entry, event: Delta | Progress, slot: tuple[str, str]) -> None:
        turn = self._open.get(event.turn_id)
        if turn is None:
            turn = self._open[event.turn_id] = {}
        turn.setdefault(slot, event.seq)
        self._entries.append(entry)

    def _append_kept(self, entry: Entry) -> None:
        event = entry.event
        if type(event) is Output:
            self._supersede(event.turn_id, ("channel", event.channel))
        elif type(event) is TurnEnded:
            self._supersede_turn(event.turn_id)
        self._entries.append(entry)
        self._events += 1
        self._bytes += entry.size
        if self._events > self._max_events or self._bytes > self._max_bytes:
            self._evict()

    def _supersede(self, turn_id: str, slot: tuple[str, str]) -> None:
        """Remove the volatile entries of one channel or progress key."""
        turn = self._open.get(turn_id)
        oldest = None if turn is None else turn.pop(slot, None)
        if oldest is None:
            return
        start = self._after(oldest - 1)
        if slot[0] == "progress":
            # One entry at most: each progress superseded the one before it.
            if start < len(self._entries) and self._entries[start].seq == oldest:
                del self._entries[start]
            return
        channel = slot[1]
        self._entries[start:] = [
            entry
            for entry in self._entries[start:]
            if not (type(event := entry.event) is Delta and event.channel == channel and event.turn_id == turn_id)
        ]

    def _supersede_turn(self, turn_id: str) -> None:
        turn = self._open.pop(turn_id, None)
        if turn:
            start = self._after(min(turn.values()) - 1)
            self._entries[start:] = [
                entry
                for entry in self._entries[start:]
                if not (entry.event.volatile and entry.event.turn_id == turn_id)  # type: ignore[attr-defined]
            ]

    def _evict(self) -> None:
        """Drop from the front until the bounds hold. Cursors below the new floor expire."""
        drop = 0
        last = len(self._entries) - 1
        while drop < last and (self._events > self._max_events or self._bytes > self._max_bytes):
            entry = self._entries[drop]
            if not entry.event.volatile:
                self._events -= 1
                self._bytes -= entry.size
            drop += 1
        if drop:
            self.floor = self._entries[drop - 1].seq
            del self._entries[:drop]

    def _after(self, cursor: int) -> int:
        """Index of the first entry with ``seq > cursor``."""
        entries = self._entries
        i = len(entries)
        # Live readers are a few entries behind: walking back beats bisecting.
        for _ in range(8):
            if i == 0 or entries[i - 1].seq <= cursor:
                return i
            i -= 1
        return bisect_right(entries, cursor, 0, i, key=_by_seq)

    def read(self, cursor: int, budget: int) -> Chunk:
        """What follows `cursor`: at least one event if there is one, then as many as `budget` bytes hold.

        Deltas that pile up behind a cursor come merged. The result is remembered, so that many readers at the same
        cursor cost one read.

        Raises:
            CursorExpired: `cursor` is below `floor`.
        """
        memo = self._memo
        if memo is not None and memo[0] == cursor and memo[1] == self.version and memo[2] == budget:
            return memo[3]
        if cursor < self.floor:
            raise CursorExpired(f"cursor {cursor} is below the oldest cursor {self.floor}")
        entries = self._entries
        i, end = self._after(cursor), len(self._entries)
        previous = entries[i - 1].seq if i else self.floor
        payloads: list[bytes] = []
        size = 0
        position = cursor
        while i < end:
            entry = entries[i]
            following = i + 1
            if type(entry.event) is Delta and (stop := self._run(i)) - i >= MERGE_FROM:
                following = stop
                payload = _merge(entries[i:stop], position, previous)
            elif entry.parts is not None and position > entry.seq - len(entry.parts):
                payload = _merge([entry], position, previous)
            else:
                payload = entry.encode(previous + 1)
            if payloads and size + len(payload) > budget:
                break
            payloads.append(payload)
            size += len(payload)
            i = following
            position = previous = entries[i - 1].seq
        chunk = Chunk(payloads, position, size)
        self._memo = (cursor, self.version, budget, chunk)
        return chunk

    def _run(self, start: int) -> int:
        """End index of the run of deltas of one turn and channel that starts at `start`, cut at `MERGED_BYTES`."""
        entries = self._entries
        head = entries[start].event
        assert type(head) is Delta
        size = entries[start].size
        i = start + 1
        while i < len(entries):
            event = entries[i].event
            if type(event) is not Delta or event.channel != head.channel or event.turn_id != head.turn_id:
                break
            size += entries[i].size
            if size > MERGED_BYTES:
                break
            i += 1
        return i

    def backlog(self, cursor: int, enough: int) -> int:
        """Bytes that a reader at `cursor` has yet to get, after merging; stops counting beyond `enough`."""
        total = 0
        for entry in self._entries[self._after(cursor) :]:
            total += entry.size
            if total > enough:
                break
        return total


def _merge(run: list[Entry], cursor: int, previous: int) -> bytes:
    """Adjacent deltas of one turn and channel as one, for a reader at `cursor`; `previous` is retained before them."""
    head, last = run[0], run[-1].event
    assert isinstance(head.event, Delta)
    inside = head.parts is not None and cursor > head.seq - len(head.parts)
    text = [head.text_after(cursor), *(entry.event.text for entry in run[1:])]  # type: ignore[attr-defined]
    merged = Delta(turn_id=head.event.turn_id, channel=head.event.channel, text="".join(text), seq=last.seq, at=last.at)
    return codec.encode_event(merged, (cursor if inside else previous) + 1)

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

Memory holds the newest part of that window, the *tail*. What is before it is in the store, where it was before it was
ever here; the log keeps only the numbers and sizes of it (`_Older`). A reader below `Log.tail` gets *pages*: `page_end`
says which events to load, `page` turns them into what the log would have served. The tail only ever moves up, so a page
ends below it, and the last one joins the log without a seam.

Invariants:
    entries are in strictly increasing ``seq``; ``floor <= tail < entries[0].seq``; ``head >= entries[-1].seq``
    all volatile entries belong to turns that have not ended, and are in memory: no store has them
    the window's non-volatile events are within ``max_events`` and ``max_bytes`` (but the newest one always stays)
    when a turn starts, what is in memory before it is within the log's share of `Tails`
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from attrs import define, field

from gateway.errors import GatewayError
from gateway.protocol import codec
from gateway.protocol.marks import Marks
from gateway.protocol.messages import Delta, Event, Output, Progress, TurnEnded, TurnStarted

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


class NotInMemory(GatewayError):
    """The cursor is below `Log.tail`: load a page, see `Log.page_end`."""


class Tails:
    """How much each of many logs may hold in memory: an equal share of what all may, but never more than `each`.

    Args:
        each: bytes that one log may hold.
        total: bytes that all may hold.
    """

    LEAST = 16 * 1024
    """Bytes that a log may hold in any case: a reader that is a little behind does not go to the disk."""

    def __init__(self, each: int, total: int) -> None:
        self._each = each
        self._total = total
        self.share = each

    def divide(self, logs: int) -> None:
        """Share among so many logs. A log notices at its next turn, or when it is told to `Log.let_go`."""
        self.share = min(self._each, max(self.LEAST, self._total // max(1, logs)))


UNBOUNDED = Tails(1 << 62, 1 << 62)
"""Everything stays in memory: for a log without a store behind it."""


class _Older:
    """Number and size of each event of the window that is not in memory, oldest first: 12 bytes each."""

    def __init__(self) -> None:
        self._seqs = array("Q")
        self._sizes = array("I")
        self._start = 0  # what is before it has left the window; the arrays are cut now and then

    def __len__(self) -> int:
        return len(self._seqs) - self._start

    def add(self, seq: int, size: int) -> None:
        self._seqs.append(seq)
        self._sizes.append(size)

    def drop_oldest(self) -> tuple[int, int]:
        start = self._start
        dropped = self._seqs[start], self._sizes[start]
        self._start += 1
        if self._start > 64 and 2 * self._start > len(self._seqs):
            del self._seqs[: self._start]
            del self._sizes[: self._start]
            self._start = 0
        return dropped

    def following(self, cursor: int, budget: int) -> int:
        """The last of the events behind `cursor` that `budget` bytes hold; one at least, or 0 if there is none."""
        last = 0
        for i in range(bisect_right(self._seqs, cursor, self._start), len(self._seqs)):
            budget -= self._sizes[i]
            if last and budget < 0:
                break
            last = self._seqs[i]
        return last

    def backlog(self, cursor: int, enough: int) -> int:
        """Bytes behind `cursor`; stops counting beyond `enough`."""
        total = 0
        for i in range(bisect_right(self._seqs, cursor, self._start), len(self._seqs)):
            total += self._sizes[i]
            if total > enough:
                break
        return total

    def newest(self, most: int, budget: int) -> int:
        """The event before the newest ones within those bounds; 0 if that is all of them."""
        i = len(self._seqs)
        while i > self._start and most > 0 and budget >= self._sizes[i - 1]:
            i -= 1
            most -= 1
            budget -= self._sizes[i]
        return self._seqs[i - 1] if i > self._start else 0

    def before(self, cursor: int, count: int) -> tuple[int, Sequence[int]]:
        """The event at or before `cursor` (0 if there is none), and the `count` numbers that follow it."""
        i = bisect_right(self._seqs, cursor, self._start)
        return (self._seqs[i - 1] if i > self._start else 0), self._seqs[i : i + count]


@define(eq=False)
class Entry:
    """One retained event. `payload` is its JSON with `first` as given in `first`; a delta's is made when first served.

    `size` is in bytes: of the text of a delta, which is what it adds to a merged one, and of the JSON of anything else.
    `parts` of a delta that stands for several: their texts, the last of them numbered `seq`.
    `wrapped` is a dialect's, for its encoded form; unset until it needs it, so that it costs nothing without one.
    """

    event: Event
    seq: int
    size: int
    first: int = 0
    payload: bytes | None = None
    parts: list[str] | None = None
    wrapped: Any = field(init=False)

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


@define
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
        older: number and size of events above `base` that the store holds, in order; the log continues behind them.
        tails: what this log may hold in memory.
    """

    def __init__(
        self,
        *,
        max_events: int,
        max_bytes: int,
        base: int = 0,
        older: Sequence[tuple[int, int]] = (),
        tails: Tails = UNBOUNDED,
    ) -> None:
        self._entries: list[Entry] = []
        self._tails = tails
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events = 0  # of the window, non-volatile
        self._bytes = 0  # theirs
        self._held = 0  # bytes of those in memory
        self._turn: int | None = None
        """``seq`` of the running turn's start. From there on everything stays in memory: what is volatile has no other
        place, and an agent that looks back sees the whole of its turn."""
        self._older = _Older()
        self._open: dict[str, dict[tuple[str, str], int]] = {}
        """Turn → (kind, channel or key) → ``seq`` of its oldest volatile entry that nothing has superseded."""
        self._memo: tuple[int, int, int, Chunk] | None = None
        self.marks: Marks | None = None
        """Kept from when a dialect needs them (`keep_marks`)."""
        self.version = 0
        self.floor = base
        """The oldest cursor that can be continued without a gap."""
        self.tail = base
        """The oldest cursor that can be continued from memory."""
        self.head = base
        for seq, size in older:
            self._older.add(seq, size)
            self._events += 1
            self._bytes += size
            self.tail = self.head = seq

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Event]:
        return (entry.event for entry in self._entries)

    def newest_first(self) -> Iterator[tuple[Entry, int]]:
        """Entries in memory from the newest to the oldest, each with its ``first``."""
        entries = self._entries
        for i in range(len(entries) - 1, -1, -1):
            yield entries[i], (entries[i - 1].seq if i else self.tail) + 1

    @property
    def retained_events(self) -> int:
        """Non-volatile events of the window, in memory or not."""
        return self._events

    @property
    def retained_bytes(self) -> int:
        """Encoded bytes of these."""
        return self._bytes

    @property
    def held_bytes(self) -> int:
        """Encoded bytes of the non-volatile events in memory."""
        return self._held

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
            if self.marks is not None:
                self.marks.add(event, self._deltas(event))
            self._supersede(event.turn_id, ("channel", event.channel))
        elif type(event) is TurnEnded:
            self._supersede_turn(event.turn_id)
            self._turn = None
        self._entries.append(entry)
        self._events += 1
        self._bytes += entry.size
        self._held += entry.size
        if self._events > self._max_events or self._bytes > self._max_bytes:
            self._evict()
        if type(event) is TurnStarted:
            self._turn = event.seq
            self.let_go()

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
        while self._older and (self._events > self._max_events or self._bytes > self._max_bytes):
            self.floor, size = self._older.drop_oldest()
            self._events -= 1
            self._bytes -= size
        drop = 0
        last = len(self._entries) - 1
        while drop < last and (self._events > self._max_events or self._bytes > self._max_bytes):
            entry = self._entries[drop]
            if not entry.event.volatile:
                self._events -= 1
                self._bytes -= entry.size
                self._held -= entry.size
            drop += 1
        if drop:
            self.floor = self.tail = self._entries[drop - 1].seq
            del self._entries[:drop]
            self._drop_marks()

    def let_go(self) -> None:
        """Leave the oldest events in memory to the store, until what is held is well within the log's share.

        Done when a turn starts, and by whoever owns the log now and then; not when one ends, because what it has just
        written is still to be sent. The store must have all non-volatile events of the log, as it does whenever they
        are visible.
        """
        if self._held <= self._tails.share:
            return
        enough = self._tails.share * 3 // 4  # so that it is not the next event's turn again
        drop = 0
        last = len(self._entries) - 1
        while drop < last and self._held > enough:
            entry = self._entries[drop]
            if entry.event.volatile or (self._turn is not None and entry.seq >= self._turn):
                break
            self._older.add(entry.seq, entry.size)
            self._held -= entry.size
            drop += 1
        if drop:
            self.tail = self._entries[drop - 1].seq
            del self._entries[:drop]
            self._memo = None
            self._drop_marks()

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
            NotInMemory: it is not, but it is below `tail`.
        """
        memo = self._memo
        if memo is not None and memo[0] == cursor and memo[1] == self.version and memo[2] == budget:
            return memo[3]
        if cursor < self.tail:
            self._check(cursor)
            raise NotInMemory(f"what follows cursor {cursor} is in the store, up to {self.tail}")
        entries = self._entries
        i, end = self._after(cursor), len(self._entries)
        previous = entries[i - 1].seq if i else self.tail
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
        total = self._older.backlog(cursor, enough) if cursor < self.tail else 0
        if total > enough:
            return total
        for entry in self._entries[self._after(cursor) :]:
            total += entry.size
            if total > enough:
                break
        return total

    # for a dialect whose clients lack the very deltas that they have not seen

    @property
    def entries(self) -> Sequence[Entry]:
        """What is in memory, oldest first; not to be changed."""
        return self._entries

    def index_after(self, cursor: int) -> int:
        """Index in `entries` of the first one with ``seq > cursor``."""
        return self._after(cursor)

    def keep_marks(self) -> None:
        """From now on, remember where in an output its deltas were."""
        if self.marks is None:
            self.marks = Marks(self.head)

    def _drop_marks(self) -> None:
        if self.marks is not None:
            self.marks.drop(self.tail)

    def _deltas(self, output: Output) -> list[tuple[int, str]] | None:
        """Number and text of the deltas that an output will replace; None if some were evicted."""
        texts: list[tuple[int, str]] = []
        oldest = self._open.get(output.turn_id, {}).get(("channel", output.channel))
        if oldest is not None:
            if oldest <= self.floor:
                return None
            for entry in self._entries[self._after(oldest - 1) :]:
                event = entry.event
                if type(event) is Delta and event.channel == output.channel and event.turn_id == output.turn_id:
                    texts += numbered_parts(entry)
        return texts

    # what is not in memory

    def _check(self, cursor: int) -> None:
        if cursor < self.floor:
            raise CursorExpired(f"cursor {cursor} is below the oldest cursor {self.floor}")

    def page_end(self, cursor: int, budget: int) -> int:
        """The last event of the page that follows `cursor`: load the events above `cursor` up to it.

        Args:
            cursor: below `tail`.
            budget: bytes; the page has one event at least.

        Raises:
            CursorExpired: `cursor` is below `floor`.
        """
        self._check(cursor)
        return self._older.following(cursor, budget)

    def page(self, cursor: int, events: Sequence[Event]) -> Log:
        """A log of just those events, which were loaded from the store: reading it from `cursor` gives what this one
        would give if it had them in memory.

        Raises:
            CursorExpired: `cursor` has come to be below `floor`, or the store did not have them.
        """
        self._check(cursor)
        first = self.with_first(cursor, events)[0][1]
        page = Log(max_events=len(events), max_bytes=self._max_bytes, base=first - 1)
        for event in events:
            page.append(event)
        page.marks = self.marks
        return page

    def older_than_tail(self, max_events: int, max_bytes: int) -> tuple[int, int] | None:
        """The newest events that are not in memory, within those bounds: load them above the first number, up to the
        second. None if there are none."""
        after = max(self.floor, self._older.newest(max_events, max_bytes))
        return (after, self.tail) if after < self.tail else None

    def with_first(self, cursor: int, events: Sequence[Event]) -> list[tuple[Event, int]]:
        """Loaded events that follow `cursor`, one at least, each with its ``first``.

        Raises:
            CursorExpired: they are not what the log knows to follow it.
        """
        previous, expected = self._older.before(cursor, len(events))
        if not events or list(expected) != [event.seq for event in events]:
            raise CursorExpired(f"the store lacks events behind cursor {cursor}")
        firsts = [max(previous, self.floor) + 1, *(seq + 1 for seq in expected)]
        return list(zip(events, firsts, strict=False))


def numbered_parts(entry: Entry) -> list[tuple[int, str]]:
    """Of a delta: the number and text of each that it stands for."""
    event = entry.event
    assert type(event) is Delta
    parts = entry.parts or [event.text]
    return list(enumerate(parts, entry.seq - len(parts) + 1))


def _merge(run: list[Entry], cursor: int, previous: int) -> bytes:
    """Adjacent deltas of one turn and channel as one, for a reader at `cursor`; `previous` is retained before them."""
    head, last = run[0], run[-1].event
    assert isinstance(head.event, Delta)
    inside = head.parts is not None and cursor > head.seq - len(head.parts)
    text = [head.text_after(cursor), *(entry.event.text for entry in run[1:])]  # type: ignore[attr-defined]
    merged = Delta(turn_id=head.event.turn_id, channel=head.event.channel, text="".join(text), seq=last.seq, at=last.at)
    return codec.encode_event(merged, (cursor if inside else previous) + 1)

"""A log that holds only its tail, against one that holds everything: whoever reads, however, gets the same."""

from __future__ import annotations

import random
from itertools import accumulate

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from steady import steady

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.log import CursorExpired, Log, NotInMemory, Tails, _Older
from gateway.protocol.view import SessionView, encode_snapshot

ROOM = 10**9


class Stored:
    """What a store has: everything that is not volatile, for longer than any log needs it."""

    def __init__(self) -> None:
        self.events: list[m.Event] = []

    def read(self, after: int, upto: int) -> list[m.Event]:
        # As decoded from its file: other objects, whose `first` is none.
        return [attrs.evolve(event, first=event.seq) for event in self.events if after < event.seq <= upto]


def decoded(payloads: list[bytes]) -> list[m.Event]:
    return [codec.decode_event(payload) for payload in payloads]


def follow(log: Log, stored: Stored, cursor: int, budget: int) -> list[m.Event]:
    """What a connection does with a cursor, up to the head. Deltas come merged only by the log's own rule."""
    got: list[m.Event] = []
    while cursor < log.head:
        if cursor < log.tail:
            with pytest.raises(CursorExpired if cursor < log.floor else NotInMemory):
                log.read(cursor, budget)
            end = log.page_end(cursor, budget)
            assert cursor < end <= log.tail
            chunk = log.page(cursor, stored.read(cursor, end)).read(cursor, budget)
            assert cursor < chunk.cursor <= end
            assert len(chunk.payloads) == 1 or chunk.size <= budget
        else:
            chunk = log.read(cursor, ROOM)
        got += decoded(chunk.payloads)
        cursor = chunk.cursor
    return got


class TailMachine(RuleBasedStateMachine):
    """One history, two logs. What `floor`, `read`, `backlog` and snapshots say must not depend on what memory holds."""

    @initialize(
        max_events=st.sampled_from([1, 3, 12, 40]),
        max_bytes=st.sampled_from([1, 2000, ROOM]),
        share=st.sampled_from([0, 300, 1500, ROOM]),
    )
    def start(self, max_events: int, max_bytes: int, share: int) -> None:
        self.bounds = {"max_events": max_events, "max_bytes": max_bytes}
        self.tails = Tails(share, ROOM)
        self.whole = Log(**self.bounds)
        self.log = Log(**self.bounds, tails=self.tails)
        self.view = SessionView()
        self.stored = Stored()
        self.seq = 0
        self.turn: str | None = None

    def append(self, event: m.Event) -> None:
        self.seq += 1
        event.seq = self.seq
        if not event.volatile:
            self.stored.events.append(event)
        self.whole.append(attrs.evolve(event))
        self.log.append(event)
        self.view.apply(event)

    @rule(size=st.integers(0, 400), count=st.integers(1, 6))
    def durable(self, size: int, count: int) -> None:
        for n in range(count):
            if n % 3:
                self.append(m.Input(request_id=f"r{self.seq}", content="x" * size, sender="a"))
            else:
                self.append(m.Custom(name="n", data="x" * size))

    @rule()
    def start_turn(self) -> None:
        if self.turn is None:
            self.turn = f"t{self.seq}"
            self.append(m.TurnStarted(turn_id=self.turn, request_ids=[], attempt=1))
            self.turn_seq = self.seq
            self.memory_is_bounded()

    @rule(count=st.integers(1, 12), channel=st.sampled_from(["answer", "reasoning"]))
    def stream(self, count: int, channel: str) -> None:
        for _ in range(count if self.turn else 0):
            self.append(m.Delta(turn_id=self.turn, channel=channel, text="ab€"))

    @rule(size=st.integers(0, 300), channel=st.sampled_from(["answer", "reasoning"]))
    def output(self, size: int, channel: str) -> None:
        if self.turn:
            self.append(m.Output(turn_id=self.turn, channel=channel, content="y" * size))

    @rule(key=st.sampled_from("kl"))
    def progress(self, key: str) -> None:
        if self.turn:
            self.append(m.Progress(turn_id=self.turn, key=key, data=self.seq))

    @rule()
    def end_turn(self) -> None:
        if self.turn:
            self.append(m.TurnEnded(turn_id=self.turn, outcome="completed"))
            self.turn = None

    @rule(share=st.sampled_from([0, 100, 1000, ROOM]))
    def divide(self, share: int) -> None:
        self.tails.share = share
        self.log.let_go()
        self.memory_is_bounded()

    @rule()
    def rest_and_come_back(self) -> None:
        """What a store gives at a load: the numbers of what is older, the events of the rest."""
        if self.turn is not None:
            return
        held = {event.seq for event in self.log}
        older = [
            (event.seq, len(codec.encode_event(event, event.seq)))
            for event in self.stored.events
            if event.seq > self.log.floor and event.seq not in held
        ]
        head = self.log.head
        self.log = Log(**self.bounds, base=self.log.floor, older=older, tails=self.tails)
        for event in self.stored.events:
            if event.seq in held:
                self.log.append(attrs.evolve(event))
        assert self.log.head == head, "without a running turn the newest event is one that is stored"

    @rule(back=st.integers(0, 200), budget=st.sampled_from([1, 150, 1000, ROOM]))
    def read(self, back: int, budget: int) -> None:
        cursor = max(self.whole.floor, self.whole.head - back)
        assert follow(self.log, self.stored, cursor, budget) == follow(self.whole, self.stored, cursor, budget)
        for enough in (0, 200, ROOM):
            mine, all_of_it = self.log.backlog(cursor, enough), self.whole.backlog(cursor, enough)
            assert (mine > enough) == (all_of_it > enough)
            assert enough < ROOM or mine == all_of_it

    @rule(most=st.sampled_from([1, 5, ROOM]))
    def snapshot(self, most: int) -> None:
        wanted = self.log.older_than_tail(ROOM, ROOM)
        older = self.stored.read(*wanted) if wanted else []
        fixed = {"epoch": "e", "reason": "requested", "max_events": most, "max_bytes": 1 << 20}
        expected = encode_snapshot(self.view, self.whole, **fixed)
        assert encode_snapshot(self.view, self.log, **fixed, older=older) == expected

    @invariant()
    def the_window_is_the_same(self) -> None:
        if not hasattr(self, "log"):
            return
        log, whole = self.log, self.whole
        assert (log.floor, log.head) == (whole.floor, whole.head)
        assert (log.retained_events, log.retained_bytes) == (whole.retained_events, whole.retained_bytes)
        assert log.floor <= log.tail <= log.head

    def memory_is_bounded(self) -> None:
        """But for the newest event and those of the running turn."""
        before = [event for event in self.log if self.turn is None or event.seq < self.turn_seq]
        assert sum(len(codec.encode_event(event, event.seq)) for event in before[:-1]) <= self.tails.share
        assert self.turn is None or not before or self.log.held_bytes <= self.tails.share


TestTail = TailMachine.TestCase
TestTail.settings = steady


def test_what_is_older_against_a_list() -> None:
    """Over many times the size at which its arrays are cut; cursors also from before the window."""
    chance = random.Random(1)
    older = _Older()
    kept: list[tuple[int, int]] = []
    seq = 0
    for step in range(4000):
        if kept and chance.random() < (0.2 if step // 400 % 2 else 0.8):
            assert older.drop_oldest() == kept.pop(0)
            assert len(older._seqs) <= 2 * len(kept) + 66, "what was dropped does not stay for ever"
        elif chance.random() < 0.9:
            seq += chance.randint(1, 3)
            kept.append((seq, chance.randint(1, 40)))
            older.add(*kept[-1])
        assert len(older) == len(kept)
        cursor, budget, most = chance.randint(0, seq + 2), chance.randint(-1, 300), chance.randint(-1, 12)
        after = [one for one in kept if one[0] > cursor]
        totals = list(accumulate(size for _, size in after))
        fitting = [number for (number, _), total in zip(after, totals, strict=True) if total <= budget]
        assert older.following(cursor, budget) == max([*fitting, *(number for number, _ in after[:1])], default=0)
        left = older.backlog(cursor, budget)
        assert left == sum(size for _, size in after) or budget < left <= budget + 40
        newest = list(accumulate(size for _, size in reversed(kept)))
        taken = sum(total <= budget for total in newest[: max(0, most)])
        assert older.newest(most, budget) == (kept[-1 - taken][0] if taken < len(kept) else 0)
        previous, following = older.before(cursor, max(0, most))
        assert previous == max((number for number, _ in kept if number <= cursor), default=0)
        assert list(following) == [number for number, _ in after][: max(0, most)]


def filled(share: int, count: int = 40) -> tuple[Log, Stored]:
    log, stored = Log(max_events=1000, max_bytes=ROOM, tails=Tails(share, ROOM)), Stored()
    for seq in range(1, count + 1):
        event = m.Custom(name="n", data="x" * 100, seq=seq)
        stored.events.append(event)
        log.append(event)
    log.let_go()
    return log, stored


def test_a_page_that_the_store_cannot_fill_is_no_continuation() -> None:
    log, stored = filled(1000)
    end = log.page_end(3, 900)
    whole = stored.read(3, end)
    assert len(whole) > 2
    for lacking in (whole[1:], whole[:1] + whole[2:], []):
        with pytest.raises(CursorExpired):
            log.page(3, lacking)
    assert log.page(3, whole[:2]).head == 5, "fewer than asked for is a shorter page"


def test_a_page_that_comes_late_is_below_the_floor() -> None:
    log, stored = Log(max_events=20, max_bytes=ROOM, tails=Tails(1000, ROOM)), Stored()
    for seq in range(1, 41):
        event = m.Custom(name="n", data="x" * 100, seq=seq)
        stored.events.append(event)
        log.append(event)
        log.let_go()
        if seq == 20:
            page = stored.read(0, log.page_end(0, 500))
    with pytest.raises(CursorExpired):
        log.page(0, page)
    with pytest.raises(CursorExpired):
        log.page_end(0, 500)


def test_the_newest_of_what_is_older_within_bounds() -> None:
    log, stored = filled(1000)
    size = len(codec.encode_event(stored.events[-1], 40))
    assert log.older_than_tail(3, ROOM) == (log.tail - 3, log.tail)
    assert log.older_than_tail(ROOM, 3 * size) == (log.tail - 3, log.tail)
    assert log.older_than_tail(ROOM, ROOM) == (0, log.tail)
    assert log.older_than_tail(0, ROOM) is None
    assert log.older_than_tail(-5, ROOM) is None
    assert log.older_than_tail(ROOM, -1) is None
    assert Log(max_events=1, max_bytes=1).older_than_tail(ROOM, ROOM) is None


def test_what_all_may_hold_is_divided_and_never_below_the_least() -> None:
    tails = Tails(1000 * Tails.LEAST, 100 * Tails.LEAST)
    shares = []
    for logs in (0, 1, 2, 50, 100, 10_000):
        tails.divide(logs)
        shares.append(tails.share / Tails.LEAST)
    assert shares == [100, 100, 50, 2, 1, 1]
    tails = Tails(1000 * Tails.LEAST, 100 * Tails.LEAST)
    tails.divide(7)
    assert tails.share == 100 * Tails.LEAST // 7, "whole bytes"
    tails = Tails(10, 1000 * Tails.LEAST)
    tails.divide(7)
    assert tails.share == 10


def test_a_running_turn_is_in_memory_as_a_whole_and_leaves_it_afterwards() -> None:
    log, _ = filled(1000)
    log.append(m.TurnStarted(turn_id="t", request_ids=[], attempt=1, seq=41))
    log.append(m.Delta(turn_id="t", channel="answer", text="early", seq=42))
    for seq in range(43, 100):
        log.append(m.ToolCall(turn_id="t", call_id="c", name="n", arguments="x" * 100, seq=seq))
    log.let_go()
    assert [event.seq for event in log] == list(range(41, 100))
    assert log.held_bytes > 5000
    log.append(m.TurnEnded(turn_id="t", outcome="completed", seq=100))
    assert 41 in [event.seq for event in log], "it is still to be sent"
    log.append(m.TurnStarted(turn_id="u", request_ids=[], attempt=1, seq=101))
    assert log.held_bytes <= 1000
    assert log.floor == 0


def test_what_no_store_has_never_leaves_memory() -> None:
    """A log that was not told of the turn, say because its start is below the window."""
    log = Log(max_events=1000, max_bytes=ROOM, tails=Tails(100, ROOM))
    log.append(m.Custom(name="n", data="x" * 100, seq=1))
    log.append(m.Delta(turn_id="t", channel="answer", text="early", seq=2))
    for seq in range(3, 20):
        log.append(m.Custom(name="n", data="x" * 100, seq=seq))
    log.let_go()
    assert [event.seq for event in log] == list(range(2, 20))


def sizes(events: list[m.Event]) -> int:
    return sum(len(codec.encode_event(event, event.seq)) for event in events)


def test_the_newest_events_stay_in_memory_up_to_three_quarters_of_a_share() -> None:
    log, stored = filled(10**6)
    size = sizes(stored.events[-1:])
    log._tails.share = log.held_bytes
    log.let_go()
    assert len(log) == 40, "what is allowed may stay"
    log._tails.share = 20 * size
    log.let_go()
    assert log.held_bytes == sizes(list(log)) <= 15 * size < log.held_bytes + size
    log._tails.share = 0
    log.let_go()
    assert [event.seq for event in log] == [40], "the newest stays"


def test_after_a_turn_its_events_may_leave_memory() -> None:
    log, _ = filled(1000)
    log.append(m.TurnStarted(turn_id="t", request_ids=[], attempt=1, seq=41))
    log.append(m.Output(turn_id="t", channel="answer", content="x" * 2000, seq=42))
    log.append(m.TurnEnded(turn_id="t", outcome="completed", seq=43))
    log.let_go()
    assert [event.seq for event in log] == [43]


def test_a_window_that_is_not_in_memory_counts_as_a_whole() -> None:
    older = [(seq, 10 * seq) for seq in range(1, 6)]
    event = m.Custom(name="n", seq=6)
    total = 150 + sizes([event])
    log = Log(max_events=6, max_bytes=total, older=older)
    assert (log.retained_events, log.retained_bytes, log.held_bytes) == (5, 150, 0)
    log.append(event)
    assert (log.floor, log.retained_events, log.retained_bytes) == (0, 6, total), "filled to the last byte"
    log.append(m.Custom(name="n", seq=7))
    assert 10 + 20 + 30 < sizes([event]) <= 10 + 20 + 30 + 40
    assert (log.floor, log.retained_events) == (4, 3), "that many bytes had to go"
    assert log.retained_bytes == 50 + log.held_bytes
    log = Log(max_events=6, max_bytes=total - 10, older=older)
    log.append(event)
    assert log.floor == 1, "nothing more than that"


def test_what_is_evicted_is_not_held_any_more() -> None:
    log = Log(max_events=3, max_bytes=ROOM)
    for seq in range(1, 10):
        log.append(m.Custom(name="n", data="x" * seq, seq=seq))
    assert log.held_bytes == log.retained_bytes == sizes(list(log))
    assert [event.seq for event in log] == [7, 8, 9]


@pytest.mark.parametrize("gone", [0, 1, 2, 30])
def test_a_transcript_begins_with_what_was_loaded(gone: int) -> None:
    """The newest of what is not in memory, with the ranges of a replay, and said to be cut if anything is before it."""
    log, stored = Log(max_events=40 - gone, max_bytes=ROOM, tails=Tails(300, ROOM)), Stored()
    for seq in range(1, 41):
        event = m.Output(turn_id="t", channel="answer", content="x" * 50, seq=seq)
        stored.events.append(event)
        log.append(event)
    log.let_go()
    assert log.floor == gone
    for count in (3, ROOM):
        reach = log.older_than_tail(count, ROOM)
        assert reach is not None
        loaded = stored.read(*reach)
        raw = encode_snapshot(
            SessionView(), log, epoch="e", reason="requested", max_events=ROOM, max_bytes=ROOM, older=loaded
        )
        (snapshot,) = codec.decode_server(raw)
        assert isinstance(snapshot, m.Snapshot)
        begin = max(gone, log.tail - count)
        assert [(event.first, event.seq) for event in snapshot.transcript] == [
            (seq, seq) for seq in range(begin + 1, 41)
        ]
        assert snapshot.transcript_truncated == (begin > 0)

"""The covering log against a plain list.

`Model` says the slow way what the log should hold. `Reader` is a client: bytes, `CursorTracker`, `SessionView`. The
machine appends, reads in tiny portions, evicts and crashes in any order; in the end every reader must know what one
knows who saw every event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from steady import steady

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.cursor import CursorTracker
from gateway.protocol.log import MERGE_FROM, MERGED_BYTES, CursorExpired, Log
from gateway.protocol.view import SessionView, encode_snapshot

ROOM = 10**9


def replaces(later: m.Event, event: m.Event) -> bool:
    """The column "superseded by" of PROTOCOL section 4."""
    if isinstance(event, m.Delta | m.Progress) and isinstance(later, m.TurnEnded):
        return later.turn_id == event.turn_id
    if isinstance(event, m.Delta) and isinstance(later, m.Output):
        return (later.turn_id, later.channel) == (event.turn_id, event.channel)
    if isinstance(event, m.Progress) and isinstance(later, m.Progress):
        return (later.turn_id, later.key) == (event.turn_id, event.key)
    return False


class Model:
    """What the log should hold, as plain lists."""

    def __init__(self, max_events: int, max_bytes: int, floor: int = 0) -> None:
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.floor = floor
        self.kept: list[m.Event] = []

    def append(self, event: m.Event) -> None:
        self.kept = [*(old for old in self.kept if not replaces(event, old)), event]
        while not event.volatile and self.is_over() and len(self.kept) > 1:
            self.floor = self.kept.pop(0).seq

    def is_over(self) -> bool:
        return len(self.durable()) > self.max_events or self.durable_bytes() > self.max_bytes

    def durable(self) -> list[m.Event]:
        return [event for event in self.kept if not event.volatile]

    def durable_bytes(self) -> int:
        return sum(len(codec.encode_event(event, event.seq)) for event in self.durable())

    def expected(self, cursor: int, served: m.Event) -> m.Event:
        """What must be served next to `cursor`, given how far the merging of `served` went."""
        after = [event for event in self.kept if event.seq > cursor]
        run = [event for event in after if event.seq <= served.seq]
        before = [event.seq for event in self.kept if event.seq <= cursor]
        first = max([self.floor, *before]) + 1
        head = after[0]
        if not isinstance(head, m.Delta):
            return attrs.evolve(head, first=first)
        deltas = [event for event in run if isinstance(event, m.Delta)]
        assert len(deltas) == len(run)
        assert {(event.turn_id, event.channel) for event in deltas} == {(head.turn_id, head.channel)}
        text = "".join(event.text for event in deltas)
        assert len(deltas) == 1 or len(text.encode()) <= MERGED_BYTES
        return attrs.evolve(deltas[-1], first=first, text=text)


def facts(view: SessionView) -> dict[str, Any]:
    """Everything a view says, comparable; without `first`, which depends on who was served when."""
    turn = view.turn
    return {
        "cursor": view.cursor,
        "state": view.state,
        "queue": list(view.queue.items()),
        "asks": [attrs.evolve(ask, first=0) for ask in view.asks.values()],
        "turn": turn and (turn.turn_id, turn.request_ids, turn.started_at, turn.channels(), turn.progress),
    }


def joined(events: Iterable[m.Event]) -> list[m.Event]:
    """The same with adjacent deltas as one, whichever way they were cut."""
    result: list[m.Event] = []
    for event in events:
        last = result[-1] if result else None
        if (
            isinstance(event, m.Delta)
            and isinstance(last, m.Delta)
            and (event.turn_id, event.channel) == (last.turn_id, last.channel)
        ):
            result[-1] = attrs.evolve(event, text=last.text + event.text)
        else:
            result.append(event)
    return result


class Reader:
    """A client: it knows what it was sent, nothing else."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tracker = CursorTracker()
        self.view = SessionView()
        self.outputs: dict[int, m.Output] = {}

    @property
    def cursor(self) -> int:
        return self.tracker.cursor

    def take(self, event: m.Event) -> None:
        assert self.tracker.offer(event) == "new"
        self.view.apply(event)
        if isinstance(event, m.Output):
            self.outputs[event.seq] = attrs.evolve(event, first=0)

    def take_snapshot(self, raw: bytes) -> None:
        (snapshot,) = codec.decode_server(raw)
        assert isinstance(snapshot, m.Snapshot)
        self.tracker.reset(snapshot)
        self.view.restore(snapshot)
        for event in snapshot.transcript:
            if isinstance(event, m.Output):
                self.outputs[event.seq] = attrs.evolve(event, first=0)

    def text(self, turn_id: str, channel: str) -> str:
        """The channel's text: its outputs joined, then what was streamed after the last."""
        mine = [event for _, event in sorted(self.outputs.items())]
        sealed = "".join(event.content for event in mine if (event.turn_id, event.channel) == (turn_id, channel))
        turn = self.view.turn
        running = turn is not None and turn.turn_id == turn_id
        return sealed + (turn.channels().get(channel, "") if turn and running else "")


channels = st.sampled_from(["answer", "reasoning"])
texts = st.text("ab\n€🙂", min_size=1, max_size=5)
budgets = st.sampled_from([1, 150, 400, 2000, ROOM])


class LogMachine(RuleBasedStateMachine):
    """`everyone` saw each event when it was made; the other readers lag, each at its own pace."""

    @initialize(max_events=st.sampled_from([1, 3, 12, 40]), max_bytes=st.sampled_from([1, 2000, ROOM]))
    def start(self, max_events: int, max_bytes: int) -> None:
        self.bounds = (max_events, max_bytes)
        self.log = Log(max_events=max_events, max_bytes=max_bytes)
        self.model = Model(max_events, max_bytes)
        self.history: list[m.Event] = []
        self.everyone = Reader(ROOM)
        self.readers = [Reader(ROOM)]
        self.made = 0
        self.turn_id = ""  # none runs
        self.next_seq = 1
        self.start_turn()

    def new_id(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def append(self, event: m.Event) -> None:
        event.seq = self.next_seq
        event.at = event.seq * 10
        self.next_seq += 1
        self.log.append(event)
        self.model.append(event)
        self.history.append(event)
        self.everyone.take(attrs.evolve(event, first=self.everyone.cursor + 1))

    # What a session writes, in the order in which one can.

    @rule()
    def input(self) -> None:
        self.append(m.Input(request_id=m.RequestId(self.new_id("r")), content="hi", metadata={"n": self.made}))

    @precondition(lambda self: self.everyone.view.queue)
    @rule()
    def withdraw(self) -> None:
        self.append(m.Withdrawn(request_id=m.RequestId(next(iter(self.everyone.view.queue))), reason="aborted"))

    @precondition(lambda self: not self.turn_id)
    @rule()
    def start_turn(self) -> None:
        self.turn_id = self.new_id("t")
        request_ids = [m.RequestId(request_id) for request_id in list(self.everyone.view.queue)[:1]]
        self.append(m.TurnStarted(turn_id=self.turn_id, request_ids=request_ids))

    @precondition(lambda self: self.turn_id)
    @rule(
        runs=st.lists(st.tuples(channels, texts, st.sampled_from([1, 3, MERGE_FROM])), min_size=1, max_size=4),
        all_read=st.booleans(),
    )
    def stream(self, runs: list[tuple[str, str, int]], all_read: bool) -> None:
        for channel, text, times in runs:
            for i in range(times):
                self.append(m.Delta(turn_id=self.turn_id, channel=channel, text=f"{text}{i}"))
        if all_read:  # before something supersedes it: merging is what this is about
            for reader in self.readers:
                self.read_once(reader)

    @precondition(lambda self: self.turn_id)
    @rule(channel=channels, parts=st.lists(texts, min_size=1, max_size=MERGE_FROM + 1))
    def stream_at_once(self, channel: str, parts: list[str]) -> None:
        """Deltas that were published in one step: one entry with the numbers of all, any of which may be a cursor."""
        for i, text in enumerate(parts):
            one = m.Delta(turn_id=self.turn_id, channel=channel, text=text, seq=self.next_seq + i)
            one.at = (self.next_seq + len(parts) - 1) * 10
            self.model.append(one)
        self.next_seq += len(parts)
        seq = self.next_seq - 1
        event = m.Delta(turn_id=self.turn_id, channel=channel, text="".join(parts), seq=seq, at=seq * 10)
        self.log.append(event, parts=parts)
        self.history.append(event)
        self.everyone.take(attrs.evolve(event, first=self.everyone.cursor + 1))

    @precondition(lambda self: self.turn_id)
    @rule(channel=channels, unit=st.sampled_from(["x", "€"]))
    def stream_large_pieces(self, channel: str, unit: str) -> None:
        for _ in range(MERGE_FROM + 4):
            self.append(m.Delta(turn_id=self.turn_id, channel=channel, text=unit * 6000))

    @precondition(lambda self: self.turn_id)
    @rule(channel=channels, more=st.booleans())
    def seal(self, channel: str, more: bool) -> None:
        assert self.everyone.view.turn is not None
        streamed = self.everyone.view.turn.channels().get(channel, "")[:100]
        content = f"<{streamed}>"  # an output replaces its deltas: a reader that keeps those shows it here
        metadata = {"more": True} if more else {}
        self.append(m.Output(turn_id=self.turn_id, channel=channel, content=content, metadata=metadata))

    @precondition(lambda self: self.turn_id)
    @rule(key=st.sampled_from("kl"), data=st.integers() | texts)
    def progress(self, key: str, data: object) -> None:
        data = data if isinstance(data, str) else data % 1000  # type: ignore[operator]
        self.append(m.Progress(turn_id=self.turn_id, key=key, data=data))

    @precondition(lambda self: self.turn_id)
    @rule()
    def use_tool(self) -> None:
        call_id = self.new_id("c")
        self.append(m.ToolCall(turn_id=self.turn_id, call_id=call_id, name="tool", arguments={"a": 1}))
        self.append(m.ToolResult(turn_id=self.turn_id, call_id=call_id, result=[call_id]))

    @precondition(lambda self: self.turn_id)
    @rule()
    def ask(self) -> None:
        self.append(m.Ask(turn_id=self.turn_id, ask_id=self.new_id("a"), kind="input", prompt="?"))

    @precondition(lambda self: self.everyone.view.asks)
    @rule()
    def answer(self) -> None:
        self.append(m.Answered(turn_id=self.turn_id, ask_id=next(iter(self.everyone.view.asks)), value="!"))

    @precondition(lambda self: self.turn_id)
    @rule(outcome=st.sampled_from(["completed", "aborted"]))
    def end_turn(self, outcome: m.TurnOutcome) -> None:
        self.append(m.TurnEnded(turn_id=self.turn_id, outcome=outcome))
        self.turn_id = ""

    @rule(key=st.sampled_from("xy"), value=st.none() | st.integers(0, 9))
    def patch_state(self, key: str, value: int | None) -> None:
        self.append(m.State(patch={key: value}))

    @rule()
    def custom(self) -> None:
        self.append(m.Custom(name="n", data={"deep": [1]}))

    @precondition(lambda self: self.turn_id)
    @rule(reserved=st.integers(0, 30))
    def crash(self, reserved: int) -> None:
        """The process dies in a turn: what was volatile is gone, and the numbers go on above the reserved ones."""
        log, model = Log(max_events=self.bounds[0], max_bytes=self.bounds[1], base=self.log.floor), self.model
        for event in model.durable():
            log.append(event, codec.encode_event(event, event.seq))
        assert log.floor == model.floor
        self.log, model.kept = log, model.durable()
        self.next_seq += reserved
        self.append(m.TurnEnded(turn_id=self.turn_id, outcome="lost"))
        self.turn_id = ""

    # What readers do.

    @rule(budget=budgets, data=st.data())
    def join_somewhere(self, budget: int, data: st.DataObject) -> None:
        """A client comes back that saw everything up to some number, often one in the middle of a run of deltas."""
        reader = Reader(budget)
        position = data.draw(st.integers(0, len(self.history)))
        for event in self.history[:position]:
            reader.take(attrs.evolve(event, first=reader.cursor + 1))
        self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 100), times=st.integers(1, 3))
    def read(self, which: int, times: int) -> None:
        for _ in range(times):
            self.read_once(self.readers[which % len(self.readers)])

    def read_once(self, reader: Reader) -> None:
        if reader.cursor < self.log.floor:
            with pytest.raises(CursorExpired):
                self.log.read(reader.cursor, reader.budget)
            reader.take_snapshot(self.snapshot())
            return
        chunk = self.log.read(reader.cursor, reader.budget)
        assert chunk.size == sum(map(len, chunk.payloads))
        assert chunk.size <= reader.budget or len(chunk.payloads) == 1
        assert bool(chunk.payloads) == (reader.cursor < self.log.head)
        for payload in chunk.payloads:
            event = codec.decode_event(payload)
            assert event == self.model.expected(reader.cursor, event)
            reader.take(event)
        assert chunk.cursor == reader.cursor

    def snapshot(self) -> bytes:
        view = self.everyone.view
        return encode_snapshot(view, self.log, epoch="e", reason="cursor_expired", max_events=10**6, max_bytes=ROOM)

    # What must hold at any time.

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert joined(self.log) == joined(self.model.kept)

    @invariant()
    def is_bounded(self) -> None:
        assert self.log.retained_events == len(self.model.durable())
        assert self.log.retained_bytes == self.model.durable_bytes()
        assert not self.model.is_over() or len(self.model.durable()) == 1

    @invariant()
    def floor_is_exact(self) -> None:
        assert self.log.floor == self.model.floor
        assert self.log.head == (self.history[-1].seq if self.history else 0)
        self.log.read(self.log.floor, 1)
        with pytest.raises(CursorExpired):
            self.log.read(self.log.floor - 1, 1)

    def teardown(self) -> None:
        if not hasattr(self, "log"):
            return
        for reader in self.readers:
            while reader.cursor != self.log.head:
                self.read_once(reader)
            assert facts(reader.view) == facts(self.everyone.view)
            # A snapshot's transcript goes back to the floor only; what a reader missed below it, it does not have.
            sealed = self.everyone.outputs
            assert reader.outputs.items() <= sealed.items()
            assert {seq for seq in sealed if seq > self.log.floor} <= reader.outputs.keys()
            if len(reader.outputs) == len(sealed):
                for turn_id in {event.turn_id for event in sealed.values()} | {self.turn_id}:
                    for channel in ("answer", "reasoning"):
                        assert reader.text(turn_id, channel) == self.everyone.text(turn_id, channel)


LogMachine.TestCase.settings = settings(steady, max_examples=200, stateful_step_count=40)
TestLogAgainstAList = LogMachine.TestCase


# --- the same rules as examples --------------------------------------------------------------------------------------


def make_log(max_events: int = 1000, max_bytes: int = ROOM, base: int = 0) -> Log:
    return Log(max_events=max_events, max_bytes=max_bytes, base=base)


def numbered(log: Log, *events: m.Event) -> None:
    for event in events:
        event.seq = log.head + 1
        log.append(event)


def delta(text: str = "x", channel: str = "answer", turn_id: str = "t") -> m.Delta:
    return m.Delta(turn_id=turn_id, channel=channel, text=text)


def output(content: str = "done", channel: str = "answer", turn_id: str = "t") -> m.Output:
    return m.Output(turn_id=turn_id, channel=channel, content=content)


def custom() -> m.Custom:
    return m.Custom(name="n")


def served(log: Log, cursor: int, budget: int = ROOM) -> list[m.Event]:
    return [codec.decode_event(payload) for payload in log.read(cursor, budget).payloads]


def ranges(events: list[m.Event]) -> list[tuple[int, int]]:
    return [(event.first, event.seq) for event in events]


def drain(log: Log, cursor: int, budget: int) -> Iterator[m.Event]:
    while cursor < log.head:
        chunk = log.read(cursor, budget)
        yield from map(codec.decode_event, chunk.payloads)
        cursor = chunk.cursor


def test_an_empty_log_is_read_at_its_base() -> None:
    log = make_log(base=7)
    assert (log.floor, log.head, log.read(7, 100).payloads, log.read(7, 100).cursor) == (7, 7, [], 7)
    with pytest.raises(CursorExpired):
        log.read(6, 100)


def test_an_output_covers_its_deltas() -> None:
    log = make_log()
    numbered(log, custom(), *(delta() for _ in range(20)), output())
    assert ranges(served(log, 0)) == [(1, 1), (2, 22)]
    assert ranges(served(log, 13)) == [(2, 22)]


def test_an_output_leaves_other_channels_and_turns_alone() -> None:
    log = make_log()
    numbered(log, delta(), delta(channel="reasoning"), delta(turn_id="u"), delta(), output())
    assert [(type(event), event.seq) for event in log] == [(m.Delta, 2), (m.Delta, 3), (m.Output, 5)]
    assert ranges(served(log, 0)) == [(1, 2), (3, 3), (4, 5)]


def test_deltas_after_an_output_are_kept_until_the_next() -> None:
    log = make_log()
    numbered(log, delta("a"), output(), delta("b"))
    assert [event.seq for event in log] == [2, 3]
    numbered(log, output())
    assert [event.seq for event in log] == [2, 4]


def test_progress_covers_the_one_before_with_its_key() -> None:
    log = make_log()
    numbered(log, *(m.Progress(turn_id="t", key=key, data=i) for i, key in enumerate("klkkl")))
    assert ranges(served(log, 0)) == [(1, 4), (5, 5)]


def test_the_end_of_a_turn_covers_all_that_was_volatile_in_it() -> None:
    log = make_log()
    ended = m.TurnEnded(turn_id="t", outcome="completed")
    numbered(log, delta(), m.Progress(turn_id="t", key="k"), delta(turn_id="u"), delta(channel="c"), ended)
    assert ranges(served(log, 0)) == [(1, 3), (4, 5)]


def test_a_hole_in_the_numbers_is_covered() -> None:
    log = make_log(base=4)
    for seq in (5, 9, 200):
        log.append(m.Custom(name="n", seq=seq))
    assert ranges(served(log, 4)) == [(5, 5), (6, 9), (10, 200)]
    assert ranges(served(log, 7)) == [(6, 9), (10, 200)]
    assert ranges(served(log, 199)) == [(10, 200)]


@pytest.mark.parametrize("seq", [0, 1, 2, 3])
def test_a_number_is_never_given_twice(seq: int) -> None:
    log = make_log()
    numbered(log, custom(), delta(), custom())
    for event in (custom(), delta()):
        event.seq = seq
        with pytest.raises(AssertionError, match="was given before"):
            log.append(event)


def test_nor_by_a_delta_that_stands_for_several() -> None:
    log = make_log()
    numbered(log, custom(), custom())
    with pytest.raises(AssertionError, match="number 3 was given before"):
        log.append(attrs.evolve(delta("ab"), seq=3), parts=["a", "b"])
    log.append(attrs.evolve(delta("ab"), seq=4), parts=["a", "b"])
    assert ranges(served(log, 2)) == [(3, 4)]


def test_a_long_answer_does_not_expire_an_earlier_cursor() -> None:
    log = make_log(max_events=40)
    numbered(log, *(custom() for _ in range(10)))
    for i in range(3000):
        numbered(log, delta(f"{i} "))
        if i % 300 == 299:
            numbered(log, output())
    assert log.floor == 0
    assert [event.seq for event in served(log, 0)][:10] == list(range(1, 11))
    assert len(log) == 20


def test_deltas_that_were_evicted_are_below_the_floor() -> None:
    log = make_log(max_events=2)
    numbered(log, delta(), delta(), custom(), delta(), custom(), custom())
    assert (log.floor, [event.seq for event in log]) == (3, [4, 5, 6])
    numbered(log, output())
    assert (log.floor, [event.seq for event in log]) == (5, [6, 7])


def test_the_newest_event_stays_even_if_it_is_too_large() -> None:
    log = make_log(max_bytes=10)
    numbered(log, custom(), delta(), custom())
    assert [event.seq for event in log] == [3]
    assert (log.floor, log.retained_events) == (2, 1)


@steady
@given(st.lists(st.text("a€🙂\n", min_size=1, max_size=40), min_size=1, max_size=60), st.integers(1, 500), st.data())
def test_a_reader_gets_exactly_the_text_above_its_cursor(parts: list[str], budget: int, data: st.DataObject) -> None:
    log = make_log()
    seq = 0
    while seq < len(parts):
        run = parts[seq : seq + data.draw(st.sampled_from([1, 1, 2, 5, 20]))]
        seq += len(run)
        log.append(attrs.evolve(delta("".join(run)), seq=seq), parts=run)
    cursor = data.draw(st.integers(0, len(parts)))
    events = list(drain(log, cursor, budget))
    assert "".join(event.text for event in events if isinstance(event, m.Delta)) == "".join(parts[cursor:])
    assert [event.first for event in events] == [cursor + 1, *(event.seq + 1 for event in events)][: len(events)]


def test_merged_deltas_cover_what_was_superseded_before_and_between_them() -> None:
    log = make_log()
    events: list[m.Event] = [custom()]
    for i in range(MERGE_FROM):
        events += [m.Progress(turn_id="t", key="k", data=i), m.Delta(turn_id="t", channel="answer", text=str(i), at=i)]
    numbered(log, *events, m.Progress(turn_id="t", key="k"))
    assert served(log, 1)[0] == m.Delta(
        turn_id="t", channel="answer", text="01234567", first=2, seq=2 * MERGE_FROM + 1, at=MERGE_FROM - 1
    )


def test_the_first_of_merged_deltas_covers_what_was_superseded_around_the_cursor() -> None:
    """Also when the cursor is right before a delta that stands for several: `first` is after what is retained."""
    log = make_log()
    numbered(log, custom(), m.Progress(turn_id="t", key="k"))
    log.append(m.Delta(turn_id="t", channel="answer", text="abc", seq=5), parts=["a", "b", "c"])
    numbered(log, *(delta() for _ in range(MERGE_FROM)), m.Progress(turn_id="t", key="k"))
    assert ranges(served(log, 2)) == [(2, 5 + MERGE_FROM), (6 + MERGE_FROM, 6 + MERGE_FROM)]
    assert ranges(served(log, 3))[0] == (4, 5 + MERGE_FROM), "inside of it there is nothing superseded"


def test_few_deltas_go_out_as_they_are_and_many_as_one() -> None:
    log = make_log()
    numbered(log, *(delta() for _ in range(MERGE_FROM)))
    assert ranges(served(log, 1)) == [(i, i) for i in range(2, MERGE_FROM + 1)]
    assert ranges(served(log, 0)) == [(1, MERGE_FROM)]


@pytest.mark.parametrize("unit", ["x", "é", "€", "🙂"])
def test_merged_text_is_cut_by_bytes(unit: str) -> None:
    log = make_log()
    numbered(log, *(delta(unit * 1000) for _ in range(300)))
    events = served(log, 0)
    sizes = [len(event.text.encode()) for event in events if isinstance(event, m.Delta)]
    assert sum(sizes) == 300 * 1000 * len(unit.encode())
    assert max(sizes) <= MERGED_BYTES
    assert len(events) <= 300 // (MERGED_BYTES // len(unit.encode() * 1000)) + MERGE_FROM


def test_a_budget_and_a_cut_are_used_to_the_last_byte() -> None:
    log = make_log()
    numbered(log, custom(), custom(), custom())
    size = log.read(0, ROOM).size
    assert len(log.read(0, size).payloads) == 3
    assert len(log.read(0, size - 1).payloads) == 2
    log = make_log()
    numbered(log, *(delta("x" * (MERGED_BYTES // MERGE_FROM)) for _ in range(MERGE_FROM)), delta())
    assert ranges(served(log, 0)) == [(1, MERGE_FROM), (MERGE_FROM + 1, MERGE_FROM + 1)]


def test_a_delta_larger_than_the_cut_goes_out_alone() -> None:
    log = make_log()
    numbered(log, delta("x" * 2 * MERGED_BYTES), *(delta() for _ in range(MERGE_FROM)))
    assert ranges(served(log, 0)) == [(1, 1), (2, MERGE_FROM + 1)]


@pytest.mark.parametrize(
    "between", [custom(), delta(channel="reasoning"), delta(turn_id="u"), m.Progress(turn_id="t", key="k")]
)
def test_nothing_is_merged_across_another_event(between: m.Event) -> None:
    log = make_log()
    numbered(log, *(delta("a") for _ in range(MERGE_FROM)), between, *(delta("b") for _ in range(MERGE_FROM)))
    assert ranges(served(log, 0)) == [
        (1, MERGE_FROM),
        (MERGE_FROM + 1, MERGE_FROM + 1),
        (MERGE_FROM + 2, 2 * MERGE_FROM + 1),
    ]


def test_readers_at_one_cursor_share_one_read() -> None:
    log = make_log()
    numbered(log, *(delta() for _ in range(20)))
    assert log.read(0, 100) is log.read(0, 100)


def test_a_remembered_read_is_not_served_after_an_append() -> None:
    log = make_log()
    numbered(log, custom())
    assert ranges(served(log, 0)) == [(1, 1)]
    numbered(log, delta())
    assert ranges(served(log, 0)) == [(1, 1), (2, 2)]
    numbered(log, output())
    assert ranges(served(log, 0)) == [(1, 1), (2, 3)]


def test_a_remembered_read_is_for_its_cursor_and_budget_only() -> None:
    log = make_log()
    numbered(log, custom(), custom())
    assert ranges(served(log, 0, ROOM)) == [(1, 1), (2, 2)]
    assert ranges(served(log, 0, 1)) == [(1, 1)]
    assert ranges(served(log, 1, 1)) == [(2, 2)]


def test_a_remembered_read_does_not_hide_that_the_cursor_expired() -> None:
    log = make_log(max_events=1)
    numbered(log, custom())
    log.read(0, ROOM)
    numbered(log, custom())
    with pytest.raises(CursorExpired):
        log.read(0, ROOM)


def test_first_is_computed_when_served_never_taken_from_the_event() -> None:
    log = make_log()
    for seq in (3, 8):
        log.append(m.Custom(name="n", seq=seq, first=seq), payload=codec.encode_event(m.Custom(name="n", seq=seq), seq))
    assert ranges(served(log, 0)) == [(1, 3), (4, 8)]
    assert [(entry.seq, first) for entry, first in log.newest_first()] == [(8, 4), (3, 1)]


@pytest.mark.parametrize("event", [output("\ud800"), delta("\ud800"), m.Progress(turn_id="t", key="k", data=object())])
def test_an_event_without_a_json_form_leaves_the_log_as_it_was(event: m.Event) -> None:
    log = make_log()
    numbered(log, delta("a"), m.Progress(turn_id="t", key="k", data=1))
    before = (list(log), log.head, log.version)
    with pytest.raises((ValueError, TypeError)):
        numbered(log, event)
    assert (list(log), log.head, log.version) == before


def test_backlog_is_what_a_reader_has_yet_to_get() -> None:
    log = make_log()
    numbered(log, *(delta("€" * 10) for _ in range(20)), m.Progress(turn_id="t", key="k", data="x" * 5000))
    assert log.backlog(log.head, ROOM) == 0
    assert log.backlog(10, ROOM) == 300 + len(codec.encode_event(list(log)[-1], log.head))
    assert 100 < log.backlog(0, 100) <= 130
    assert log.backlog(0, 30) > 30, "as much as is enough is not more than that"
    numbered(log, output())
    assert log.backlog(0, ROOM) > 5000


def test_readers_share_the_bytes_that_were_handed_in() -> None:
    log, event = make_log(), m.Custom(name="n", seq=1)
    payload = codec.encode_event(event, 1)
    log.append(event, payload)
    assert log.read(0, 1).payloads[0] is log.read(0, 2).payloads[0] is payload
    numbered(log, delta(), output())
    assert log.read(1, 1).payloads[0] is log.read(1, 2).payloads[0], "encoded once for a `first` of its own"

"""What events add up to, and the snapshot of it."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import steady

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.log import Log
from gateway.protocol.view import SessionView, encode_snapshot
from gateway.testing.strategies import any_of

ROOM = 10**9


class Session:
    """A log and the view of it, fed together."""

    def __init__(self, max_events: int = 1000) -> None:
        self.log = Log(max_events=max_events, max_bytes=ROOM)
        self.view = SessionView()

    def add(self, *events: m.Event) -> Session:
        for event in events:
            event.seq = self.log.head + 1
            event.at = 1000 + event.seq
            self.log.append(event)
            self.view.apply(event)
        return self

    def encoded(self, max_events: int = 200, max_bytes: int = ROOM) -> bytes:
        return encode_snapshot(
            self.view, self.log, epoch="e", reason="requested", max_events=max_events, max_bytes=max_bytes
        )

    def snapshot(self, max_events: int = 200, max_bytes: int = ROOM) -> m.Snapshot:
        (frame,) = codec.decode_server(self.encoded(max_events, max_bytes))
        assert isinstance(frame, m.Snapshot)
        return frame


def request(name: str, content: str = "hi") -> m.Input:
    return m.Input(request_id=m.RequestId(name), content=content)


def started(*names: str, turn_id: str = "t") -> m.TurnStarted:
    return m.TurnStarted(turn_id=turn_id, request_ids=[m.RequestId(name) for name in names])


def delta(text: str, channel: str = "answer") -> m.Delta:
    return m.Delta(turn_id="t", channel=channel, text=text)


def output(content: str, channel: str = "answer") -> m.Output:
    return m.Output(turn_id="t", channel=channel, content=content)


def ask(name: str) -> m.Ask:
    return m.Ask(turn_id="t", ask_id=name, kind="input", prompt="?")


def ended() -> m.TurnEnded:
    return m.TurnEnded(turn_id="t", outcome="completed")


# --- the fold --------------------------------------------------------------------------------------------------------


def test_an_input_waits_until_a_turn_takes_it_or_it_is_withdrawn() -> None:
    session = Session().add(request("a"), request("b"), request("c"))
    assert session.view.queue == {"a": 1, "b": 2, "c": 3}
    session.add(m.Withdrawn(request_id=m.RequestId("b"), reason="aborted"), started("a"))
    assert session.view.queue == {"c": 3}
    assert session.snapshot().queue == [m.QueuedRef(request_id="c", seq=3)]


def test_a_channel_holds_the_text_after_its_last_output() -> None:
    session = Session().add(started(), delta("a"), delta("why", "reasoning"), delta("b"))
    assert session.view.turn is not None
    assert session.view.turn.channels() == {"answer": "ab", "reasoning": "why"}
    session.add(output("ab"))
    assert session.view.turn.channels() == {"reasoning": "why"}
    session.add(delta("c"))
    assert session.view.turn.channels() == {"answer": "c", "reasoning": "why"}


def test_the_end_of_a_turn_leaves_nothing_of_it_running() -> None:
    session = Session().add(started(), delta("a"), ask("q"), m.Progress(turn_id="t", key="k", data=1), ended())
    assert (session.view.turn, session.view.asks) == (None, {})
    assert (session.snapshot().turn, session.snapshot().asks) == (None, [])


def test_an_ask_is_open_until_it_is_answered() -> None:
    session = Session().add(started(), ask("p"), ask("q"))
    assert [ask.ask_id for ask in session.snapshot().asks] == ["p", "q"]
    session.add(m.Answered(turn_id="t", ask_id="p", value="yes"))
    assert [ask.ask_id for ask in session.snapshot().asks] == ["q"]


def test_an_open_ask_outlives_its_event_in_the_log() -> None:
    session = Session(max_events=2).add(started(), ask("q"), *(m.Custom(name="n") for _ in range(5)))
    assert session.log.floor > 2
    assert [(ask.ask_id, ask.seq) for ask in session.snapshot().asks] == [("q", 2)]


def test_the_latest_progress_of_each_key_counts() -> None:
    session = Session().add(started(), *(m.Progress(turn_id="t", key=key, data=i) for i, key in enumerate("klk")))
    assert session.snapshot().turn == m.RunningTurn(
        turn_id="t", request_ids=[], channels={}, progress={"k": 2, "l": 1}, started_at=1001
    )


def test_state_is_the_patches_merged() -> None:
    session = Session().add(m.State(patch={"a": {"b": 1, "c": 2}}), m.State(patch={"a": {"b": None}, "d": 3}))
    assert session.snapshot().state == {"a": {"c": 2}, "d": 3}


# --- the snapshot ----------------------------------------------------------------------------------------------------


def test_a_snapshot_of_nothing() -> None:
    assert Session().snapshot() == m.Snapshot(
        epoch="e", cursor=0, reason="requested", state={}, transcript=[], transcript_truncated=False, turn=None,
        queue=[], asks=[],
    )  # fmt: skip


def test_a_session_that_came_back_without_events_is_where_its_log_is() -> None:
    log = Log(max_events=10, max_bytes=ROOM, base=50)
    raw = encode_snapshot(SessionView(), log, epoch="e", reason="requested", max_events=10, max_bytes=ROOM)
    (snapshot,) = codec.decode_server(raw)
    assert isinstance(snapshot, m.Snapshot)
    assert (snapshot.cursor, snapshot.transcript_truncated) == (50, True)


def test_the_transcript_has_what_was_said_with_the_ranges_a_replay_would_have() -> None:
    call = m.ToolCall(turn_id="t", call_id="c", name="n")
    result = m.ToolResult(turn_id="t", call_id="c")
    answered = m.Answered(turn_id="t", ask_id="q")
    session = Session().add(
        request("a"), started("a"), delta("x"), call, result, ask("q"), answered, m.State(patch={}),
        m.Custom(name="n"), output("x"), ended(),
    )  # fmt: skip
    snapshot = session.snapshot()
    assert [(event.type, event.first, event.seq) for event in snapshot.transcript] == [
        ("input", 1, 1), ("tool_call", 3, 4), ("tool_result", 5, 5), ("answered", 7, 7), ("output", 10, 10),
        ("turn_ended", 11, 11),
    ]  # fmt: skip
    assert (snapshot.cursor, snapshot.transcript_truncated) == (11, False)


@pytest.mark.parametrize(("max_events", "truncated"), [(4, True), (5, False), (6, False)])
def test_the_newest_events_are_kept_within_the_count(max_events: int, truncated: bool) -> None:
    session = Session().add(*(request(f"r{i}") for i in range(5)))
    snapshot = session.snapshot(max_events=max_events)
    assert [event.seq for event in snapshot.transcript] == list(range(1, 6))[-max_events:]
    assert snapshot.transcript_truncated is truncated


def test_what_the_log_evicted_makes_the_transcript_truncated() -> None:
    assert Session(max_events=2).add(request("a"), request("b"), request("c")).snapshot().transcript_truncated


def test_one_byte_less_costs_the_oldest_event() -> None:
    session = Session().add(*(request(f"r{i}", "x" * 500) for i in range(4)))
    whole = session.encoded()
    # Some slack is left for the frame's own punctuation; an event is far larger than it.
    assert len(session.snapshot(max_bytes=len(whole) + 20).transcript) == 4
    less = session.snapshot(max_bytes=len(whole) - 1)
    assert ([event.seq for event in less.transcript], less.transcript_truncated) == ([2, 3, 4], True)


def test_no_snapshot_is_larger_than_its_bound() -> None:
    """Of many small events the commas count."""
    session = Session().add(*(request(f"r{i}") for i in range(60)))
    whole = len(session.encoded())
    for bound in range(whole // 2, whole + 20, 7):
        assert len(session.encoded(max_bytes=bound)) <= bound


def test_a_turn_knows_which_attempt_it_is() -> None:
    session = Session().add(m.TurnStarted(turn_id="t", request_ids=[], attempt=3))
    assert session.view.turn is not None
    assert session.view.turn.attempt == 3


def test_an_open_ask_is_shown_as_it_was_served() -> None:
    session = Session().add(request("a"), started(), ask("q"))
    session.view.asks["q"].first = 2
    assert [(event.first, event.seq) for event in session.snapshot().asks] == [(2, 3)]
    session.view.asks["q"].first = 0
    assert [(event.first, event.seq) for event in session.snapshot().asks] == [(3, 3)]


def test_what_is_needed_to_go_on_is_there_even_without_room_for_a_transcript() -> None:
    session = Session().add(request("a"), started(), delta("partial"), ask("q"), m.State(patch={"k": 1}), request("b"))
    snapshot = session.snapshot(max_bytes=1)
    assert (snapshot.transcript, snapshot.transcript_truncated) == ([], True)
    assert snapshot.turn is not None
    assert (snapshot.turn.channels, len(snapshot.asks), len(snapshot.queue)) == ({"answer": "partial"}, 1, 2)
    assert snapshot.state == {"k": 1}


@steady
@given(st.lists(any_of(m.EVENTS), max_size=12), st.integers(1, 12), st.integers(0, 3000), st.integers(1, 12))
def test_any_session_fits(events: list[m.Event], max_events: int, room: int, kept: int) -> None:
    session = Session(kept).add(*events)
    needed = len(session.encoded(max_events=0)) + 20
    snapshot = session.snapshot(max_events, needed + room)
    assert len(session.encoded(max_events, needed + room)) <= needed + room
    assert len(snapshot.transcript) <= max_events
    assert snapshot.cursor == len(events)
    said = [event for event in session.log if isinstance(event, m.TRANSCRIPT_EVENTS)]
    newest = said[len(said) - len(snapshot.transcript) :]
    assert [attrs.evolve(event, first=0) for event in snapshot.transcript] == [
        attrs.evolve(event, first=0) for event in newest
    ]
    assert snapshot.transcript_truncated == (len(newest) < len(said) or session.log.floor > 0)


def test_a_snapshot_restores_what_it_was_taken_of() -> None:
    session = Session().add(
        request("a"), request("b"), started("a"), delta("x"), delta("y"), ask("q"), m.State(patch={"s": [1]}),
        m.Progress(turn_id="t", key="k", data={"n": 1}),
    )  # fmt: skip
    restored = SessionView()
    restored.restore(session.snapshot())
    assert as_facts(restored) == as_facts(session.view)
    # Both go on alike.
    for event in (delta("z"), output("xyz"), m.State(patch={"s": None}), started("b", turn_id="u")):
        session.add(event)
        restored.apply(event)
        assert as_facts(restored) == as_facts(session.view)


def test_applying_after_a_restore_leaves_the_snapshot_alone() -> None:
    session = Session().add(started(), delta("x"), m.State(patch={"a": {"b": 1}}), ask("q"), request("r"))
    snapshot = session.snapshot()
    before = codec.encode_frame(snapshot)
    restored = SessionView()
    restored.restore(snapshot)
    for event in (delta("y"), m.Progress(turn_id="t", key="k"), m.State(patch={"a": {"b": 2}}), ended(), started("r")):
        restored.apply(event)
    assert codec.encode_frame(snapshot) == before


def as_facts(view: SessionView) -> dict[str, Any]:
    turn = view.turn
    return {
        "cursor": view.cursor,
        "state": view.state,
        "queue": view.queue,
        "asks": [attrs.evolve(ask, first=0) for ask in view.asks.values()],
        "turn": turn and (turn.turn_id, turn.request_ids, turn.started_at, turn.channels(), turn.progress),
    }


def test_a_view_that_is_behind_its_log_is_no_snapshot() -> None:
    session = Session().add(request("a"))
    event = request("b")
    event.seq = 2
    session.log.append(event)
    with pytest.raises(AssertionError, match="must agree"):
        session.encoded()

"""The client's side: the rule for what arrives, and the delays between reconnects."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import steady

from gateway.protocol import messages as m
from gateway.protocol.cursor import Backoff, CursorTracker, Verdict


def custom(first: int, seq: int) -> m.Event:
    return m.Custom(name="x", seq=seq, first=first)


def hello_ok(**changes: Any) -> m.HelloOk:
    policy = m.Policy(**{field.name: 1 for field in attrs.fields(m.Policy)})
    fields: dict[str, Any] = {
        "protocol": 2, "server": m.ServerInfo(name="g", version="0", node="n"), "connection_id": "c", "session_id": "s",
        "agent_id": "a", "epoch": "e2", "resumed": True, "cursor": 9, "head": 9, "oldest_cursor": 0,
        "resync_required": False, "resync_reason": None, "credit": 1, "policy": policy,
        "features": m.Features(messages=[], events=[], capabilities=[]), "presence": [],
        "health": m.Health(status="ok", draining=False),
    }  # fmt: skip
    return m.HelloOk(**fields | changes)


def snapshot(cursor: int, epoch: str) -> m.Snapshot:
    return m.Snapshot(
        epoch=epoch, cursor=cursor, reason="requested", state={}, transcript=[], transcript_truncated=False, turn=None,
        queue=[], asks=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "seq", "verdict", "cursor"),
    [
        (6, 6, "new", 6),
        (6, 9, "new", 9),
        (1, 6, "new", 6),  # replaces what the client has and goes on
        (5, 5, "duplicate", 5),
        (1, 3, "duplicate", 5),
        (7, 7, "gap", 5),
        (7, 9, "gap", 5),
    ],
)
def test_the_rule(first: int, seq: int, verdict: Verdict, cursor: int) -> None:
    tracker = CursorTracker(5)
    assert (tracker.offer(custom(first, seq)), tracker.cursor) == (verdict, cursor)


@steady
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=20))
def test_the_cursor_never_goes_back_and_never_jumps_over_a_number(events: list[tuple[int, int]]) -> None:
    tracker = CursorTracker()
    accounted = {0}
    for first, width in events:
        before = tracker.cursor
        if tracker.offer(custom(first, first + width)) == "new":
            accounted |= set(range(first, first + width + 1))
        assert tracker.cursor >= before
        assert set(range(tracker.cursor + 1)) <= accounted


def test_a_welcome_says_where_the_stream_continues() -> None:
    tracker = CursorTracker(3, "e1")
    tracker.welcome(hello_ok(cursor=9))
    assert (tracker.cursor, tracker.epoch) == (9, "e2")


def test_a_promised_snapshot_moves_nothing_until_it_is_here() -> None:
    tracker = CursorTracker(3, "e1")
    tracker.welcome(hello_ok(cursor=9, resync_required=True, resync_reason="epoch_changed"))
    assert (tracker.cursor, tracker.epoch) == (3, "e1")
    tracker.reset(snapshot(9, "e2"))
    assert (tracker.cursor, tracker.epoch) == (9, "e2")


def test_a_snapshot_of_a_new_epoch_may_lead_back() -> None:
    tracker = CursorTracker(100, "e1")
    tracker.reset(snapshot(2, "e2"))
    assert tracker.offer(custom(3, 3)) == "new"


@steady
@given(st.floats(0, 1), st.floats(0, 100), st.integers(0, 3000))
def test_a_delay_is_within_the_jitter_and_not_under_the_hint(chance: float, hint: float, attempt: int) -> None:
    backoff = Backoff(base=0.5, cap=30.0)
    backoff.attempt = attempt
    ceiling = 0.5 * 2**attempt if attempt < 10 else 30.0
    assert backoff.delay(chance, hint) == max(hint, chance * min(30.0, ceiling))


def test_delays_grow_to_the_cap_and_start_again_after_a_reset() -> None:
    backoff = Backoff()
    assert [backoff.delay(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    backoff.reset()
    assert backoff.delay(1.0) == 0.5

"""Every rule that the vectors' runner keeps: a good stream passes, and each way to break it is seen."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.testing.rules import Observer, RuleBroken

Frame = dict[str, Any]

POLICY = dict.fromkeys(
    ("max_payload", "max_inbox", "max_buffered_bytes", "heartbeat_ms", "resume_window_ms", "max_turn_ms",
     "replay_max_events", "replay_max_bytes"), 1,
) | {"max_frame_bytes": 1000}  # fmt: skip


def hello_ok(**fields: Any) -> Frame:
    return {
        "type": "hello_ok", "protocol": 2, "server": {"name": "x", "version": "0", "node": "n"}, "connection_id": "c",
        "session_id": "s", "agent_id": "a", "epoch": "e", "resumed": True, "cursor": 0, "head": 0, "oldest_cursor": 0,
        "resync_required": False, "resync_reason": None, "credit": 1, "policy": POLICY,
        "features": {"messages": [], "events": [], "capabilities": []}, "presence": [],
        "health": {"status": "ok", "draining": False}, **fields,
    }  # fmt: skip


def event(tag: str, seq: int, first: int | None = None, **fields: Any) -> Frame:
    base: Frame = {"type": tag, "seq": seq, "first": first or seq, "at": 0}
    if tag not in ("input", "state"):
        base["turn_id"] = "t"
    return base | fields


def started(seq: int, turn_id: str = "t", *request_ids: str) -> Frame:
    return event("turn_started", seq, turn_id=turn_id, request_ids=list(request_ids))


def delta(seq: int, text: str, **fields: Any) -> Frame:
    return event("delta", seq, channel="answer", text=text, **fields)


def output(seq: int, content: str, first: int | None = None) -> Frame:
    return event("output", seq, first, channel="answer", content=content)


def ended(seq: int) -> Frame:
    return event("turn_ended", seq, outcome="completed")


def snapshot(**fields: Any) -> Frame:
    return {
        "type": "snapshot", "epoch": "e", "cursor": 9, "reason": "requested", "state": {}, "transcript": [],
        "transcript_truncated": False, "turn": None, "queue": [], "asks": [], **fields,
    }  # fmt: skip


ACCEPTED = {
    "type": "accepted", "request_id": "r", "seq": 1, "queued": 0, "duplicate": False, "durable": True, "credit": 1
}  # fmt: skip
RUNNING = {"turn_id": "t", "request_ids": [], "channels": {"answer": "so "}, "progress": {}, "started_at": 0}
RESYNC = hello_ok(cursor=9, head=9, resync_required=True, resync_reason="cursor_expired")


def feed(*frames: Any, size: int = 10) -> Observer:
    observer = Observer()
    for frame in frames:
        observer.received(frame, size)
    return observer


def test_a_good_stream() -> None:
    observer = feed(
        hello_ok(), started(1), delta(2, "so "), delta(4, "far", first=3), output(5, "so far", 2), ended(6),
        started(7, "u"), delta(8, "more", turn_id="u"),
    )  # fmt: skip
    assert observer.cursor == 8
    assert observer.text("t", "answer") == "so far"
    assert observer.text("u", "answer") == "more"


def test_a_good_snapshot_in_the_middle() -> None:
    transcript = [output(3, "sealed, ", 2)]
    observer = feed(
        RESYNC, snapshot(cursor=9, turn=RUNNING, transcript=transcript), delta(10, "far"), output(11, "so far")
    )
    assert observer.text("t", "answer") == "sealed, so far"


@pytest.mark.parametrize(
    ("clause", "frames"),
    [
        ("1.3", [hello_ok(), ["x"]]),
        ("1.3", [hello_ok(), {"type": 3}]),
        ("1.6", [hello_ok(), delta(True, "x")]),
        ("1.6", [hello_ok(head="0")]),
        ("3.1", [delta(1, "x")]),
        ("3.1", [hello_ok(), hello_ok()]),
        ("3.6", [RESYNC, snapshot(cursor=8)]),
        ("3.7", [hello_ok(cursor=3, head=2)]),
        ("3.7", [hello_ok(cursor=3, head=9, oldest_cursor=4)]),
        ("3.8", [hello_ok(resync_required=True)]),
        ("3.8", [hello_ok(resync_reason="cursor_ahead")]),
        ("3.10", [RESYNC, delta(10, "x")]),
        ("4.1", [hello_ok(), started(1), delta(3, "x")]),
        ("4.1", [hello_ok(), started(1), delta(2, "x", first=3)]),
        ("4.2", [hello_ok(), started(1), delta(2, "x"), delta(2, "x")]),
        ("4.2", [hello_ok(cursor=5, head=5), delta(4, "x")]),
        ("4.3", [hello_ok(), started(1), delta(2, "so "), delta(3, "so "), output(4, "so far")]),
        ("4.3", [RESYNC, snapshot(turn=RUNNING), output(10, "far")]),
        ("4.5", [hello_ok(), started(1), started(2, "u")]),
        ("4.5", [RESYNC, snapshot(turn=RUNNING), started(10, "u")]),
        ("4.6", [hello_ok(), started(1), ended(2), delta(3, "x")]),
        ("4.6", [hello_ok(), started(1), ended(2), ended(3)]),
        ("4.6", [hello_ok(), started(1), delta(2, "x") | {"turn_id": "u"}]),
        ("6.1", [hello_ok(), {"type": "dance"}]),
        ("6.3", [RESYNC, snapshot(transcript=[output(10, "x")])]),
        ("6.3", [RESYNC, snapshot(transcript=[output(3, "x"), output(2, "y")])]),
    ],
)  # fmt: skip
def test_each_rule(clause: str, frames: list[Any]) -> None:
    feed(*frames[:-1])
    with pytest.raises(RuleBroken) as broken:
        feed(*frames)
    assert broken.value.clause == clause


def test_no_frame_is_larger_than_promised() -> None:
    feed(hello_ok(), started(1), size=1000)
    with pytest.raises(RuleBroken) as broken:
        feed(hello_ok(), started(1), size=1001)
    assert broken.value.clause == "4.13"


def test_an_answer_comes_before_its_turn() -> None:
    for frames, fine in [([ACCEPTED, started(1, "t", "r")], True), ([started(1, "t", "r"), ACCEPTED], False)]:
        observer = feed(hello_ok())
        observer.sent("r")
        if fine:
            for frame in frames:
                observer.received(frame, 10)
        else:
            with pytest.raises(RuleBroken) as broken:
                observer.received(frames[0], 10)
            assert broken.value.clause == "5.3"

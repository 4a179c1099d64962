"""Every rule that the vectors' runner keeps on a connection of dialect 1."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.testing.praison_rules import PraisonObserver
from gateway.testing.rules import RuleBroken

Frame = dict[str, Any]
OK = {"type": "hello_ok", "cursor": 4, "sequence": 4}


def event(seq: int, sequence: int, kind: str = "custom", **data: Any) -> Frame:
    inner = {"type": kind, "data": {"turn_id": "t", "cursor": seq, "seq": seq, **data}, "sequence": sequence}
    return {"type": "replay", "seq": seq, "event": inner}


def token(seq: int, sequence: int, content: str) -> Frame:
    return event(seq, sequence, "token_stream", content=content)


def final(seq: int, sequence: int, content: str) -> Frame:
    return event(seq, sequence, "response", content=content, status="final", offset=0)


def feed(*frames: Any) -> PraisonObserver:
    observer = PraisonObserver()
    for frame in frames:
        observer.received(frame, 10)
    return observer


def test_a_good_stream() -> None:
    snapshot = {"type": "snapshot", "state": {"event_cursor": 9}}
    observer = feed(OK, snapshot, token(10, 5, "so "), token(11, 6, "far"), event(11, 7), final(12, 8, "it is so far"))
    assert (observer.cursor, observer.text("t", "answer")) == (12, "so far")


@pytest.mark.parametrize(
    ("clause", "frames"),
    [
        ("1.3", [OK, 3]),
        ("3.1", [event(1, 1)]),
        ("3.1", [OK, OK]),
        ("10.2", [{**OK, "sequence": 5}]),
        ("10.4", [OK, {**event(5, 5), "seq": 6}]),
        ("10.5", [OK, event(5, 6)]),
        ("10.5", [OK, event(5, 5), event(6, 5)]),
        ("10.5", [OK, event(5, 5), event(4, 6)]),
        ("10.6", [OK, token(5, 5, "so "), token(6, 6, "so "), final(7, 7, "so far")]),
    ],
)
def test_each_rule(clause: str, frames: list[Any]) -> None:
    feed(*frames[:-1])
    with pytest.raises(RuleBroken) as broken:
        feed(*frames)
    assert broken.value.clause == clause

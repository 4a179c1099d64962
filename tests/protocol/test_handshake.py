"""Joining: PROTOCOL section 3, row by row."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import steady

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.testing.strategies import any_of, json_values, of

HELLO = {"type": "hello", "protocol_min": 1, "protocol_max": 2, "agent_id": "echo"}


def hello(**fields: Any) -> m.Hello:
    required: dict[str, Any] = {"protocol_min": 1, "protocol_max": 2, "agent_id": "echo"}
    return m.Hello(**required | fields)


def refused(raw: bytes) -> HandshakeRefused:
    with pytest.raises(HandshakeRefused) as caught:
        handshake.read_hello(raw)
    return caught.value


def test_the_smallest_and_the_fullest_hello() -> None:
    assert handshake.read_hello(json.dumps(HELLO).encode()) == hello()
    full = hello(
        session_id="s.1_a:b-c", since=0, epoch="e", token="t", capabilities=["batch"],
        client=m.ClientInfo(name="app", version="1"),
    )  # fmt: skip
    assert handshake.read_hello(codec.encode_frame(full)) == full


@pytest.mark.parametrize("version", [1, 2, 7])
def test_a_client_may_speak_one_version_alone(version: int) -> None:
    fields = {"protocol_min": version, "protocol_max": version}
    assert handshake.read_hello(json.dumps(HELLO | fields).encode()) == hello(**fields)


@pytest.mark.parametrize(("agent_id", "since", "named"), [("", 0, "agent_id"), ("echo", -1, "since")])
def test_what_types_do_not_say_is_an_invalid_frame(agent_id: str, since: int, named: str) -> None:
    """For openings that a dialect reads in its own way."""
    with pytest.raises(FrameError, match=f"field '{named}'") as caught:
        handshake.check_hello(agent_id, since)
    assert caught.value.code == "invalid_frame"
    handshake.check_hello("echo", 0)
    handshake.check_hello("echo", None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"protocol_min": 3}, "protocol_min"),
        ({"protocol_min": "1"}, "protocol_min"),
        ({"protocol_min": True}, "protocol_min"),
        ({"protocol_max": 2.0}, "protocol_max"),
        ({"protocol_max": None}, "protocol_max"),
        ({"agent_id": ""}, "agent_id"),
        ({"agent_id": None}, "agent_id"),
        ({"session_id": "a/b"}, "session_id"),
        ({"session_id": "x" * 129}, "session_id"),
        ({"since": -1}, "since"),
        ({"since": "5"}, "since"),
        ({"since": 1.5}, "since"),
        ({"type": "message"}, "type"),
        ({"type": "join"}, "type"),
        ({"type": 1}, "type"),
    ],
)
def test_an_invalid_hello_names_the_field(fields: dict[str, Any], named: str) -> None:
    error = refused(json.dumps(HELLO | fields).encode())
    assert (error.code, error.close_code, error.retryable) == ("invalid_hello", 4400, False)
    assert f"field {named!r}" in error.message
    assert error.next_step


@pytest.mark.parametrize("name", ["protocol_min", "protocol_max", "agent_id", "type"])
def test_a_required_field_is_missing(name: str) -> None:
    error = refused(json.dumps({key: value for key, value in HELLO.items() if key != name}).encode())
    assert error.code == "invalid_hello"
    assert f"field {name!r}: is required" in error.message


@pytest.mark.parametrize("raw", [b"", b"[]", b"hello", b"\xff", b'"hello"', json.dumps([HELLO]).encode()])
def test_a_first_frame_that_is_no_object(raw: bytes) -> None:
    assert refused(raw).code == "invalid_hello"


@steady
@given(any_of(m.CLIENT_FRAMES) | of(m.Hello), st.data())
def test_any_first_frame_is_a_valid_hello_or_refused(message: m.ClientFrame, data: st.DataObject) -> None:
    fields = codec.to_builtins(message)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)
    with suppress(HandshakeRefused):
        result = handshake.read_hello(codec.dump_json(fields))
        assert result.protocol_min <= result.protocol_max
        assert result.agent_id
        assert (result.since or 0) >= 0


@steady
@given(st.integers(-3, 6), st.integers(0, 5))
def test_the_highest_common_version_is_chosen(low: int, width: int) -> None:
    offer = hello(protocol_min=low, protocol_max=low + width)
    common = [version for version in handshake.VERSIONS if low <= version <= low + width]
    if common:
        assert handshake.negotiate(offer) == max(common)
    else:
        with pytest.raises(HandshakeRefused) as caught:
            handshake.negotiate(offer)
        assert (caught.value.code, caught.value.close_code) == ("protocol_unsupported", 4406)
        assert f"versions 1 to 2, the client {low} to {low + width}" in caught.value.message
        assert caught.value.next_step


@pytest.mark.parametrize(("low", "high", "chosen"), [(1, 2, 2), (1, 1, 1), (0, 9, 3), (3, 3, 3)])
def test_of_several_common_versions_the_highest(
    monkeypatch: pytest.MonkeyPatch, low: int, high: int, chosen: int
) -> None:
    monkeypatch.setattr(handshake, "VERSIONS", (1, 2, 3))
    assert handshake.negotiate(hello(protocol_min=low, protocol_max=high)) == chosen


def test_a_refusal_becomes_a_hello_error_with_the_versions_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "VERSIONS", (1, 2, 3))
    error = HandshakeRefused(
        "rate_limited", "slow down", close_code=4429, next_step="Wait.", retryable=True, retry_after_ms=5
    )
    assert handshake.hello_error(error) == m.HelloError(
        code="rate_limited", message="slow down", retryable=True, retry_after_ms=5, next_step="Wait.",
        server_min_version=1, server_max_version=3,
    )  # fmt: skip


def test_features_name_every_message_and_event() -> None:
    assert {*handshake.FEATURES.messages, "hello"} == set(m.CLIENT_FRAMES)
    assert set(handshake.FEATURES.events) == set(m.EVENTS)
    assert handshake.FEATURES.capabilities == ["batch"]


FLOOR, HEAD = 37, 180


@pytest.mark.parametrize(
    ("fields", "existed", "cursor", "reason"),
    [
        ({"since": 120}, True, 120, None),
        ({"since": 120, "epoch": "e1"}, True, 120, None),
        ({"since": FLOOR}, True, FLOOR, None),
        ({"since": FLOOR - 1}, True, HEAD, "cursor_expired"),
        ({"since": 0}, True, HEAD, "cursor_expired"),
        ({}, True, HEAD, "cursor_expired"),
        ({"since": HEAD}, True, HEAD, None),
        ({"since": HEAD + 1}, True, HEAD, "cursor_ahead"),
        ({"since": 120, "epoch": "e0"}, True, HEAD, "epoch_changed"),
        ({"since": 0, "epoch": "e0"}, True, HEAD, "epoch_changed"),
        # Where several hold, in this order: unknown_session, epoch_changed, cursor_ahead, cursor_expired.
        ({"since": HEAD + 1, "epoch": "e0"}, True, HEAD, "epoch_changed"),
        ({"since": FLOOR - 1, "epoch": "e0"}, True, HEAD, "epoch_changed"),
        ({"since": HEAD + 1, "epoch": "e0"}, False, HEAD, "unknown_session"),
        ({"since": 1}, False, HEAD, "unknown_session"),
    ],
)
def test_where_the_stream_continues(fields: dict[str, Any], existed: bool, cursor: int, reason: str | None) -> None:
    position = handshake.position_for(hello(**fields), existed=existed, epoch="e1", floor=FLOOR, head=HEAD)
    assert (position.cursor, position.resync) == (cursor, reason)


@pytest.mark.parametrize("fields", [{}, {"since": 0}, {"since": None, "epoch": "e0"}])
def test_a_new_session_starts_at_its_beginning(fields: dict[str, Any]) -> None:
    position = handshake.position_for(hello(**fields), existed=False, epoch="e1", floor=0, head=0)
    assert (position.cursor, position.resync) == (0, None)


def test_a_cursor_before_the_first_event_can_be_resumed() -> None:
    position = handshake.position_for(hello(since=0, epoch="e1"), existed=True, epoch="e1", floor=0, head=5)
    assert (position.cursor, position.resync) == (0, None)

"""Dialect 1, everything without a number; and the golden vectors of both dialects."""

from __future__ import annotations

import json
from typing import Any

import attrs
import golden
import pytest
from hypothesis import given
from hypothesis import strategies as st
from praison_reader import PraisonReader
from steady import steady

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec, dialects
from gateway.protocol import messages as m
from gateway.protocol.log import Log
from gateway.protocol.praison import Praison
from gateway.protocol.praison_events import EVENTS
from gateway.testing.strategies import client_frames, near_valid

HELLO = {"type": "hello", "agent_id": "echo", "protocol_min": 1, "protocol_max": 1}
JOIN = {"type": "join", "agent_id": "echo"}


def test_both_dialects_are_on_the_wire_as_they_were() -> None:
    """A difference is a change of a wire format. See `golden`."""
    assert golden.vectors() == json.loads(golden.PATH.read_text())


def test_every_message_has_a_golden_vector() -> None:
    assert {type(frame) for frame in golden.SERVER.values()} | {m.Snapshot} == set(m.SERVER_FRAMES.values())
    assert {type(event) for event in golden.EVENTS} == set(m.EVENTS.values())
    kept = json.loads(golden.PATH.read_text())
    seen = {frame["event"]["type"] for event in kept["events"] for frame in event["1"]}
    assert seen == set(EVENTS)
    assert {frame["1"]["type"] for frame in kept["client"] if "2" in frame} == set(
        kept["server"]["hello_ok"]["1"]["features"]["methods"]
    )


def test_its_client_reads_the_golden_vectors() -> None:
    client = PraisonReader()
    kept = json.loads(golden.PATH.read_text())
    client.take(json.dumps(kept["server"]["hello_ok"]["1"]))
    for event in kept["events"]:
        for frame in event["1"]:
            client.take(json.dumps(frame))
    assert client.gaps == client.repeated == []
    assert client.tokens["t_1", "answer"] == 'say "é"\n'
    assert [final["content"] for final in client.finals["t_1"]] == ['say "é"\nit']


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "version"),
    [
        (HELLO, 1),
        (HELLO | {"since": "abc"}, 1),
        (HELLO | {"protocol_min": -3}, 1),
        (JOIN, 1),
        (JOIN | {"min_version": "x"}, 1),
        (HELLO | {"protocol_max": 2}, 2),
        (HELLO | {"protocol_min": "x"}, 2),
        ({name: value for name, value in HELLO.items() if name != "protocol_min"}, 2),
        (HELLO | {"protocol_min": 2, "protocol_max": 2}, 2),
        (HELLO | {"protocol_max": "x"}, 2),
        (HELLO | {"protocol_max": True}, 2),
        (HELLO | {"protocol_max": 1.0}, 2),
        (HELLO | {"protocol_max": 0}, 2),
        (HELLO | {"protocol_min": 2}, 2),
        ({"type": "message"}, 2),
        ({}, 2),
        ([], 2),
    ],
    ids=str,
)
def test_the_first_frame_chooses(first: Any, version: int) -> None:
    assert dialects.choose(json.dumps(first).encode()).version == version


def test_an_unreadable_first_frame_is_answered_in_version_2() -> None:
    assert dialects.choose(b"{").version == dialects.choose(b"\xff").version == 2


@pytest.mark.parametrize(
    ("first", "hello"),
    [
        (HELLO, {}),
        (HELLO | {"session_id": "s_1", "since": 7}, {"session_id": "s_1", "since": 7}),
        (HELLO | {"capabilities": ["streaming", "ack"]}, {}),
        (JOIN, {}),
        (JOIN | {"min_version": 1, "max_version": 1}, {}),
        (JOIN | {"session_id": "s_1", "since": 0}, {"session_id": "s_1", "since": 0}),
        (JOIN | {"max_version": 5}, {}),
        (JOIN | {"token": "secret"}, {"token": "secret"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_opening_becomes_a_hello(first: dict[str, Any], hello: dict[str, Any]) -> None:
    raw = json.dumps(first).encode()
    read = dialects.choose(raw).read_hello(raw)
    assert (read.agent_id, read.protocol_min, read.protocol_max) == ("echo", 1, 1)
    assert {name: getattr(read, name) for name in hello} == hello


def test_version_2_reads_its_own_opening() -> None:
    raw = json.dumps(HELLO | {"protocol_max": 2, "since": 7}).encode()
    assert dialects.NATIVE.read_hello(raw) == m.Hello(protocol_min=1, protocol_max=2, agent_id="echo", since=7)
    for fields, code in (({"protocol_min": 3, "protocol_max": 9}, "protocol_unsupported"), ({}, "invalid_hello")):
        with pytest.raises(HandshakeRefused) as caught:
            dialects.NATIVE.read_hello(json.dumps({"type": "hello", "agent_id": "echo"} | fields).encode())
        assert caught.value.code == code


@pytest.mark.parametrize("fields", [
    {"since": "abc"}, {"since": -1}, {"since": True}, {"since": 1.5}, {"session_id": "a b"}, {"session_id": 5},
    {"agent_id": None}, {"agent_id": ""}, {"token": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("opening", [HELLO, JOIN], ids=["hello", "join"])
def test_a_wrong_opening_is_named_and_may_be_tried_again(opening: dict[str, Any], fields: dict[str, Any]) -> None:
    raw = json.dumps(opening | fields).encode()
    dialect = dialects.choose(raw)
    with pytest.raises(FrameError) as caught:
        dialect.read_hello(raw)
    answer = json.loads(dialect.encode(m.Error(code=caught.value.code, message=caught.value.message)) or b"")
    (name,) = fields
    assert f"field '{name}'" in answer["message"]
    joins = opening is JOIN
    assert (answer["type"], answer["code"]) == (
        ("error", "invalid_protocol_hello") if joins else ("hello_error", "invalid_hello")
    )
    assert answer["next_step"] == "do_not_retry"


@pytest.mark.parametrize(("low", "high"), [("x", 1), (1, "x"), (2, 1), (True, 1)])
def test_wrong_versions_of_a_join(low: Any, high: Any) -> None:
    raw = json.dumps(JOIN | {"min_version": low, "max_version": high}).encode()
    with pytest.raises(FrameError) as caught:
        dialects.choose(raw).read_hello(raw)
    assert "_version'" in caught.value.message


@pytest.mark.parametrize(("low", "high"), [(2, 2), (3, 9), (-2, 0)])
def test_a_join_without_a_common_version(low: int, high: int) -> None:
    raw = json.dumps(JOIN | {"min_version": low, "max_version": high}).encode()
    dialect = dialects.choose(raw)
    with pytest.raises(HandshakeRefused) as caught:
        dialect.read_hello(raw)
    assert (caught.value.code, caught.value.close_code) == ("protocol_unsupported", 4406)
    refused = json.loads(dialect.encode(refusal("protocol_unsupported")) or b"")
    assert (refused["type"], refused["code"]) == ("error", "version_unsupported")
    assert (refused["server_min_version"], refused["server_max_version"]) == (1, 2)


@pytest.mark.parametrize(
    ("given", "query", "found"),
    [
        (None, "", None),
        (None, "token=abc", "abc"),
        (None, "x=1&token=a%2Fb&token=c", "a/b"),
        ("header", "token=abc", "header"),
        (None, "token=", None),
    ],
)
def test_the_token_may_be_in_the_query(given: str | None, query: str, found: str | None) -> None:
    assert Praison().find_token(given, query) == found
    assert dialects.NATIVE.find_token(given, query) == given


def refusal(code: str, retry_after_ms: int | None = None) -> m.HelloError:
    return m.HelloError(
        code=code, message="no", retryable=False, retry_after_ms=retry_after_ms, next_step="For people.",
        server_min_version=1, server_max_version=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "token", "shown", "step"),
    [
        ("unauthorized", "", "auth_required", "reauthenticate"),
        ("unauthorized", "token=x", "auth_unauthorized", "reauthenticate"),
        ("forbidden", "token=x", "auth_unauthorized", "reauthenticate"),
        ("agent_not_found", "", "agent_not_found", "do_not_retry"),
        ("origin_not_allowed", "", "origin_not_allowed", "do_not_retry"),
        ("protocol_unsupported", "", "protocol_unsupported", "upgrade_client"),
        ("rate_limited", "", "rate_limited", "wait_then_retry"),
        ("too_many_connections", "", "rate_limited", "wait_then_retry"),
        ("draining", "", "draining", "wait_then_retry"),
        ("internal", "", "internal", "wait_then_retry"),
    ],
)
def test_refusals_say_what_to_do(code: str, token: str, shown: str, step: str) -> None:
    dialect = Praison()
    dialect.find_token(None, token)
    answer = json.loads(dialect.encode(refusal(code, 1)) or b"")
    assert (answer["type"], answer["code"], answer["next_step"]) == ("hello_error", shown, step)
    assert answer["retry_after_seconds"] == 1


# --- frames ----------------------------------------------------------------------------------------------------------


@steady
@given(near_valid(client_frames(1)) | st.binary(max_size=40))
def test_whatever_comes_is_a_frame_or_a_typed_error(raw: bytes) -> None:
    dialect, _ = golden.joined()
    (frame,) = dialect.decode(raw)
    if isinstance(frame, FrameError):
        assert frame.code in {"invalid_json", "invalid_frame", "unknown_type", "already_joined"}
        assert dialect.encode(m.Error(code=frame.code, message=frame.message)) is not None


def test_made_up_request_ids_are_not_made_up_twice() -> None:
    dialect, _ = golden.joined()
    ids = []
    for _ in range(3):
        (frame,) = dialect.decode(b'{"type":"message","content":"hi"}')
        assert isinstance(frame, m.Message)
        ids.append(frame.request_id)
    assert len(set(ids)) == 3
    assert all(request_id.startswith("c_1.") for request_id in ids)


def test_a_snapshot_is_cut_to_a_frame() -> None:
    """What version 2 fits into a frame may be too long once it is wrapped; the newest stays."""
    dialect = Praison()
    dialect.attach(Log(max_events=1, max_bytes=1), {})
    dialect.encode(attrs.evolve(golden.HELLO_OK, session_id="s" * 128))
    size = golden.POLICY.max_frame_bytes
    transcript = [
        m.Input(seq=n, first=n, at=1, request_id=m.RequestId(f"r{n}"), content=f"{n} " + "x" * 4_950)
        for n in range(1, 206)
    ]
    given = codec.encode_snapshot(golden.SNAPSHOT, [codec.encode_event(event, event.seq) for event in transcript], [])
    assert size * 0.99 < len(given) <= size
    (frame,) = dialect.snapshot(given)
    assert len(frame) <= size
    state = json.loads(frame)["state"]
    assert state["truncated"] is True
    assert state["messages"][-1]["content"].startswith("205 ")


def cut_snapshot(transcript: list[m.Event], room: int) -> dict[str, Any]:
    """The state that a client gets of a snapshot of these events, where a frame may have `room` bytes."""
    dialect = Praison()
    dialect.attach(Log(max_events=1, max_bytes=1), {})
    dialect.encode(attrs.evolve(golden.HELLO_OK, policy=attrs.evolve(golden.POLICY, max_frame_bytes=room)))
    encoded = [codec.encode_event(event, event.seq) for event in transcript]
    given = codec.encode_snapshot(attrs.evolve(golden.SNAPSHOT, turn=None, state={}), encoded, [])
    (frame,) = dialect.snapshot(given)
    assert len(frame) <= room
    state: dict[str, Any] = json.loads(frame)["state"]
    assert state["truncated"] is True
    return state


def said(seq: int, size: int) -> m.Event:
    return m.Input(seq=seq, first=seq, at=1, request_id=m.RequestId("r"), content=str(seq).ljust(size, "x"))


def called(seq: int, size: int) -> m.Event:
    return m.ToolCall(seq=seq, first=seq, at=1, turn_id="t", call_id="c", name="look", arguments="x" * size)


@pytest.mark.parametrize(
    ("transcript", "messages", "events"),
    [
        ([called(1, 900), called(2, 900)], [], ["2"]),
        ([called(n, 200) for n in range(1, 9)], [], ["7", "8"]),
        ([called(1, 400), called(2, 400), called(3, 400), called(4, 400)], [], ["3", "4"]),
        ([said(1, 900), called(2, 900)], [], ["2"]),
        ([said(1, 500), said(2, 500), called(3, 300)], ["2"], ["3"]),
        ([said(1, 900), said(2, 900)], ["2"], []),
        ([said(1, 2000)], [], []),
        ([called(1, 2000)], [], []),
        ([said(1, 2000), called(2, 2000)], [], []),
    ],
    ids=["calls", "many calls", "halves", "both", "more messages", "messages", "a message", "a call", "two too large"],
)  # fmt: skip
def test_a_snapshot_is_halved_until_it_fits(transcript: list[m.Event], messages: list[str], events: list[str]) -> None:
    """Of a single entry too large for a frame nothing is shown: its client would close, come back, and get it again."""
    state = cut_snapshot(transcript, 1800)
    assert [message["message_id"] for message in state["messages"]] == messages
    assert [event["event_id"] for event in state["events"]] == events


def test_an_entry_that_fills_a_frame_of_version_2_is_left_out() -> None:
    encoded = codec.encode_event(said(4, 100_000), 4)
    given = codec.encode_snapshot(attrs.evolve(golden.SNAPSHOT, turn=None, state={}), [encoded], [])
    state = cut_snapshot([said(4, 100_000)], len(given))
    assert (state["messages"], state["event_cursor"]) == ([], 18)


def test_a_snapshot_of_exactly_a_frame_is_whole() -> None:
    dialect, _ = golden.joined()
    given = codec.encode_snapshot(golden.SNAPSHOT, [codec.encode_event(said(4, 100), 4)], [])
    (whole,) = dialect.snapshot(given)
    for room, truncated in ((len(whole), False), (len(whole) - 1, True)):
        dialect.encode(attrs.evolve(golden.HELLO_OK, policy=attrs.evolve(golden.POLICY, max_frame_bytes=room)))
        (frame,) = dialect.snapshot(given)
        assert (frame != whole) is truncated


def test_after_a_snapshot_in_mid_answer_no_text_is_repeated() -> None:
    """How much of the answer the snapshot had is not known, as its marks are gone: it comes in the response alone."""
    log = Log(max_events=9, max_bytes=9_999)
    log.append(m.TurnStarted(seq=1, first=1, at=1, turn_id="t", request_ids=[]))
    log.append(m.Output(seq=4, first=2, at=1, turn_id="t", channel="answer", content="three"))
    dialect = Praison()
    dialect.attach(log, {})
    dialect.encode(golden.HELLO_OK)
    list(dialect.snapshot(codec.encode_snapshot(attrs.evolve(golden.SNAPSHOT, cursor=2), [], [])))
    (frame,) = dialect.read(log, 2, 9_999).payloads
    event = json.loads(frame)["event"]
    assert (event["type"], event["data"]["content"]) == ("response", "three")


def test_a_turn_in_a_snapshot_that_has_not_answered_yet() -> None:
    dialect, _ = golden.joined()
    turn = attrs.evolve(golden.SNAPSHOT.turn, channels={"reasoning": "hm"})
    sealed = m.Output(seq=2, first=1, at=1, turn_id="t_1", channel="answer", content="so ", metadata={"more": True})
    for outputs, shown in (([], []), ([sealed], ["so "]), ([sealed, attrs.evolve(sealed, seq=3)], ["so so "])):
        given = codec.encode_snapshot(
            attrs.evolve(golden.SNAPSHOT, turn=turn), [codec.encode_event(event, event.seq) for event in outputs], []
        )
        (frame,) = dialect.snapshot(given)
        assert [event["data"]["content"] for event in json.loads(frame)["state"]["events"]] == shown


def test_a_stopped_turn_in_a_snapshot_is_a_message() -> None:
    dialect, _ = golden.joined()
    part = m.Output(seq=1, first=1, at=1, turn_id="t", channel="answer", content="so ", metadata={"more": True})
    transcript: list[m.Event] = [
        part,
        attrs.evolve(part, seq=2, content="far"),
        m.TurnEnded(seq=3, first=3, at=1, turn_id="t", outcome="lost"),
    ]
    given = codec.encode_snapshot(golden.SNAPSHOT, [codec.encode_event(event, event.seq) for event in transcript], [])
    (frame,) = dialect.snapshot(given)
    state = json.loads(frame)["state"]
    assert [(message["content"], message["sender_id"], message["metadata"]) for message in state["messages"]] == [
        ("so far", "echo", {})
    ]
    assert [event["data"]["content"] for event in state["events"]] == ["four"]


def test_a_reply_to_no_question_is_acknowledged_by_its_id() -> None:
    dialect, _ = golden.joined()
    list(dialect.decode(b'{"type":"server_reply","request_id":"a_7","value":"yes"}'))
    answer = json.loads(dialect.encode(m.Error(code="unknown_ask", message="no")) or b"")
    assert answer == {"type": "server_reply_ack", "request_id": "a_7", "status": "unknown_request"}


@pytest.mark.parametrize(
    ("options", "reply", "value"),
    [([7, "red"], "7", 7), (["red", 7], "7", 7), (["7", 7], "7", "7"), ([7], "8", "8"), ([[1, 2]], "[1,2]", [1, 2])],
)
def test_a_choice_may_be_replied_to_in_json(options: list[Any], reply: str, value: Any) -> None:
    dialect = Praison()
    dialect.attach(Log(max_events=1, max_bytes=1), {"a_1": attrs.evolve(golden.ASK, options=options)})
    raw = json.dumps({"type": "server_reply", "request_id": "a_1", "value": reply}).encode()
    assert list(dialect.decode(raw)) == [m.Answer(ask_id="a_1", value=value)]


def test_what_will_be_wrapped_may_be_nested_less_deep() -> None:
    dialect, _ = golden.joined()
    for depth, refused in ((codec.MAX_GIVEN_DEPTH, False), (codec.MAX_GIVEN_DEPTH + 1, True)):
        nested = "[" * (depth - 2) + "]" * (depth - 2)
        raw = f'{{"type":"message","content":"hi","metadata":{{"n":{nested}}}}}'.encode()
        (frame,) = dialect.decode(raw)
        assert isinstance(frame, FrameError) is refused


@pytest.mark.parametrize(("ms", "seconds"), [(0, 0), (1, 1), (1000, 1), (1001, 2), (3_600_000, 3600)])
def test_a_retry_is_never_before_the_hint(ms: int, seconds: int) -> None:
    assert json.loads(Praison().encode(refusal("rate_limited", ms)) or b"")["retry_after_seconds"] == seconds
    dialect, _ = golden.joined()
    error = m.Error(code="rate_limited", message="slow down", retryable=True, retry_after_ms=ms)
    assert json.loads(dialect.encode(error) or b"")["retry_after_seconds"] == seconds

"""Strict reading, exact writing: what is refused, how it is said, and that everything written can be read back."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steady import steady

from gateway.errors import FrameError
from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.testing.strategies import any_of, json_values, of
from gateway.testing.strategies import texts as text

SURVIVES_A_SNAPSHOT = codec.MAX_GIVEN_DEPTH - 2  # a frame's own object and `metadata` are two levels


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def refusal(raw: bytes) -> FrameError:
    (result,) = codec.decode_client(raw)
    assert isinstance(result, FrameError), result
    return result


def frame(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


# --- what is no JSON, or not one thing to everyone -------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "blank": b"  ",
    "cut short": b'{"type":"ping"',
    "two texts": b'{"type":"ping"}{"type":"ping"}',
    "trailing comma": b'{"type":"ping",}',
    "single quotes": b"{'type':'ping'}",
    "invalid UTF-8": b'{"type":"ping","nonce":"\xff"}',
    "surrogate in UTF-8": b'{"type":"ping","nonce":"\xed\xa0\x80"}',
    "overlong UTF-8": b'{"type":"ping","nonce":"\xc0\xaf"}',
    "byte order mark": b'\xef\xbb\xbf{"type":"ping"}',
    "UTF-16": '{"type":"ping"}'.encode("utf-16-le"),
    "lone high surrogate": b'{"type":"ping","nonce":"\\ud800"}',
    "lone low surrogate": b'{"type":"ping","nonce":"\\udc00"}',
    "raw control character": b'{"type":"ping","nonce":"\x01"}',
    "NaN": b'{"type":"ping","nonce":NaN}',
    "Infinity": b'{"type":"ping","nonce":Infinity}',
    "-Infinity": b'{"type":"ping","nonce":-Infinity}',
    "beyond a double": b'{"type":"ping","nonce":1e400}',
    "leading zero": b'{"type":"ping","nonce":01}',
    "5000 digits": b'{"type":"ping","nonce":' + b"1" * 5000 + b"}",
    "5000 digits in a double": b'{"type":"ping","nonce":' + b"1" * 5000 + b".5}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_invalid_json(raw: bytes) -> None:
    refused = refusal(raw)
    assert refused.code == "invalid_json"
    assert refused.message.startswith(("expected one JSON text in UTF-8: ", "an integer does not fit"))


@pytest.mark.parametrize("number", [2**64, 2**64 + 1, -(2**63) - 1, 10**20, -(10**40)])
def test_integers_beyond_64_bits_are_refused_rather_than_rounded(number: int) -> None:
    refused = refusal(frame(type="ping", nonce={"deep": [number]}))
    assert (refused.code, "64 bits" in refused.message) == ("invalid_json", True)


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**18])
def test_integers_of_64_bits_pass_unchanged(number: int) -> None:
    assert codec.decode_client(frame(type="ping", nonce=number)) == [m.Ping(nonce=number)]


@pytest.mark.parametrize(
    "raw",
    [
        b'{"type":"ping","type":"leave"}',
        b'{"type":"ping","type":"ping"}',
        b'{"type":"ping","t\\u0079pe":"leave"}',
        b'{"\\u0074\\u0079\\u0070\\u0065":"ping","type":"leave"}',
        b'{"\\u0074ype":"ping","typ\\u0065":"leave"}',
        b'[{"type":"ping"},{"type":"ping","type":"leave"}]',
        b'{"type":"ping","nonce":{"type":1,"type":2}}',
    ],
)
def test_a_repeated_type_is_refused_since_parsers_disagree_about_it(raw: bytes) -> None:
    refused = refusal(raw)
    assert refused.code == "invalid_json"
    assert "'type'" in refused.message


@pytest.mark.parametrize("raw", [b'[{"type":"ping"},{"type":"ping"}]', b'{"type":"ping","nonce":{"type":"ping"}}'])
def test_type_may_appear_in_several_objects(raw: bytes) -> None:
    assert all(isinstance(ping, m.Ping) for ping in codec.decode_client(raw))


def test_any_other_repeated_name_has_its_last_value_whichever_way_a_frame_is_read() -> None:
    for raw in (b'{"type":"ping","nonce":1,"nonce":2}', b'{"type":"ping","nonce":1,"n\\u006fnce":2}'):
        assert codec.decode_client(raw) == [m.Ping(nonce=2)]


def test_nesting_is_bounded_for_clients_below_what_readers_take() -> None:
    deepest = nested(codec.MAX_GIVEN_DEPTH - 1)
    assert codec.decode_client(frame(type="ping", nonce=deepest)) == [m.Ping(nonce=deepest)]
    refused = refusal(frame(type="ping", nonce=[deepest]))
    assert (refused.code, refused.message) == (
        "invalid_json",
        f"expected at most {codec.MAX_GIVEN_DEPTH} levels of nesting",
    )
    assert refusal(b"[" * 500_000).code == "invalid_json"
    assert refusal(b'{"a":' * 900 + b"1" + b"}" * 900).code == "invalid_json"


def inside(value: Any) -> list[Any]:
    """Values one level deeper than `value`, with brackets enough beside it that they must be measured."""
    wide: list[Any] = [[]] * codec.MAX_DEPTH
    return [[value, *wide], [*wide, value], [value, *wide, 1], [1, *wide, value], {"a": value, "b": wide, "c": 1}]


def test_the_deepest_place_counts_wherever_it_stands() -> None:
    as_deep_as_may_be = nested(codec.MAX_GIVEN_DEPTH - 2)
    for value in inside(as_deep_as_may_be):
        assert codec.decode_client(frame(type="ping", nonce=value)) == [m.Ping(nonce=value)]
        assert codec.check_json([value]) == orjson.dumps([value])
    for value in inside([as_deep_as_may_be]):
        assert refusal(frame(type="ping", nonce=value)).code == "invalid_json"
        with pytest.raises(ValueError, match="nested"):
            codec.check_json([value])


def test_width_is_not_depth() -> None:
    wide: list[Any] = [[] for _ in range(1000)]
    assert codec.decode_client(frame(type="ping", nonce=wide)) == [m.Ping(nonce=wide)]


def test_brackets_in_a_string_are_not_depth() -> None:
    assert codec.decode_client(frame(type="ping", nonce="[{" * 1000)) == [m.Ping(nonce="[{" * 1000)]


# --- what is JSON but not the protocol -------------------------------------------------------------------------------

HELLO = {"type": "hello", "protocol_min": 1, "protocol_max": 2, "agent_id": "echo"}
MESSAGE = {"type": "message", "request_id": "r1", "content": "hi"}

WRONG_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    (HELLO | {"protocol_min": True}, "protocol_min", "an integer"),
    (HELLO | {"protocol_min": "1"}, "protocol_min", "an integer"),
    (HELLO | {"protocol_min": 1.0}, "protocol_min", "an integer"),
    (HELLO | {"protocol_min": None}, "protocol_min", "an integer"),
    (HELLO | {"protocol_max": [2]}, "protocol_max", "an integer"),
    (HELLO | {"since": "0"}, "since", "an integer"),
    (HELLO | {"since": False}, "since", "an integer"),
    (HELLO | {"since": 0.5}, "since", "an integer"),
    (HELLO | {"agent_id": 7}, "agent_id", "a string"),
    (HELLO | {"agent_id": None}, "agent_id", "a string"),
    (HELLO | {"epoch": 1}, "epoch", "a string"),
    (HELLO | {"token": {}}, "token", "a string"),
    (HELLO | {"session_id": ""}, "session_id", "1 to 128"),
    (HELLO | {"session_id": "a b"}, "session_id", "1 to 128"),
    (HELLO | {"session_id": "a\n"}, "session_id", "1 to 128"),
    (HELLO | {"session_id": "é"}, "session_id", "1 to 128"),
    (HELLO | {"session_id": "x" * 129}, "session_id", "1 to 128"),
    (HELLO | {"session_id": 5}, "session_id", "1 to 128"),
    (HELLO | {"capabilities": "batch"}, "capabilities", "an array"),
    (HELLO | {"capabilities": None}, "capabilities", "an array"),
    (HELLO | {"capabilities": {"batch": 1}}, "capabilities", "an array"),
    (HELLO | {"capabilities": ["batch", 1]}, "capabilities", "a string"),
    (HELLO | {"client": []}, "client", "an object"),
    (HELLO | {"client": "name"}, "client", "an object"),
    (HELLO | {"client": {"name": 1}}, "client.name", "a string"),
    ({"type": "hello", "protocol_min": 1, "protocol_max": 2}, "agent_id", "is required"),
    (MESSAGE | {"content": 3}, "content", "a string"),
    (MESSAGE | {"content": None}, "content", "a string"),
    (MESSAGE | {"content": ["hi"]}, "content", "a string"),
    (MESSAGE | {"metadata": []}, "metadata", "an object"),
    (MESSAGE | {"metadata": None}, "metadata", "an object"),
    (MESSAGE | {"metadata": "{}"}, "metadata", "an object"),
    (MESSAGE | {"on_busy": "wait"}, "on_busy", "queue, interrupt, steer, collect, reject"),
    (MESSAGE | {"on_busy": None}, "on_busy", "queue"),
    (MESSAGE | {"on_busy": ["queue"]}, "on_busy", "queue"),
    (MESSAGE | {"request_id": ""}, "request_id", "1 to 128"),
    (MESSAGE | {"request_id": "x" * 129}, "request_id", "1 to 128"),
    (MESSAGE | {"request_id": 1}, "request_id", "1 to 128"),
    (MESSAGE | {"request_id": None}, "request_id", "1 to 128"),
    ({"type": "message", "content": "hi"}, "request_id", "is required"),
    ({"type": "message", "request_id": "r1"}, "content", "is required"),
    ({"type": "abort", "scope": "everything"}, "scope", "turn, queue, all"),
    ({"type": "abort", "turn_id": 1}, "turn_id", "a string"),
    ({"type": "answer", "ask_id": "a"}, "value", "is required"),
    ({"type": "answer", "value": 1}, "ask_id", "is required"),
    ({"type": "signal", "data": 1}, "name", "is required"),
    ({"type": "refresh", "token": None}, "token", "a string"),
]


@pytest.mark.parametrize(("fields", "path", "expected"), WRONG_FIELDS, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named_with_what_was_expected(fields: dict[str, Any], path: str, expected: str) -> None:
    refused = refusal(frame(**fields))
    assert refused.code == "invalid_frame"
    assert f"field {path!r}" in refused.message
    assert expected in refused.message


@pytest.mark.parametrize("value", [1, "ping", None, True, 1.5, []])
def test_a_member_that_is_no_object(value: Any) -> None:
    refused = refusal(json.dumps([value]).encode())
    assert refused.code == "invalid_frame"
    assert "expected a JSON object" in refused.message


@pytest.mark.parametrize("value", [1, "ping", None, True, 1.5])
def test_a_frame_that_is_no_object(value: Any) -> None:
    assert refusal(json.dumps(value).encode()).code == "invalid_frame"


@pytest.mark.parametrize(
    "fields", [{}, {"type": 1}, {"type": None}, {"type": ["ping"]}, {"type": {}}, {"Type": "ping"}]
)
def test_a_type_that_is_no_string(fields: dict[str, Any]) -> None:
    refused = refusal(frame(**fields))
    assert refused.code == "invalid_frame"
    assert "'type'" in refused.message


def test_an_unknown_type_is_told_what_is_known_and_not_echoed_at_length() -> None:
    refused = refusal(frame(type="x" * 100_000))
    assert refused.code == "unknown_type"
    assert "'type'" in refused.message
    assert "message" in refused.message
    assert len(refused.message) < 300


def test_an_unknown_type_is_named_as_far_as_it_is_a_name() -> None:
    forty = "x" * 40
    assert f"{forty!r} is not one of abort, answer, " in refusal(frame(type=forty)).message
    assert f"{forty + '…'!r} is not one of abort, answer, " in refusal(frame(type=forty + "y")).message


@pytest.mark.parametrize("tag", ["input", "hello_ok", "", "PING", "ping "])
def test_what_only_the_gateway_says_is_unknown_from_a_client(tag: str) -> None:
    assert refusal(frame(type=tag)).code == "unknown_type"


def test_a_refusal_says_whose_request_it_was() -> None:
    assert refusal(frame(**MESSAGE | {"content": 1})).request_id == "r1"
    assert refusal(frame(**MESSAGE | {"request_id": "x" * 129})).request_id is None
    assert refusal(frame(**MESSAGE | {"request_id": 1})).request_id is None


@pytest.mark.parametrize("length", [1, codec.MAX_REQUEST_ID])
def test_the_shortest_and_the_longest_request_id(length: int) -> None:
    request_id = "x" * length
    assert codec.decode_client(frame(**MESSAGE | {"request_id": request_id})) == [
        m.Message(request_id=m.RequestId(request_id), content="hi")
    ]
    assert refusal(frame(**MESSAGE | {"request_id": request_id, "content": 1})).request_id == request_id


def test_a_request_id_that_is_refused_is_not_repeated() -> None:
    for request_id in ("", "x" * (codec.MAX_REQUEST_ID + 1), None, [1]):
        assert refusal(frame(**MESSAGE | {"request_id": request_id, "content": 1})).request_id is None


REFUSALS = {
    b'{"type":"hello","protocol_min":true,"protocol_max":2,"agent_id":"a"}': (
        "field 'protocol_min': expected an integer, got true or false"
    ),
    b'{"type":"message","request_id":"","content":""}': (
        "field 'request_id': expected a string of 1 to 128 characters, got 0 characters"
    ),
    b'{"type":"message","request_id":null,"content":""}': (
        "field 'request_id': expected a string of 1 to 128 characters, got null"
    ),
    b'{"type":"abort","scope":0.5}': "field 'scope': expected one of turn, queue, all",
    b'{"type":"signal"}': "field 'name': is required",
    b'{"type":[]}': "field 'type': expected a string, got an array",
    b'["ping"]': "expected a JSON object, got a string",
    b'{"type":"ping","nonce":18446744073709551616}': "an integer does not fit into 64 bits; send it as a string",
    b'{"type":"ping","type":"ping"}': "field 'type': appears twice; expected it once",
}


@pytest.mark.parametrize("raw", REFUSALS, ids=range(len(REFUSALS)))
def test_a_refusal_is_one_sentence_that_says_what_to_send(raw: bytes) -> None:
    assert refusal(raw).message == REFUSALS[raw]


@attrs.frozen
class Wait:
    """No frame has a number that may be a fraction, but the line of a process does."""

    seconds: float


def test_a_number_may_be_whole_and_is_neither_a_truth_nor_a_text() -> None:
    for value in (2, 2.0):
        wait = codec.structure({"seconds": value}, Wait)
        assert (wait, type(wait.seconds)) == (Wait(2.0), float)
    for wrong, name in ((True, "true or false"), ("2", "a string"), (None, "null")):
        with pytest.raises(FrameError, match=f"^field 'seconds': expected a number, got {name}$"):
            codec.structure({"seconds": wrong}, Wait)


def test_unknown_fields_are_ignored() -> None:
    assert codec.decode_client(frame(type="leave", later={"a": [1]})) == [m.Leave()]


def test_optional_fields_may_be_absent_or_null() -> None:
    assert codec.decode_client(frame(**HELLO)) == codec.decode_client(
        frame(**HELLO, session_id=None, since=None, epoch=None, token=None, client=None)
    )


def test_one_bad_member_of_a_batch_does_not_spoil_the_others() -> None:
    first, bad, last = codec.decode_client(b'[{"type":"ping"},{"type":"nope"},{"type":"leave"}]')
    assert (first, last) == (m.Ping(), m.Leave())
    assert isinstance(bad, FrameError)


def test_an_empty_array_is_no_error() -> None:
    assert codec.decode_client(b"[]") == []


def test_a_client_skips_frames_it_does_not_know_but_not_broken_ones() -> None:
    assert codec.decode_server(b'[{"type":"of a later version"},{"type":"left"}]') == [m.Left()]
    for raw in (b"[1]", b"{}", b'{"type":"credit"}', b"x"):
        with pytest.raises(FrameError):
            codec.decode_server(raw)


# --- whatever comes, it is a message or a refusal --------------------------------------------------------------------


def only_frames_and_refusals(raw: bytes) -> None:
    for result in codec.decode_client(raw):
        assert isinstance(result, FrameError | m.ClientFrame)
    for decode in (codec.decode_server, codec.decode_event):
        with suppress(FrameError):
            decode(raw)


@steady
@given(st.binary(max_size=60))
def test_any_bytes(raw: bytes) -> None:
    only_frames_and_refusals(raw)


@steady
@given(json_values | st.lists(st.dictionaries(st.sampled_from(["type", "seq"]), json_values | st.just("ping"))))
def test_any_json(value: Any) -> None:
    only_frames_and_refusals(orjson.dumps(value))


@settings(steady, max_examples=300)
@given(any_of(m.EVENTS, m.CLIENT_FRAMES, m.SERVER_FRAMES), st.data())
def test_nearly_valid_frames(message: Any, data: st.DataObject) -> None:
    fields = codec.to_builtins(message)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(fields)))
        if data.draw(st.booleans()):
            fields[name] = data.draw(json_values)
        elif len(fields) > 1:
            del fields[name]
    only_frames_and_refusals(orjson.dumps(fields))


@steady
@given(any_of(m.EVENTS, m.CLIENT_FRAMES), st.data())
def test_damaged_frames(message: Any, data: st.DataObject) -> None:
    raw = bytearray(codec.encode_frame(message))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    only_frames_and_refusals(bytes(raw))


# --- what is written can be read -------------------------------------------------------------------------------------


@steady
@given(any_of(m.SERVER_FRAMES))
def test_server_frames_come_back(message: m.ServerFrame) -> None:
    assert codec.decode_server(codec.encode_frame(message)) == [message]


@steady
@given(any_of(m.CLIENT_FRAMES))
def test_client_frames_come_back(message: m.ClientFrame) -> None:
    assert codec.decode_client(codec.encode_frame(message)) == [message]


@steady
@given(any_of(m.EVENTS), st.integers(0, 2**63))
def test_events_come_back_with_the_first_they_were_served_with(event: m.Event, first: int) -> None:
    raw = codec.encode_event(event, first)
    assert codec.decode_server(raw) == [attrs.evolve(event, first=first)]
    assert codec.decode_event(raw) == attrs.evolve(event, first=first)
    assert list(orjson.loads(raw))[:4] == ["type", "seq", "first", "at"]


@steady
@given(of(m.Delta))
def test_the_short_way_for_deltas_writes_what_the_general_way_writes(event: m.Delta) -> None:
    assert codec.encode_event(event, event.first) == orjson.dumps(codec.to_builtins(event))


@steady
@given(of(m.Snapshot))
def test_snapshots_of_encoded_events_come_back(snapshot: m.Snapshot) -> None:
    transcript, asks = (
        [codec.encode_event(event, event.first) for event in events] for events in (snapshot.transcript, snapshot.asks)
    )
    raw = codec.encode_snapshot(attrs.evolve(snapshot, transcript=[], asks=[]), transcript, asks)
    assert codec.decode_server(raw) == [snapshot]
    assert orjson.loads(raw)["type"] == "snapshot"


@pytest.mark.parametrize("cls", m.SERVER_FRAMES.values(), ids=lambda cls: cls.type)
@settings(steady, max_examples=5)
@given(data=st.data())
def test_type_is_the_first_key(cls: type[m.ServerFrame], data: st.DataObject) -> None:
    assert codec.encode_frame(data.draw(of(cls))).startswith(b'{"type":"%b"' % cls.type.encode())


def test_error_leaves_out_what_it_does_not_say_but_always_says_retryable() -> None:
    assert orjson.loads(codec.encode_frame(m.Error(code="busy", message="wait"))) == {
        "type": "error",
        "code": "busy",
        "message": "wait",
        "retryable": False,
    }
    full = orjson.loads(codec.encode_frame(m.Error(code="c", message="", retry_after_ms=0, request_id="r", credit=0)))
    assert (full["retry_after_ms"], full["request_id"], full["credit"]) == (0, "r", 0)


def test_signal_has_from_on_the_wire() -> None:
    member = m.Member(connection_id="c", subject="alice", joined_at=1)
    fields = orjson.loads(codec.encode_frame(m.Signal(name="typing", data=None, from_=member)))
    assert fields["from"] == {"connection_id": "c", "subject": "alice", "joined_at": 1}
    assert "from_" not in fields
    del fields["from"]["subject"]
    with pytest.raises(FrameError, match=r"field 'from\.subject': is required"):
        codec.decode_server(orjson.dumps(fields))


WEIRD: list[Any] = [
    None, True, 0, -1, 2**64 - 1, -(2**63), 1e308, 5e-324, 0.1, "", "\0", "\x7f\u2028\u2029", "\ud7ff\ue000\uffff",
    "🙂", {"": {"": []}}, {"type": "delta", "seq": 1}, [[], {}, [None]], nested(SURVIVES_A_SNAPSHOT), '"]}', "\\u0000",
]  # fmt: skip


@pytest.mark.parametrize("value", WEIRD, ids=lambda value: repr(value)[:20])
def test_weird_values_survive_an_event_and_a_snapshot(value: Any) -> None:
    events = [
        m.ToolCall(turn_id="t", call_id="c", name="n", arguments=value),
        m.ToolResult(turn_id="t", call_id="c", result=value),
        m.Answered(turn_id="t", ask_id="a", value=value),
        m.Input(request_id=m.RequestId("r"), content="", metadata={"v": value}),
    ]
    payloads = [codec.encode_event(event, 0) for event in events]
    assert [codec.decode_event(payload) for payload in payloads] == events
    empty = m.Snapshot(
        epoch="e", cursor=0, reason="requested", state={}, transcript=[], transcript_truncated=False, turn=None,
        queue=[], asks=[],
    )  # fmt: skip
    (snapshot,) = codec.decode_server(codec.encode_snapshot(empty, payloads, []))
    assert isinstance(snapshot, m.Snapshot)
    assert snapshot.transcript == events


def test_whatever_a_client_may_nest_can_be_read_from_a_snapshot() -> None:
    (message,) = codec.decode_client(frame(**MESSAGE, metadata={"v": nested(SURVIVES_A_SNAPSHOT)}))
    assert isinstance(message, m.Message)
    test_weird_values_survive_an_event_and_a_snapshot(message.metadata["v"])


@pytest.mark.parametrize(
    "value",
    [{1}, b"x", {1: 2}, "\ud800", {"\udc00": 1}, 2**64, -(2**63) - 1, nested(300), object()],
    ids=lambda value: repr(value)[:20],
)
def test_what_has_no_json_form_is_a_value_error(value: Any) -> None:
    for write in (codec.dump_json, codec.check_json):
        with pytest.raises(ValueError):
            write(value)


def test_what_has_no_json_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"\bset$"):
        codec.dump_json({"tags": {1}})


def test_what_a_peer_would_refuse_is_refused_when_it_is_written() -> None:
    tuples: Any = ()
    for _ in range(codec.MAX_GIVEN_DEPTH):
        tuples = (tuples,)
    for value in (nested(codec.MAX_GIVEN_DEPTH + 1), tuples):
        with pytest.raises(ValueError, match="nested"):
            codec.check_json(value)
    assert codec.check_json(nested(codec.MAX_GIVEN_DEPTH)) == orjson.dumps(nested(codec.MAX_GIVEN_DEPTH))


def test_objects_count_as_arrays_do() -> None:
    value: Any = 1
    for _ in range(codec.MAX_GIVEN_DEPTH):
        value = {"a": value}
    assert codec.check_json(value) == orjson.dumps(value)
    with pytest.raises(ValueError, match="nested"):
        codec.check_json({"a": value})


@steady
@given(json_values)
def test_checked_values_can_be_read_back(value: Any) -> None:
    assert codec.parse_json(codec.check_json(value)) == value


@steady
@given(st.lists(text), st.integers(1, 3))
def test_decoding_does_not_depend_on_what_was_decoded_before(contents: list[str], times: int) -> None:
    codec.structure_all()
    batch = [m.Message(request_id=m.RequestId(f"r{i}"), content=text) for i, text in enumerate(contents)]
    raw = b"[" + b",".join(codec.encode_frame(message) for message in batch) + b"]"
    for _ in range(times):
        assert codec.decode_client(raw) == batch


def test_once_everything_is_built_no_first_frame_builds_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_structure", {})
    monkeypatch.setattr(codec, "_unstructure", {})
    codec.structure_all()
    monkeypatch.setattr(codec, "_converter", None)
    assert codec.decode_client(frame(**MESSAGE)) == [m.Message(request_id=m.RequestId("r1"), content="hi")]
    assert codec.encode_frame(m.Left()) == b'{"type":"left"}'
    ended = m.TurnEnded(turn_id="t", outcome="completed", seq=1)
    assert codec.decode_event(codec.encode_event(ended, 1)) == attrs.evolve(ended, first=1)
    read, written = codec._structure, codec._unstructure
    assert all(callable(read[cls]) for cls in (*m.CLIENT_FRAMES.values(), *m.EVENTS.values()))
    assert all(callable(written[cls]) for cls in (*m.EVENTS.values(), *m.SERVER_FRAMES.values()))


def test_an_encoded_event_takes_no_more_memory_than_it_has_bytes() -> None:
    """Logs keep thousands of them. orjson's buffer was 32 KiB for each, however small, after a large one."""
    event = m.TurnEnded(turn_id="t", outcome="completed", seq=1)
    codec.encode_event(m.Output(turn_id="t", channel="answer", content="x" * 16_000, seq=1), 1)
    tracemalloc.start()
    try:
        kept = [codec.encode_event(event, 1) for _ in range(100)]
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 100 * (len(kept[0]) + 500)

"""The schema and the codec take and refuse the same frames."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from steady import steady

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.protocol.asyncapi import ANSWERS, asyncapi
from gateway.protocol.schema import json_schema
from gateway.testing.strategies import any_of, json_values, of

SCHEMA = json_schema()
DEFS = SCHEMA["$defs"]

# JSON Schema takes 1.0 for an integer; the protocol does not, and no schema can say so.
Strict = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)


def validator(name: str) -> Any:
    return Strict({"$schema": SCHEMA["$schema"], "$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


CLIENT, GATEWAY = validator("ClientFrame"), validator("GatewayFrame")
CLIENT_MESSAGE, GATEWAY_MESSAGE = validator("ClientMessage"), validator("GatewayMessage")


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def taken_from_client(frame: dict[str, Any]) -> bool:
    """Whether the gateway takes this frame: a hello as the first, any other after it."""
    raw = codec.dump_json(frame)
    if frame.get("type") == "hello":
        try:
            handshake.read_hello(raw)
        except HandshakeRefused:
            return False
        return True
    (read,) = codec.iter_client(raw)
    return not isinstance(read, FrameError)


def taken_from_gateway(frame: dict[str, Any]) -> bool:
    """Whether a client takes this frame. One of an unknown type is skipped, which counts as not taken."""
    try:
        return bool(codec.decode_server(codec.dump_json(frame)))
    except FrameError:
        return False


def plain(message: Any) -> Any:
    return json.loads(codec.dump_json(codec.to_builtins(message)))


@given(any_of(m.CLIENT_FRAMES))
@steady
def test_what_clients_send_is_valid(message: m.ClientFrame) -> None:
    frame = plain(message)
    if isinstance(message, m.Hello):
        assume(message.protocol_min <= message.protocol_max)
    assert CLIENT.is_valid(frame) == taken_from_client(frame)
    assert CLIENT.is_valid(frame) or isinstance(message, m.Hello)
    assert CLIENT_MESSAGE.is_valid([frame, frame]) == CLIENT.is_valid(frame)


@given(any_of(m.EVENTS, m.SERVER_FRAMES))
@steady
def test_what_the_gateway_sends_is_valid(message: Any) -> None:
    frame = plain(message)
    assert GATEWAY.is_valid(frame)
    assert GATEWAY_MESSAGE.is_valid(frame)
    assert GATEWAY_MESSAGE.is_valid([frame])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            found += places(item, (*path, at))
    return found


@st.composite
def near_valid(draw: st.DrawFn, *families: dict[str, type[Any]]) -> dict[str, Any]:
    """A frame in which one thing, anywhere, is missing, other or new."""
    frame: dict[str, Any] = plain(draw(any_of(*families)))
    path = draw(st.sampled_from(places(frame)))
    parent: Any = frame
    for step in path[:-1]:
        parent = parent[step]
    what = draw(st.sampled_from(["drop", "retype", "retype", "add"]))
    if what == "add" and isinstance(parent, dict):
        parent["unknown-" + draw(st.text("ab", max_size=3))] = draw(json_values)
    elif what == "drop":
        del parent[path[-1]]
    else:
        odd = st.sampled_from(
            ["", "x" * 128, "x" * 129, "a\n", "ok.ID:1", True, False, -1, 0, 1, 1.0, None, [], {}, [1]]
        )
        parent[path[-1]] = draw(odd | json_values)
    return frame


steadier = settings(steady, max_examples=600)


@given(near_valid(m.CLIENT_FRAMES))
@steadier
def test_near_valid_frames_of_clients(frame: dict[str, Any]) -> None:
    low, high = frame.get("protocol_min"), frame.get("protocol_max")
    if type(low) is int and type(high) is int:
        assume(low <= high)  # no schema can compare two fields
    assert CLIENT.is_valid(frame) == taken_from_client(frame)


def _stricter_than_the_codec(frame: dict[str, Any]) -> bool:
    """Two things that the schema asks for and a client need not: events are numbered, and an ask says so."""
    events = [frame, *(item for name in ("transcript", "asks") for item in _objects(frame.get(name)))]
    unnumbered = any(
        event.get("type") in m.EVENTS and not {"seq", "first", "at"} <= event.keys()
        for event in events
        if type(event.get("type")) is str
    )
    return unnumbered or any(
        ask.get("type") != "ask" or not {"seq", "first", "at"} <= ask.keys() for ask in _objects(frame.get("asks"))
    )


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@given(near_valid(m.EVENTS, m.SERVER_FRAMES))
@steadier
def test_near_valid_frames_of_the_gateway(frame: dict[str, Any]) -> None:
    valid, taken = GATEWAY.is_valid(frame), taken_from_gateway(frame)
    assert taken or not valid
    if not _stricter_than_the_codec(frame):
        assert valid == taken


@pytest.mark.parametrize(
    ("session_id", "valid"), [("a", True), ("A-z_0.9:", True), ("x" * 128, True)]
    + [(bad, False) for bad in ("", "x" * 129, "a b", "a\n", "ä", 3, True, ["a"])],
)  # fmt: skip
def test_session_ids(session_id: Any, valid: bool) -> None:
    frame = {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "a", "session_id": session_id}
    assert CLIENT.is_valid(frame) is taken_from_client(frame) is valid


def test_every_class_is_defined_under_its_name() -> None:
    for family in (m.CLIENT_FRAMES, m.EVENTS, m.SERVER_FRAMES):
        for tag, cls in family.items():
            assert SCHEMA["$defs"][cls.__name__]["properties"]["type"] == {"const": tag}


def test_what_is_left_out_has_a_default_that_the_codec_gives_it_too() -> None:
    schema = SCHEMA["$defs"]["Message"]["properties"]
    (read,) = codec.iter_client(b'{"type":"message","request_id":"r","content":""}')
    assert isinstance(read, m.Message)
    assert (schema["on_busy"]["default"], schema["metadata"]["default"]) == (read.on_busy, read.metadata)


def test_every_answer_is_a_message_of_the_channel() -> None:
    document = asyncapi()
    assert set(ANSWERS) | {m.ClientSignal, m.Pong} == set(m.CLIENT_FRAMES.values())
    known = document["channels"]["session"]["messages"]
    for operation in document["operations"].values():
        for place in (operation, operation.get("reply", {"messages": []})):
            assert all(item["$ref"].rpartition("/")[2] in known for item in place["messages"])


@given(of(m.Delta))
@steady
def test_a_number_as_text_or_truth_is_refused(event: m.Delta) -> None:
    for wrong in (True, "3", 3.0, None):
        frame = {**plain(event), "seq": wrong}
        assert not GATEWAY.is_valid(frame)
        assert not taken_from_gateway(frame)


def test_the_schema_of_an_event_word_for_word() -> None:
    number = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
    text = {"type": "string"}
    assert DEFS["Delta"] == {
        "type": "object",
        "properties": {
            "type": {"const": "delta"}, "seq": number, "first": number, "at": number,
            "turn_id": text, "channel": text, "text": text,
        },
        "required": ["type", "seq", "first", "at", "turn_id", "channel", "text"],
        "description": m.Delta.__doc__,
        "x-volatile": True,
    }  # fmt: skip
    for cls in m.EVENTS.values():
        assert DEFS[cls.__name__]["required"][:4] == ["type", "seq", "first", "at"]
    assert DEFS["RunningTurn"]["properties"]["channels"] == {"type": "object", "additionalProperties": text}
    assert DEFS["RunningTurn"]["properties"]["progress"] == {"type": "object"}
    assert DEFS["Ask"]["properties"]["options"] == {"type": ["array", "null"], "default": None}
    assert DEFS["HelloOk"]["properties"]["resync_reason"] == {"enum": [*get_args(m.ResyncReason), None]}
    assert list(DEFS["Event"]) == ["description", "oneOf"]
    assert DEFS["Event"]["description"] == "An entry of a session's log, numbered."


def test_what_may_be_left_out_is_marked() -> None:
    marked = {mark: {name for name in DEFS if mark in DEFS[name]} for mark in ("x-volatile", "x-droppable")}
    assert marked == {"x-volatile": {"Delta", "Progress"}, "x-droppable": {"Signal", "Presence"}}
    assert all(DEFS[name][mark] is True for mark, names in marked.items() for name in names)


def test_the_schema_as_a_whole() -> None:
    assert {name: value for name, value in SCHEMA.items() if name not in ("description", "$defs")} == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:trio-gateway:protocol:2",
        "title": "trio-gateway protocol 2",
        "anyOf": [{"$ref": "#/$defs/ClientMessage"}, {"$ref": "#/$defs/GatewayMessage"}],
    }
    assert "Unknown fields are ignored" in SCHEMA["description"]
    for side in ("Client", "Gateway"):
        frame = {"$ref": f"#/$defs/{side}Frame"}
        message = DEFS[f"{side}Message"]
        assert message["oneOf"] == [frame, {"type": "array", "items": frame}]
        assert message["description"].startswith("One frame, or, where `batch` was agreed on, an array")


def test_descriptions_use_the_names_of_the_wire() -> None:
    assert DEFS["Signal"]["description"].startswith("`from` ")
    assert DEFS["Error"]["description"].endswith("Fields that are null are left out on the wire.")
    assert "description" not in DEFS["ServerInfo"]

"""Hypothesis strategies for everything that goes over the wire, from valid frames to dialogues that look for trouble.

They need the extra ``testing``. What `__all__` names is public and stays. Frames of version 2 are made from the message
classes, so a new message or field is generated without a change here; those of version 1 stand in tables.

Valid frames are dicts, what may be damaged is bytes, and a dialogue is a list of `gateway.testing.dialogue` steps::

    @given(near_valid(client_frames()))
    def test_my_decoder_raises_nothing_else(raw: bytes) -> None: ...
"""

from __future__ import annotations

import json
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.testing.dialogue import Close, Cut, SendBytes, SendText, Step, Sync, Wait
from gateway.testing.wire import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, dumps, fragments, frame

__all__ = [
    "any_of",
    "client_frames",
    "damaged_wire",
    "dialogues",
    "gateway_frames",
    "hellos",
    "integers",
    "json_values",
    "near_valid",
    "of",
    "texts",
    "valid_wire",
]

Frame = dict[str, Any]

texts = st.text(st.characters(codec="utf-8"), max_size=8)
"""Short texts of any characters that have a UTF-8 form."""

integers = st.integers(-(2**63), 2**64 - 1)
"""What the wire calls an integer."""

json_values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Small JSON values of every kind."""


# --- valid frames ----------------------------------------------------------------------------------------------------

_SCALARS: dict[Any, SearchStrategy[Any]] = {
    Any: json_values,
    str: texts,
    int: integers,
    bool: st.booleans(),
    type(None): st.none(),
    m.RequestId: st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    m.SessionId: st.text("aZ0._:-", min_size=1, max_size=8),
}


@cache
def of(kind: Any) -> SearchStrategy[Any]:
    """Values of an annotation, or instances of a message class of `gateway.protocol.messages`."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([of(arg) for arg in args])
    if origin is list:
        return st.lists(of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(texts, of(args[1]), max_size=3)
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: of(hints[field.name]) for field in attrs.fields(kind)})


def any_of(*families: dict[str, type[Any]]) -> SearchStrategy[Any]:
    """Instances of any class of these families, such as `gateway.protocol.messages.EVENTS`."""
    classes: list[Any] = [cls for family in families for cls in family.values()]
    return st.one_of([of(cls) for cls in classes])


def _object(type: str, /, optional: Frame | None = None, **fields: SearchStrategy[Any]) -> SearchStrategy[Frame]:
    return st.fixed_dictionaries({"type": st.just(type), **fields}, optional=optional or {})


_count = st.integers(0, 2**53)
_moment = st.floats(0, 2e9)
_id = st.text("abc019_-", min_size=1, max_size=8)
_members = st.lists(_object("presence", client_id=_id), max_size=2)

_WRAPPED: SearchStrategy[tuple[str, Frame]] = st.one_of(
    [
        st.tuples(st.just(kind), data)
        for kind, data in {
            "token_stream": st.fixed_dictionaries({"content": texts}),
            "response": st.fixed_dictionaries({"status": st.sampled_from(["accepted", "final"]), "content": texts}),
            "stream_end": st.fixed_dictionaries({}),
            "tool_call_stream": st.fixed_dictionaries({"name": texts, "arguments": json_values}),
            "tool_result_stream": st.fixed_dictionaries({"name": texts, "result": json_values}),
            "server_request": st.fixed_dictionaries({"request_id": _id, "prompt": texts}),
            "error": st.fixed_dictionaries({"code": _id, "message": texts}),
        }.items()
    ]
)


@st.composite
def _replays(draw: st.DrawFn) -> Frame:
    """An event as version 1 wraps it."""
    kind, data = draw(_WRAPPED)
    seq = draw(_count)
    event = {
        "type": kind, "data": {**data, "cursor": seq, "seq": seq}, "event_id": draw(_id), "timestamp": draw(_moment),
        "source": "agent", "target": draw(_id), "sequence": seq,
    }  # fmt: skip
    return {"type": "replay", "seq": seq, "event": event}


_CLIENT_1: dict[str, SearchStrategy[Frame]] = {
    "hello": _object(
        "hello",
        {"session_id": of(m.SessionId), "since": _count, "capabilities": st.lists(_id, max_size=2)},
        protocol_min=st.just(1),
        protocol_max=st.just(1),
        agent_id=_id,
    ),
    "join": _object(
        "join",
        {"session_id": of(m.SessionId), "since": _count, "min_version": st.just(1), "max_version": st.integers(1, 3)},
        agent_id=_id,
    ),
    "message": _object("message", {"request_id": of(m.RequestId)}, content=texts),
    "abort": _object("abort", {"scope": st.sampled_from(["turn", "session"])}),
    "message_abort": _object("message_abort", {"scope": st.sampled_from(["turn", "session"])}),
    "server_reply": _object("server_reply", request_id=_id, value=json_values),
    "leave": _object("leave"),
    "ping": _object("ping"),
    "pong": _object("pong"),
}

_GATEWAY_1: dict[str, SearchStrategy[Frame]] = {
    "hello_ok": _object(
        "hello_ok",
        {"resync_required": st.booleans(), "oldest_cursor": _count},
        protocol=st.just(1), session_id=_id, resumed=st.booleans(), cursor=_count, sequence=_count,
        features=st.fixed_dictionaries({"methods": st.lists(_id, max_size=2), "events": st.lists(_id, max_size=2)}),
        policy=st.fixed_dictionaries(
            dict.fromkeys(("max_payload", "max_buffered_bytes", "max_queued_frames", "heartbeat_ms"), _count)
        ),
    ),
    "joined": _object(
        "joined",
        session_id=_id, agent_id=_id, resumed=st.booleans(), cursor=_count, oldest_cursor=_count,
        resync_required=st.booleans(), sequence=_count, protocol_version=st.just(1), server_min_version=st.just(1),
        server_max_version=st.integers(1, 3), presence=_members, health=st.dictionaries(_id, texts, max_size=2),
    ),
    "snapshot": _object(
        "snapshot",
        state=st.fixed_dictionaries(
            {
                "session_id": _id, "agent_id": _id, "state": st.dictionaries(_id, json_values, max_size=2),
                "messages": st.lists(st.dictionaries(_id, texts, max_size=2), max_size=2),
                "events": st.lists(json_values, max_size=2), "event_cursor": _count,
            }
        ),
    ),
    "replay": _replays(),
    "response": _object("response", status=st.sampled_from(["accepted", "duplicate"]), request_id=_id),
    "aborted": _object("aborted"),
    "no_active_turn": _object("no_active_turn"),
    "server_reply_ack": _object("server_reply_ack", request_id=_id),
    "left": _object("left"),
    "pong": _object("pong"),
    "error": _object("error", code=_id, message=texts),
    "hello_error": _object("hello_error", {"retry_after_seconds": _count}, code=_id, message=texts, next_step=texts),
}  # fmt: skip


@cache
def client_frames(version: int = 2) -> SearchStrategy[Frame]:
    """Valid frames of a client, its `hello` among them."""
    if version == 1:
        return st.one_of(list(_CLIENT_1.values()))
    return any_of(m.CLIENT_FRAMES).map(codec.to_builtins)


@cache
def gateway_frames(version: int = 2) -> SearchStrategy[Frame]:
    """Valid frames of a gateway: events, and those without a number."""
    if version == 1:
        return st.one_of(list(_GATEWAY_1.values()))
    return any_of(m.EVENTS, m.SERVER_FRAMES).map(codec.to_builtins)


# --- near-valid frames -----------------------------------------------------------------------------------------------

_HUGE = st.one_of(
    st.builds(
        lambda piece, times: piece * times, st.sampled_from(["x", "é", "\x00", '"', "🙂"]), st.integers(1, 30_000)
    ),
    st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**25, 10**400, 1e308]),
    st.builds(lambda size: [0] * size, st.integers(1, 20_000)),
    st.builds(lambda size: {str(key): key for key in range(size)}, st.integers(1, 3_000)),
)
"""Values that are large in one of the ways there are. Over a network a few tens of KB are as large as any."""

_HOLE = "\ue000hole\ue000"
"""Stands for a text that `json.dumps` would not write; private use, so nobody means anything by it."""

_NOT_JSON = st.sampled_from(["NaN", "-Infinity", "01", "1e999", "'x'", "undefined", '"\\ud800"', '"\\x"', '"\n"', ""])


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value that can be changed, the outermost first."""
    if isinstance(value, dict):
        found = [(*path, key) for key in value]
    elif isinstance(value, list):
        found = [(*path, index) for index in range(len(value))]
    else:
        return []
    return found + [inner for place in found for inner in _places(_at(value, place[len(path) :]), place)]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def near_valid(draw: st.DrawFn, frames: SearchStrategy[Frame]) -> bytes:
    """JSON texts that are one mistake away from `frames`: a field is dropped, retyped, doubled, huge or deep, or the
    text itself is damaged. Some come out valid all the same."""
    value = json.loads(dumps(draw(frames)))
    place = draw(st.sampled_from(_places(value) or [()]))
    parent, key = _at(value, place[:-1]), place[-1] if place else None
    how = draw(st.sampled_from(["drop", "retype", "double", "huge", "deep", "rename", "no json", "cut", "bytes"]))
    hole = ""
    if key is None:
        how = "bytes"
    elif how == "drop":
        del parent[key]
    elif how == "retype":
        parent[key] = draw(json_values)
    elif how == "huge":
        parent[key] = draw(_HUGE)
    elif how in ("deep", "no json"):
        parent[key] = _HOLE
        if how == "deep":
            depth = draw(st.sampled_from([8, 54, 55, 56, 57, 63, 64, 65, 250, 1023, 1024, 1025, 20_000]))
            hole = draw(st.sampled_from(["[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth, "[" * depth]))
        else:
            hole = draw(_NOT_JSON)
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(texts)] = parent.pop(key)
    text = dumps(value).replace(f'"{_HOLE}"', hole)
    if how == "double" and isinstance(value, dict) and value:
        name = draw(st.sampled_from(sorted(value)))
        text = f"{text[:-1]}, {dumps(name)}: {dumps(draw(st.just(value[name]) | json_values))}}}"
    raw = text.encode("utf-8", "surrogatepass")
    if how == "cut":
        return raw[: draw(st.integers(0, len(raw)))]
    if how == "bytes":
        at = draw(st.integers(0, len(raw)))
        return raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


# --- the WebSocket beneath -------------------------------------------------------------------------------------------

_PING_TEXT = b'{"type": "ping"}'


def _control_frames() -> SearchStrategy[bytes]:
    return st.builds(frame, st.sampled_from([PING, PONG]), st.binary(max_size=125))


@st.composite
def valid_wire(draw: st.DrawFn, payloads: SearchStrategy[bytes] = st.just(_PING_TEXT)) -> bytes:
    """What RFC 6455 allows a client and few do: a message in fragments, empty ones too, pings and pongs in between."""
    payload = draw(payloads)
    cuts = draw(st.lists(st.integers(0, len(payload)), max_size=6))
    return fragments(payload, cuts, draw(st.lists(_control_frames(), max_size=3)))


_WRONG_FRAMES: dict[str, SearchStrategy[bytes]] = {
    "not masked": st.just(frame(TEXT, _PING_TEXT, masked=False)),
    "reserved bits": st.builds(
        lambda opcode, bits: frame(opcode, _PING_TEXT, bits=bits),
        st.sampled_from([TEXT, PING]),
        st.sampled_from([0x40, 0x20, 0x10, 0x70]),
    ),
    "a reserved opcode": st.builds(frame, st.sampled_from([3, 4, 7, 11, 15]), st.binary(max_size=8)),
    "a control frame in pieces": st.builds(
        lambda opcode: frame(opcode, b"", final=False), st.sampled_from([CLOSE, PING, PONG])
    ),
    "a long control frame": st.builds(
        lambda opcode, size: frame(opcode, bytes(size)), st.sampled_from([CLOSE, PING, PONG]), st.integers(126, 70_000)
    ),
    "a continuation of nothing": st.just(frame(CONTINUATION, _PING_TEXT)),
    "a message within a message": st.just(frame(TEXT, b"{", final=False) + frame(TEXT, _PING_TEXT)),
    "a length that is not the shortest": st.builds(
        lambda opcode, form: frame(opcode, _PING_TEXT, length_bytes=form),
        st.sampled_from([TEXT, PING]),
        st.sampled_from([2, 8]),
    ),
    "a length beyond any limit": st.builds(
        lambda size: frame(TEXT, b"{", length=size), st.sampled_from([2**26, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
    ),
    "a header cut short": st.builds(
        lambda whole, size: whole[:size],
        st.sampled_from([frame(TEXT, _PING_TEXT), frame(TEXT, bytes(200)), frame(TEXT, b"", length=70_000)]),
        st.integers(1, 8),
    ),
    "a payload cut short": st.builds(lambda missing: frame(TEXT, _PING_TEXT)[:-missing], st.integers(1, 16)),
    "a message without its last fragment": st.just(frame(TEXT, _PING_TEXT, final=False)),
    "text that is not UTF-8": st.builds(
        lambda bad, cuts: fragments(b'{"type": "ping", "nonce": "' + bad + b'"}', cuts),
        st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe2\x82"]),
        st.lists(st.integers(0, 40), max_size=3),
    ),
    "a binary message": st.builds(lambda data: frame(BINARY, data), st.binary(max_size=8)),
    "a close frame of one byte": st.just(frame(CLOSE, b"\x03")),
    "a close code that must not be sent": st.builds(
        lambda code: frame(CLOSE, code.to_bytes(2, "big")),
        st.sampled_from([0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535]),
    ),
    "a close reason that is not UTF-8": st.just(frame(CLOSE, b"\x03\xe8\xff")),
    "bytes behind a close frame": st.builds(
        lambda rest: frame(CLOSE, b"\x03\xe8") + rest, st.just(frame(TEXT, _PING_TEXT)) | st.binary(max_size=8)
    ),
    "noise": st.binary(min_size=1, max_size=40),
}
"""What is wrong → bytes of a client that are wrong in this way."""


@st.composite
def _damages(draw: st.DrawFn) -> tuple[str, bytes]:
    why = draw(st.sampled_from(sorted(_WRONG_FRAMES)))
    return why, draw(_WRONG_FRAMES[why])


def damaged_wire() -> SearchStrategy[bytes]:
    """Bytes that a client must not send behind the upgrade, or not only: wrong masks, bits, opcodes and lengths, frames
    and headers cut short, text that is not UTF-8, forbidden close frames, noise."""
    return _damages().map(lambda item: item[1])


# --- dialogues -------------------------------------------------------------------------------------------------------

_SESSION = st.sampled_from(["{{session}}"] * 6 + ["{{session}}:2", "", "no such/id", "x" * 128, "x" * 129])
_SINCE: SearchStrategy[Any] = st.sampled_from(
    ['{{cursor}}'] * 6 + ["{{cursor-1}}", "{{cursor+1}}", "{{cursor-3}}", "{{cursor+1000}}", 0, 1, -1, 2**63, 1.0, None]
)  # fmt: skip
_EPOCH = st.sampled_from(["{{epoch}}"] * 4 + ["", "e_other", None])
_IDS = st.sampled_from(["r1", "r2", "r3"]) | st.sampled_from(["", "x" * 128, "x" * 129, "\x00", "é"])
_CONTENTS = st.sampled_from(
    ["hello", "one two three four five", "", "/tool count these words", "/think deep", "/ask go on?", "/choose a b",
     "/name", "/slow 0.3", "/long 400", "/long 20000", "/state k=v", "/history", "/fail as asked", "/crash", "stop",
     "/stop", "/stop all"]
) | texts  # fmt: skip
"""What the built-in demo agent knows as commands is only text to any other."""


@cache
def hellos(version: int = 2) -> SearchStrategy[Frame]:
    """Opening frames of a dialogue, most of them valid; with names as in `gateway.testing.dialogue`."""
    maybe: Frame = {"since": _SINCE}
    if version == 1:
        join = _object(
            "join",
            {**maybe, "min_version": st.sampled_from([1, 1, 1, 2, 9, "1"]), "max_version": st.sampled_from([1, 2, 0])},
            agent_id=st.just("{{agent}}"),
            session_id=_SESSION,
        )
        return join | _hello(1, maybe)
    return _hello(2, {**maybe, "epoch": _EPOCH, "capabilities": st.sampled_from([["batch"], [], ["batch", "x"]])})


def _hello(version: int, optional: Frame) -> SearchStrategy[Frame]:
    low = [version] * 8 + [1, 9, -1, "2"]
    return _object(
        "hello",
        optional,
        protocol_min=st.sampled_from(low),
        protocol_max=st.sampled_from([version] * 10 + [0]),
        agent_id=st.sampled_from(["{{agent}}"] * 12 + ["", "nobody"]),
        session_id=_SESSION,
    )


def _good_hello(version: int, since: Any = None) -> Frame:
    fields: Frame = {"type": "hello", "protocol_min": version, "protocol_max": version, "agent_id": "{{agent}}",
                     "session_id": "{{session}}"}  # fmt: skip
    return fields if since is None else {**fields, "since": since}


@cache
def _requests(version: int) -> SearchStrategy[Frame]:
    """Requests that refer to what the dialogue has: repeated ids, open asks, the running turn."""
    # With these the answers collide, which is where the trouble is.
    answers = st.sampled_from([True, False, "a", "b", "", None, 3])
    if version == 1:
        scopes = {"scope": st.sampled_from(["turn", "session", "all"])}
        message = _object("message", {"request_id": _IDS}, content=_CONTENTS)
        others = [
            _object("abort", scopes),
            _object("message_abort", scopes),
            _object("server_reply", request_id=st.sampled_from(["{{ask}}", "{{ask}}", "nothing"]), value=answers),
        ]
    else:
        modes = st.sampled_from(["queue", "interrupt", "steer", "collect", "reject", "panic"])
        message = _object(
            "message",
            {"on_busy": modes, "metadata": st.sampled_from([{}, {"k": 1}, []])},
            request_id=_IDS,
            content=_CONTENTS,
        )
        others = [
            _object(
                "abort",
                {
                    "scope": st.sampled_from(["turn", "queue", "all", "everything"]),
                    "turn_id": st.sampled_from(["{{turn}}", "t_other"]),
                    "request_id": _IDS,
                },
            ),
            _object("answer", ask_id=st.sampled_from(["{{ask}}", "{{ask}}", "nothing"]), value=answers),
            _object("resync"),
            _object("signal", name=texts, data=json_values),
            _object("refresh", token=texts),
        ]
    ping = _object("ping", {"nonce": json_values})
    return _one_of(6, message, *others, *others, ping, client_frames(version))


@st.composite
def _one_of(draw: st.DrawFn, weight: int, favourite: SearchStrategy[Any], *others: SearchStrategy[Any]) -> Any:
    """One of these, the first `weight` times as often. `st.one_of` would give every branch of each the same chance."""
    at = draw(st.integers(1 - weight, len(others)))
    return draw(favourite if at <= 0 else others[at - 1])


@cache
def _near_misses(version: int) -> SearchStrategy[bytes]:
    return near_valid(client_frames(version) | hellos(version) | _requests(version))


@cache
def _arrays(version: int) -> SearchStrategy[list[Frame]]:
    return st.lists(_requests(version) | hellos(version), max_size=5)


# Strategies are made once where they can be: to make one takes longer than to draw from it.
_VALID_WIRE = valid_wire()
_DAMAGES = _damages()
_ON = st.sampled_from("aaaabbc")
_PAUSES = st.integers(0, 30)
_CLOSE_CODES = st.sampled_from([1000, 1001, 1011, 3000, 4000, 4999])
_ENDS = st.sampled_from(["cut", "cut", "close"])


@st.composite
def _moves(draw: st.DrawFn, version: int) -> list[Step]:
    """A few steps that belong together."""
    on = draw(_ON)
    kind = draw(_MOVES)
    if kind == "request":
        return [SendText(on, dumps(draw(_requests(version))))]
    if kind == "array":
        return [SendText(on, dumps(draw(_arrays(version))))]
    if kind == "near":
        raw = draw(_near_misses(version))
        try:
            return [SendText(on, raw.decode())]
        except UnicodeDecodeError:
            return [SendBytes(on, frame(TEXT, raw), "text that is not UTF-8")]
    if kind == "join":
        return [SendText(on, dumps(_good_hello(version)))]
    if kind == "hello":
        return [SendText(on, dumps(draw(hellos(version))))]
    if kind == "resume":
        end = Cut(on) if draw(_ENDS) == "cut" else Close(on)
        return [end, SendText(on, dumps(_good_hello(version, draw(_SINCE))))]
    if kind == "leave":
        return [SendText(on, dumps({"type": "leave"})), SendText(on, dumps(draw(_requests(version))))]
    if kind == "valid wire":
        return [SendBytes(on, draw(_VALID_WIRE), "fragments and control frames")]
    if kind == "damage":
        why, data = draw(_DAMAGES)
        return [SendBytes(on, data, why)]
    if kind == "close":
        return [Close(on, draw(_CLOSE_CODES))]
    if kind == "cut":
        return [Cut(on)]
    if kind == "sync":
        return [Sync(on)]
    if kind == "turn":
        until = "turn_ended" if version == 2 else "replay"
        return [Wait(on, 150, until)]
    return [Wait(on, draw(_PAUSES))]


_MOVES = st.sampled_from(
    ["request"] * 12 + ["near"] * 4 + ["resume"] * 4 + ["join"] * 2 + ["hello"] * 2 + ["array"] * 2 + ["damage"] * 2
    + ["wait"] * 3 + ["turn", "sync", "valid wire", "leave", "close", "cut"]
)  # fmt: skip


_LEAST = st.sampled_from([0, 2, 6])


@cache
def _scripts(version: int, least: int, most: int) -> SearchStrategy[list[tuple[list[Step], int]]]:
    return st.lists(st.tuples(_moves(version), st.integers(0, 7)), min_size=least, max_size=most)


@st.composite
def dialogues(draw: st.DrawFn, version: int = 2, max_moves: int = 20) -> list[Step]:
    """What some clients do to a gateway, weighted towards trouble.

    Most begin well, since nothing happens before a hello. Then: messages under repeated ids, aborts without a turn,
    answers to nobody, resyncs, arrays, a second hello, lines cut and resumed from cursors right and wrong, frames that
    are nearly right, damage to the WebSocket itself, and more after leaving, on up to three connections. Shrinking
    leaves out what is not needed.
    """
    steps: list[Step] = []
    joined: set[str] = set()
    least = draw(_LEAST)
    for move, chance in draw(_scripts(version, min(least, max_moves), max_moves)):
        on = move[0].on
        if on not in joined and chance:
            # Before a hello there is little to go wrong, so only few are left out.
            steps.append(SendText(on, dumps(_good_hello(version))))
            joined.add(on)
        steps += move
        if any(isinstance(step, Cut | Close | SendBytes) for step in move) and not isinstance(move[-1], SendText):
            joined.discard(on)
    return steps

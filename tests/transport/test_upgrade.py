"""Upgrade requests as pure functions, against the handshake of wsproto."""

from __future__ import annotations

import gc

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.events import AcceptConnection, Request
from wsproto.handshake import H11Handshake
from wsproto.utilities import RemoteProtocolError

from gateway.transport.upgrade import (
    HandshakeFailed,
    OtherVersion,
    TooMany,
    UpgradeRequest,
    accepting,
    parse_request,
    refusing,
)

REQUIRED = [
    (b"Host", b"gateway.test"),
    (b"Upgrade", b"websocket"),
    (b"Connection", b"keep-alive, Upgrade"),
    (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    (b"Sec-WebSocket-Version", b"13"),
]

Headers = list[tuple[bytes, bytes]]


def head_of(headers: Headers, *, target: bytes = b"/ws", method: bytes = b"GET") -> bytes:
    lines = b"".join(name + b":" + value + b"\r\n" for name, value in headers)
    return method + b" " + target + b" HTTP/1.1\r\n" + lines + b"\r\n"


def mangled(word: bytes) -> st.SearchStrategy[bytes]:
    """The same in another case."""
    cases = st.lists(st.booleans(), min_size=len(word), max_size=len(word))
    return cases.map(lambda up: bytes(b ^ 0x20 if u and chr(b).isalpha() else b for b, u in zip(word, up, strict=True)))


odd_values = st.sampled_from(
    [b"", b"upgrade", b"Upgrade,", b",,upgrade ,x", b"upgraded", b"close", b"websocket", b"h2c", b"8", b"13", b"013"]
)


rarely = st.integers(0, 19).map(lambda n: n == 7)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Mostly good ones: each header there in some case and order, one in a while missing or with another value."""
    headers: Headers = []
    for name, value in REQUIRED:
        if draw(rarely):
            continue
        if draw(rarely):
            value = draw(odd_values)
        elif name != b"Sec-WebSocket-Key":
            value = draw(mangled(value))
        headers.append((draw(mangled(name)), draw(st.sampled_from([b"", b" ", b" \t"])) + value))
    offered = draw(st.lists(st.sampled_from([b"trio-gateway", b"bearer.a.b-c", b"x"]), max_size=3, unique=True))
    if offered:
        headers.append((draw(mangled(b"Sec-WebSocket-Protocol")), draw(st.sampled_from([b",", b" , "])).join(offered)))
    headers += draw(
        st.lists(st.just((b"Origin", b"https://a.test")) | st.just((b"X-Other", b"1")), max_size=2, unique=True)
    )
    target = draw(st.sampled_from([b"/ws", b"/", b"/ws?token=a%20b&c", b"*", b"http://a/ws", b"/a?b?c"]))
    return head_of(draw(st.permutations(headers)), target=target, method=b"POST" if draw(rarely) else b"GET")


def the_library_s(head: bytes) -> tuple[H11Handshake, Request] | RemoteProtocolError:
    handshake = H11Handshake(ConnectionType.SERVER)
    try:
        handshake.receive_data(head)
    except RemoteProtocolError as exc:
        return exc
    (request,) = handshake.events()
    assert isinstance(request, Request)
    return handshake, request


def of_ours(head: bytes) -> UpgradeRequest | HandshakeFailed:
    try:
        return parse_request(head)
    except HandshakeFailed as exc:
        return exc


def lines_of(answer: bytes) -> tuple[bytes, set[bytes]]:
    first, *rest = answer.removesuffix(b"\r\n\r\n").split(b"\r\n")
    return first.lower().strip(), {line.lower() for line in rest}


@given(heads())
@example(head_of(REQUIRED))
@example(head_of([*REQUIRED[:4], (b"Sec-WebSocket-Version", b"8")]))
@example(head_of(REQUIRED[:4]))
@example(head_of(REQUIRED, method=b"POST"))
@example(head_of([*REQUIRED[:3], (b"Sec-WebSocket-Key", b"a, b"), REQUIRED[4]]))
def test_the_same_requests_are_taken_and_answered_alike(head: bytes) -> None:
    theirs, ours = the_library_s(head), of_ours(head)
    if isinstance(theirs, RemoteProtocolError):
        assert isinstance(ours, HandshakeFailed)
        if isinstance(ours, OtherVersion):
            assert theirs.event_hint is not None
            assert theirs.event_hint.status_code == 426
        return
    if isinstance(ours, HandshakeFailed):
        lines = [line.partition(b":") for line in head.split(b"\r\n")]
        (key,) = [value.strip() for name, _, value in lines if name.lower() == b"sec-websocket-key"]
        assert not key or b"," in key, "it has one key, and wsproto takes it"
        return
    handshake, request = theirs
    assert ours.target == request.target
    assert (ours.path, ours.query) == (request.target.partition("?")[0], request.target.partition("?")[2])
    assert ours.header(b"host") == request.host
    offered = [part for part in ours.subprotocols if part]
    assert offered == list(request.subprotocols)
    chosen = offered[-1] if offered else None
    assert lines_of(accepting(ours, chosen)) == lines_of(handshake.send(AcceptConnection(subprotocol=chosen)))


def test_a_header_that_comes_twice() -> None:
    """A list goes on; anything else is not what was asked for, whichever of the two would have been."""
    twice = [(b"Sec-WebSocket-Protocol", b"a"), (b"sec-websocket-protocol", b"b, c")]
    assert parse_request(head_of([*REQUIRED, *twice])).subprotocols == ["a", "b", "c"]
    origins = [(b"Origin", b"https://good.test"), (b"origin", b"https://bad.test")]
    assert parse_request(head_of([*REQUIRED, *origins])).header(b"origin") == "https://good.test,https://bad.test"
    with pytest.raises(HandshakeFailed, match="Upgrade header"):
        parse_request(head_of([*REQUIRED, (b"Upgrade", b"h2c")]))


@pytest.mark.parametrize(
    "body", [(b"Content-Length", b"5"), (b"content-length", b"50"), (b"Transfer-Encoding", b"chunked")]
)
def test_a_body_is_not_taken_for_frames(body: tuple[bytes, bytes]) -> None:
    with pytest.raises(HandshakeFailed, match="no body"):
        parse_request(head_of([*REQUIRED, body]))
    assert parse_request(head_of([*REQUIRED, (b"Content-Length", b"0")])).path == "/ws"


@given(st.binary(max_size=80).map(lambda tail: b"GET /" + tail + b"\r\n\r\n") | st.binary(max_size=80))
@example(b"GET ")
def test_any_bytes_are_a_request_or_are_refused(head: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        parse_request(head)


def test_a_malformed_request_leaves_memory_without_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(HandshakeFailed, match="not HTTP"):
            parse_request(head_of([*REQUIRED, (b"X ", b"a space before the colon")]))
        assert not any(isinstance(one, h11.Connection) for one in gc.get_objects())
    finally:
        gc.enable()


def test_another_version_is_told_ours() -> None:
    with pytest.raises(OtherVersion) as caught:
        parse_request(head_of([*REQUIRED[:4], (b"Sec-WebSocket-Version", b"8")]))
    first, lines = lines_of(refusing(caught.value))
    assert first == b"http/1.1 426 upgrade required"
    assert {b"sec-websocket-version: 13", b"upgrade: websocket", b"connection: upgrade, close"} <= lines


def test_who_is_one_too_many_is_told_when_to_come_back() -> None:
    first, lines = lines_of(refusing(TooMany("later")).partition(b"later")[0])
    assert first == b"http/1.1 503 service unavailable"
    assert b"retry-after: 1" in lines

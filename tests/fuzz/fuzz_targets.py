"""What the fuzzers feed: functions of bytes that return when everything is as it must be, and raise otherwise.

Errors of the declared types are as it must be. Beside that no other may escape, each target asks for more: what was
read can be written and read again, and the frame splitter finds in any bytes what a strict reader finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from wsproto import ConnectionType
from wsproto.events import Request
from wsproto.handshake import H11Handshake

from gateway.errors import ConnectionLost, FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.protocol.praison import Praison
from gateway.testing.vectors import load
from gateway.testing.wire import Closed, MessageReader, Received, fragments, frame
from gateway.transport.upgrade import HandshakeFailed, UpgradeRequest, accepting, parse_request
from gateway.transport.websocket import ServerWebSocket

Target = Callable[[bytes], None]


def client(data: bytes) -> None:
    """What a joined client sends."""
    for read in codec.iter_client(data):
        if isinstance(read, FrameError):
            assert read.code in ("invalid_json", "invalid_frame", "unknown_type")
            assert read.message
        else:
            assert list(codec.iter_client(codec.encode_frame(read))) == [read]


def hello(data: bytes) -> None:
    """What a client sends first."""
    try:
        read = handshake.read_hello(data)
    except HandshakeRefused as refused:
        codec.encode_frame(handshake.hello_error(refused))
        return
    assert handshake.read_hello(codec.encode_frame(read)) == read


def server(data: bytes) -> None:
    """What a gateway sends to our client."""
    try:
        frames = codec.decode_server(data)
    except FrameError:
        return
    for read in frames:
        encoded = codec.encode_event(read, read.first) if isinstance(read, m.Event) else codec.encode_frame(read)
        assert codec.decode_server(encoded) == [read]


def event(data: bytes) -> None:
    """What a store gives back."""
    try:
        read = codec.decode_event(data)
    except FrameError:
        return
    assert codec.decode_event(codec.encode_event(read, read.first)) == read


def praison(data: bytes) -> None:
    """What a client of dialect 1 sends, first and later."""
    for joins in (False, True):
        dialect = Praison(joins=joins)
        try:
            opening = dialect.read_hello(data)
        except HandshakeRefused as refused:
            dialect.encode(handshake.hello_error(refused))
        except FrameError:
            pass
        else:
            assert handshake.negotiate(opening) == 1 or not joins
        for read in dialect.decode(data):
            if isinstance(read, FrameError):
                assert read.code in ("invalid_json", "invalid_frame", "unknown_type", "already_joined")
            else:
                assert list(codec.iter_client(codec.encode_frame(read))) == [read]


def upgrade(data: bytes) -> None:
    """What comes before the first frame. What is taken here, wsproto takes as well."""
    try:
        read = parse_request(data)
    except HandshakeFailed:
        return
    said = [read.target.encode("ascii"), *read.headers.values(), read.path.encode(), read.query.encode()]
    assert not any(b"\r" in value or b"\n" in value for value in said)
    assert accepting(read, None).count(b"\r\n\r\n") == 1
    library = H11Handshake(ConnectionType.SERVER)
    # Of a header that comes twice wsproto sees the last; here the values were joined, as RFC 9110 section 5.2 has it.
    lines = [name + b": " + value for name, value in read.headers.items()]
    with suppress(UnicodeError):  # it minds a Host that is no valid international name
        library.receive_data(b"\r\n".join([b"GET %b HTTP/1.1" % read.target.encode(), *lines, b"", b""]))
        (request,) = library.events()
        assert isinstance(request, Request)
        assert request.target == read.target


# --- the frame splitter ---

MAX_INPUT = 4096
"""Below the limits on messages and on empty fragments, which the strict reader does not have."""


_NO_TASKS: Any = None
"""The nursery, for which nothing is started: nobody writes."""


class _Chunks:
    """A stream that has everything already, in pieces."""

    peer = "fuzz"

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return self._chunks.pop(0) if self._chunks else b""

    def send_nowait(self, data: bytes) -> int:
        return len(data)


def _finish(coroutine: Any) -> Any:
    """Run a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the splitter waits although its input is there")


def split(data: bytes) -> tuple[list[bytes], int | None, bool]:
    """The messages that the transport finds in a client's bytes, the close code, and whether that is ours.

    The first byte says how the rest comes in: all at once, or in pieces of so many bytes.
    """
    size = (data[0] if data else 0) or MAX_INPUT
    rest = data[1:MAX_INPUT]
    ws = ServerWebSocket(
        _Chunks([rest[at : at + size] for at in range(0, len(rest), size)]),  # type: ignore[arg-type]
        _NO_TASKS,
        UpgradeRequest("/ws", {}),
        bytearray(),
        connected_at=trio.current_time(),
        max_message_bytes=2 * MAX_INPUT,
        max_queued_frames=8,
    )
    messages: list[bytes] = []
    try:
        while True:
            messages += _finish(ws.get_many())
    except ConnectionLost:
        return messages, ws.close_code, ws.closed_by_us


def splitter(data: bytes) -> None:
    """A client's bytes, held against a reader that takes nothing for granted. Needs a trio loop around it."""
    messages, code, by_us = split(data)
    reader = MessageReader(masked=True)
    expected: list[bytes] = []
    closed: int | None = None
    for item in reader.feed(data[1:MAX_INPUT]):
        if isinstance(item, Closed):
            closed = item.code
        elif isinstance(item, Received):
            if item.binary:
                break
            expected.append(item.payload)
    refused = code if by_us else None
    # Refused before the message is whole: what is binary or too long at the header, bad UTF-8 at the first fragment.
    early = refused in (1003, 1007, 1009)
    assert messages == expected[: len(messages)]
    assert early or len(messages) == len(expected)
    if not early:
        violation = reader.violation.code if reader.violation else None
        assert refused == violation, f"refused with {refused}, a strict reader says {reader.violation}"
        assert by_us or code == (closed or 1006)
    if refused in (1007, 1009):
        assert reader.violation is not None or reader.mid_message or reader.mid_frame


TARGETS: dict[str, Target] = {
    "client": client, "hello": hello, "server": server, "event": event, "praison": praison,
    "upgrade": upgrade, "splitter": splitter
}  # fmt: skip


async def in_trio(run: Callable[[], None]) -> None:
    """The splitter asks trio for the time and for parking lots, and never waits."""
    await trio.lowlevel.checkpoint()
    run()


# --- what to begin with ---


def seeds(target: str) -> list[bytes]:
    """Inputs that mean something: every frame of the conformance vectors, and frames of every kind on the wire."""

    def plain(value: Any) -> Any:
        """A pattern as a value."""
        if isinstance(value, dict):
            if "$is" in value:
                return {"integer": 1, "boolean": True, "object": {}, "array": []}.get(value["$is"], "x")
            if "$contains" in value:
                return plain(value["$contains"])
            return 1 if "$add" in value else "xx" if "$repeat" in value else {k: plain(v) for k, v in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    sent: dict[str, None] = {}
    expected: dict[str, None] = {}
    for vector in load():
        if (target == "praison") is (vector.protocol == 2):
            continue
        for step in vector.steps:
            if "send" in step:
                sent[json.dumps(plain(step["send"]))] = None
            for pattern in [step[key] for key in ("expect",) if key in step] + list(step.get("expect_all", ())):
                expected[json.dumps({"seq": 2, "first": 1, "at": 0, **plain(pattern)})] = None
    if target == "splitter":
        texts = [text.encode()[:200] for text in list(sent)[:40]]
        whole = b"".join(frame(1, text) for text in texts[:4])
        odd = [
            whole,
            fragments("äöü in pieces".encode(), [1, 4], [frame(9, b"p")]),
            frame(1, "ä".encode()[:1]),
            frame(2, b"binary"),
            frame(8, b"\x03\xe8bye"),
            frame(8),
            frame(10, b"pong") + frame(1, b"{}"),
            frame(1, b"x" * 126),
            frame(1, b"short", length_bytes=8),
            frame(0, b"alone"),
            frame(1, b"a", final=False) + frame(1, b"b"),
            frame(1, b"", final=False) + frame(0, b"", final=False) + frame(0, b"end"),
            frame(9, b"x" * 126),
            frame(3, b"reserved"),
            frame(1, b"x", bits=0x40),
            frame(1, b"x", masked=False),
        ]
        return [bytes((size,)) + item for item in odd for size in (0, 1, 7)] + [
            b"\0" + frame(1, text) for text in texts
        ]
    if target == "upgrade":
        lines = [b"Host: a", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"]
        lines += [b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        more = [b"Origin: https://a", b"Sec-WebSocket-Protocol: trio-gateway, bearer.x", b"Authorization: Bearer x"]
        return [
            b"\r\n".join([first, *lines, *extra, b"", b""])
            for first in (b"GET /ws HTTP/1.1", b"GET /ws?token=a HTTP/1.1")
            for extra in ([], more[:1], more)
        ]
    chosen = expected if target in ("server", "event") else sent
    return [text.encode() for text in chosen]

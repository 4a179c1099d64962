"""The upgrade request and its answer (RFC 6455 section 4.2). h11 parses HTTP; what WebSocket asks is checked here.

trio-websocket would do both, with a task, channels and events of its own for each connection, of which nothing is
needed afterwards (see `docs/explanation/decisions.md`).
"""

from __future__ import annotations

import re
from base64 import b64encode
from contextlib import suppress
from hashlib import sha1

import h11
import trio
from attrs import frozen

from gateway.errors import TransportError
from gateway.transport.streams import ByteStream

MAX_HEAD = 16 * 1024
"""Bytes of an upgrade request: what common HTTP servers take (8 to 16 KiB) at its upper end."""

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3

_ANSWER = b"HTTP/1.1 %b\r\nConnection: %b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%b"


class HandshakeFailed(TransportError):
    """The upgrade request was refused or never completed; the peer got an HTTP answer where one was possible."""

    status = b"400 Bad Request"
    connection = b"close"
    """The answer's ``Connection`` header, and any that follow it."""


class NoRequest(HandshakeFailed):
    """It did not come in time."""

    status = b"408 Request Timeout"


class OtherVersion(HandshakeFailed):
    """It is of another version of the protocol."""

    status = b"426 Upgrade Required"
    connection = b"Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"


class Stopping(HandshakeFailed):
    """The gateway is about to stop."""

    status = b"503 Service Unavailable"


class TooMany(HandshakeFailed):
    """No room for it now."""

    status = b"503 Service Unavailable"
    connection = b"close\r\nRetry-After: 1"


class NoWebSocketHere(HandshakeFailed):
    """The request names another path."""

    status = b"404 Not Found"


@frozen
class UpgradeRequest:
    """What a client asked for. `headers` by lower-case name; of a repeated one the values, joined by commas."""

    target: str
    headers: dict[bytes, bytes]

    @property
    def path(self) -> str:
        """The requested path without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The query, without the question mark."""
        return self.target.partition("?")[2]

    @property
    def subprotocols(self) -> list[str]:
        """What the client offers in ``Sec-WebSocket-Protocol``."""
        return self.tokens(b"sec-websocket-protocol")

    def header(self, name: bytes) -> str | None:
        """A header by its lower-case name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("ascii")

    def tokens(self, name: bytes) -> list[str]:
        """The parts of a header that is a list."""
        return [part.strip() for part in (self.header(name) or "").split(",")]


def parse_request(head: bytes) -> UpgradeRequest:
    """Read a head, from its first byte to its empty line.

    Raises:
        HandshakeFailed: it is no request for a WebSocket.
    """
    if not head.isascii() or _CONTROL.search(head):
        raise HandshakeFailed("the request's head must be printable ASCII")
    if not head.startswith(b"GET "):
        raise HandshakeFailed("expected a GET request with Upgrade: websocket")
    if not head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n"):
        # h11 would take a line feed alone, and see another end of the head than we do. After a carriage return alone it
        # looks for the end of the header in every possible way: for half a second, in a head of 16 KiB.
        raise HandshakeFailed("the request's lines must end with CR LF")
    parser = h11.Connection(h11.SERVER)
    try:
        parser.receive_data(head)
        event = parser.next_event()
    except h11.RemoteProtocolError as exc:
        exc.__traceback__ = None  # a circle through h11's frames would keep the head until the collector comes
        # What it says quotes the line, and a token may be in it.
        raise HandshakeFailed("malformed request: a line of it is not HTTP") from None
    if not isinstance(event, h11.Request):
        raise HandshakeFailed("malformed request: it has no end")
    headers: dict[bytes, bytes] = {}
    for name, value in event.headers:
        headers[name] = headers[name] + b"," + value if name in headers else value
    request = UpgradeRequest(event.target.decode("ascii"), headers)
    _check(event.http_version, request)
    return request


def _check(http_version: bytes, request: UpgradeRequest) -> None:
    """What RFC 6455 section 4.2.1 asks of a request, beside its Host, for which h11 has looked."""
    wanted = "expected a WebSocket upgrade request (RFC 6455 section 4.2.1)"
    headers = request.headers
    if http_version < b"1.1":
        raise HandshakeFailed(f"{wanted}: it must be of HTTP/1.1")
    if b"transfer-encoding" in headers or headers.get(b"content-length", b"").strip(b"0"):
        raise HandshakeFailed(f"{wanted}: it must have no body")  # which would be taken for frames
    if headers.get(b"upgrade", b"").lower() != b"websocket":
        raise HandshakeFailed(f"{wanted}: its Upgrade header must be 'websocket'")
    if "upgrade" not in (token.lower() for token in request.tokens(b"connection")):
        raise HandshakeFailed(f"{wanted}: its Connection header must have 'Upgrade'")
    if b"," in (key := headers.get(b"sec-websocket-key", b"")) or not key:
        raise HandshakeFailed(f"{wanted}: it must have one Sec-WebSocket-Key")
    if not headers.get(b"sec-websocket-version"):
        raise HandshakeFailed(f"{wanted}: it must have a Sec-WebSocket-Version")
    if headers[b"sec-websocket-version"] != b"13":
        raise OtherVersion("this gateway speaks version 13 of the WebSocket protocol")


def accepting(request: UpgradeRequest, subprotocol: str | None) -> bytes:
    """The answer that opens the connection (RFC 6455 section 4.2.2)."""
    proof = b64encode(sha1(request.headers[b"sec-websocket-key"] + _GUID, usedforsecurity=False).digest())
    chosen = b"" if subprotocol is None else b"Sec-WebSocket-Protocol: %b\r\n" % subprotocol.encode("ascii")
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n%b\r\n" % (proof, chosen)
    )


def refusing(failed: HandshakeFailed) -> bytes:
    """The answer that says why not."""
    body = f"{failed}\n".encode()
    return _ANSWER % (failed.status, failed.connection, len(body), body)


class Upgrade:
    """An upgrade request being read.

    Args:
        deadline: until when (trio time) it must have come.

    Attributes:
        rest: what came behind it.
    """

    def __init__(self, stream: ByteStream, deadline: float) -> None:
        self._stream = stream
        self._scope = trio.CancelScope(deadline=deadline)
        self._refused: HandshakeFailed | None = None
        self.rest = bytearray()

    async def read(self) -> UpgradeRequest:
        """Wait for the request.

        Raises:
            HandshakeFailed: none came, or it is refused.
        """
        with self._scope:
            return parse_request(await self._receive_head())
        raise self._refused or NoRequest("no upgrade request within the time limit")

    def stop(self, why: HandshakeFailed) -> None:
        """Have `read` raise this. Nothing happens when the request was read."""
        self._refused = why
        self._scope.cancel()

    def refuse(self, failed: HandshakeFailed) -> None:
        """Say it in HTTP, as far as one non-blocking write goes."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._stream.send_nowait(refusing(failed))

    async def _receive_head(self) -> bytes:
        buffer = self.rest
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > MAX_HEAD:
                raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
            try:
                data = await self._stream.receive_some(4096)
            except trio.BrokenResourceError as exc:
                raise HandshakeFailed(f"the line was lost during the upgrade request: {exc}") from None
            if not data:
                raise HandshakeFailed("the peer closed during the upgrade request")
            buffer += data
        head = bytes(buffer[: end + 4])
        if len(head) > MAX_HEAD:
            raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
        del buffer[: end + 4]
        return head

"""The upgrade request: all that trio-websocket is used for on the server's side.

The library reads the request and writes the answer, over a stream of ours that shows it nothing else. When it has
answered, its reading ends and it leaves memory: what follows on the line is `websocket`'s.

What it would do wrong is kept from it: heads that are not ASCII or have control characters, and line ends that its
parser takes for others than we do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress

import trio
import trio_websocket

from gateway.errors import TransportError
from gateway.transport.streams import ByteStream

MAX_HEAD = 16 * 1024
"""Bytes of an upgrade request: what common HTTP servers take (8 to 16 KiB) at its upper end."""

_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class HandshakeFailed(TransportError):
    """The upgrade request was refused or never completed; the peer got an HTTP answer where one was possible."""

    status = b"400 Bad Request"


class NoRequest(HandshakeFailed):
    """It did not come in time."""

    status = b"408 Request Timeout"


class Stopping(HandshakeFailed):
    """The gateway is about to stop."""

    status = b"503 Service Unavailable"


class Upgrade(trio.abc.HalfCloseableStream):
    """An upgrade request being read and answered.

    Args:
        write: takes the library's bytes; never waits.
        deadline: until when (trio time) the request must have come.

    Attributes:
        request: what was asked for, once `read` has returned.
        host: its ``Host`` header.
        rest: what came behind it.
        answered: whether anything was written.
    """

    def __init__(self, stream: ByteStream, write: Callable[[bytes], None], deadline: float) -> None:
        self._stream = stream
        self._write = write
        self._scope = trio.CancelScope(deadline=deadline)
        self._refused: HandshakeFailed = NoRequest("no upgrade request within the time limit")
        self._head_seen = False
        self._over = trio.Event()
        self.request: trio_websocket.WebSocketRequest | None = None
        self.host: str | None = None  # the library keeps this header to itself
        self.rest = bytearray()
        self.answered = False

    async def read(self, nursery: trio.Nursery) -> None:
        """Read the request. The library's task in `nursery` ends with `accept` or `reject`.

        Raises:
            HandshakeFailed: also out of the nursery.
        """
        # When the library refuses a request it closes the stream but does not say so to `wrap_server_stream`, which
        # would wait for ever: `aclose` cancels this scope.
        with self._scope:
            self.request = await trio_websocket.wrap_server_stream(
                nursery, self, message_queue_size=1, receive_buffer_size=None
            )
        if self.request is None:
            raise self._refused

    def stop(self, why: HandshakeFailed) -> None:
        """Have `read` raise this. Nothing happens when the request was read."""
        self._refused = why
        self._scope.cancel()

    async def accept(self, subprotocol: str | None) -> None:
        """Answer 101."""
        assert self.request is not None
        await self.request.accept(subprotocol=subprotocol)
        self._over.set()

    async def reject(self, status: int, body: bytes) -> None:
        """Answer with an HTTP error."""
        assert self.request is not None
        headers = [(b"Content-Type", b"text/plain; charset=utf-8"), (b"Connection", b"close")]
        await self.request.reject(status, extra_headers=headers, body=body)
        self._over.set()

    # what the library sees

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The request; then, as soon as it is answered, the line is broken as far as the library knows."""
        if not self._head_seen:
            self._head_seen = True
            return await self._receive_head()
        await self._over.wait()
        raise trio.BrokenResourceError("the rest is not for the library")

    async def _receive_head(self) -> bytes:
        buffer = self.rest
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > MAX_HEAD:
                raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
            try:
                data = await self._stream.receive_some(4096)
            except trio.BrokenResourceError as exc:
                # Not as it is: the library would swallow it and wait on.
                raise HandshakeFailed(f"the line was lost during the upgrade request: {exc}") from None
            if not data:
                raise HandshakeFailed("the peer closed during the upgrade request")
            buffer += data
        head = bytes(buffer[: end + 4])
        if len(head) > MAX_HEAD:
            raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
        if not head.isascii() or _CONTROL.search(head):
            raise HandshakeFailed("the request's head must be printable ASCII")
        if not head.startswith(b"GET "):
            raise HandshakeFailed("expected a GET request with Upgrade: websocket")
        if head.count(b"\n") != head.count(b"\r\n"):
            # The library's parser would take them, and see another Host than we do.
            raise HandshakeFailed("the request's lines must end with CR LF")
        del buffer[: end + 4]
        found = _HOST.search(head)
        self.host = found[1].decode("ascii") if found else None
        return head

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self._over.is_set():
            self.answered = True
            self._write(bytes(data))
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self.request is None:
            self.stop(HandshakeFailed("expected a WebSocket upgrade request (RFC 6455 section 4.2.1)"))
        await trio.lowlevel.checkpoint()


_ANSWER = b"HTTP/1.1 %b\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"


def failure_in(group: ExceptionGroup[Exception]) -> HandshakeFailed:
    """Why the request failed. Whatever went wrong while it was read is its fault: the library raises on some heads."""
    failed = next((exc for exc in _leaves(group) if isinstance(exc, HandshakeFailed)), None)
    return failed or HandshakeFailed("malformed request")


def answer_in_http(stream: ByteStream, failed: HandshakeFailed) -> None:
    """Say it in HTTP, as far as one non-blocking write goes."""
    body = f"{failed}\n".encode()
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        stream.send_nowait(_ANSWER % (failed.status, len(body), body))


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for exc in group.exceptions:
        if isinstance(exc, ExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
